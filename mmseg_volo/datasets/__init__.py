"""Data sets and faster transforms that mmseg lacks, rasters, and checks of any data set."""

from .camvid import CamVidDataset
from .folder import FolderDataset
from .raster_loading import LoadRasterAnnotations, LoadRasterFromFile
from .transforms import PhotoMetricDistortion, RandomCrop

__all__ = [
    'CamVidDataset',
    'FolderDataset',
    'LoadRasterAnnotations',
    'LoadRasterFromFile',
    'PhotoMetricDistortion',
    'RandomCrop',
]
