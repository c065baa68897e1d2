"""Training that diverges stops or warns, and keeps its weights."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from mmengine.optim import OptimWrapper
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_volo import NonFiniteLossHook, OneClassWarningHook
from mmseg_volo.apis.training import train
from mmseg_volo.benchmark.segmentor import build_segmentor, random_batch
from mmseg_volo.checkpoints.reading import read_checkpoint
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError


class Trainer:
    """Train a small model and call the hook as mmengine's loop does."""

    def __init__(self, work_dir: Path, skip: int, clip_grad: dict | None = None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.optim_wrapper = OptimWrapper(optimizer, clip_grad=clip_grad and dict(clip_grad))
        self.work_dir, self.rank, self.iter = str(work_dir), 0, 0
        self.warnings = []
        self.logger = SimpleNamespace(warning=self.warnings.append)
        self.hook = NonFiniteLossHook(skip)
        self.hook.before_train(self)

    def step(self, factor: float) -> None:
        batch = dict(inputs=[torch.full((1, 2, 2), self.iter)], data_samples=[sample(0, path=f'{self.iter}.png')])
        self.hook.before_train_iter(self, self.iter, batch)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(self.iter))
        loss = (self.model(x * factor) ** 2).sum()
        self.optim_wrapper.update_params(loss)
        self.hook.after_train_iter(self, self.iter, batch, dict(loss=loss))
        self.iter += 1

    def state(self) -> list[torch.Tensor]:
        optimizer = self.optim_wrapper.optimizer.state_dict()['state']
        moments = [value.clone() for state in optimizer.values() for value in state.values()]
        return [value.clone() for value in self.model.state_dict().values()] + moments


def sample(value: int, path: str = 'x.png') -> SegDataSample:
    data = PixelData(data=torch.full((1, 2, 2), value))
    return SegDataSample(gt_sem_seg=data, pred_sem_seg=data, metainfo=dict(img_path=path))


CLIPPINGS = [None, dict(max_norm=1.0), dict(type='value', clip_value=1.0)]


@pytest.mark.parametrize('clip_grad', CLIPPINGS, ids=['no clipping', 'norm', 'value'])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_bad_batch_changes_nothing(tmp_path, bad, clip_grad):
    trainer = Trainer(tmp_path, skip=2, clip_grad=clip_grad)
    trainer.step(1.0)
    before = trainer.state()
    trainer.step(bad)
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.state(), strict=True))
    assert 'not finite at iteration 2 (learning rate 0.01)' in trainer.warnings[0]
    assert trainer.warnings[0].endswith('1.png; skipped, 1 of at most 2')
    trainer.step(1.0)
    assert not any(torch.equal(one, other) for one, other in zip(before, trainer.state(), strict=True))


def test_one_too_many_stops_and_leaves_the_batch(tmp_path):
    trainer = Trainer(tmp_path, skip=1)
    trainer.step(float('nan'))
    with pytest.raises(UserError, match=r'not finite at iteration 2 .*1\.png; inspect it'):
        trainer.step(float('nan'))
    batch = read_checkpoint(tmp_path / 'non_finite_iter_2_rank_0.pth')
    assert batch['files'] == ['1.png'] and torch.equal(batch['inputs'][0], torch.full((1, 2, 2), 1))


def test_finite_loss_with_bad_gradients_is_caught(tmp_path):
    trainer = Trainer(tmp_path, skip=0)
    trainer.model[0].weight.register_hook(lambda grad: grad * float('inf'))
    with pytest.raises(UserError, match='or its gradients are not finite at iteration 1'):
        trainer.step(1.0)
    assert all(torch.isfinite(value).all() for value in trainer.state())


