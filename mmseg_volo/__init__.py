"""VOLO for MMSegmentation; importing it registers everything."""

from ._mm_packages import require_one_stack

require_one_stack()  # before the imports below run into what it explains

from ._version import __version__  # noqa: E402
from .checkpoints import DurableCheckpointHook, use_safe_loader  # noqa: E402
from .datasets import (  # noqa: E402
    CamVidDataset,
    FolderDataset,
    LoadRasterAnnotations,
    LoadRasterFromFile,
    PhotoMetricDistortion,
    RandomCrop,
)
from .engine import (  # noqa: E402
    BackboneLayerDecayConstructor,
    BeginSample,
    CPUMemoryHook,
    DurableEarlyStoppingHook,
    IterationSeedHook,
    NonFiniteLossHook,
    OneClassWarningHook,
    SideBySideHook,
    StreamSampler,
    ValidationPicturesHook,
    VOLOLayerDecayConstructor,
)
from .evaluation import SegmentationMetric  # noqa: E402
from .models import (  # noqa: E402
    ARCHITECTURES,
    COATNET_ARCHITECTURES,
    HVT,
    HVT_ARCHITECTURES,
    VOLO,
    CoAtNet,
    FCNHead,
    MultiLevelNeck,
    RasterDataPreProcessor,
    SegformerHead,
    SlidingCascadeSegmentor,
    SlidingSegmentor,
    SlidingTTAModel,
    UPerHead,
)

use_safe_loader()  # from here on mmengine reads checkpoints without running code in them

__all__ = [
    'ARCHITECTURES',
    'COATNET_ARCHITECTURES',
    'HVT',
    'HVT_ARCHITECTURES',
    'VOLO',
    'BackboneLayerDecayConstructor',
    'BeginSample',
    'CPUMemoryHook',
    'CamVidDataset',
    'CoAtNet',
    'DurableCheckpointHook',
    'DurableEarlyStoppingHook',
    'FCNHead',
    'FolderDataset',
    'IterationSeedHook',
    'LoadRasterAnnotations',
    'LoadRasterFromFile',
    'MultiLevelNeck',
    'NonFiniteLossHook',
    'OneClassWarningHook',
    'PhotoMetricDistortion',
    'RandomCrop',
    'RasterDataPreProcessor',
    'SegformerHead',
    'SegmentationMetric',
    'SideBySideHook',
    'SlidingCascadeSegmentor',
    'SlidingSegmentor',
    'SlidingTTAModel',
    'StreamSampler',
    'UPerHead',
    'VOLOLayerDecayConstructor',
    'ValidationPicturesHook',
    '__version__',
]
