"""Operators."""

from . import outlook, resized_maps, strip_loss
from .biased_attention import biased_attention
from .outlook import outlook_attention
from .resized_maps import resized_conv

__all__ = ['biased_attention', 'explain', 'outlook_attention', 'resized_conv']


def explain() -> str:
    """Tables that show which implementation of each operator runs on this machine, and why the others do not."""
    tables = dict(
        outlook_attention=outlook.explain(),
        resized_conv=resized_maps.explain(),
        resized_cross_entropy=strip_loss.explain(),
    )
    return '\n'.join(f'{name}\n{table}' for name, table in tables.items())
