"""Measure a checkpoint, or write its label maps for a benchmark's server, with one call."""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import mmengine
import mmseg
import numpy as np
import timm
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmseg.datasets import ADE20KDataset, CityscapesDataset
from mmseg.registry import DATASETS
from prettytable import PrettyTable

from .._extras import without_tensorboard
from .._files import file_sha256
from .._version import __version__
from ..checkpoints.download import local_file
from ..config import LABEL_LOADERS, check_tta, data_sets, first_test_set, make_writable, set_work_dir, without_steps
from ..datasets.checks import check_data
from ..engine.console import runner_on_terminal
from ..engine.distributed import join_processes
from ..errors import UserError
from ..evaluation.report import comparison_table, read_run, summary, write_results
from ..evaluation.robustness import (
    check_corruptions,
    corruption_summary,
    corruption_table,
    damaged_pictures,
    measure_corruptions,
)
from ..export.loading import device_for, load_weights
from ..export.runtime import is_exported
from ..models.segmentor import SlidingSegmentor
from .sources import load_model, try_out

SERVER_FORMATS = {
    'cityscapes': (CityscapesDataset, dict(type='CityscapesLabelIds', format_only=True, keep_results=True)),
    'ade20k': (ADE20KDataset, dict(type='IoUMetric', format_only=True)),
}


def test(
    config: str,
    checkpoint: str | None = None,
    work_dir: str | None = None,
    out_dir: str | None = None,
    show_dir: str | None = None,
    tta: bool = False,
    compare: str | None = None,
    server_format: str | None = None,
    corruptions: bool = False,
    openvino: bool = False,
    cfg_options: dict | None = None,
    launcher: str = 'none',
    verbose: bool = False,
) -> dict:
    """Measure a checkpoint on the config's test set; returns the mean scores and writes a report.

    Args:
        config: a file, the name of a shipped config, ``hf://owner/name``, or a folder that ``mmseg-volo push`` wrote.
        checkpoint: a segmentor's weights, which must fit the config's model exactly, or an exported file. None takes
            those of ``config``.
        work_dir: folder for logs; ``work_dirs/<config name>`` by default.
        out_dir: folder for ``metrics.json``, ``report.html`` and the rest (docs/measuring.md); by default the work dir.
        show_dir: folder for one picture per image that shows image, truth and prediction.
        tta: average over the scales and flips of the config's ``tta_pipeline``.
        compare: ``metrics.json`` from another run on the same images.
        server_format: ``'cityscapes'`` or ``'ade20k'``: instead of measuring, write label maps in the format of that
            benchmark's server to a folder of that name in ``out_dir``. Needs no labels.
        corruptions: measure also under noise, blur, JPEG compression, darkness and fog, with three strengths each: 16
            times the work.
        openvino: run an exported file with OpenVINO.
        cfg_options: values that override the config, by dotted key.
        launcher: how the processes of a distributed run were started: ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        verbose: print everything that goes into the log file.

    Raises:
        UserError: the config, the data or the checkpoint cannot be used, or the two runs cannot be compared.
    """
    if server_format and (show_dir or compare or corruptions):
        raise UserError(
            '--format neither measures nor reads labels, so --show-dir, --compare and --corruptions cannot be used '
            'with it'
        )
    found = load_model(config, checkpoint, cfg_options or {}, with_data=True)
    cfg, checkpoint = found.config, found.checkpoint
    device_for(checkpoint, 'auto', openvino=openvino)
    if is_exported(checkpoint) and launcher != 'none':
        raise UserError(f'--launcher {launcher} does not go with {checkpoint}: an exported file runs in one process')
    config_sha256 = _sha256(cfg.pretty_text.encode())  # before this run's folders are set
    join_processes(cfg, launcher)
    cfg.load_from, cfg.resume = None, False
    if server_format:
        _leave_out_labels(cfg)
    check_data(cfg, ('test',))
    set_work_dir(cfg, config, work_dir)
    folder = make_writable(out_dir or cfg.work_dir)
    if show_dir:
        cfg.setdefault('custom_hooks', []).append(dict(type='SideBySideHook', out_dir=str(make_writable(show_dir))))
    if tta:
        check_tta(cfg, config)
        for settings in data_sets(cfg.test_dataloader.dataset):
            settings.pipeline = cfg.tta_pipeline
        cfg.model = dict(**cfg.tta_model, module=cfg.model)
    # The default repeats images until all processes have equally many; sums would count those twice.
    cfg.test_dataloader.sampler.round_up = False
    if server_format:
        unfinished = _use_server_format(cfg, server_format, folder)
    else:
        root = _common_folder(cfg)
        ignore_index = first_test_set(cfg).get('ignore_index', 255)
        cfg.test_evaluator = dict(type='SegmentationMetric', out_dir=str(folder), root=root, ignore_index=ignore_index)

    if corruptions:
        check_corruptions(cfg)

    without_tensorboard(cfg)
    with runner_on_terminal(cfg, verbose) as runner:
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        if isinstance(model, SlidingSegmentor):
            model.test_cfg.confidence = not tta  # whose average brings its own
        load_weights(model, checkpoint, cfg, openvino)
        if found.is_foreign:
            try_out(model, config)
        dataset = runner.test_dataloader.dataset
        if server_format:
            runner.test()
            if is_main_process():
                os.replace(unfinished, folder / server_format)
                runner.logger.info(f'{len(dataset)} label maps for the server: {folder / server_format}')
            return {}

        classes, images_sha256 = dataset.metainfo['classes'], _images_sha256(dataset, root)
        other = read_run(compare, classes, images_sha256) if compare else None  # before testing, which takes time
        metrics = runner.test()
        if is_main_process():
            totals = runner.test_evaluator.metrics[0].totals
            record = dict(
                **summary(totals, classes),
                images_sha256=images_sha256,
                tta=tta,
                config=str(config),
                config_sha256=config_sha256,
                checkpoint=str(checkpoint),
                checkpoint_sha256=file_sha256(local_file(str(checkpoint))),
                seed=runner.seed,
                date=datetime.now().isoformat(timespec='seconds'),
                device=f'cpu, {model.network}' if is_exported(checkpoint) else str(next(model.parameters()).device),
                versions={module.__name__: module.__version__ for module in (torch, mmengine, mmseg, timm, np)},
            )
            record['versions']['mmseg_volo'] = __version__
            write = partial(write_results, folder, record, totals, dataset.metainfo['palette'], other)
            page = write()
            if other:
                runner.logger.info(f'compared with {compare}:\n{comparison_table(record, totals, other)}')
            low, high = record['intervals']['mIoU']
            runner.logger.info(
                f'{_class_table(record["classes"])}\n{_calibration_table(record)}'
                f'mIoU {metrics["mIoU"]:.2f} (95 % interval {low:.2f} to {high:.2f}) on {totals.images} images; {page}'
            )
        if corruptions:
            rows = measure_corruptions(runner, cfg, folder)
            if is_main_process():
                record['corruptions'] = corruption_summary(rows, metrics['mIoU'])
                page = write(damaged=damaged_pictures(dataset.get_data_info(0)['img_path']))
                runner.logger.info(f'{corruption_table(record["corruptions"])}; {page}')
        return metrics


