"""Classifiers by timm's names: how each is built and loaded, and how pictures are prepared for it."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from timm import list_models
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, list_pretrained
from torch import Tensor, nn

from ..checkpoints.reading import read_checkpoint
from ..checkpoints.state_dict import backbone_tensors
from ..errors import UserError
from .classifiers import VOLOClassifier
from .pretrained import load_strictly
from .volo import ARCHITECTURES, PRETRAINED

# Classifiers that timm does not have: their image side and crop.
OWN: dict[str, dict[str, Any]] = {'volo_tiny_224': dict(input_size=(3, 224, 224), crop_pct=0.96)}


@dataclass(frozen=True)
class Family:
    """How the classifiers with one backbone are built and recognised.

    Args:
        archs: the ``<arch>`` in their names, ``<family>_<arch>_<side>``.
        build: from arch, image side and number of classes to the classifier.
        last_layer: name of the weight that has one row per class.
        recognise: from the tensors of a checkpoint to the classifier's name, or None.
    """

    archs: Collection[str]
    build: Callable[[str, int, int], nn.Module]
    last_layer: str
    recognise: Callable[[Mapping[str, Tensor]], str | None]


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
        family, arch, side = _parts(self.name)
        last_layer = state.get(family.last_layer)
        num_classes = 1000 if last_layer is None else len(last_layer)
        actual = next((name for other in FAMILIES.values() if (name := other.recognise(state))), None)
        model = family.build(arch, side, num_classes)
        load_strictly(model, state, source, self.name, actual if actual != self.name else None)
        return model.eval()


def named_classifier(name: str, source: str = '') -> NamedClassifier:
    """Describe a classifier.

    Args:
        name: timm's name, such as ``'volo_d1_224'``, with or without the tag of its weights, or one of ``OWN``.
        source: the checkpoint that will be loaded; the tag of a ``timm://name`` precedes that of ``name``.

    Raises:
        UserError: the name is unknown, or ``source`` names another classifier of timm's.
    """
    model, _, tag = name.partition('.')
    if model not in (known := classifier_names()):
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
    weights = f'{model}.{cfg.tag}' if cfg.tag else model
    return NamedClassifier(model, weights, resolve_data_config(pretrained_cfg=cfg.to_dict()))


def classifier_names() -> list[str]:
    """Names that ``named_classifier`` knows, without tags."""
    candidates = [*OWN, *(name for family in FAMILIES for name in list_models(f'{family}_*'))]
    return sorted(name for name in candidates if _splits(name))


def _splits(name: str) -> bool:
    family, _, rest = name.partition('_')
    arch, _, side = rest.rpartition('_')
    return arch in FAMILIES[family].archs and side.isdecimal()


def _parts(name: str) -> tuple[Family, str, int]:
    family, _, rest = name.partition('_')
    arch, _, side = rest.rpartition('_')
    return FAMILIES[family], arch, int(side)


def _recognise_volo(state: Mapping[str, Tensor]) -> str | None:
    arch, grid = PRETRAINED.recognise(state), state.get('pos_embed')
    return f'volo_{arch}_{16 * grid.shape[1]}' if arch and grid is not None and grid.dim() == 4 else None


FAMILIES = {'volo': Family(ARCHITECTURES, VOLOClassifier, 'head.weight', _recognise_volo)}
