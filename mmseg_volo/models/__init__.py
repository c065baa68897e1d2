"""The backbones, their pretrained weights, fast heads, and segmentors that test images of any size."""

from .heads import FCNHead, MultiLevelNeck, SegformerHead, UPerHead
from .hvt import HVT, HVT_ARCHITECTURES
from .segmentor import SlidingCascadeSegmentor, SlidingSegmentor, SlidingTTAModel
from .volo import ARCHITECTURES, VOLO

__all__ = [
    'ARCHITECTURES',
    'HVT',
    'HVT_ARCHITECTURES',
    'VOLO',
    'FCNHead',
    'MultiLevelNeck',
    'SegformerHead',
    'SlidingCascadeSegmentor',
    'SlidingSegmentor',
    'SlidingTTAModel',
    'UPerHead',
]
