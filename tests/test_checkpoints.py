"""A stopped run leaves complete checkpoints; a resumed run ends with the same weights as an uninterrupted one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import MessageHub
from mmseg.registry import HOOKS

from mmseg_volo import DurableCheckpointHook, DurableEarlyStoppingHook
from mmseg_volo.apis.testing import test as measure
from mmseg_volo.apis.training import train
from mmseg_volo.checkpoints.hook import DurableBackend, newest_whole_checkpoint
from mmseg_volo.checkpoints.reading import read_checkpoint
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.engine.parallel import ShardedRunner
from mmseg_volo.error_messages import one_sentence_errors
from mmseg_volo.errors import UserError

CONFIG = str(ROOT / 'configs/volo_tiny_toy_streets.py')
ITERATIONS = 6
# Its momentum falls from 1 to 0.25 in these iterations, so that it depends on the steps that a checkpoint remembers.
AVERAGE = dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=0.2, gamma=2, update_buffers=True)
# A rise that no validation reaches: training stops after the third.
STOP = dict(type='DurableEarlyStoppingHook', patience=2, min_delta=100)


class Lightning(Exception):
    pass


@HOOKS.register_module()
class DoAtHook(Hook):
    """Send this process a signal, or raise ``Lightning``, at the start of an iteration."""

    def __init__(self, iteration: int, number: int | None = None):
        self.iteration, self.number = iteration, number

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == self.iteration:
            if self.number is None:
                raise Lightning
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope='module')
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('toy')
    make_toy_streets(folder, train=4, val=2, size=(96, 64))
    return folder


def run(toy: Path, work_dir: Path, *hooks: dict, **settings: object):
    options = {
        'data_root': str(toy),
        'train_cfg.max_iters': ITERATIONS,
        'train_cfg.val_interval': 2,
        'default_hooks.checkpoint.interval': 2,
        'default_hooks.checkpoint.max_keep_ckpts': 2,
        'train_dataloader.batch_size': 2,
        'model.backbone.drop_path_rate': 0.3,
        'visualizer.vis_backends': [dict(type='LocalVisBackend')],
        'custom_hooks': [AVERAGE, *hooks],
    }
    for loader in ('train', 'val', 'test'):
        options |= {f'{loader}_dataloader.num_workers': 0, f'{loader}_dataloader.persistent_workers': False}
    options |= settings.pop('cfg_options', {})
    return train(CONFIG, str(work_dir), cfg_options=options, **settings)


@HOOKS.register_module()
class KeepValidatedHook(Hook):
    """Save the weights that are validated, and their scores."""

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        torch.save(runner.model.state_dict(), Path(runner.work_dir) / f'validated_{runner.iter}')

    def after_val_epoch(self, runner, metrics=None):
        Path(runner.work_dir, f'scores_{runner.iter}.json').write_text(
            json.dumps({key: float(value) for key, value in metrics.items()})
        )


@pytest.fixture(scope='module')
def whole(toy, tmp_path_factory) -> Path:
    """Work dir of an uninterrupted run."""
    work_dir = tmp_path_factory.mktemp('whole')
    run(toy, work_dir, dict(type='KeepValidatedHook'), seed=0)
    return work_dir


def assert_ended_as(work_dir: Path, whole: Path) -> None:
    names = [sorted(path.name for path in folder.glob('*.pth*')) for folder in (work_dir, whole)]
    assert names[0] == names[1]
    for name in names[0]:
        one, other = read_checkpoint(work_dir / name), read_checkpoint(whole / name)
        assert_same_weights(one, other)
        for key in ('best_score', 'keep_ckpt_ids', 'iter'):
            assert one['message_hub']['runtime_info'][key] == other['message_hub']['runtime_info'][key]


def assert_same_weights(one: dict, other: dict) -> None:
    for part in ('state_dict', 'ema_state_dict'):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(tensor, other[part][key]) for key, tensor in one[part].items()), part


def test_a_compiled_run_writes_the_checkpoints_of_an_eager_one_and_can_be_resumed(toy, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))  # Inductor takes minutes
    with pytest.raises(Lightning):
        run(toy, tmp_path, dict(type='DoAtHook', iteration=3), seed=0, compile=True)
    run(toy, tmp_path, resume='auto', compile=True)
    names = [sorted(path.name for path in folder.glob('iter_*.pth')) for folder in (tmp_path, whole)]
    assert names[0] == names[1]
    compiled, eager = (read_checkpoint(folder / names[0][-1])['state_dict'] for folder in (tmp_path, whole))
    assert compiled.keys() == eager.keys()
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key], rtol=1e-3, atol=1e-4)


def test_a_run_struck_by_lightning_ends_as_if_it_had_not_been(toy, whole, tmp_path):
    with pytest.raises(Lightning):
        run(toy, tmp_path, dict(type='DoAtHook', iteration=3), seed=0)
    (tmp_path / '.partial-iter_4.pth').write_bytes(b'half of')
    run(toy, tmp_path, resume='auto')  # the seed comes from the checkpoint
    assert_ended_as(tmp_path, whole)


def test_a_validation_that_was_due_is_made_up_for(toy, whole, tmp_path, monkeypatch):
    after_val_epoch = DurableCheckpointHook.after_val_epoch

    def strike(hook, runner, metrics):
        if runner.iter == 4:
            raise Lightning
        after_val_epoch(hook, runner, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(DurableCheckpointHook, 'after_val_epoch', strike)
        with pytest.raises(Lightning):
            run(toy, tmp_path, seed=0)
    assert newest_whole_checkpoint(tmp_path)[0].endswith('iter_4.pth')
    run(toy, tmp_path, resume='auto')
    assert_ended_as(tmp_path, whole)


def test_a_signal_saves_and_exits_with_its_status(toy, whole, tmp_path, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as end:
        run(toy, tmp_path, dict(type='DoAtHook', iteration=2, number=int(signal.SIGTERM)), seed=0)
    assert end.value.code == 143
    assert f'stopped by SIGTERM; continue with --resume from {tmp_path}/iter_3.pth' in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    run(toy, tmp_path, resume='auto')
    assert_same_weights(*(read_checkpoint(folder / 'iter_6.pth') for folder in (tmp_path, whole)))


def test_mmsegs_own_train_tool_saves_on_sigterm(toy, tmp_path):
    tool = Path(find_spec('mmseg').origin).with_name('.mim') / 'tools/train.py'
    work_dir = tmp_path / 'work'
    options = [
        *[f'{split}_dataloader.dataset.data_root={toy}' for split in ('train', 'val', 'test')],
        'train_cfg.max_iters=100000',
        'default_hooks.logger.interval=1',
        'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=1',
        'randomness.seed=0',
    ]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, tool, CONFIG, '--work-dir', work_dir, '--cfg-options', *options]
    with (tmp_path / 'output').open('w') as output:
        training = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 240
            while not any('loss: ' in log.read_text() for log in work_dir.glob('*/*.log')):
                assert training.poll() is None and time.monotonic() < deadline, (tmp_path / 'output').read_text()
                time.sleep(0.1)
            training.terminate()
            assert training.wait(120) == 143, (tmp_path / 'output').read_text()
        finally:
            training.kill()
    printed = (tmp_path / 'output').read_text()
    path, contents = newest_whole_checkpoint(work_dir)
    assert f'stopped by SIGTERM; continue with --resume from {path}' in printed and 'Traceback' not in printed
    assert contents['meta']['iter'] >= 1 and 'optimizer' in contents


def test_a_signal_after_a_failed_training_is_not_swallowed(toy, tmp_path):
    with pytest.raises(Lightning):
        run(toy, tmp_path, dict(type='DoAtHook', iteration=1), seed=0)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_finished_training_restores_the_signal_handlers(toy, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run(toy, tmp_path, seed=0)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_last_checkpoint_stays_until_the_next_is_whole(toy, tmp_path, monkeypatch):
    put = DurableBackend.put

    def full(self, obj, filepath):
        if 'iter_4' in str(filepath):
            raise UserError('no space')
        put(self, obj, filepath)

    monkeypatch.setattr(DurableBackend, 'put', full)
    with pytest.raises(UserError, match='no space'):
        run(toy, tmp_path, seed=0, cfg_options={'default_hooks.checkpoint.max_keep_ckpts': 1})
    assert newest_whole_checkpoint(tmp_path)[0].endswith('iter_2.pth')


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    backend, path = DurableBackend(), tmp_path / 'new' / 'x.pth'
    backend.put(b'one', path)

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match=r'cannot write .*x\.pth \(No space left on device\); free some space'):
        backend.put(b'two', path)
    assert path.read_bytes() == b'one' and list(path.parent.iterdir()) == [path]


def test_what_is_replaced_is_removed_when_asked(tmp_path):
    backend, path = DurableBackend(), tmp_path / 'x.pth'
    backend.put(b'one', path)
    backend.remove(path)
    assert path.exists()
    backend.remove_outdated()
    assert not path.exists() and not backend.outdated


def test_a_damaged_checkpoint_is_skipped(tmp_path):
    assert newest_whole_checkpoint(tmp_path) is None
    for number in (8, 9, 10):
        torch.save(dict(state_dict={}, meta=dict(iter=number)), tmp_path / f'iter_{number}.pth')
    torch.save({}, tmp_path / 'best_mIoU_iter_11.pth')
    os.truncate(tmp_path / 'iter_10.pth', 200)
    path, contents = newest_whole_checkpoint(tmp_path)
    assert path == str(tmp_path / 'iter_9.pth') and contents['meta']['iter'] == 9
    for number in (8, 9):
        (tmp_path / f'iter_{number}.pth').write_bytes(b'')
    with pytest.raises(UserError, match='every checkpoint in .* is damaged'):
        newest_whole_checkpoint(tmp_path)


def test_weights_alone_cannot_be_resumed(toy, whole, tmp_path):
    (best,) = whole.glob('best_*.pth')
    with pytest.raises(UserError, match=r'--resume cannot use .*best_mIoU.*load_from='):
        run(toy, tmp_path, resume=str(best))


def test_deterministic_asks_torch_for_it(toy, tmp_path):
    try:
        run(toy, tmp_path, seed=0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# Averaged weights


def test_a_checkpoint_holds_the_averaged_weights_that_were_validated(toy, whole, tmp_path):
    contents = read_checkpoint(whole / 'iter_6.pth')
    validated, trained = torch.load(whole / 'validated_6'), contents['ema_state_dict']
    for key, value in contents['state_dict'].items():
        assert torch.equal(value, validated[key]), key
        is_averaged = value.is_floating_point()  # the rest counts batches
        assert not is_averaged or torch.isfinite(value).all() and not torch.equal(value, trained[f'module.{key}']), key
    printed = json.loads((whole / 'scores_6.json').read_text())
    options = {f'test_dataloader.{key}': value for key, value in dict(num_workers=0, persistent_workers=False).items()}
    options |= {'data_root': str(toy), 'visualizer.vis_backends': [dict(type='LocalVisBackend')]}
    options |= {'custom_hooks': [AVERAGE, STOP], 'train_dataloader.dataset.type': 'Unbuildable'}
    scores = measure(CONFIG, str(whole / 'iter_6.pth'), str(tmp_path), cfg_options=options)
    for key in ('mIoU', 'aAcc', 'mAcc'):
        assert abs(scores[key] - printed[key]) <= 0.00501  # of a printed hundredth


def test_recomputed_activations_leave_the_average_as_it_is(toy, whole, tmp_path):
    run(toy, tmp_path, seed=0, cfg_options={'model.backbone.with_cp': True})
    assert_same_weights(*(read_checkpoint(folder / 'iter_6.pth') for folder in (tmp_path, whole)))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(interval=0), 'interval of EMAHook must be an integer of at least 1, got 0'),
        (dict(begin_iter=7), 'begin_iter of EMAHook must be at most max_iters=6, got 7'),
        (dict(begin_epoch=1), 'begin_epoch of EMAHook does not go with max_iters; use begin_iter'),
    ],
)
def test_an_average_that_cannot_be_taken_is_a_mistake(toy, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(toy, tmp_path, dict(type='EMAHook', **settings))


@pytest.mark.parametrize(
    'settings', [dict(momentum=2), dict(momentum='x'), dict(ema_type='x'), dict(beta=1), dict(begin_iter='x')]
)
def test_what_mmengine_refuses_is_one_sentence(toy, tmp_path, settings, capsys):
    with pytest.raises(SystemExit) as end, one_sentence_errors():
        run(toy, tmp_path, cfg_options={'custom_hooks': [dict(type='EMAHook', **settings)]})
    assert end.value.code == 2 and 'error: the config cannot be used: ' in capsys.readouterr().err


def test_shares_of_a_model_cannot_be_averaged():
    runner = ShardedRunner.__new__(ShardedRunner)
    runner._hooks = [EMAHook()]
    with pytest.raises(UserError, match='ShardedRunner cannot average weights'):
        runner.train()


# Early stopping

OFTEN = {'train_cfg.max_iters': 10, 'train_cfg.val_interval': 1, 'default_hooks.checkpoint.interval': 1}


def test_a_training_stops_where_it_would_have_without_an_interruption(toy, tmp_path, capsys):
    runner = run(toy, tmp_path / 'whole', STOP, seed=0, cfg_options=OFTEN)
    assert runner.iter == 3
    assert re.search(
        r'stopped at iteration 3: mIoU is \d+\.\d\d, and 2 validations did not exceed \d+\.\d\d by 100\n',
        capsys.readouterr().out,
    )
    with pytest.raises(Lightning):
        run(toy, tmp_path / 'struck', STOP, dict(type='DoAtHook', iteration=2), seed=0, cfg_options=OFTEN)
    run(toy, tmp_path / 'struck', STOP, resume='auto', cfg_options=OFTEN)
    assert_ended_as(tmp_path / 'struck', tmp_path / 'whole')
    capsys.readouterr()
    again = run(toy, tmp_path / 'struck', STOP, resume='auto', cfg_options=OFTEN)  # it has ended
    assert again.iter == 3 and '2 validations did not exceed' in capsys.readouterr().out
    assert_ended_as(tmp_path / 'struck', tmp_path / 'whole')


def test_a_better_score_starts_the_count_anew():
    hook, log = DurableEarlyStoppingHook(patience=2, min_delta=1), []
    runner = SimpleNamespace(
        iter=0,
        train_loop=SimpleNamespace(stop_training=False),
        message_hub=MessageHub('early stopping'),
        logger=SimpleNamespace(info=log.append),
        val_loop='exists',
    )
    hook.before_train(runner)
    for score in (10, 10.5, 11, 12, 11, 12.5):  # each at least 1 above the last best, or the first one below it
        assert not runner.train_loop.stop_training
        runner.iter += 1
        for _ in range(2):  # a validation that is repeated counts once
            hook.after_val_epoch(runner, dict(mIoU=score))
    assert runner.train_loop.stop_training and log[-1].endswith('2 validations did not exceed 12.00 by 1')
    runner.train_loop.stop_training = False
    hook.after_val_epoch(runner, dict(mIoU=float('nan')))
    assert runner.train_loop.stop_training and log[-1].endswith('mIoU is nan, and that is no finite number')


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(patience=0), 'patience must be an integer of at least 1, got 0'),
        (dict(patience='x'), "patience must be an integer of at least 1, got 'x'"),
        (dict(min_delta=0), 'min_delta must be a number above 0, got 0'),
        (dict(min_delta=float('nan')), 'min_delta must be a number above 0, got nan'),
    ],
)
def test_a_count_that_cannot_be_kept_is_a_mistake(settings, message):
    with pytest.raises(UserError, match=message):
        DurableEarlyStoppingHook(**settings)


def test_a_score_that_no_validation_gives_is_a_mistake(toy, tmp_path):
    wrong = dict(type='DurableEarlyStoppingHook', monitor='IoU')
    with pytest.raises(UserError, match="monitors 'IoU', but the validation has aAcc, mIoU, mAcc"):
        run(toy, tmp_path, wrong, cfg_options={'train_cfg.val_interval': 1})
    with pytest.raises(UserError, match='needs a validation, but the config has no val_dataloader'):
        DurableEarlyStoppingHook().before_train(SimpleNamespace(val_loop=None))
