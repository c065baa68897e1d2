"""The config that trains on a data set of one's own: sizes, batch and iterations from the data, the rest inherited."""

import math
import pprint
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..config import load_config, shipped_configs, type_name
from ..errors import UserError

HEADS = {'UPerHead': 'UPerNet', 'SegformerHead': 'SegFormer head'}
RARE = 0.02  # share of the training pixels below which a class is rare
PRETRAINED_LR = 1e-4
STEP = 32  # crops are multiples of it
LONGEST = 512  # most pixels of the shorter side
LINE = 120  # characters

TEMPLATE = """# {title} on {name} from {start}: 1 process x {batch_size} images, {height} x {width} crops.
# Written by mmseg-volo new-dataset; docs/finetune.md explains how the values were chosen.
from mmengine.config import read_base

with read_base():
    from mmseg_volo.configs.{base} import *  # backbone and heads
    from mmseg_volo.configs._base_.own_data import *  # data and schedule

classes = {classes}
palette = {palette}
{weights}
crop_size = ({height}, {width})  # height, width
scale = {scale}  # longest and shortest side after resizing
batch_size, max_iters = {batch_size}, {max_iters}

num_classes = len(classes)
data = dict(
    metainfo=dict(classes=classes, palette=palette),
    data_prefix=dict(img_path={img_path!r}, seg_map_path={seg_map_path!r}),
)
train_dataloader.update(batch_size=batch_size, num_workers=4, dataset=dict(ann_file={train!r}, **data))
train_dataloader.dataset.pipeline[3].update(scale=scale)  # RandomResize
train_dataloader.dataset.pipeline[4].update(crop_size=crop_size)  # RandomCrop
val_dataloader.update(dataset=dict(ann_file={val!r}, **data))
val_dataloader.dataset.pipeline[1].update(scale=scale)  # Resize
{test}
tta_pipeline[1].update(scale=scale)  # Resize

head = dict(num_classes=num_classes, loss_decode=dict(class_weight=class_weight))
model.update(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size),
    {heads},
    test_cfg={test_cfg},
)
optim_wrapper.optimizer.update(lr={lr})
param_scheduler[0].update(end=max_iters // 20)
param_scheduler[1].update(begin=max_iters // 20, end=max_iters)
train_cfg.update(max_iters=max_iters, val_interval=max_iters // 10)
default_hooks.checkpoint.update(interval=max_iters // 10)
auto_scale_lr.update(base_batch_size=batch_size)
"""
SAME_TEST = 'test_dataloader = val_dataloader'
OWN_TEST = """test_dataloader.update(dataset=dict(ann_file={!r}, **data))
test_dataloader.dataset.pipeline[1].update(scale=scale)  # Resize"""
WEIGHTS = """# 1 / log(1.02 + share of training pixels), mean 1 over pixels (ENet, arXiv 1606.02147)
class_weight = {}"""


@dataclass
class Base:
    """The shipped config that has the backbone.

    Args:
        name: name of the config.
        title: backbone and head, in words.
        start: the weights from which it starts, in words.
        learning_rate: for AdamW.
        batch_size: images per step.
        small: whether it is made for a CPU.
        heads: keys of the heads in the model.
    """

    name: str
    title: str
    start: str
    learning_rate: float
    batch_size: int
    small: bool
    heads: list[str]


@dataclass
class Sizes:
    """Longest and shortest side of resized pictures, (height, width) of the crop, and ``test_cfg`` as text."""

    scale: tuple[int, int]
    crop: tuple[int, int]
    test_cfg: str


def bases() -> dict[str, str]:
    """The shipped configs to inherit from, by backbone, as ``--arch`` takes them; those of ADE20K, or of CamVid."""
    found: dict[str, str] = {}
    for data in ('ade20k', 'camvid'):
        for name in shipped_configs():
            match = re.fullmatch(rf'(volo|coatnet|hvt)_(\w+)_{data}', name)
            if match:
                found.setdefault(match[2] if match[1] == 'volo' else f'{match[1]}_{match[2]}', name)
    return found


def choose_base(arch: str | None) -> Base:
    """The config to inherit from; without ``arch``, VOLO-D1's with a GPU, and VOLO-tiny's without.

    Raises:
        UserError: no config has this backbone.
    """
    arch = (arch or ('d1' if torch.cuda.is_available() else 'tiny')).removeprefix('volo_')
    name = bases().get(arch)
    if name is None:
        raise UserError(f'--arch must be one of {", ".join(sorted(bases()))}, got {arch!r}')
    cfg = load_config(name, {})
    backbone, head = cfg.model.backbone, type_name(cfg.model.decode_head)
    pretrained = bool(backbone.get('init_cfg'))
    size = backbone.arch.upper() if backbone.arch[1:].isdigit() else backbone.arch
    return Base(
        name,
        f'{type_name(backbone)}-{size} + {HEADS.get(head, head)}',
        f'{"ImageNet" if pretrained else "random"} weights',
        PRETRAINED_LR if pretrained else cfg.optim_wrapper.optimizer.lr,
        cfg.train_dataloader.batch_size,
        'tiny' in arch,
        [key for key in ('decode_head', 'auxiliary_head') if cfg.model.get(key)],
    )


