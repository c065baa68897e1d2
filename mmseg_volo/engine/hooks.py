"""Hooks for mmengine's loops."""

import resource
from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample

from ..pictures import save_whole, truth_and_prediction


@HOOKS.register_module()
class HostMemoryHook(Hook):
    """Log the peak resident memory in MB where there is no GPU, whose memory mmengine logs itself."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Once per iteration."""
        if not torch.cuda.is_available():
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            runner.message_hub.update_scalar('train/memory', kilobytes // 1024)


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
