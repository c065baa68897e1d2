"""VOLO, its weights and what stands between it and a decode head."""

from .pyramid import VOLOPyramid
from .volo import ARCHITECTURES, VOLO

__all__ = ['ARCHITECTURES', 'VOLO', 'VOLOPyramid']
