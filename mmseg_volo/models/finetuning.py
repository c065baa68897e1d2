"""Start a segmentor from the weights of another one, whose classes may be others."""

import re
from collections.abc import Mapping, Sequence

import torch
from mmseg.models.decode_heads import PointHead
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoints.hub import is_model, model_config
from ..checkpoints.reading import read_checkpoint
from ..checkpoints.state_dict import state_tensors
from ..checkpoints.wording import some
from ..errors import UserError
from .backbone import Backbone
from .pretrained import adapt, differences, refuse_not_finite

MOST = 20  # names in a message
# Tensors of mmseg's heads with a row per class: the classifier, further ones in some heads, and EncHead's SE layer.
ROWS = re.compile(r'(\w*conv_seg|\w*cls_seg|fc_seg|se_layer)\.(weight|bias)')
# Tensors of PointHead whose last columns multiply the scores of the head before it.
COLUMNS = re.compile(r'(fcs\.\d+\.conv|fc_seg)\.weight')


class SegmentorWeights:
    """Weights of a segmentor's checkpoint, for a model whose classes may be others.

    Backbone, neck and heads are loaded whole. Rows of the classifiers are taken from the class of the same name;
    capitals, spaces, hyphens and underscores do not matter. A classifier with one channel for two classes belongs to
    the second of them. Rows of other classes keep the values that the model has. Position embeddings, relative tables
    and the stem are adapted as those of ImageNet weights are.

    Args:
        source: path or URL of the checkpoint, ``hf://owner/name``, or a folder that ``mmseg-volo push`` wrote. Averaged
            weights are taken if there are any.
        same_classes: its classes are those of the model in the same order, whatever their names.

    Raises:
        UserError: the checkpoint is unreadable, unsafe or not a segmentor's, or does not name its classes.
    """

    def __init__(self, source: str, same_classes: bool = False):
        content, weights = model_config(source) if is_model(source) else (None, source)
        contents = read_checkpoint(weights)
        self.source, self.state = source, state_tensors(contents)
        self.classes = _class_names(dict(meta=content) if content else contents)
        if not any(key.startswith('decode_head.') for key in self.state):
            raise UserError(
                f'{source} has no decode head, so it is not a segmentor; weights of a backbone alone are named by '
                f'--cfg-options model.backbone.init_cfg.checkpoint={source}'
            )
        refuse_not_finite(self.state, source)
        if same_classes:
            self.classes = None
        elif self.classes is None:
            raise UserError(
                f'{source} does not name its classes; if they are those of this config, in the same order, add '
                '--same-classes'
            )

    def load_into(self, model: nn.Module, classes: Sequence[str]) -> str:
        """Load the weights, and say in one line what was taken.

        Args:
            model: initialised segmentor; it may be sharded. It stays unchanged unless the whole checkpoint fits.
            classes: names of its classes.

        Raises:
            UserError: a tensor is missing, unexpected or of another shape.
        """
        own, state, saved = model.state_dict(), dict(self.state), self.classes or classes
        changes = _adapt_backbone(model, state, own)
        channels = _sort_classes(model, state, own, saved, classes, self.source)
        problems = differences(own, state)
        if problems:
            raise UserError(f'{self.source} does not fit the model of this config: ' + '; '.join(problems))
        model.load_state_dict(state)
        return '; '.join([_summary(*channels, self.source), *changes])


def _class_names(contents: Mapping) -> list[str] | None:
    """Names of a checkpoint's classes where mmseg 1.x or 0.x stores them, if there are any."""
    meta = contents.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get('dataset_meta')
    names = dataset.get('classes') if isinstance(dataset, Mapping) else meta.get('CLASSES')
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return list(names)
    return None


def _plain(name: str) -> str:
    """``name`` without what may differ between two names of one class."""
    return re.sub(r'[\s_-]', '', name).casefold()


def _pairs(saved: Sequence[str], own: Sequence[str]) -> list[tuple[int, int]]:
    """Places in ``own`` and in ``saved`` of the classes that both have; an equal name goes before a similar one."""
    similar = {_plain(name): place for place, name in reversed(list(enumerate(saved)))}
    equal = {name: place for place, name in enumerate(saved)}
    found = [(place, equal.get(name, similar.get(_plain(name)))) for place, name in enumerate(own)]
    return [(place, theirs) for place, theirs in found if theirs is not None]


