"""Tables of the configs and of the backbones that come with the package."""

import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from importlib.util import find_spec

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from prettytable import PrettyTable
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..config import data_sets, shipped_configs, type_name
from ..errors import UserError
from ..models import ARCHITECTURES, COATNET_ARCHITECTURES, VOLO, CoAtNet
from ..models.backbone import Backbone


def list_configs(pattern: str = '*') -> None:
    """Print name, backbone, head, data set and number of parameters of each shipped config.

    Args:
        pattern: a shell pattern, or a part of the name.

    Raises:
        UserError: no name matches.
    """
    usable = {
        name: path
        for name, path in sorted(shipped_configs().items())
        if path.parent.name != 'pretrain' or find_spec('mmpretrain') is not None
    }
    chosen = {name: path for name, path in usable.items() if fnmatch(name, pattern) or pattern in name}
    if not chosen:
        raise UserError(f'no shipped config matches {pattern!r}; mmseg-volo configs lists all of them')
    table = PrettyTable(['name', 'backbone', 'head', 'data set', 'parameters, M'], align='l')
    table.align['parameters, M'] = 'r'
    init_default_scope('mmseg')
    for name, path in tqdm(chosen.items(), desc='configs', leave=False, disable=None):
        cfg = Config.fromfile(path)
        backbone, head = cfg.model.backbone, cfg.model.get('decode_head')
        dataset = type_name(data_sets(cfg.train_dataloader.dataset)[0]).removesuffix('Dataset')
        parameters = sum(p.numel() for p in _built(cfg.model if head else backbone).parameters()) / 1e6
        variant = backbone.get('arch') or backbone.get('model_name') or ''
        row = [f'{type_name(backbone)} {variant}'.strip(), type_name(head) if head else '-', dataset]
        table.add_row([name, *row, f'{parameters:.1f}'])
    print(table)


def list_models() -> None:
    """Print Markdown tables of the backbones: sizes, parameters and multiply-adds counted by PyTorch."""
    _print_table(VOLO, 'VOLO', ARCHITECTURES, dict(blocks='layers', widths='embed_dims', heads='num_heads'))
    print()
    _print_table(CoAtNet, 'CoAtNet', COATNET_ARCHITECTURES, dict(blocks='depths', widths='widths', stem='stem_widths'))


def _print_table(
    backbone: Callable[..., Backbone], name: str, archs: Mapping[str, Mapping], sizes: Mapping[str, str]
) -> None:
    """Print a row per arch of ``backbone``; ``sizes`` are columns and keys of the settings."""
    columns = [name, *sizes, 'parameters, M', 'GMACs at 512²', 'GMACs at 1024²', 'strides']
    print(f'| {" | ".join(columns)} |\n|{"---|" * len(columns)}')
    for arch, settings in archs.items():
        with torch.device('meta'):
            model = backbone(arch=arch)
        cells = [', '.join(str(size) for size in settings[key]) for key in sizes.values()]
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        cells += [f'{parameters:.2f}', f'{_gmacs(backbone, arch, 512):.1f}', f'{_gmacs(backbone, arch, 1024):.0f}']
        print(f'| {arch} | {" | ".join(cells)} | {", ".join(map(str, model.out_strides))} |')


def _gmacs(backbone: Callable[..., Backbone], arch: str, size: int) -> float:
    """Multiply-adds of one forward pass for a ``size`` x ``size`` image, in billions."""
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(arch=arch, img_size=size).eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 2e9


def _built(settings: dict) -> nn.Module:
    """The model, without memory for its weights where its code allows that."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # from mmseg's losses
        try:
            with torch.device('meta'):
                return MODELS.build(settings)
        except RuntimeError:  # mmseg's Swin reads numbers from tensors
            return MODELS.build(settings)
