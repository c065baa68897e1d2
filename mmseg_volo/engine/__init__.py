"""Hooks, samplers, wrappers and constructors for mmengine's training loop."""

from .early_stopping import DurableEarlyStoppingHook
from .layer_decay import BackboneLayerDecayConstructor, VOLOLayerDecayConstructor
from .memory import CPUMemoryHook
from .parallel import CPUDataParallel, ShardedRunner
from .pictures import SideBySideHook, ValidationPicturesHook
from .reproducible import BeginSample, IterationSeedHook, StreamSampler
from .safeguards import NonFiniteLossHook, OneClassWarningHook

__all__ = [
    'BackboneLayerDecayConstructor',
    'BeginSample',
    'CPUDataParallel',
    'CPUMemoryHook',
    'DurableEarlyStoppingHook',
    'IterationSeedHook',
    'NonFiniteLossHook',
    'OneClassWarningHook',
    'ShardedRunner',
    'SideBySideHook',
    'StreamSampler',
    'VOLOLayerDecayConstructor',
    'ValidationPicturesHook',
]
