"""The backbones, their pretrained weights, fast heads, and segmentors that test images of any size."""

from .coatnet import COATNET_ARCHITECTURES, CoAtNet
from .heads import FCNHead, MultiLevelNeck, SegformerHead, UPerHead
from .hvt import HVT, HVT_ARCHITECTURES
from .raster_preprocessor import RasterDataPreProcessor
from .segmentor import SlidingCascadeSegmentor, SlidingSegmentor, SlidingTTAModel
from .volo import ARCHITECTURES, VOLO

__all__ = [
    'ARCHITECTURES',
    'COATNET_ARCHITECTURES',
    'HVT',
    'HVT_ARCHITECTURES',
    'VOLO',
    'CoAtNet',
    'FCNHead',
    'MultiLevelNeck',
    'RasterDataPreProcessor',
    'SegformerHead',
    'SlidingCascadeSegmentor',
    'SlidingSegmentor',
    'SlidingTTAModel',
    'UPerHead',
]
