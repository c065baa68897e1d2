"""Checkpoints: reading them safely, downloading them, writing them so that nothing is lost."""

from .hook import DurableCheckpointHook
from .reading import use_safe_loader

__all__ = ['DurableCheckpointHook', 'use_safe_loader']
