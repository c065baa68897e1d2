"""Train a segmentor with one call."""

import errno
import os
import re

import torch
from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS, MODELS
from torch import nn

from .._extras import without_tensorboard
from ..checkpoints.download import local_copy
from ..checkpoints.hook import DurableCheckpointHook, newest_whole_checkpoint
from ..checkpoints.mmengine_loader import read_ahead
from ..config import data_sets, decode_heads, load_config, set_work_dir, type_name
from ..datasets.checks import check_data
from ..engine.console import runner_on_terminal
from ..engine.denormals import denormals_as_zero
from ..engine.distributed import join_processes
from ..engine.finetuning import FinetuneHook, leave_out_pretrained
from ..engine.reproducible import BeginSample
from ..errors import UserError
from ..models.segmentor import compile_backbone


def train(
    config: str,
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    cfg_options: dict | None = None,
    launcher: str = 'none',
    seed: int | None = None,
    deterministic: bool = False,
    compile: bool = False,
    verbose: bool = False,
    finetune: str | None = None,
    same_classes: bool = False,
) -> Runner:
    """Train the model of a config and return the runner.

    SIGTERM and Ctrl-C save a checkpoint and exit with 128 + the signal number.

    Args:
        config: a file, or the name of a shipped config.
        work_dir: folder for checkpoints and logs; ``work_dirs/<config name>`` by default.
        resume: a checkpoint to resume from; ``'auto'`` for the newest undamaged one in the work dir, if any.
        amp: mixed precision, on a GPU.
        auto_scale_lr: scale the learning rate to the batch size of this run.
        cfg_options: values that override the config, by dotted key.
        launcher: how the processes of a distributed run were started: ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        seed: random seed for Python, NumPy and PyTorch; None keeps that of a resumed run, else draws one and logs it.
        deterministic: use only operators that give the same bits in every run; slower on a GPU.
        compile: run the backbone under ``torch.compile``.
        verbose: print everything that goes into the log file.
        finetune: checkpoint of a segmentor to start from instead of the weights that the config names: a path, a URL or
            ``hf://owner/name``. Rows of the classifiers are matched by the names of the classes. Not used if
            ``resume='auto'`` finds a checkpoint.
        same_classes: match the rows by position, for a checkpoint that does not name its classes.

    Raises:
        UserError: before the first iteration, if the config, the data or a checkpoint cannot be used; later, for a loss
            that is not finite, a data-loader worker that dies, or a full disk.
    """
    cfg = load_config(config, cfg_options or {})
    join_processes(cfg, launcher)
    set_options(cfg, config, amp, auto_scale_lr)
    _check_batch(cfg)
    _check_start(cfg, resume, finetune, same_classes)
    _check_averaging(cfg)
    check_data(cfg, ('train', 'val') if cfg.get('val_dataloader') else ('train',))
    set_work_dir(cfg, config, work_dir)
    start = None
    if finetune is not None:
        leave_out_pretrained(cfg.model)
        start = FinetuneHook(finetune, same_classes)
    return run_training(cfg, resume, seed, deterministic, verbose, compile, start)


def set_options(cfg: Config, name: str, amp: bool, auto_scale_lr: bool) -> None:
    """Set mixed precision and the scaling of the learning rate; raises ``UserError`` if ``cfg`` does not allow them."""
    if amp:
        _enable_amp(cfg)
    if auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise UserError(f'--auto-scale-lr requires auto_scale_lr=dict(base_batch_size=...) in {name}')
        cfg.auto_scale_lr.enable = True


@denormals_as_zero()
def run_training(
    cfg: Config,
    resume: str | None,
    seed: int | None,
    deterministic: bool,
    verbose: bool,
    compile: bool = False,
    start: FinetuneHook | None = None,
) -> Runner:
    """Train the model of a checked config in ``cfg.work_dir``; see ``train``."""
    cfg.resume = resume is not None
    kept_seed = _find_start(cfg, resume)
    _set_randomness(cfg, kept_seed if seed is None else seed, deterministic)
    if start and cfg.load_from:  # the run is resumed
        start = None
    elif start:
        start.read()

    lacks_tensorboard = without_tensorboard(cfg)
    with runner_on_terminal(cfg, verbose) as runner:
        if lacks_tensorboard:
            runner.logger.info("TensorBoard gets no data: pip install 'mmseg-volo[tensorboard]'")
        if compile:
            compile_backbone(runner.model.module if is_model_wrapper(runner.model) else runner.model)
        if cfg.resume and cfg.load_from:
            runner.logger.info(f'resuming from {cfg.load_from}')
        if start:
            runner.register_hook(start)
        try:
            runner.train()
        except RuntimeError as error:
            _explain_dead_worker(error, runner)
            raise
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f'no space left on the device of {cfg.work_dir}; free some and continue with --resume: the checkpoints '
                'are intact'
            ) from None
        best = runner.message_hub.runtime_info.get('best_ckpt')
        if best:
            runner.logger.info(f'best checkpoint: {best}')
    return runner


