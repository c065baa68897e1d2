"""The table of the configs that come with the package."""

import warnings
from collections.abc import Iterable
from fnmatch import fnmatch
from importlib.util import find_spec

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from prettytable import PrettyTable
from torch import nn
from tqdm import tqdm

from ..config import data_sets, shipped_configs, type_name
from ..errors import UserError


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
    names = chosen(usable, pattern)
    if not names:
        raise UserError(f'no shipped config matches {pattern!r}; mmseg-volo configs lists all of them')
    table = PrettyTable(['name', 'backbone', 'head', 'data set', 'parameters, M'], align='l')
    table.align['parameters, M'] = 'r'
    init_default_scope('mmseg')
    for name in tqdm(names, desc='configs', leave=False, disable=None):
        cfg = Config.fromfile(usable[name])
        backbone, head = cfg.model.backbone, cfg.model.get('decode_head')
        dataset = type_name(data_sets(cfg.train_dataloader.dataset)[0]).removesuffix('Dataset')
        parameters = sum(p.numel() for p in _built(cfg.model if head else backbone).parameters()) / 1e6
        variant = backbone.get('arch') or backbone.get('model_name') or ''
        row = [f'{type_name(backbone)} {variant}'.strip(), type_name(head) if head else '-', dataset]
        table.add_row([name, *row, f'{parameters:.1f}'])
    print(table)


def chosen(names: Iterable[str], pattern: str) -> list[str]:
    """Those of ``names`` that match a shell pattern or contain it."""
    return [name for name in names if fnmatch(name, pattern) or pattern in name]


def _built(settings: dict) -> nn.Module:
    """The model, without memory for its weights where its code allows that."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # from mmseg's losses
        try:
            with torch.device('meta'):
                return MODELS.build(settings)
        except RuntimeError:  # mmseg's Swin reads numbers from tensors
            return MODELS.build(settings)
