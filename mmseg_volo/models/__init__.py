"""The backbones VOLO and CoAtNet, their pretrained weights, fast heads, and segmentors that test images of any size."""

from .coatnet import COATNET_ARCHITECTURES, CoAtNet
from .heads import FCNHead, MultiLevelNeck, SegformerHead, UPerHead
from .segmentor import SlidingCascadeSegmentor, SlidingSegmentor, SlidingTTAModel
from .volo import ARCHITECTURES, VOLO

__all__ = [
    'ARCHITECTURES',
    'COATNET_ARCHITECTURES',
    'VOLO',
    'CoAtNet',
    'FCNHead',
    'MultiLevelNeck',
    'SegformerHead',
    'SlidingCascadeSegmentor',
    'SlidingSegmentor',
    'SlidingTTAModel',
    'UPerHead',
]
