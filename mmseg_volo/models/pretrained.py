"""Load checkpoints into models, strictly: no tensor may be missing, unexpected or of another shape."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmengine.logging import MMLogger
from mmengine.model.weight_init import PretrainedInit
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..checkpoints.reading import read_checkpoint
from ..checkpoints.state_dict import backbone_tensors, not_finite, state_tensors
from ..checkpoints.wording import some
from ..errors import UserError


def grid_of_map(tensor: Tensor) -> tuple[int, int] | None:
    """Grid of a map ``[1, h, w, C]``."""
    return (tensor.shape[1], tensor.shape[2]) if tensor.dim() == 4 and tensor.numel() else None


@dataclass(frozen=True)
class PretrainedFormat:
    """How the ImageNet checkpoints of one architecture differ from its backbone.

    Args:
        name: the architecture in messages.
        classifier: names of the tensors that only a classifier has.
        stem: name of the first convolution's weight, which is adapted to the number of image channels.
        new: names of the tensors that a classifier lacks, all of which may be missing together.
        unbuilt: whether the tensor of a name belongs to a stage after the given one, the last that is built.
        recognise: name of the variant whose tensors a state dict contains, or None.
        resize: functions by the last part of the name of a tensor that depends on the grid of tokens, from the tensor
            and ``(h, w)`` to the backbone's tensor for this grid.
        grid: grid ``(h, w)`` of a tensor that ``resize`` names, or None if it has another form.
    """

    name: str
    classifier: re.Pattern
    stem: str
    new: re.Pattern
    unbuilt: Callable[[str, int], bool]
    recognise: Callable[[Mapping[str, Tensor]], str | None]
    resize: Mapping[str, Callable[[Tensor, tuple[int, int]], Tensor]] = field(default_factory=dict)
    grid: Callable[[Tensor], tuple[int, int] | None] = grid_of_map


def pretrained_checkpoint(init_cfg: dict | list[dict] | None) -> str | None:
    """Return the checkpoint of an ``init_cfg`` of type Pretrained, else None; raises ``UserError`` for other keys."""
    if isinstance(init_cfg, list):
        named = [cfg for cfg in init_cfg if pretrained_checkpoint(cfg) is not None]
        if named and len(init_cfg) > 1:  # mmengine would load it, even if tensors are missing
            raise UserError(f'a Pretrained init_cfg must stand alone, got it in a list of {len(init_cfg)}')
        return pretrained_checkpoint(named[0]) if named else None
    if not isinstance(init_cfg, dict):
        return None
    kind = init_cfg.get('type')
    if kind is not PretrainedInit and str(kind).split('.')[-1] != 'Pretrained':  # 'mmengine.Pretrained' too
        return None
    extra = set(init_cfg) - {'type', 'checkpoint'}
    if extra or 'checkpoint' not in init_cfg:
        raise UserError(f"init_cfg must be dict(type='Pretrained', checkpoint=...), got {dict(init_cfg)}")
    return init_cfg['checkpoint']


def load_pretrained(model: Any, source: str, form: PretrainedFormat) -> None:
    """Load the checkpoint ``source`` into a backbone, and log in one line what was loaded, resized and dropped.

    Args:
        model: backbone with the attributes ``arch`` and ``out_indices``; unchanged unless the whole checkpoint fits.
        source: path, URL or ``timm://name``; see ``docs/weights.md``.
        form: description of the checkpoints of this architecture.

    Raises:
        UserError: the checkpoint is unreadable or unsafe, or a tensor is missing, unexpected, of another shape or not
            finite.
    """
    load_tensors(model, backbone_tensors(read_checkpoint(source), source), source, form)


def load_tensors(model: Any, state: Mapping[str, Tensor], source: str, form: PretrainedFormat) -> None:
    """Load the tensors ``state``, which were read from ``source``; see ``load_pretrained``."""
    state, changes = fitted(model, state, source, form)
    model.load_state_dict(state, strict=False)
    MMLogger.get_current_instance().info(
        f'{form.name} {model.arch}: {len(state)} of {len(model.state_dict())} tensors loaded from {source}'
        + ''.join(f'; {change}' for change in changes)
    )


def fitted(
    model: Any, state: Mapping[str, Tensor], source: str, form: PretrainedFormat
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit tensors to a backbone, which may be on the meta device, and say what changed; see ``load_pretrained``."""
    own = model.state_dict()
    whole = {key: tensor for key, tensor in state.items() if not form.classifier.fullmatch(key)}
    kept = {key: tensor for key, tensor in whole.items() if not form.unbuilt(key, model.out_indices[-1])}
    dropped, state = len(state) - len(kept), kept

    changes = adapt(state, own, form)
    new = {key for key in own if form.new.fullmatch(key)}
    if not new.isdisjoint(state):
        new = set()
    problems = differences(own, state, allowed_missing=new)
    if problems:
        variant = form.recognise(whole)
        whose = f', it is {form.name} arch={variant!r}' if variant not in (None, model.arch) else ''
        raise UserError(f'{source} does not fit {form.name} arch={model.arch!r}{whose}: ' + '; '.join(problems))
    refuse_not_finite(state, source)
    if dropped:
        changes.append(f'{dropped} tensors of the classifier or of unused stages dropped')
    if new:
        changes.append(f'{len(new)} tensors of the output norms are new')
    return state, changes


