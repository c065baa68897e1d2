"""Pre-train a classifier with one call."""

import warnings

from mmengine.runner import Runner

from .._extras import require
from ..config import load_any_config, set_work_dir
from ..engine.distributed import join_processes
from ..errors import UserError
from .training import run_training, set_options


def pretrain(
    config: str,
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    cfg_options: dict | None = None,
    launcher: str = 'none',
    seed: int | None = None,
    deterministic: bool = False,
    verbose: bool = False,
) -> Runner:
    """Train the classifier of a config with mmpretrain and return the runner; the arguments are those of ``train``.

    Raises:
        UserError: mmpretrain is missing, or the config, the data or a checkpoint cannot be used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about operators of mmcv that nothing here uses
        require('mmpretrain.models', 'pretrain', 'mmseg-volo pretrain')
    cfg = load_any_config(config, cfg_options or {})
    if 'decode_head' in cfg.model:
        raise UserError(f'{config} trains a segmentor, not a classifier; use mmseg-volo train')
    join_processes(cfg, launcher)
    set_options(cfg, config, amp, auto_scale_lr)
    set_work_dir(cfg, config, work_dir)
    return run_training(cfg, resume, seed, deterministic, verbose)
