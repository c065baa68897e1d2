"""What plugs into mmengine's loops and optimisers."""

from .hooks import HostMemoryHook, SideBySideHook
from .layer_decay import VOLOLayerDecayConstructor
from .metric import SegmentationMetric
from .validation_pictures import ValidationPicturesHook

__all__ = [
    'HostMemoryHook',
    'SegmentationMetric',
    'SideBySideHook',
    'VOLOLayerDecayConstructor',
    'ValidationPicturesHook',
]
