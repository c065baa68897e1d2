"""Data sets that mmseg lacks, and checks of any data set."""

from .camvid import CamVidDataset

__all__ = ['CamVidDataset']
