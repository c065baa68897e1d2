"""Pictures of predictions, during training and testing."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample

from ..visualization import save_whole, truth_and_prediction

MAX_HEIGHT = 512  # in pixels: what a browser shows, and a tenth of the bytes of a Cityscapes image


@HOOKS.register_module()
class ValidationPicturesHook(Hook):
    """Send the same few images, with truth and prediction, to the visualizer's backends after every validation.

    mmseg's ``SegVisualizationHook`` would draw every image of a test, too, and 15 s at each of Cityscapes' size.

    Args:
        count: images per validation, at most, evenly spread.
    """

    def __init__(self, count: int = 4):
        self.count = count

    @master_only
    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[SegDataSample]
    ) -> None:
        """Once per batch; its first image may be drawn."""
        loader = runner.val_dataloader
        if batch_idx % -(-len(loader) // self.count):
            return
        sample, meta = outputs[0], loader.dataset.metainfo
        image = mmcv.imread(sample.img_path, channel_order='rgb')
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
    """Write image, truth and prediction of every tested image into one picture.

    Args:
        out_dir: gets ``<image's stem>.png``.
    """

    def __init__(self, out_dir: str):
        self.out_dir = Path(out_dir)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[SegDataSample]
    ) -> None:
        """Once per batch."""
        meta = runner.test_dataloader.dataset.metainfo
        for sample in outputs:
            image = mmcv.imread(sample.img_path, channel_order='rgb')
            truth = sample.gt_sem_seg.data[0].cpu().numpy().astype(np.uint8)
            prediction = sample.pred_sem_seg.data[0].cpu().numpy()
            save_whole(
                truth_and_prediction(image, truth, prediction, meta['classes'], meta['palette']),
                self.out_dir / f'{Path(sample.img_path).stem}.png',
            )
