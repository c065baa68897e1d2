"""Scores, the metrics that compute them, and the report."""

from .metric import CityscapesLabelIds, SegmentationMetric

__all__ = ['CityscapesLabelIds', 'SegmentationMetric']