def _class_table(rows: Sequence[dict]) -> PrettyTable:
    """Scores per class, in per cent, for the classes that occur."""
    table = PrettyTable(['class', 'IoU', '95 % interval', 'Acc', 'Precision', 'BoundaryIoU'], align='r')
    table.align['class'] = 'l'
    for row in rows:
        if row['pixels']:
            iou, *others = ['' if row[key] is None else f'{row[key]:.2f}' for key in table.field_names if key in row]
            low, high = row['IoU_interval']
            table.add_row([row['name'], iou, f'{low:.2f} to {high:.2f}', *others])
    return table


def _calibration_table(record: dict) -> str:
    """ECE and the bins of confidence that hold pixels, in per cent; empty without probabilities."""
    if 'reliability' not in record:
        return ''
    table = PrettyTable(['confidence', 'mean', 'accuracy', 'pixels'], align='r')
    total = sum(row['pixels'] for row in record['reliability'])
    for row in record['reliability']:
        if row['pixels']:
            bounds = f'{row["low"]:.1f} to {row["high"]:.1f}'
            table.add_row(
                [bounds, *(f'{x:.2f}' for x in (row['confidence'], row['accuracy'], 100 * row['pixels'] / total))]
            )
    return f'{table}\nECE {record["metrics"]["ECE"]:.2f}\n'


def _common_folder(cfg: Config) -> str:
    """Folder that contains all test images."""
    roots = [
        os.path.join(settings.get('data_root') or '', settings.get('data_prefix', {}).get('img_path', ''))
        for settings in data_sets(cfg.test_dataloader.dataset)
    ]
    return os.path.commonpath([os.path.abspath(root) for root in roots])


def _images_sha256(dataset: BaseDataset, root: str) -> str:
    """Digest of the image names, by which two runs on the same images are recognised."""
    names = [os.path.relpath(dataset.get_data_info(i)['img_path'], root) for i in range(len(dataset))]
    return _sha256('\n'.join(sorted(names)).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _leave_out_labels(cfg: Config) -> None:
    """Load no labels, because those of a benchmark's test set are secret."""
    for settings in data_sets(cfg.test_dataloader.dataset):
        settings.get('data_prefix', {}).pop('seg_map_path', None)
        settings.pipeline = without_steps(settings.pipeline, LABEL_LOADERS)
    cfg.tta_pipeline = without_steps(cfg.get('tta_pipeline', []), LABEL_LOADERS)


def _use_server_format(cfg: Config, name: str, folder: Path) -> Path:
    """Make mmseg's writer the evaluator; returns the folder that it writes to."""
    benchmark, writer = SERVER_FORMATS[name]
    for settings in data_sets(cfg.test_dataloader.dataset):
        classes = DATASETS.build({**settings, 'pipeline': [], 'lazy_init': True}).metainfo['classes']
        if tuple(classes) != tuple(benchmark.METAINFO['classes']):
            raise UserError(
                f'--format {name} requires the {len(benchmark.METAINFO["classes"])} classes of that benchmark, '
                f'but this test set has {len(classes)} other classes'
            )
        if name == 'ade20k':
            settings.reduce_zero_label = True  # mmseg's writer then counts from 1
    if (folder / name).exists():
        raise UserError(f'{folder / name} already exists; delete it, or choose another --out-dir')
    if name == 'cityscapes' and importlib.util.find_spec('cityscapesscripts') is None:
        raise UserError("--format cityscapes requires cityscapesscripts: pip install 'mmseg-volo[cityscapes]'")
    unfinished = folder / f'.{name}.partial'
    if is_main_process():
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
    cfg.test_evaluator = dict(**writer, output_dir=str(unfinished))
    return unfinished