def choose_sizes(sizes: Sequence[tuple[int, int]], limit: int) -> Sizes:
    """Scale and crop for pictures of the given sizes (width, height).

    Pictures are resized so that their shorter side is the median one, at most 512. The crop is as large as a resized
    picture, or a square if sizes differ; its sides are rounded down to multiples of 32 and are at most ``limit``.
    Pictures more than twice as large as the crop are tested in windows.
    """
    shorter = min(LONGEST, round(statistics.median(min(size) for size in sizes)))
    if len(set(sizes)) == 1:
        width, height = (max(1, round(side * shorter / min(sizes[0]))) for side in sizes[0])
        scale = max(width, height), min(width, height)
    else:
        width = height = shorter
        scale = 4 * shorter, shorter
    crop = tuple(max(STEP, min(side, limit) // STEP * STEP) for side in (height, width))
    aspect = statistics.median(max(size) / min(size) for size in sizes)
    if shorter * shorter * aspect <= 2 * math.prod(crop):
        return Sizes(scale, (crop[0], crop[1]), "dict(mode='whole')")
    stride = tuple(side * 2 // 3 for side in crop)
    return Sizes(scale, (crop[0], crop[1]), f"dict(mode='slide', crop_size=crop_size, stride={stride})")


def choose_iterations(count: int, batch_size: int, small: bool) -> int:
    """Iterations that show each of ``count`` training pictures 200 times, from 2000 to 40000.

    With a small backbone, 100 times, and 8000 to 32000 pictures in all.
    """
    if small:
        iterations = min(32_000, max(8_000, 100 * count)) / batch_size
    else:
        iterations = min(40_000, max(2_000, 200 * count / batch_size))
    return math.ceil(iterations / 100) * 100


def class_weights(pixels: Sequence[int]) -> list[float] | None:
    """Weights for the loss, or None if no class is rare: ``1 / log(1.02 + share)``, with mean 1 over pixels.

    The formula is ENet's (https://arxiv.org/abs/1606.02147). A class is rare below 2 % of the pixels.

    Args:
        pixels: number of training pixels of each class.
    """
    shares = [count / sum(pixels) for count in pixels]
    if not any(0 < share < RARE for share in shares):
        return None
    weights = [1 / math.log(1.02 + share) for share in shares]
    mean = sum(weight * share for weight, share in zip(weights, shares, strict=True))
    return [round(weight / mean, 2) for weight in weights]


def config_text(
    base: Base,
    name: str,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    weights: Sequence[float] | None,
    sizes: Sizes,
    max_iters: int,
    folders: tuple[str, str],
    lists: Mapping[str, str],
) -> str:
    """The text of the config.

    Args:
        base: the config to inherit from.
        name: of the data set, for the first line.
        classes: their names.
        palette: RGB of each.
        weights: of each in the loss, if they differ.
        sizes: of pictures and crops.
        max_iters: iterations.
        folders: of the pictures and of the label maps.
        lists: the list of each split.
    """
    return TEMPLATE.format(
        title=base.title,
        name=name,
        start=base.start,
        base=base.name,
        classes=_wrapped('classes', list(classes)),
        palette=_wrapped('palette', [list(colour) for colour in palette]),
        weights=WEIGHTS.format(_wrapped('class_weight', list(weights))) if weights else 'class_weight = None',
        height=sizes.crop[0],
        width=sizes.crop[1],
        scale=sizes.scale,
        batch_size=base.batch_size,
        max_iters=max_iters,
        img_path=folders[0],
        seg_map_path=folders[1],
        train=lists['train'],
        val=lists['val'],
        test=OWN_TEST.format(lists['test']) if 'test' in lists else SAME_TEST,
        heads=',\n    '.join(f'{key}=head' for key in base.heads),
        test_cfg=sizes.test_cfg,
        lr=base.learning_rate,
    )


def _wrapped(name: str, values: list) -> str:
    """A list, over several lines if it does not fit into one."""
    line = repr(values)
    if len(f'{name} = {line}') <= LINE:
        return line
    body = pprint.pformat(values, width=LINE - 4, compact=True)[1:-1]
    return '[\n    ' + '\n    '.join(part.strip() for part in body.splitlines()) + ',\n]'
