"""Classifiers by timm's names: how each is built and loaded, and how pictures are prepared for it."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm import list_models
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, list_pretrained
from torch import Tensor, nn

from ..checkpoints.reading import read_checkpoint
from ..checkpoints.state_dict import backbone_tensors
from ..errors import UserError
from ..ops.relative_table import table_grid
from .classifiers import CoAtNetClassifier, HVTClassifier, VOLOClassifier
from .coatnet import COATNET_ARCHITECTURES
from .hvt import HVT_ARCHITECTURES
from .pretrained import differences
from .volo import ARCHITECTURES

_HVT = HVT_ARCHITECTURES.keys() - {'tiny'}
# Classifiers that timm does not have: the preparation of pictures, where it differs from timm's defaults.
OWN: dict[str, dict[str, Any]] = {
    'volo_tiny_224': dict(crop_pct=0.96),
    **{f'hvt_{arch}_224': dict(crop_pct=0.875) for arch in _HVT},
}


@dataclass(frozen=True)
class Family:
    """How the classifiers with one backbone are built and recognised.

    Args:
        archs: the ``<arch>`` in their names, ``<family>_<arch>_<side>``.
        build: from arch, image side and number of classes to the classifier.
        last_layer: name of the weight that has one row per class.
        side: from the tensors of a checkpoint to the image side, or None if they do not tell.
    """

    archs: Collection[str]
    build: Callable[[str, int, int], Any]
    last_layer: str
    side: Callable[[Mapping[str, Tensor]], int | None]


@dataclass(frozen=True)
class NamedClassifier:
    """A classifier that can be built.

    Args:
        name: timm's name, such as ``'volo_d1_224'``.
        weights: timm's name of the weights, such as ``'volo_d1_224.sail_in1k'``, or ``name`` if timm has none.
        data: the arguments of ``timm.data.create_transform`` with which these weights were measured.
    """

    name: str
    weights: str
    data: dict[str, Any]

    def load(self, source: str) -> nn.Module:
        """Build the classifier with the weights at ``source``: a path, URL or ``timm://name``.

        Raises:
            UserError: the checkpoint is unreadable or unsafe, or a tensor is missing, unexpected or of another shape.
        """
        state = backbone_tensors(read_checkpoint(source), source)
        name, arch, side = _parts(self.name)
        family = FAMILIES[name]
        last = state.get(family.last_layer)
        num_classes = len(last) if last is not None and last.dim() == 2 and last.numel() else 1000
        with torch.device('meta'):  # nothing is allocated before every tensor fits
            model = family.build(arch, int(side), num_classes)
        own = model.state_dict()
        state = {key: _with_shape(tensor, own.get(key)) for key, tensor in state.items()}
        problems = differences(own, state)
        if problems:
            actual = _recognise(state)
            whose = f', it is {actual}' if actual not in (None, self.name) else ''
            raise UserError(f'{source} does not fit {self.name}{whose}: ' + '; '.join(problems))
        model.load_state_dict(state, assign=True)
        return model.float().eval()


def named_classifier(name: str, source: str = '') -> NamedClassifier:
    """Describe a classifier.

    Args:
        name: timm's name, such as ``'volo_d1_224'``, with or without the tag of its weights, or one of ``OWN``.
        source: the checkpoint that will be loaded; the tag of a ``timm://name`` precedes that of ``name``.

    Raises:
        UserError: the name is unknown, or ``source`` names another classifier of timm's.
    """
    model, _, tag = name.partition('.')
    if model not in (known := classifier_names()) or (tag and model in OWN):
        near = difflib.get_close_matches(model, known, n=3)
        hint = f'did you mean {" or ".join(near)}?' if near else f'choose from {", ".join(known)}'
        raise UserError(f'no classifier named {name!r}: {hint}')
    if source.startswith('timm://'):
        other, _, other_tag = source.removeprefix('timm://').partition('.')
        if other != model:
            raise UserError(f'{source} does not fit {model}, it is {other}')
        tag = other_tag or tag
    if model in OWN:
        return NamedClassifier(model, model, resolve_data_config(pretrained_cfg=OWN[model]))
    try:
        cfg: Any = get_pretrained_cfg(f'{model}.{tag}' if tag else model)
    except RuntimeError:  # the model is known, the tag is not
        raise UserError(f'timm has no weights {model}.{tag}, only {", ".join(list_pretrained(f"{model}.*"))}') from None
    weights = f'{model}.{cfg.tag}' if cfg.has_weights else model
    return NamedClassifier(model, weights, resolve_data_config(pretrained_cfg=cfg.to_dict()))


def classifier_names() -> list[str]:
    """Names that ``named_classifier`` knows, without tags."""
    candidates = [*OWN, *(name for family in FAMILIES for name in list_models(f'{family}_*'))]
    return sorted(name for name in candidates if _is_built(*_parts(name)))


def _parts(name: str) -> tuple[str, str, str]:
    """Family, arch and side in a name."""
    family, _, rest = name.partition('_')
    arch, _, side = rest.rpartition('_')
    return family, arch, side


def _is_built(family: str, arch: str, side: str) -> bool:
    return arch in FAMILIES[family].archs and side.isdecimal()


def _with_shape(tensor: Tensor, own: Tensor | None) -> Tensor:
    """timm's table of relative biases ``[positions, heads]`` in rows and columns, as ours; others as they are."""
    is_table = own is not None and (own.dim(), tensor.dim()) == (3, 2) and own.numel() == tensor.numel()
    return tensor.view(own.shape) if is_table and own is not None else tensor


def _recognise(state: Mapping[str, Tensor]) -> str | None:
    """Name of the classifier whose tensors ``state`` contains, without the side if they do not tell, or None."""
    for name, family in FAMILIES.items():
        with torch.device('meta'):
            form = family.build(next(iter(family.archs)), 224, 1).pretrained
        if (arch := form.recognise(state)) in family.archs:
            side = family.side(state)
            return f'{name}_{arch}' + (f'_{side}' if side else '')
    return None


def _side_of_embedding(state: Mapping[str, Tensor]) -> int | None:
    embedding = state.get('pos_embed')
    return 16 * embedding.shape[1] if embedding is not None and embedding.dim() == 4 else None


def _side_of_tables(state: Mapping[str, Tensor]) -> int | None:
    tables = (tensor for key, tensor in state.items() if re.fullmatch(r'stages\.2\..+_table', key))
    grid = next(map(table_grid, tables), None)
    return 16 * grid[0] if grid else None


FAMILIES = {
    'volo': Family(ARCHITECTURES, VOLOClassifier, 'head.weight', _side_of_embedding),
    'coatnet': Family(COATNET_ARCHITECTURES, CoAtNetClassifier, 'head.fc.weight', _side_of_tables),
    'hvt': Family(sorted(_HVT), lambda arch, _, classes: HVTClassifier(arch, classes), 'head.weight', lambda _: None),
}
