"""The VOLO backbone, its pretrained weights, fast heads, and segmentors that test images of any size."""

from .heads import FCNHead, MultiLevelNeck, SegformerHead, UPerHead
from .segmentor import SlidingCascadeSegmentor, SlidingSegmentor, SlidingTTAModel
from .volo import ARCHITECTURES, VOLO

__all__ = [
    'ARCHITECTURES',
    'VOLO',
    'FCNHead',
    'MultiLevelNeck',
    'SegformerHead',
    'SlidingCascadeSegmentor',
    'SlidingSegmentor',
    'SlidingTTAModel',
    'UPerHead',
]
