"""Data sets and faster transforms that mmseg lacks, and checks of any data set."""

from .camvid import CamVidDataset
from .raster_loading import LoadRasterAnnotations, LoadRasterFromFile
from .transforms import PhotoMetricDistortion, RandomCrop

__all__ = ['CamVidDataset', 'LoadRasterAnnotations', 'LoadRasterFromFile', 'PhotoMetricDistortion', 'RandomCrop']
