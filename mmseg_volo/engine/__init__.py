"""What plugs into mmengine's loops and optimisers."""

from .hooks import HostMemoryHook, SideBySideHook
from .layer_decay import VOLOLayerDecayConstructor

__all__ = ['HostMemoryHook', 'SideBySideHook', 'VOLOLayerDecayConstructor']
