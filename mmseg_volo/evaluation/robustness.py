"""Scores on damaged images: noise, blur, JPEG, darkness and fog."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.runner import Runner
from PIL import Image
from prettytable import PrettyTable
from tqdm import tqdm

from ..config import data_sets, type_name
from ..datasets.corruptions import CORRUPTIONS, STRENGTHS, Corruption
from ..errors import UserError
from ..rasters import read_rgb
from ..visualization import jpeg
from .scores import Totals, interval

ROUNDS = [(kind, strength) for kind in CORRUPTIONS for strength in STRENGTHS]
WIDTH = 320  # maximum of a picture in the report
LOADERS = ('LoadImageFromFile', 'LoadImageFromNDArray')


def check_corruptions(cfg: Config) -> None:
    """Raise ``UserError`` unless imagecorruptions is installed and the images can be damaged once they are read."""
    Corruption('fog', 1)
    for settings in data_sets(cfg.test_dataloader.dataset):
        _corrupted(settings, 'fog', 1)


def measure_corruptions(runner: Runner, cfg: Config, folder: Path) -> list[dict[str, Any]]:
    """Measure a runner's model on its test images, damaged in five ways with three strengths each.

    Args:
        runner: its model has the weights.
        cfg: names the test set and the metric, a ``SegmentationMetric``.
        folder: temporary files go into a folder in it.

    Returns:
        ``kind``, ``strength``, ``mIoU`` and ``mIoU_interval`` for each; only in the main process.
    """
    scratch = folder / '.corruptions'
    scratch.mkdir(exist_ok=True)
    images = len(ROUNDS) * len(runner.test_dataloader)
    silent = None if is_main_process() else True  # None: unless the output is a terminal
    runner.model.eval()
    rows = []
    try:
        with tqdm(desc='damaged images', total=images, leave=False, disable=silent) as bar:
            for kind, strength in ROUNDS:
                totals = _totals(runner, cfg, kind, strength, scratch, bar)
                if totals:
                    bounds = [float(bound) for bound in interval(totals.bootstrap_scores()['mIoU'])]
                    score = totals.mean_scores()['mIoU']
                    rows.append(dict(kind=kind, strength=strength, mIoU=score, mIoU_interval=bounds))
    finally:
        if is_main_process():
            shutil.rmtree(scratch, ignore_errors=True)
    return rows


def corruption_summary(rows: list[dict[str, Any]], miou: float) -> dict[str, Any]:
    """What ``metrics.json`` says of damaged images.

    Args:
        rows: what ``measure_corruptions`` returned.
        miou: of the images as they are, in percent.

    Returns:
        ``mPC``, the mean mIoU of the rows, ``rPC``, that in percent of ``miou`` (arXiv 1907.07484), and ``rows``.
    """
    mean = float(np.mean([row['mIoU'] for row in rows]))
    return dict(mPC=mean, rPC=100 * mean / miou if miou else None, rows=rows)


def corruption_table(found: dict[str, Any]) -> str:
    """mIoU by kind and strength, from ``corruption_summary``."""
    table = PrettyTable(['mIoU with', *(f'strength {strength}' for strength in STRENGTHS)], align='r')
    table.align['mIoU with'] = 'l'
    for kind in CORRUPTIONS:
        table.add_row([kind, *(f'{row["mIoU"]:.2f}' for row in found['rows'] if row['kind'] == kind)])
    share = '' if found['rPC'] is None else f', {found["rPC"]:.1f} % of that of the images as they are (rPC)'
    return f'{table}\nmean mIoU of damaged images (mPC) {found["mPC"]:.2f}{share}'


def damaged_pictures(path: str) -> list[bytes]:
    """JPEGs of an image, damaged as in each row."""
    image = np.ascontiguousarray(read_rgb(path)[..., ::-1])
    pictures = []
    for kind, strength in ROUNDS:
        damaged = Corruption(kind, strength)(dict(img=image, img_path=path))['img']
        picture = Image.fromarray(damaged[..., ::-1])
        picture.thumbnail((WIDTH, WIDTH))
        pictures.append(jpeg(picture))
    return pictures


def _totals(runner: Runner, cfg: Config, kind: str, strength: int, folder: Path, bar: tqdm) -> Totals | None:
    """Counts over the test set with one kind of damage, in the main process."""
    settings = copy.deepcopy(cfg.test_dataloader)
    settings.persistent_workers = False
    for dataset in data_sets(settings.dataset):
        dataset.pipeline = _corrupted(dataset, kind, strength)
    loader = runner.build_dataloader(settings, seed=runner.seed)
    evaluator: Any = runner.build_evaluator(dict(cfg.test_evaluator, out_dir=str(folder)))
    evaluator.dataset_meta = loader.dataset.metainfo
    for batch in loader:
        with torch.no_grad():
            outputs = runner.model.test_step(batch)
        evaluator.process(data_samples=outputs, data_batch=batch)
        bar.update()
    evaluator.evaluate(len(loader.dataset))
    return evaluator.metrics[0].totals


def _corrupted(settings: Any, kind: str, strength: int) -> list[dict]:
    """A data set's pipeline with damage right after the image is read."""
    steps = list(settings.pipeline)
    loaders = [i for i, step in enumerate(steps) if type_name(step) in LOADERS]
    if not loaders:
        raise UserError('--corruptions needs 8-bit colour images, read by LoadImageFromFile in the test pipeline')
    steps.insert(loaders[0] + 1, dict(type=Corruption, kind=kind, strength=strength))
    return steps
