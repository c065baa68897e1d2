"""VOLO for MMSegmentation; importing it registers everything."""

from ._stack import require_one_stack

require_one_stack()  # before the imports below run into what it explains

from ._version import __version__  # noqa: E402
from .datasets import CamVidDataset  # noqa: E402
from .engine import (  # noqa: E402
    BeginSample,
    DurableCheckpointHook,
    HostMemoryHook,
    IterationSeedHook,
    NonFiniteLossHook,
    OneClassWarningHook,
    SegmentationMetric,
    SideBySideHook,
    StreamSampler,
    ValidationPicturesHook,
    VOLOLayerDecayConstructor,
)
from .models import ARCHITECTURES, VOLO, SlidingSegmentor, SlidingTTAModel  # noqa: E402

__all__ = [
    'ARCHITECTURES',
    'VOLO',
    'BeginSample',
    'CamVidDataset',
    'DurableCheckpointHook',
    'HostMemoryHook',
    'IterationSeedHook',
    'NonFiniteLossHook',
    'OneClassWarningHook',
    'SegmentationMetric',
    'SideBySideHook',
    'SlidingSegmentor',
    'SlidingTTAModel',
    'StreamSampler',
    'VOLOLayerDecayConstructor',
    'ValidationPicturesHook',
    '__version__',
]
