"""Training, one call."""

import torch
from mmengine.config import Config
from mmengine.runner import Runner, find_latest_checkpoint

from ..errors import UserError
from ..models.weights import local_copy, read_checkpoint
from .check_data import check_data
from .config import load_config, set_work_dir


def train(
    config: str,
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    cfg_options: dict | None = None,
    launcher: str = 'none',
    seed: int | None = None,
) -> Runner:
    """Train what ``config`` describes, and return the runner.

    Args:
        resume: ``'auto'`` for the newest checkpoint in the work dir, a path, or None.
        seed: of Python, numpy and torch; None draws one and logs it.

    Raises:
        UserError: before the first iteration, for anything in config, data or checkpoints that cannot work.
    """
    cfg = load_config(config, cfg_options or {})
    cfg.launcher = launcher
    if seed is not None:
        cfg.randomness = dict(seed=seed)
    if amp:
        _enable_amp(cfg)
    if auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise UserError(f'--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in {config}')
        cfg.auto_scale_lr.enable = True
    _check_batch(cfg)
    check_data(cfg, ('train', 'val'))
    set_work_dir(cfg, config, work_dir)
    cfg.resume = resume is not None
    if resume is not None:
        cfg.load_from = find_latest_checkpoint(cfg.work_dir) if resume == 'auto' else resume
    if cfg.get('load_from'):
        cfg.load_from = local_copy(cfg.load_from)
        read_checkpoint(cfg.load_from)  # mmengine's own loader runs whatever code a file asks it to
    runner = Runner.from_cfg(cfg)
    runner.train()
    best = runner.message_hub.runtime_info.get('best_ckpt')
    if best:
        runner.logger.info(f'best checkpoint: {best}')
    return runner


def _enable_amp(cfg: Config) -> None:
    if not torch.cuda.is_available():
        raise UserError('--amp needs a GPU, and torch finds none; leave it out on a CPU')
    if cfg.optim_wrapper.type not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(f'--amp goes with OptimWrapper, but the config has {cfg.optim_wrapper.type}')
    dtype = cfg.optim_wrapper.get('dtype') or ('bfloat16' if torch.cuda.is_bf16_supported() else 'float16')
    # bfloat16 has float32's range: nothing to scale.
    loss_scale = cfg.optim_wrapper.get('loss_scale', 1.0 if dtype == 'bfloat16' else 'dynamic')
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype, loss_scale=loss_scale)


def _check_batch(cfg: Config) -> None:
    head = cfg.model.decode_head
    pools_to_one_pixel = head.type in ('UPerHead', 'PSPHead') and 1 in head.get('pool_scales', (1,))
    normalises_batches = (head.get('norm_cfg') or {}).get('type') in ('BN', 'SyncBN', 'BN2d')
    synced = cfg.launcher != 'none' and cfg.get('sync_bn')
    if cfg.train_dataloader.batch_size == 1 and pools_to_one_pixel and normalises_batches and not synced:
        raise UserError(
            f'train_dataloader.batch_size=1 cannot train {head.type}: BatchNorm sees one pixel per channel in its '
            'pyramid pooling; use 2 or more, or --cfg-options model.decode_head.norm_cfg.type=LN2d'
        )
