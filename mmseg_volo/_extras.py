"""Packages that only an extra installs."""

import importlib
from importlib.util import find_spec
from types import ModuleType

from mmengine.config import Config

from .errors import UserError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module``; raises ``UserError`` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition('.')[0]
        raise UserError(f"{purpose} needs {package}: pip install 'mmseg-volo[{extra}]'") from None


def without_tensorboard(cfg: Config) -> bool:
    """Remove TensorBoard from a config's visualizer if it is not installed; returns whether that was necessary."""
    backends = (cfg.get('visualizer') or {}).get('vis_backends') or []
    installed = [backend for backend in backends if backend['type'] != 'TensorboardVisBackend']
    if len(installed) == len(backends) or find_spec('tensorboard') is not None:
        return False
    cfg.visualizer.vis_backends = installed
    return True
