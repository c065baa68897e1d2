"""Checkpoints: safe reading, downloads, and writing that survives interruptions."""

from .hook import DurableCheckpointHook
from .mmengine_loader import use_safe_loader

__all__ = ['DurableCheckpointHook', 'use_safe_loader']
