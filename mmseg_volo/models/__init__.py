"""VOLO, its weights and what stands between it and a decode head."""

from .volo import ARCHITECTURES, VOLO

__all__ = ['ARCHITECTURES', 'VOLO']
