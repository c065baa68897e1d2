"""Random numbers depend only on the seed and the position in the run."""

import copy
import itertools
import os
import pickle
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import DATASETS

from mmseg_volo import BeginSample, IterationSeedHook, StreamSampler
from mmseg_volo.config import load_config
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.engine.reproducible import SampleNumber

SEED = 7


@pytest.fixture(scope='module')
def loader(tmp_path_factory) -> dict:
    """Config of the demo's training data loader on 5 toy streets, with all augmentations."""
    folder = tmp_path_factory.mktemp('toy')
    make_toy_streets(folder, train=5, val=1, size=(96, 64))
    init_default_scope('mmseg')
    loader = load_config(str(ROOT / 'configs/volo_tiny_toy_streets.py'), {'data_root': str(folder)}).train_dataloader
    loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    return loader


def batches(loader: dict, count: int, skip: int = 0, **changes: object) -> list[torch.Tensor]:
    built = Runner.build_dataloader(dict(copy.deepcopy(loader.to_dict()), **changes), seed=SEED)
    built.sampler.skip(skip * built.batch_size)
    pairs = itertools.islice(built, count)
    return [
        torch.cat([x.flatten() for x in (*batch['inputs'], *(s.gt_sem_seg.data for s in batch['data_samples']))])
        for batch in pairs
    ]


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_a_resumed_loader_gives_what_it_would_have_given(loader, workers):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    whole = batches(loader, 8)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    resumed = batches(loader, 5, skip=3, num_workers=workers)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(whole, 2)), (
        'two samples got the same augmentation'
    )


def test_processes_share_one_stream(monkeypatch):
    def stream(rank: int, world_size: int, skip: int = 0) -> list[tuple[int, tuple[int, int]]]:
        monkeypatch.setattr('mmseg_volo.engine.reproducible.get_dist_info', lambda: (rank, world_size))
        sampler = StreamSampler(range(5), seed=SEED)
        sampler.skip(skip)
        return [(int(number), number.place) for number in itertools.islice(sampler, 12 // world_size)]

    alone = stream(0, 1)
    assert [place for _, place in alone] == [(SEED, position) for position in range(12)]
    for start in range(0, 10, 5):
        assert sorted(index for index, _ in alone[start : start + 5]) == list(range(5)), 'each sample once an epoch'
    assert stream(0, 2) == alone[::2] and stream(1, 2) == alone[1::2]
    assert stream(1, 2, skip=2)[:4] == alone[5::2]


@pytest.mark.parametrize(
    'wrap',
    [lambda data: RepeatDataset(data, times=2), lambda data: ConcatDataset([data, copy.deepcopy(data)])],
    ids=['RepeatDataset', 'ConcatDataset'],
)
def test_a_sample_keeps_its_place_inside_other_data_sets(loader, wrap):
    data = DATASETS.build(copy.deepcopy(loader.dataset))
    both = wrap(data)
    assert len(both) == 10
    for index in (3, 8):
        one, other = both[SampleNumber(index, (SEED, 40))], data[SampleNumber(3, (SEED, 40))]
        assert torch.equal(one['inputs'], other['inputs'])


def test_a_sample_number_reaches_workers_whole():
    number = pickle.loads(pickle.dumps(SampleNumber(3, (SEED, 40))))
    assert number == 3 and number.place == (SEED, 40)


def test_iterations_draw_the_same_whatever_came_before():
    def draw(iteration: int, rank: int = 0, seed: int = SEED) -> tuple:
        IterationSeedHook().before_train_iter(SimpleNamespace(seed=seed, iter=iteration, rank=rank), iteration)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first = draw(3)
    torch.rand(5), np.random.rand(5), random.random()
    assert draw(3) == first
    others = [draw(4), draw(3, rank=1), draw(3, seed=SEED + 1)]
    assert len({value for draws in (first, *others) for value in draws}) == 12


def test_every_training_set_begins_its_samples():
    for base in ('ade20k', 'camvid', 'cityscapes', 'toy_streets'):
        cfg = load_config(str(next((ROOT / 'configs').glob(f'volo_*_{base}.py'))), {})
        assert cfg.train_dataloader.dataset.pipeline[0].type is BeginSample
        assert cfg.train_dataloader.sampler.type is StreamSampler


def test_the_file_of_a_worker_is_known(loader):
    built = Runner.build_dataloader(dict(copy.deepcopy(loader.to_dict()), num_workers=2), seed=SEED)
    batches = iter(built)
    paths = {sample.img_path for batch in itertools.islice(batches, 3) for sample in batch['data_samples']}
    begin = built.dataset.pipeline.transforms[0]
    for worker in batches._workers:
        assert Path(begin.last_file(worker.pid)).name in {Path(path).name for path in paths}
    assert begin.last_file(os.getpid()) is None