def _summary(saved: Sequence[str], own: Sequence[str], source: str) -> str:
    pairs = _pairs(saved, own)
    new = [name for place, name in enumerate(own) if place not in {mine for mine, _ in pairs}]
    dropped = [name for place, name in enumerate(saved) if place not in {theirs for _, theirs in pairs}]
    text = f'{len(pairs)} of {len(own)} classes taken from {source}'
    return text + ''.join(
        f'; {what}: {some(names, MOST)}' for what, names in (('new', new), ('dropped', dropped)) if names
    )


def _adapt_backbone(model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    if not isinstance(model.backbone, Backbone):
        return []
    prefix = 'backbone.'
    theirs, mine = (
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for tensors in (state, own)
    )
    changes = adapt(theirs, mine, model.backbone.pretrained)
    state.update({prefix + key: value for key, value in theirs.items()})
    return changes


def _sort_classes(
    model: nn.Module,
    state: dict[str, Tensor],
    own: Mapping[str, Tensor],
    saved: Sequence[str],
    classes: Sequence[str],
    source: str,
) -> tuple[Sequence[str], Sequence[str]]:
    """Replace what depends on the classes in ``state`` by that of ``model``, with the entries that both have.

    Returns:
        The classes of the channels of the last classifier in the checkpoint, and in the model.
    """
    pairs_of_classes = _pairs(saved, classes)
    same = len(saved) == len(classes) and pairs_of_classes == [(i, i) for i in range(len(classes))]
    channels = saved, classes
    for prefix, head in _heads(model):
        names = [key.removeprefix(prefix) for key in own if key.startswith(prefix)]
        rows = {name for name in names if ROWS.fullmatch(name)}
        columns = {name for name in names if COLUMNS.fullmatch(name)} if isinstance(head, PointHead) else set()
        if not rows and not same:
            raise UserError(
                f'{prefix[:-1]} is a {type(head).__name__}, whose classes cannot be matched by name: this config must '
                f'have those of {source}, in the same order'
            )
        for name in sorted(rows | columns):
            key = prefix + name
            if key not in state or state[key].dim() != own[key].dim():
                continue  # ``differences`` reports it
            mine, theirs = own[key], state[key]
            if mine.shape[0] == theirs.shape[0] == 1 and max(len(saved), len(classes)) > 2:
                continue  # it finds edges, for example, and has no classes
            fitting = list(mine.shape)
            pairs = [[(i, i) for i in range(fitting[0])]]
            if name in rows:
                channels = (
                    _channels(saved, theirs.shape[0], f'{key} of {source}'),
                    _channels(classes, mine.shape[0], f'{key} of this config'),
                )
                fitting[0] = theirs.shape[0]
                pairs = [_pairs(*channels)]
            if name in columns:
                others = fitting[1] - len(classes)
                fitting[1] = others + len(saved)
                of_classes = [(others + i, others + j) for i, j in pairs_of_classes]
                pairs.append([*((i, i) for i in range(others)), *of_classes])
            if list(theirs.shape) == fitting:
                state[key] = _merged(mine, theirs, pairs)
    return channels


def _channels(classes: Sequence[str], count: int, what: str) -> Sequence[str]:
    """Names of the classes that the channels of a classifier belong to."""
    if count == 1 and len(classes) == 2:
        return classes[1:]
    if count != len(classes):
        raise UserError(f'{what} has {count} rows for {len(classes)} classes')
    return classes


def _merged(own: Tensor, saved: Tensor, pairs: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Copy of ``own`` with entries of ``saved``: per dimension, the places in the one and the other."""
    merged = (own.full_tensor() if isinstance(own, DTensor) else own).cpu().clone()
    mine, theirs = (
        torch.meshgrid([torch.tensor([pair[i] for pair in along], dtype=torch.long) for along in pairs], indexing='ij')
        for i in range(2)
    )
    merged[mine] = saved[theirs].to(merged)
    return merged


def _heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Prefix and module of each head."""
    heads: list[tuple[str, nn.Module]] = []
    for name in ('auxiliary_head', 'decode_head'):
        head = getattr(model, name, None)
        if isinstance(head, nn.ModuleList):
            heads += [(f'{name}.{i}.', part) for i, part in enumerate(head)]
        elif head is not None:
            heads.append((f'{name}.', head))
    return heads
