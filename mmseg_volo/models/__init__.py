"""VOLO, its weights and what stands between it and a decode head."""

from .segmentor import SlidingCascadeSegmentor, SlidingSegmentor, SlidingTTAModel
from .volo import ARCHITECTURES, VOLO

__all__ = ['ARCHITECTURES', 'VOLO', 'SlidingCascadeSegmentor', 'SlidingSegmentor', 'SlidingTTAModel']