def _check_start(cfg: Config, resume: str | None, finetune: str | None, same_classes: bool) -> None:
    if same_classes and finetune is None:
        raise UserError('--same-classes says how to read the checkpoint of --finetune, which is missing')
    if finetune is not None and resume not in (None, 'auto'):
        raise UserError(
            f'--finetune {finetune} and --resume {resume} name two checkpoints to start from; --resume without a path '
            'goes with --finetune'
        )
    if finetune is not None and cfg.get('load_from'):
        raise UserError(f'--finetune {finetune} and load_from={cfg.load_from!r} name two checkpoints to start from')


def _check_averaging(cfg: Config) -> None:
    """Check what mmengine's EMAHook does not check, or only once the model has been built."""
    end = (cfg.get('train_cfg') or {}).get('max_iters')
    for hook in cfg.get('custom_hooks') or []:
        if not isinstance(hook, dict) or 'type' not in hook or type_name(hook) != 'EMAHook':
            continue
        average = HOOKS.build(hook).ema_cfg
        MODELS.build({'model': nn.Identity(), **average})  # in a training, mmengine would not say what it built
        interval, begin = hook.get('interval', 1), hook.get('begin_iter', 0)
        if type(interval) is not int or interval < 1:
            raise UserError(f'interval of EMAHook must be an integer of at least 1, got {interval!r}')
        if end is not None and begin > end:
            raise UserError(f'begin_iter of EMAHook must be at most max_iters={end}, got {begin}')
        if end is not None and hook.get('begin_epoch'):
            raise UserError('begin_epoch of EMAHook does not go with max_iters; use begin_iter')


def _find_start(cfg: Config, resume: str | None) -> int | None:
    """Set ``cfg.load_from`` to a readable checkpoint; returns the seed of the run that is resumed."""
    contents: dict = {}
    if resume == 'auto':
        cfg.load_from, contents = newest_whole_checkpoint(cfg.work_dir) or (None, {})
    elif resume is not None or cfg.get('load_from'):
        cfg.load_from = local_copy(resume or cfg.load_from)
        contents = read_ahead(cfg.load_from)
    if not (cfg.resume and contents):
        return None
    if not {'meta', 'message_hub', 'optimizer'} <= contents.keys():
        raise UserError(
            f'--resume cannot use {cfg.load_from}, which holds no optimizer: resume from an iter_*.pth, '
            f'or start a new run from its weights with --cfg-options load_from={cfg.load_from}'
        )
    return contents['meta'].get('seed')


def _set_randomness(cfg: Config, seed: int | None, deterministic: bool) -> None:
    cfg.setdefault('randomness', dict(seed=None))
    if seed is not None:
        cfg.randomness.seed = seed
    if deterministic:
        cfg.randomness.deterministic = True
        cfg.env_cfg.cudnn_benchmark = False
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # PyTorch requires it for matrix products on a GPU


def _explain_dead_worker(error: RuntimeError, runner: Runner) -> None:
    """If a data-loader worker died, raise ``UserError`` with the file that it was reading."""
    dead = re.search(r'DataLoader worker \(pid(?:\(s\))? (\d+)[\d, ]*\) (.*)', str(error))
    if dead is None:
        return
    for hook in runner.hooks:
        if isinstance(hook, DurableCheckpointHook):
            hook.exit_if_asked(runner)  # the signal may have ended the workers, too
    file = None
    for dataset in data_sets(runner.train_dataloader.dataset):
        for transform in dataset.pipeline.transforms:
            if isinstance(transform, BeginSample):
                file = file or transform.last_file(int(dead[1]))
    raise UserError(
        f'data-loader worker {dead[1]} {dead[2].rstrip(". ")} while reading {file or "data"}; '
        'if memory ran out, use fewer workers: --cfg-options train_dataloader.num_workers=1'
    ) from None


def _enable_amp(cfg: Config) -> None:
    if not torch.cuda.is_available():
        raise UserError('--amp requires a GPU, but PyTorch finds none; leave it out on a CPU')
    if type_name(cfg.optim_wrapper) not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(f'--amp requires OptimWrapper, but the config has {type_name(cfg.optim_wrapper)}')
    dtype = cfg.optim_wrapper.get('dtype') or ('bfloat16' if torch.cuda.is_bf16_supported() else 'float16')
    # bfloat16 has float32's range: nothing to scale.
    loss_scale = cfg.optim_wrapper.get('loss_scale', 1.0 if dtype == 'bfloat16' else 'dynamic')
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype, loss_scale=loss_scale)


def _check_batch(cfg: Config) -> None:
    if cfg.train_dataloader.batch_size != 1 or (cfg.launcher != 'none' and cfg.get('sync_bn')):
        return
    for head in decode_heads(cfg):
        kind, norm = type_name(head), head.get('norm_cfg') or {}
        pools_to_one_pixel = kind in ('UPerHead', 'PSPHead') and 1 in head.get('pool_scales', (1,))
        if pools_to_one_pixel and norm.get('type') in ('BN', 'SyncBN', 'BN2d'):
            raise UserError(
                f'train_dataloader.batch_size=1 cannot train {kind}: BatchNorm sees one pixel per channel in its '
                'pyramid pooling; use 2 or more, or GroupNorm: '
                '--cfg-options model.decode_head.norm_cfg.type=GN model.decode_head.norm_cfg.num_groups=16'
            )