class Scalars(TorchDispatchMode):
    """Count copies of scalars to the host, each of which waits for the GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(('clip_grad', 'waits'), [(CLIPPINGS[0], 2), (CLIPPINGS[1], 1)], ids=['no clipping', 'norm'])
def test_a_sound_iteration_costs_few_waits_and_no_exchange(tmp_path, monkeypatch, clip_grad, waits):
    def counted(trainer: Trainer) -> int:
        with Scalars() as scalars:
            trainer.step(1.0)
        return scalars.count

    def forbidden(*_: object) -> None:
        raise AssertionError('an exchange between processes, or a second norm')

    trainer = Trainer(tmp_path, skip=0, clip_grad=clip_grad)
    monkeypatch.setattr('mmseg_volo.engine.safeguards.all_reduce', forbidden)
    if clip_grad:
        monkeypatch.setattr('mmseg_volo.engine.safeguards.get_total_norm', forbidden)
    with_hook = counted(trainer)
    trainer.optim_wrapper.optimizer._optimizer_step_pre_hooks.clear()
    trainer.hook = SimpleNamespace(before_train_iter=lambda *_: None, after_train_iter=lambda *_: None)
    assert with_hook - counted(trainer) == waits


@pytest.mark.parametrize('clip_grad', CLIPPINGS[:2], ids=['no clipping', 'norm'])
def test_the_hook_takes_a_hundredth_of_a_step(clip_grad):
    cfg, model = build_segmentor('volo_tiny_camvid', 'cpu')  # the smallest recipe for real images
    images, samples = random_batch(cfg, model, cfg.train_dataloader.batch_size, 'cpu')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    trainer = SimpleNamespace(
        model=model, optim_wrapper=OptimWrapper(optimizer, clip_grad=clip_grad and dict(clip_grad))
    )
    hook = NonFiniteLossHook(skip=1)
    hook.before_train(trainer)
    hooks, spent = optimizer._optimizer_step_pre_hooks, []

    def timed(function):
        def call(*args: object) -> None:
            start = time.thread_time()
            function(*args)
            spent.append(time.thread_time() - start)

        return call

    for key, check in hooks.items():
        hooks[key] = timed(check)
    shares = []
    for iteration in range(5):
        spent.clear()
        start = time.thread_time()
        timed(hook.before_train_iter)(trainer, iteration)
        loss = sum(value for name, value in model.loss(images, samples).items() if 'loss' in name)
        trainer.optim_wrapper.update_params(loss)
        timed(hook.after_train_iter)(trainer, iteration, {}, dict(loss=loss))
        shares.append(sum(spent) / (time.thread_time() - start))
    assert len(spent) == 3
    assert min(shares) < 0.01, shares  # the minimum, because other jobs on the machine disturb the rest


def test_training_stops_at_a_loss_that_is_not_finite(tmp_path):
    make_toy_streets(tmp_path / 'toy', train=2, val=1, size=(96, 64))
    options = {
        'data_root': str(tmp_path / 'toy'),
        'model.decode_head.loss_decode.loss_weight': float('inf'),
        'train_dataloader.batch_size': 2,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'visualizer.vis_backends': [dict(type='LocalVisBackend')],
    }
    with pytest.raises(UserError, match=r'loss \(inf\).* at iteration 1 .*leftImg8bit.png.*non_finite.skip=10'):
        train(str(ROOT / 'configs/volo_tiny_toy_streets.py'), str(tmp_path / 'work'), seed=0, cfg_options=options)
    assert (tmp_path / 'work/non_finite_iter_1_rank_0.pth').is_file()


@pytest.mark.parametrize('classes, warned', [([1, 1], True), ([0, 1], False)])
def test_a_validation_of_one_class_warns(classes, warned):
    warnings = []
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo=dict(classes=('sky', 'road'))))
    runner = SimpleNamespace(iter=40, val_dataloader=loader, logger=SimpleNamespace(warning=warnings.append))
    hook = OneClassWarningHook()
    for _ in range(2):  # each validation is judged separately
        hook.before_val_epoch(runner)
        hook.after_val_iter(runner, 0, {}, [sample(value) for value in classes])
        hook.after_val_epoch(runner)
    assert len(warnings) == (2 if warned else 0)
    assert not warned or "predicts 'road' for every pixel" in warnings[0]
