"""Checkpoints into VOLO: tensors only, and every tensor accounted for."""

import argparse
import hashlib
import re
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model.weight_init import PretrainedInit
from timm.models import adapt_input_conv, get_pretrained_cfg, list_pretrained
from torch import Tensor, nn

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
        if named and len(init_cfg) > 1:  # mmengine's own loader would run whatever code the file asks it to
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
    state = _backbone_tensors(read_checkpoint(source), source)
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
    print_log(
        f'VOLO {model.arch}: {len(state)} of {len(own)} tensors loaded from {source}'
        + ''.join(f'; {c}' for c in changes),
        logger='current',
    )


def load_segmentor(model: nn.Module, source: str) -> dict:
    """Load a whole segmentor's checkpoint strictly and return its ``meta`` (classes, palette, config).

    Raises:
        UserError: unreadable, unsafe, or any tensor missing, unexpected or of another shape.
    """
    contents = read_checkpoint(source)
    state = _tensors(contents['state_dict'] if isinstance(contents.get('state_dict'), Mapping) else contents)
    own = model.state_dict()
    problems = _differences(own, state)
    if problems:
        raise UserError(f'{source} does not fit the model of this config: ' + '; '.join(problems))
    model.load_state_dict(state)
    return contents.get('meta', {})


def read_checkpoint(source: str) -> dict:
    """Contents of a checkpoint, read without running any code in it.

    Args:
        source: path to ``.safetensors`` or to anything ``torch.save`` wrote, http(s) URL, or ``timm://name``.

    Raises:
        UserError: missing, truncated, unreachable, or holding more than tensors and plain data.
    """
    path = Path(local_copy(str(source))).expanduser()
    if not path.is_file():
        raise UserError(f'checkpoint not found: {source}; docs/weights.md lists where weights come from')
    name = f'{source}, kept as {path},' if '://' in str(source) else source
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(path)
        with path.open('rb') as file:
            start = file.read(16)
        if not start.startswith((b'PK', b'\x80')):  # neither a zip archive nor a pickle
            raise ValueError(f'it starts with {start!r}')
        known = torch.serialization.get_safe_globals()  # leaving the context takes out what went in
        with torch.serialization.safe_globals([item for item in _plain_data() if item not in known]):
            contents = torch.load(path, map_location='cpu', weights_only=True)
    except UnpicklingError as error:
        if 'weights_only' not in str(error).lower() and 'Unsupported' not in str(error):
            raise UserError(f'{name} is not a checkpoint or is damaged ({_first_sentence(error)})') from None
        blamed = re.search(r'(?:GLOBAL|class) ([\w.]+)', str(error))
        raise UserError(
            f'{name} is refused: it {f"asks to run {blamed[1]}" if blamed else "holds more than tensors"}, '
            'and only tensors are read; ask its author for a .safetensors file'
        ) from None
    except Exception as error:  # torch and safetensors raise a dozen kinds for a damaged file
        raise UserError(f'{name} is not a checkpoint or is damaged ({_first_sentence(error)})') from None
    if not isinstance(contents, Mapping):
        raise UserError(f'{source} holds a {type(contents).__name__}, not a state dict')
    return dict(contents)


def _plain_data() -> list:
    """Types beside tensors that checkpoints of mmengine and timm hold; none of them can run code."""

    def history_buffer_method(owner, name):
        if (owner is HistoryBuffer or isinstance(owner, HistoryBuffer)) and not name.startswith('_'):
            return getattr(owner, name)
        raise UnpicklingError(f'Unsupported getattr({owner!r}, {name!r})')

    multiarray = np._core.multiarray
    dtypes = [type(np.dtype(t)) for t in ('uint8', 'uint32', 'int64', 'float32', 'float64', 'bool')]
    return [
        (history_buffer_method, 'builtins.getattr'),  # mmengine's message hub pickles its buffers' methods
        HistoryBuffer,
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        *dtypes,
        (multiarray._reconstruct, 'numpy._core.multiarray._reconstruct'),
        (multiarray._reconstruct, 'numpy.core.multiarray._reconstruct'),
        (multiarray.scalar, 'numpy._core.multiarray.scalar'),
        (multiarray.scalar, 'numpy.core.multiarray.scalar'),
    ]


def local_copy(source: str) -> str:
    """Path of ``source`` on this machine, downloaded into torch's or huggingface_hub's cache where needed.

    Raises:
        UserError: ``timm://`` or http(s) that cannot be had; a path is passed on as it is.
    """
    if source.startswith('timm://'):
        return _from_timm(source.removeprefix('timm://'))
    if not source.startswith(('http://', 'https://')):
        return source
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    try:
        # With a hash, because every file on the Hugging Face hub is called model.safetensors.
        path = folder / f'{hashlib.sha256(source.encode()).hexdigest()[:8]}-{Path(urlparse(source).path).name}'
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source, str(path))  # to a temporary name, then renamed
    except (OSError, HTTPException, ValueError) as error:  # ValueError: no URL
        raise UserError(f'cannot download {source} ({error}); fetch it by hand and give its path') from None
    return str(path)


def _from_timm(name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        cfg = get_pretrained_cfg(name) if name.startswith('volo_') else None
    except RuntimeError:  # the model is known, the tag is not
        cfg = None
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(f'timm has no VOLO weights named {name!r}; it has {", ".join(list_pretrained("volo_*"))}')
    repo = cfg.hf_hub_id if not cfg.hf_hub_id.endswith('/') else f'{cfg.hf_hub_id}{cfg.architecture}.{cfg.tag}'
    try:
        return hf_hub_download(repo, 'model.safetensors')
    except Exception as error:  # offline, proxy, hub down: huggingface_hub raises many kinds
        raise UserError(
            f'cannot get timm://{name} from the Hugging Face hub ({_first_sentence(error)}); '
            'without a network, download it elsewhere (docs/weights.md) and give its path'
        ) from None


def _backbone_tensors(contents: Mapping, source: str) -> dict[str, Tensor]:
    """Unwrap the state dict and strip ``module.`` and ``backbone.``."""
    for key in ('state_dict_ema', 'state_dict', 'model'):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
            break
    state = _tensors(contents)
    if any(key.startswith('backbone.') for key in state):
        state = {key.removeprefix('backbone.'): value for key, value in state.items() if key.startswith('backbone.')}
    if not state:
        raise UserError(f'{source} holds no tensors')
    return state


def _tensors(contents: Mapping) -> dict[str, Tensor]:
    return {
        key.removeprefix('module.'): value
        for key, value in contents.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


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
    return [f'{len(keys)} {what} ({_some(keys)})' for what, keys in named if keys]


def _some(keys: list[str], most: int = 5) -> str:
    return ', '.join(keys[:most]) + (f' and {len(keys) - most} more' if len(keys) > most else '')


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


def _first_sentence(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].split('. ')[0]
