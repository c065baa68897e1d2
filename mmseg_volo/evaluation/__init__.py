"""Scores, the metric that computes them, and the report that shows them."""

from .metric import CityscapesLabelIds, SegmentationMetric

__all__ = ['CityscapesLabelIds', 'SegmentationMetric']
