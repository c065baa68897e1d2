"""VOLO for MMSegmentation; importing it registers everything."""

from ._stack import require_one_stack

require_one_stack()  # before the imports below run into what it explains

from ._version import __version__  # noqa: E402
from .datasets import CamVidDataset  # noqa: E402
from .engine import HostMemoryHook, SideBySideHook, VOLOLayerDecayConstructor  # noqa: E402
from .models import ARCHITECTURES, VOLO  # noqa: E402

__all__ = [
    'ARCHITECTURES',
    'VOLO',
    'CamVidDataset',
    'HostMemoryHook',
    'SideBySideHook',
    'VOLOLayerDecayConstructor',
    '__version__',
]
