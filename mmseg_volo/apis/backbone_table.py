"""The table of all backbones: size, published accuracy, licence of the weights, and costs measured on this machine."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence

import timm
import torch
from timm.models import get_pretrained_cfg
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..benchmark.memory import LiveMemory
from ..benchmark.timing import environment, paired_times
from ..errors import UserError
from ..evaluation.imagenet import PROMISED, SOURCES
from ..models import ARCHITECTURES, COATNET_ARCHITECTURES, HVT, HVT_ARCHITECTURES, VOLO, CoAtNet
from ..models.backbone import Backbone
from .listing import chosen

FAMILIES: dict[str, tuple[Callable[..., Backbone], Mapping[str, Mapping]]] = {
    'volo': (VOLO, ARCHITECTURES),
    'coatnet': (CoAtNet, COATNET_ARCHITECTURES),
    'hvt': (HVT, HVT_ARCHITECTURES),
}
SIDE, ROUNDS = 512, 3


def backbone_names() -> list[str]:
    """Names ``<family>_<arch>`` of all backbones."""
    return [f'{family}_{arch}' for family, (_, archs) in FAMILIES.items() for arch in archs]


def list_backbones(pattern: str = '*', measure: Sequence[str] | None = None) -> None:
    """Print a Markdown table with a row per backbone.

    Args:
        pattern: a shell pattern, or a part of the name, of the rows.
        measure: such patterns of the rows with measured time and memory, none of them for all; None measures nothing.

    Raises:
        UserError: no backbone matches one of the patterns.
    """
    rows, measured = _matching([pattern]), _matching(measure or ['*']) if measure is not None else []
    if measure is not None:
        found = environment('cpu')
        versions = ', '.join(f'{package} {found[package]}' for package in ('torch', 'timm', 'mmseg_volo'))
        print(f'Measured with {found["device"]}, float32, one image of {SIDE} x {SIDE}; {versions}.\n')
    for name in tqdm(rows, desc='backbones', leave=False, disable=None):
        row = {'backbone': name, **_size(name), **published(name)}
        if measure is not None:
            row |= costs(name) if name in measured else dict.fromkeys(COSTS, 'not measured')
        if name == rows[0]:
            tqdm.write(f'| {" | ".join(row)} |\n|{"---|" * len(row)}')
        tqdm.write(f'| {" | ".join(row.values())} |')  # at once, as the largest take a minute


def _matching(patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not chosen(backbone_names(), pattern):
            raise UserError(f'no backbone matches {pattern!r}; mmseg-volo configs --backbones lists all of them')
    return [name for name in backbone_names() if any(chosen([name], pattern) for pattern in patterns)]


def _build(name: str, **settings: int) -> Backbone:
    family, _, arch = name.partition('_')
    return FAMILIES[family][0](arch=arch, **settings)


def _size(name: str) -> dict[str, str]:
    """Parameters for images of the default size, multiply-adds counted by PyTorch, and strides of the maps."""
    with torch.device('meta'):
        model = _build(name)
    return {
        'parameters, M': f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}',
        'GMACs at 512²': f'{_gmacs(name, 512):.1f}',
        'GMACs at 1024²': f'{_gmacs(name, 1024):.0f}',
        'strides': ', '.join(map(str, model.out_strides)),
    }


def _gmacs(name: str, side: int) -> float:
    """Multiply-adds of one forward pass for a ``side`` x ``side`` image, in billions."""
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        _build(name, img_size=side).eval()(torch.empty(1, 3, side, side))
    return counter.get_total_flops() / 2e9


def published(name: str) -> dict[str, str]:
    """The released weights with the highest ImageNet top-1 in percent, its source, and their licence."""
    released = {**PROMISED, **{weights: {} for weights in timm.list_pretrained(f'{name}_*') if weights not in PROMISED}}
    own = {key: found for key, found in released.items() if re.fullmatch(rf'{name}_\d+(\..+)?', key)}
    if not own:
        return {'weights': 'none released', 'top-1, %': '-', 'source of top-1': '-', 'licence': '-'}
    weights = max(own, key=lambda key: own[key].get('val', 0))
    source, timms = SOURCES[name.partition('_')[0]], get_pretrained_cfg(weights, allow_unregistered=True)
    top1 = own[weights].get('val')
    return {
        'weights': f'`{weights}`',
        'top-1, %': '-' if top1 is None else f'{top1:.2f}',
        'source of top-1': '-' if top1 is None else source.published_in,
        'licence': (source.licence or (timms.license if timms else None) or 'not stated').capitalize(),
    }


COSTS = ['CPU forward, ms', 'activations, MiB']


def costs(name: str) -> dict[str, str]:
    """Median time of a forward pass on the CPU, and what one in training keeps for the backward pass."""
    torch.manual_seed(0)
    model, image = _build(name, img_size=SIDE), torch.randn(1, 3, SIDE, SIDE)
    with LiveMemory() as memory:
        outputs = model.train()(image)
        kept = memory.live()
    del outputs
    with torch.no_grad():
        times = paired_times({name: lambda: model.eval()(image)}, ROUNDS, 'cpu')[name]
    return dict(zip(COSTS, [f'{statistics.median(times) * 1e3:.0f}', f'{kept / 2**20:.0f}'], strict=True))
