"""The description in an exported file: everything that happens to a picture before and after the network."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmseg.registry import DATASETS
from torch import Tensor

from .._version import __version__
from ..config import LABEL_LOADERS, first_test_set, type_name, without_steps
from ..errors import UserError
from ..models.named_classifiers import NamedClassifier
from ..models.segmentor import last_head

KEY = 'mmseg_volo'  # under which a file stores the description as JSON
VERSION = 1
INPUT, OUTPUT = 'images', 'logits'
TRANSFORM = {'input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode'}  # as timm calls them
# What a description must have, and the tests of its values.
FORMS: dict[str, dict[str, Callable[[Any], bool]]] = dict(
    segmentation=dict(
        classes=lambda value: _is_list(value, str),
        palette=lambda value: _is_list(value, list) and all(len(c) == 3 and _is_list(c, int) for c in value),
        channels=lambda value: value in ('RGB', 'BGR', 'bands'),
        mean=lambda value: _is_list(value, int | float),
        std=lambda value: _is_list(value, int | float),
        threshold=lambda value: value is None or isinstance(value, int | float),
    ),
    classification=dict(
        model=lambda value: isinstance(value, str),
        weights=lambda value: isinstance(value, str),
        transform=lambda value: isinstance(value, dict) and value.keys() == TRANSFORM,
    ),
)
NOT_GEOMETRY = ('LoadImageFromFile', 'LoadImageFromNDArray', 'LoadRasterFromFile', *LABEL_LOADERS, 'PackSegInputs')


def describe_segmentor(cfg: Config, model: Any, meta: Mapping, name: str) -> dict[str, Any]:
    """The description of a segmentor; docs/export.md explains the keys.

    Args:
        cfg: its whole config.
        model: the segmentor.
        meta: ``classes`` and ``palette``.
        name: of the config.
    """
    steps = without_steps(first_test_set(cfg).pipeline, NOT_GEOMETRY)
    test_cfg = model.test_cfg
    windows = None
    if test_cfg.get('mode') == 'slide':
        windows = dict(
            crop_size=list(test_cfg.crop_size),
            stride=list(test_cfg.stride),
            weighting=test_cfg.get('weighting', 'uniform'),
        )
    return dict(
        version=VERSION,
        task='segmentation',
        model=name,
        classes=list(meta['classes']),
        palette=[[int(value) for value in color] for color in meta['palette']],
        **normalisation(model.data_preprocessor),
        resize=[{**step, 'type': type_name(step)} for step in steps],
        windows=windows,
        size_divisor=1,
        align_corners=model.align_corners,
        threshold=last_head(model).threshold if model.out_channels == 1 else None,
        precision='float32',
        versions=dict(mmseg_volo=__version__),
    )


def describe_classifier(named: NamedClassifier, classes: Sequence[str]) -> dict[str, Any]:
    """The description of a classifier, whose pictures timm's transform prepares."""
    return dict(
        version=VERSION,
        task='classification',
        model=named.name,
        weights=named.weights,
        classes=list(classes),
        channels='RGB',
        mean=[255 * value for value in named.data['mean']],
        std=[255 * value for value in named.data['std']],
        transform=named.data,
        precision='float32',
        versions=dict(mmseg_volo=__version__),
    )


def normalisation(data_preprocessor: Any) -> dict[str, Any]:
    """Order of the channels, and what is subtracted from pixels of 0 to 255 before they are divided."""
    is_set = data_preprocessor._enable_normalize
    bands = data_preprocessor.mean.numel() if is_set else 3
    colours = 'RGB' if data_preprocessor._channel_conversion else 'BGR'  # as OpenCV reads
    return dict(
        channels=colours if bands == 3 else 'bands',
        mean=_decimals(data_preprocessor.mean) if is_set else [0.0, 0.0, 0.0],
        std=_decimals(data_preprocessor.std) if is_set else [1.0, 1.0, 1.0],
    )


def _decimals(values: Tensor) -> list[float]:
    """The numbers as they were written before they became float32."""
    return [float(f'{value:.8g}') for value in values.flatten().tolist()]


def classes_of(dataset: Mapping) -> Mapping[str, Any] | None:
    """``classes`` and ``palette`` that a data set's config tells, or None."""
    metainfo = dataset.get('metainfo') or {}
    if {'classes', 'palette'} <= metainfo.keys():
        return metainfo
    kind = dataset.get('type')
    if (DATASETS.get(kind) if isinstance(kind, str) else kind) is None:
        return None
    found = DATASETS.build({**dataset, 'pipeline': [], 'lazy_init': True}).metainfo
    return found if found.get('classes') else None


def _is_list(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def as_json(description: Mapping) -> str:
    """The text that a file stores."""
    return json.dumps(description, default=str)


def parsed(text: str | None, path: str, task: str) -> dict[str, Any]:
    """The description in ``text``, which the file ``path`` stores.

    Raises:
        UserError: there is none, or it is of another task or version.
    """
    if text is None:
        raise UserError(
            f'{path} does not say how to prepare pictures for it: its metadata has no {KEY!r}; mmseg-volo export '
            'writes files that have it, and docs/export.md shows how to add it to others'
        )
    try:
        found = json.loads(text)
        version, actual = found['version'], found['task']
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'the metadata {KEY!r} of {path} is no description ({type(error).__name__}: {error})') from None
    if version != VERSION:
        raise UserError(f'{path} has a description of version {version!r}; this mmseg_volo reads version {VERSION}')
    if actual != task:
        raise UserError(f'{path} is for {actual}, not for {task}')
    if wrong := [key for key, fits in FORMS[task].items() if not fits(found.get(key))]:
        raise UserError(f'the metadata {KEY!r} of {path} has no usable {" or ".join(wrong)}; see docs/export.md')
    return found
