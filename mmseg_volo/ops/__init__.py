"""Operators."""

from .outlook import explain, outlook_attention

__all__ = ['explain', 'outlook_attention']
