"""Randomness as a function of the seed and of the place in the run, not of what this process did before.

A resumed run then draws what an uninterrupted one draws, with any number of data-loader workers, and the k-th global
batch holds the same augmented images on one process and on many.
"""

import itertools
import os
import random
from collections.abc import Iterator, Sized

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import DATA_SAMPLERS, HOOKS, TRANSFORMS
from torch.utils.data import Sampler, get_worker_info

from ..errors import UserError

SAMPLE, ITERATION = 0, 1  # streams that must not draw the same numbers
MAX_WORKERS, PATH_BYTES = 64, 4096


class SampleNumber(int):
    """Index of a sample in its data set that knows its ``place``: (the run's seed, how many samples came before)."""

    def __new__(cls, index: int, place: tuple[int, int] = (0, 0)):
        number = super().__new__(cls, index)
        number.place = place
        return number

    # How ConcatDataset and RepeatDataset find the index in the data set inside them.
    def __sub__(self, other: int) -> 'SampleNumber':
        return SampleNumber(int(self) - other, self.place)

    def __mod__(self, other: int) -> 'SampleNumber':
        return SampleNumber(int(self) % other, self.place)


@DATA_SAMPLERS.register_module()
class StreamSampler(Sampler):
    """One endless, shuffled stream of samples for all processes; process r of w takes every w-th from the r-th on.

    Args:
        seed: of the shuffling; None draws one that all processes share.
    """

    def __init__(self, dataset: Sized, seed: int | None = None):
        if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
            raise UserError(f'the seed must be an integer from 0 to 2**63 - 1, got {seed!r}')
        self.size = len(dataset)
        self.seed = sync_random_seed() if seed is None else seed
        self.rank, self.world_size = get_dist_info()
        self.start = 0

    def __iter__(self) -> Iterator[SampleNumber]:
        first = self.start * self.world_size + self.rank
        for position, index in itertools.islice(enumerate(self._stream()), first, None, self.world_size):
            yield SampleNumber(index, (self.seed, position))

    def __len__(self) -> int:
        return self.size

    def skip(self, num_samples: int) -> None:
        """Start after this process' first ``num_samples`` samples; mmengine's loop calls it on resuming."""
        self.start = num_samples

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.size, generator=generator).tolist()


@TRANSFORMS.register_module()
class BeginSample(BaseTransform):
    """First of a training pipeline: seeds the augmentation with the sample's place in the run, and notes its file."""

    def __init__(self):
        # One row per data-loader worker, in memory that the training process reads after a worker's death.
        self.reading = torch.zeros(MAX_WORKERS, PATH_BYTES, dtype=torch.uint8).share_memory_()

    def transform(self, results: dict) -> dict:
        """Leave ``results`` as they are."""
        worker = get_worker_info()
        if worker is not None and worker.id < MAX_WORKERS:
            note = f'{os.getpid()} {results["img_path"]}'.encode()[: PATH_BYTES - 1] + b'\0'
            self.reading.numpy()[worker.id, : len(note)] = np.frombuffer(note, np.uint8)
        number = results.get('sample_idx')
        if isinstance(number, SampleNumber):  # a plain index comes from another sampler
            _seed_everything(SAMPLE, *number.place)
        return results

    def last_file(self, pid: int) -> str | None:
        """Image that worker process ``pid`` began last."""
        for row in self.reading.numpy():
            owner, _, path = row.tobytes().partition(b'\0')[0].decode(errors='replace').partition(' ')
            if owner == str(pid):
                return path
        return None


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seed Python, numpy and torch for each iteration, so that dropout and drop path do not depend on the past."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Once per iteration, after its data are there; processes draw differently."""
        _seed_everything(ITERATION, runner.seed, runner.iter, runner.rank)


def _seed_everything(*place: int) -> None:
    words = np.random.SeedSequence(place).generate_state(6)
    random.seed(words[:2].tobytes())
    np.random.seed(words[2:4])
    torch.manual_seed(int(words[4]) << 32 | int(words[5]))
