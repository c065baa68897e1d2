"""Operators."""

from . import outlook, resized_maps
from .biased_attention import biased_attention
from .outlook import outlook_attention
from .resized_maps import resized_conv

__all__ = ['biased_attention', 'explain', 'outlook_attention', 'resized_conv']


def explain() -> str:
    """Tables that show which implementation of each operator runs on this machine, and why the others do not."""
    return f'outlook_attention\n{outlook.explain()}\nresized_conv\n{resized_maps.explain()}'