def adapt(state: dict[str, Tensor], own: Mapping[str, Tensor], form: PretrainedFormat) -> list[str]:
    """Fit what depends on the grid and on the image's channels in ``state`` to the state dict of a backbone, ``own``.

    Returns:
        What changed, in words.
    """
    changes = _resize(state, own, form)
    stem, channels = state.get(form.stem), own[form.stem].shape[1]
    if stem is not None and stem.dim() == 4 and stem.shape[1] == 3 != channels:
        state[form.stem] = adapt_input_conv(channels, stem)
        changes.append(f'stem adapted from 3 to {channels} channels')
    return changes


def _resize(state: dict[str, Tensor], own: Mapping[str, Tensor], form: PretrainedFormat) -> list[str]:
    found: Counter[tuple] = Counter()
    for key in state.keys() & own.keys():
        name = key.split('.')[-1]
        old, new = (form.grid(tensor[key]) if name in form.resize else None for tensor in (state, own))
        if old and new and (old != new or state[key].dim() != own[key].dim()):
            state[key] = form.resize[name](state[key], new)
            found[name, old, new] += old != new
    return [
        f'{f"{count} " if count > 1 else ""}{name} resized from {old[0]}x{old[1]} to {new[0]}x{new[1]}'
        for (name, old, new), count in sorted(found.items())
        if count
    ]


def load_segmentor(model: nn.Module, source: str) -> dict:
    """Load a whole segmentor's checkpoint and return its ``meta`` (classes, palette, config).

    Raises:
        UserError: the checkpoint is unreadable or unsafe, or a tensor is missing, unexpected, of another shape or not
            finite.
    """
    contents = read_checkpoint(source)
    state = state_tensors(contents)
    own = model.state_dict()
    problems = differences(own, state)
    if problems:
        raise UserError(f'{source} does not fit the model of this config: ' + '; '.join(problems))
    refuse_not_finite(state, source)
    model.load_state_dict(state)
    return contents.get('meta', {})


def refuse_not_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise ``UserError`` if tensors read from ``source`` contain NaN or infinity."""
    if names := not_finite(state):
        raise UserError(f'{source} is refused: {len(names)} of its tensors contain NaN or infinity ({some(names)})')


def differences(own: Mapping, state: Mapping, allowed_missing: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """What keeps ``state`` from fitting the state dict ``own``: missing, unexpected and misshapen tensors in words."""
    missing = [key for key in own if key not in state and key not in allowed_missing]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f'{key} is {list(state[key].shape)} instead of {list(own[key].shape)}'
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    named = [('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)]
    return [f'{len(keys)} {what} ({some(keys)})' for what, keys in named if keys]
