"""mIoU of a checkpoint, one call."""

import json
import os
from datetime import datetime
from pathlib import Path

import mmengine
import mmseg
import timm
import torch
from mmengine.dist import is_main_process
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner

from ..models.weights import load_segmentor
from .config import check_data, load_config, make_writable, set_work_dir


def test(
    config: str,
    checkpoint: str,
    work_dir: str | None = None,
    out: str | None = None,
    show_dir: str | None = None,
    tta: bool = False,
    cfg_options: dict | None = None,
    launcher: str = 'none',
) -> dict:
    """Measure a checkpoint on the config's test set; returns and saves ``metrics.json``.

    Args:
        checkpoint: of a segmentor; it must fit the config's model exactly.
        out: folder of ``metrics.json``, the work dir by default.
        show_dir: folder for one picture per image: image, truth, prediction.
        tta: average over the scales and flips of the config's ``tta_pipeline``.

    Raises:
        UserError: config, data or checkpoint cannot work.
    """
    cfg = load_config(config, cfg_options or {})
    cfg.launcher = launcher
    cfg.load_from, cfg.resume = None, False
    check_data(cfg, ('test',))
    set_work_dir(cfg, config, work_dir)
    folder = make_writable(out or cfg.work_dir)
    if show_dir:
        cfg.setdefault('custom_hooks', []).append(dict(type='SideBySideHook', out_dir=str(make_writable(show_dir))))
    if tta:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(**cfg.tta_model, module=cfg.model)

    runner = Runner.from_cfg(cfg)
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    load_segmentor(model, checkpoint)
    metrics = runner.test()

    if is_main_process():
        report = dict(
            metrics={key: float(metrics[key]) for key in ('mIoU', 'mAcc', 'aAcc')},
            images=len(runner.test_dataloader.dataset),
            tta=tta,
            config=str(config),
            checkpoint=str(checkpoint),
            date=datetime.now().isoformat(timespec='seconds'),
            device=str(next(model.parameters()).device),
            versions=dict(
                torch=torch.__version__, mmengine=mmengine.__version__, mmseg=mmseg.__version__, timm=timm.__version__
            ),
        )
        write_whole(folder / 'metrics.json', json.dumps(report, indent=2) + '\n')
        runner.logger.info(
            f'mIoU {report["metrics"]["mIoU"]:.2f} on {report["images"]} images; {folder / "metrics.json"}'
        )
    return metrics


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name first, so that nobody finds half of it."""
    partial = path.with_name(path.name + '.partial')
    partial.write_text(text)
    os.replace(partial, path)
