"""Hooks that save predictions as pictures during training and testing."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample

from .._files import distinct_names
from ..rasters import read_rgb
from ..visualization import save_whole, truth_and_prediction

MAX_HEIGHT = 512  # pixels: enough for a browser, and a tenth of the bytes of a Cityscapes image


@HOOKS.register_module()
class ValidationPicturesHook(Hook):
    """Send the same few images, with truth and prediction, to the visualizer's backends after every validation.

    mmseg's ``SegVisualizationHook`` also draws during tests, and takes 15 s for an image of Cityscapes' size.

    Args:
        count: largest number of images per validation; they are evenly spread over the data set.
    """

    def __init__(self, count: int = 4):
        self.count = count

    @master_only
    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[SegDataSample]
    ) -> None:
        """Draw the first image of a batch if it is one of the few."""
        loader = runner.val_dataloader
        if batch_idx % -(-len(loader) // self.count):
            return
        sample, meta = outputs[0], loader.dataset.metainfo
        image = read_rgb(sample.img_path)
        truth = sample.gt_sem_seg.data[0].cpu().numpy().astype(np.uint8)
        prediction = sample.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)
        height, width = truth.shape
        if height > MAX_HEIGHT:
            size = round(width * MAX_HEIGHT / height), MAX_HEIGHT
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            truth, prediction = (cv2.resize(x, size, interpolation=cv2.INTER_NEAREST) for x in (truth, prediction))
        page = truth_and_prediction(image, truth, prediction, meta['classes'], meta['palette'])
        runner.visualizer.add_image(f'val_{Path(sample.img_path).stem}', np.asarray(page), runner.iter)


@HOOKS.register_module()
class SideBySideHook(Hook):
    """Save image, truth and prediction of every tested image side by side as one picture.

    Args:
        out_dir: folder for ``<image name>.png``, with the image's subfolders if two images have the same name.
    """

    def __init__(self, out_dir: str):
        self.out_dir = Path(out_dir)

    def before_test_epoch(self, runner: Runner) -> None:
        """Choose a distinct name for each image."""
        dataset = runner.test_dataloader.dataset
        paths = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
        self.names = distinct_names(list(dict.fromkeys(paths)))

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[SegDataSample]
    ) -> None:
        """Save the pictures of a batch."""
        meta = runner.test_dataloader.dataset.metainfo
        for sample in outputs:
            image = read_rgb(sample.img_path)
            truth = sample.gt_sem_seg.data[0].cpu().numpy().astype(np.uint8)
            prediction = sample.pred_sem_seg.data[0].cpu().numpy()
            save_whole(
                truth_and_prediction(image, truth, prediction, meta['classes'], meta['palette']),
                self.out_dir / f'{self.names[sample.img_path]}.png',
            )
