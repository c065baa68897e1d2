"""Data sets and faster transforms that mmseg lacks, and checks of any data set."""

from .camvid import CamVidDataset
from .folder import FolderDataset
from .transforms import PhotoMetricDistortion, RandomCrop

__all__ = ['CamVidDataset', 'FolderDataset', 'PhotoMetricDistortion', 'RandomCrop']
