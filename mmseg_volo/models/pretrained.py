"""Checkpoints into models: tensors only, and every tensor accounted for."""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.model.weight_init import PretrainedInit
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..checkpoints.reading import backbone_tensors, read_checkpoint, state_tensors
from ..checkpoints.wording import some
from ..errors import UserError

# What an ImageNet classifier has and a backbone has not.
CLASSIFIER = re.compile(r'(head|aux_head|post_network|norm)\..+|cls_token')
STEM = 'patch_embed.conv.0.weight'


def resize_pos_embed(pos_embed: Tensor, size: tuple[int, int]) -> Tensor:
    """Position embedding ``[1, h, w, C]`` resized bicubically to ``size``, as the authors do; dtype kept."""
    exact = pos_embed if pos_embed.dtype == torch.float64 else pos_embed.float()
    resized = F.interpolate(exact.permute(0, 3, 1, 2), size=size, mode='bicubic', align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous().to(pos_embed.dtype)


def pretrained_checkpoint(init_cfg: dict | list[dict] | None) -> str | None:
    """Checkpoint that an ``init_cfg`` of type Pretrained names, else None; raises ``UserError`` on keys it ignores."""
    if isinstance(init_cfg, list):
        named = [cfg for cfg in init_cfg if pretrained_checkpoint(cfg) is not None]
        if named and len(init_cfg) > 1:  # mmengine would load it itself, whether it fits or not
            raise UserError(f'VOLO reads a Pretrained init_cfg alone, got it in a list of {len(init_cfg)}')
        return pretrained_checkpoint(named[0]) if named else None
    kind = init_cfg.get('type') if isinstance(init_cfg, dict) else None
    if kind is not PretrainedInit and str(kind).split('.')[-1] != 'Pretrained':  # 'mmengine.Pretrained' too
        return None
    extra = set(init_cfg) - {'type', 'checkpoint'}
    if extra or 'checkpoint' not in init_cfg:
        raise UserError(f"VOLO reads init_cfg=dict(type='Pretrained', checkpoint=...), got {dict(init_cfg)}")
    return init_cfg['checkpoint']


def load_pretrained(model: nn.Module, source: str, architectures: Mapping[str, Mapping]) -> None:
    """Load ``source`` into a VOLO, and log in one line what was loaded, resized and left out.

    Args:
        model: a VOLO; its tensors are untouched unless all of the checkpoint fits.
        source: path, URL or ``timm://name``; see ``docs/weights.md`` for the forms.
        architectures: rows of numbers by name, to say whose weights these are when they do not fit.

    Raises:
        UserError: unreadable, unsafe, or not these weights: any tensor missing, unexpected or of another shape.
    """
    state = backbone_tensors(read_checkpoint(source), source)
    own = model.state_dict()
    dropped = [key for key in state if CLASSIFIER.fullmatch(key)]
    state = {key: tensor for key, tensor in state.items() if key not in dropped}
    whose = _whose(state, model.arch, architectures)
    unbuilt = {key for key in state if _is_beyond(key, model.out_indices[-1])}
    state = {key: tensor for key, tensor in state.items() if key not in unbuilt}

    changes = []
    if 'pos_embed' in own and 'pos_embed' in state and state['pos_embed'].dim() == 4 and state['pos_embed'].numel():
        old, new = state['pos_embed'].shape[1:3], own['pos_embed'].shape[1:3]
        if old != new:
            state['pos_embed'] = resize_pos_embed(state['pos_embed'], tuple(new))
            changes.append(f'pos_embed resized from {old[0]}x{old[1]} to {new[0]}x{new[1]}')
    if STEM in state and state[STEM].dim() == 4 and state[STEM].shape[1] == 3 != own[STEM].shape[1]:
        state[STEM] = adapt_input_conv(own[STEM].shape[1], state[STEM])
        changes.append(f'stem adapted from 3 to {own[STEM].shape[1]} channels')

    norms = {key for key in own if re.fullmatch(r'norm\d\..+', key)}
    new = norms if norms.isdisjoint(state) else set()  # ImageNet classifiers have no output norms
    problems = _differences(own, state, allowed_missing=new)
    if problems:
        raise UserError(f'{source} does not fit VOLO arch={model.arch!r}{whose}: ' + '; '.join(problems))

    model.load_state_dict(state, strict=False)
    if dropped or unbuilt:
        changes.append(f'{len(dropped) + len(unbuilt)} tensors of the classifier or of unused stages left out')
    if new:
        changes.append(f'{len(new)} tensors of the output norms are new')
    MMLogger.get_current_instance().info(
        f'VOLO {model.arch}: {len(state)} of {len(own)} tensors loaded from {source}'
        + ''.join(f'; {c}' for c in changes)
    )


def load_segmentor(model: nn.Module, source: str) -> dict:
    """Load a whole segmentor's checkpoint strictly and return its ``meta`` (classes, palette, config).

    Raises:
        UserError: unreadable, unsafe, or any tensor missing, unexpected or of another shape.
    """
    contents = read_checkpoint(source)
    state = state_tensors(contents['state_dict'] if isinstance(contents.get('state_dict'), Mapping) else contents)
    own = model.state_dict()
    problems = _differences(own, state)
    if problems:
        raise UserError(f'{source} does not fit the model of this config: ' + '; '.join(problems))
    model.load_state_dict(state)
    return contents.get('meta', {})


def _is_beyond(key: str, last_stage: int) -> bool:
    """Whether a tensor belongs to a stage after ``last_stage``, which the model does not build."""
    if last_stage == 0 and key == 'pos_embed':
        return True
    stage = re.match(r'network\.(\d+)\.', key)
    return bool(stage) and (last_stage + 1 if last_stage else 0) < int(stage[1]) <= 4  # 4 is the last of any VOLO


def _differences(own: Mapping, state: Mapping, allowed_missing: frozenset[str] | set[str] = frozenset()) -> list[str]:
    missing = [key for key in own if key not in state and key not in allowed_missing]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f'{key} is {list(state[key].shape)} instead of {list(own[key].shape)}'
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    named = [('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)]
    return [f'{len(keys)} {what} ({some(keys)})' for what, keys in named if keys]


def _whose(state: Mapping[str, Tensor], arch: str, architectures: Mapping[str, Mapping]) -> str:
    """Sentence part that says which architecture a state dict is of, if it is one of ours and another than ``arch``."""
    blocks = {re.match(r'network\.(\d+\.\d+)\.', key)[1] for key in state if re.match(r'network\.\d+\.\d+\.', key)}
    layers = tuple(sum(block.startswith(f'{stage}.') for block in blocks) for stage in (0, 2, 3, 4))
    stem = state.get('patch_embed.proj.weight')
    for name, row in architectures.items():
        if stem is not None and name != arch and layers == row['layers']:
            if tuple(stem.shape[:2]) == (row['embed_dims'][0], row['stem_channels']):
                return f', it is VOLO arch={name!r}'
    return ''
