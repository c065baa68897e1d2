"""The VOLO backbone, its pretrained weights, and segmentors that test images of any size."""

from .segmentor import SlidingCascadeSegmentor, SlidingSegmentor, SlidingTTAModel
from .volo import ARCHITECTURES, VOLO

__all__ = ['ARCHITECTURES', 'VOLO', 'SlidingCascadeSegmentor', 'SlidingSegmentor', 'SlidingTTAModel']
