"""What plugs into mmengine's loops and optimisers."""

from .checkpoints import DurableBackend, DurableCheckpointHook
from .data_parallel import HostDataParallel, ShardedRunner
from .hooks import HostMemoryHook, SideBySideHook
from .layer_decay import VOLOLayerDecayConstructor
from .metric import SegmentationMetric
from .reproducible import BeginSample, IterationSeedHook, StreamSampler
from .safeguards import NonFiniteLossHook, OneClassWarningHook
from .validation_pictures import ValidationPicturesHook

__all__ = [
    'BeginSample',
    'DurableBackend',
    'DurableCheckpointHook',
    'HostDataParallel',
    'HostMemoryHook',
    'IterationSeedHook',
    'NonFiniteLossHook',
    'OneClassWarningHook',
    'SegmentationMetric',
    'ShardedRunner',
    'SideBySideHook',
    'StreamSampler',
    'VOLOLayerDecayConstructor',
    'ValidationPicturesHook',
]
