"""Packages that only an extra installs."""

import importlib
from types import ModuleType

from .errors import UserError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module``; raises ``UserError`` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition('.')[0]
        raise UserError(f"{purpose} needs {package}: pip install 'mmseg-volo[{extra}]'") from None
