"""The config of a model as plain data. Reading it runs no code and opens no file: every type and word is on a list.

It is stored as JSON. ``{"tuple": [...]}`` stands for a tuple, because mmseg's modules tell lists from tuples.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import mmengine
import mmseg
import timm
import torch
from mmengine.config import Config
from mmseg.registry import MODELS, TRANSFORMS

from .._version import __version__
from ..errors import UserError
from .wording import printable

FORMAT = 1  # of config.json; raise it when older readers would misunderstand the file
# Classes of this package, written with its name because mmseg has others called FCNHead, UPerHead and so on.
OURS = {
    'CoAtNet',
    'FCNHead',
    'HVT',
    'MultiLevelNeck',
    'SegformerHead',
    'SlidingCascadeSegmentor',
    'SlidingSegmentor',
    'SlidingTTAModel',
    'UPerHead',
    'VOLO',
}
# Names in the registries of mmseg, mmcv and mmengine. None of these classes opens files or runs code that it is given.
THEIRS = {
    'ASPPHead',
    'BN',
    'CascadeEncoderDecoder',
    'DepthwiseSeparableASPPHead',
    'EncoderDecoder',
    'FCNHead',
    'FPN',
    'GELU',
    'GN',
    'LN',
    'LoadAnnotations',
    'LoadImageFromFile',
    'MultiLevelNeck',
    'OCRHead',
    'PSPHead',
    'PackSegInputs',
    'RandomFlip',
    'ReLU',
    'Resize',
    'ResizeShortestEdge',
    'ResizeToMultiple',
    'SegDataPreProcessor',
    'SegTTAModel',
    'SegformerHead',
    'SyncBN',
    'TestTimeAug',
    'UPerHead',
}
# All other strings that may occur, except names of architectures.
WORDS = {
    *('whole', 'slide', 'uniform', 'hann'),  # test_cfg
    *('bilinear', 'nearest', 'bicubic', 'area', 'lanczos', 'geometric', '1d', '2d'),
    *('multiple_select', 'resize_concat', 'horizontal', 'vertical', 'diagonal'),
    *('color', 'unchanged', 'cv2', 'pillow'),
    *('gelu', 'relu', 'silu', 'dw', '1x1', 'pool', 'avg2', 'max2', 'max', 'bias', 'mlp'),  # CoAtNet's arch
    *('img_path', 'seg_map_path', 'ori_shape', 'img_shape', 'pad_shape', 'scale_factor'),  # PackSegInputs
    *('flip', 'flip_direction', 'reduce_zero_label'),
}
NAME = re.compile(r'[a-z0-9][a-z0-9_]*')
# Not needed for predictions: initial weights (which are files), losses and the training.
LEFT_OUT = {'init_cfg', 'loss_decode', 'pretrained', 'sampler', 'train_cfg'}
COUNTS = {'layers', 'depths', 'num_convs', 'num_outs'}  # of modules
LARGEST, WIDEST, MOST = 2**20, 2**14, 256  # a number, one in a pipeline, and a count of modules
LONGEST, DEEPEST = 1000, 20  # a list, and levels of nesting


def plain_config(cfg: Config, name: str, dataset_meta: Mapping) -> dict:
    """The content of ``config.json`` for a model, its test pipeline and its classes.

    Args:
        cfg: a whole config.
        name: its name, which the model keeps.
        dataset_meta: ``classes`` and ``palette``.

    Raises:
        UserError: a part of the config is not on the lists above, such as a class of the user's own.
    """
    parts = {
        'model': cfg.model,
        'test_pipeline': _test_pipeline(cfg),
        **{key: cfg[key] for key in ('tta_model', 'tta_pipeline') if cfg.get(key)},
    }
    try:
        content = dict(
            format='mmseg_volo',
            format_version=FORMAT,
            name=name,
            **{key: _written(part, key) for key, part in parts.items()},
            dataset_meta=dict(
                classes=[str(label) for label in dataset_meta['classes']],
                palette=[[int(value) for value in colour] for colour in dataset_meta['palette']],
            ),
            versions=dict(
                mmseg_volo=__version__,
                torch=torch.__version__,
                timm=timm.__version__,
                mmengine=mmengine.__version__,
                mmseg=mmseg.__version__,
            ),
        )
        _check(content)
    except ValueError as refusal:
        raise UserError(f'{name} cannot be pushed: {refusal}') from None
    return content


def parsed_config(text: bytes, source: str) -> dict | None:
    """Parse a ``config.json`` and check it; None if another library wrote it.

    Args:
        text: its content.
        source: where it is from, for messages.

    Raises:
        UserError: it is damaged, was written by a newer version, or contains what is not on the lists.
    """

    def no_number(text: str) -> None:
        raise ValueError(f'it contains {text}')

    try:
        content = json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{source} is refused: it is not JSON or is damaged ({printable(str(error))})') from None
    if not isinstance(content, dict) or content.get('format') != 'mmseg_volo':
        return None
    version = content.get('format_version')
    if type(version) is int and version > FORMAT:
        raise UserError(f'{source} was written by a newer mmseg_volo (format {version}): pip install -U mmseg-volo')
    try:
        _check(content)
    except ValueError as refusal:
        raise UserError(f'{source} is refused: {refusal}') from None
    return content


def config_of(content: dict) -> Config:
    """The config of a checked ``config.json``: ``model``, pipelines, and a ``test_dataloader`` without data."""
    parts = {
        key: _read(content[key]) for key in ('model', 'test_pipeline', 'tta_model', 'tta_pipeline') if key in content
    }
    data = dict(type='BaseSegDataset', metainfo=content['dataset_meta'], pipeline=parts['test_pipeline'])
    loader = dict(batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data)
    return Config(dict(**parts, test_dataloader=loader, default_scope='mmseg'))


def backbone_arguments(content: dict) -> dict:
    """Type and arguments of the backbone in a checked ``config.json``; the type is its name."""
    return _read(content['model']['backbone'], build=False)


def _test_pipeline(cfg: Config) -> list:
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset:  # wrapped
        dataset = dataset['dataset'] if 'dataset' in dataset else dataset['datasets'][0]
    return dataset['pipeline']


def _written(value: Any, place: str) -> Any:
    """``value`` of a config as JSON represents it."""
    if isinstance(value, Mapping):
        return {
            key: _type_name(item) if key == 'type' else _written(item, f'{place}.{key}')
            for key, item in value.items()
            if key not in LEFT_OUT
        }
    if isinstance(value, list | tuple):
        items = [_written(item, f'{place}.{i}') for i, item in enumerate(value)]
        return items if isinstance(value, list) else {'tuple': items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f'{place} is of type {type(value).__name__}, and config.json holds plain data only')


def _type_name(kind: Any) -> str:
    """Name of a class in ``config.json``."""
    if isinstance(kind, str):
        name = re.sub(r'^(mmseg|mmcv|mmengine)\.', '', kind)
        found = (MODELS.get(name) or TRANSFORMS.get(name)) if name in OURS else None
    else:
        name, found = getattr(kind, '__name__', repr(kind)), kind
    module = getattr(found, '__module__', 'mmseg')
    package = module.partition('.')[0]
    return name if package in ('mmseg', 'mmcv', 'mmengine', 'torch') else f'{package}.{name}'


def _read(value: Any, build: bool = True) -> Any:
    """The value that checked JSON represents; with ``build`` our types become classes."""
    if isinstance(value, dict):
        if value.keys() == {'tuple'}:
            return tuple(_read(item, build) for item in value['tuple'])
        return {key: _class(item) if build and key == 'type' else _read(item, build) for key, item in value.items()}
    return [_read(item, build) for item in value] if isinstance(value, list) else value


def _class(name: str) -> Any:
    """The class called ``name``; others than ours stay names, which mmseg compares."""
    import mmseg_volo

    package, _, kind = name.rpartition('.')
    return getattr(mmseg_volo, kind) if package else kind


def _check(content: dict) -> None:
    """Raise ``ValueError`` with the reason if ``content`` is not what ``plain_config`` returns."""
    known = {'format', 'format_version', 'name', 'model', 'test_pipeline', 'tta_model', 'tta_pipeline'}
    strange = content.keys() - known - {'dataset_meta', 'versions'}
    if strange:
        raise ValueError(f'it has the unknown key {printable(min(strange))!r}')
    name, model = content.get('name'), content.get('model')
    meta: Any = content.get('dataset_meta')
    if not isinstance(name, str) or not re.fullmatch(r'[\w.-]{1,100}', name):
        raise ValueError(f'name must consist of letters, digits, . _ and -, got {_shown(name)}')
    if not isinstance(model, dict) or not isinstance(model.get('backbone'), dict):
        raise ValueError('model must be an object with a backbone')
    if not {'type', 'backbone', 'data_preprocessor'} <= model.keys() or 'test_pipeline' not in content:
        raise ValueError('it must have a test_pipeline, and model must have a type and a data_preprocessor')
    for key in known & content.keys() - {'format', 'format_version', 'name'}:
        _check_value(content[key], key, 0)
    _check_steps(content['test_pipeline'], 'test_pipeline')
    _check_steps(content.get('tta_pipeline', []), 'tta_pipeline')
    _check_meta(meta)
    _check_heads(model.get('decode_head'), len(meta['classes']))
    _check_test_cfg(_read(model.get('test_cfg'), build=False))


def _check_value(value: Any, place: str, level: int) -> None:
    key = place.rpartition('.')[2]
    if level > DEEPEST:
        raise ValueError(f'{printable(place)} is nested too deeply')
    if isinstance(value, dict):
        if 'tuple' in value and not (len(value) == 1 and isinstance(value['tuple'], list)):
            raise ValueError(f'{place} must hold a list as its only entry')
        for name, item in value.items():
            if not re.fullmatch('[a-z][A-Za-z0-9_]*', name) or name in LEFT_OUT:
                raise ValueError(f'{printable(f"{place}.{name}")} must not be in it')
            if name == 'type':
                _check_type(item, f'{place}.type')
            else:
                _check_value(item, place if name == 'tuple' else f'{place}.{name}', level + 1)
    elif isinstance(value, list):
        if len(value) > LONGEST:
            raise ValueError(f'{place} has more than {LONGEST} entries')
        for item in value:
            _check_value(item, place, level + 1)
    elif isinstance(value, str):
        if value not in WORDS and not (key == 'arch' and NAME.fullmatch(value) and len(value) < 100):
            raise ValueError(f'{place} is {_shown(value)}, which is not among the words that config.json may hold')
    elif isinstance(value, int | float) and not isinstance(value, bool):
        largest = MOST if key in COUNTS else WIDEST if 'pipeline' in place else LARGEST
        if not math.isfinite(value) or abs(value) > largest:
            raise ValueError(f'{place} is {_shown(value)}, too large')
    elif value is not None and not isinstance(value, bool):
        raise ValueError(f'{place} is of type {type(value).__name__}')


def _check_type(name: Any, place: str) -> None:
    ours = isinstance(name, str) and name.startswith('mmseg_volo.') and name.removeprefix('mmseg_volo.') in OURS
    if not ours and (not isinstance(name, str) or name not in THEIRS):
        raise ValueError(f'{place} is {_shown(name)}, which is not among the types that config.json may name')


def _check_steps(steps: Any, place: str) -> None:
    if not isinstance(steps, list) or len(steps) > MOST:
        raise ValueError(f'{place} must be a list of at most {MOST} steps')
    for step in steps:
        if isinstance(step, list):
            _check_steps(step, place)
        elif not isinstance(step, dict) or 'type' not in step:
            raise ValueError(f'{place} must consist of objects with a type')
        else:
            _check_steps(step.get('transforms', []), place)


def _check_meta(meta: Any) -> None:
    if not isinstance(meta, dict) or meta.keys() != {'classes', 'palette'}:
        raise ValueError('dataset_meta must hold classes and palette')
    classes, palette = meta['classes'], meta['palette']
    if not isinstance(classes, list) or not 0 < len(classes) <= LONGEST:
        raise ValueError(f'dataset_meta.classes must be a list of 1 to {LONGEST} names')
    for label in classes:
        if not isinstance(label, str) or not 0 < len(label) <= 200 or not label.isprintable():
            raise ValueError(f'dataset_meta.classes must hold printable names, got {_shown(label)}')
    colours = isinstance(palette, list) and len(palette) == len(classes)
    if not colours or not all(
        isinstance(colour, list) and len(colour) == 3 and all(type(v) is int and 0 <= v < 256 for v in colour)
        for colour in palette
    ):
        raise ValueError(f'dataset_meta.palette must be {len(classes)} lists of 3 numbers from 0 to 255')


def _check_heads(heads: Any, classes: int) -> None:
    for head in heads if isinstance(heads, list) and heads else [heads]:
        if not isinstance(head, dict) or 'type' not in head or head.get('num_classes') != classes:
            raise ValueError(f'model.decode_head must have a type and num_classes={classes}, as many as dataset_meta')


def _check_test_cfg(test_cfg: Any) -> None:
    """mmseg's segmentors read ``test_cfg`` while they segment, without a check."""
    mode = test_cfg.get('mode') if isinstance(test_cfg, dict) else None
    if mode not in ('whole', 'slide'):
        raise ValueError(f"model.test_cfg.mode must be 'whole' or 'slide', got {_shown(mode)}")
    if mode == 'whole':
        return
    stride, crop = (test_cfg.get(key) for key in ('stride', 'crop_size'))
    for pair in (stride, crop):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
            raise ValueError('model.test_cfg must hold stride and crop_size as two numbers above 0 each')
    if any(step > side for step, side in zip(stride, crop, strict=True)):
        raise ValueError('model.test_cfg.stride must not exceed crop_size')


def _shown(value: Any) -> str:
    return printable(repr(value), 100)
