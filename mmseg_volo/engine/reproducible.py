"""Random numbers that depend on the seed and the position in the run, not on what this process did before.

A resumed run therefore draws the same numbers as an uninterrupted run, with any number of data-loader workers, and the
k-th global batch holds the same augmented images on one process and on several.
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

SAMPLE, ITERATION = 0, 1  # separate streams of random numbers
MAX_WORKERS, PATH_BYTES = 64, 4096


class SampleNumber(int):
    """Index of a sample in its data set, with its ``place``: (seed of the run, number of samples before this one)."""

    def __new__(cls, index: int, place: tuple[int, int] = (0, 0)):
        number = super().__new__(cls, index)
        number.place = place
        return number

    # ConcatDataset and RepeatDataset compute the index in the data set that they wrap with - and %.
    def __sub__(self, other: int) -> 'SampleNumber':
        return SampleNumber(int(self) - other, self.place)

    def __mod__(self, other: int) -> 'SampleNumber':
        return SampleNumber(int(self) % other, self.place)


@DATA_SAMPLERS.register_module()
class StreamSampler(Sampler):
    """One endless, shuffled stream of samples for all processes; process r of w takes samples r, r + w, r + 2 w, ...

    Args:
        dataset: the data set to sample from.
        seed: random seed for shuffling; None draws one that all processes share.

    Raises:
        UserError: ``seed`` is not an integer from 0 to 2**63 - 1.
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
        """Start after the first ``num_samples`` samples of this process; mmengine's loop calls it when it resumes."""
        self.start = num_samples

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.size, generator=generator).tolist()


@TRANSFORMS.register_module()
class BeginSample(BaseTransform):
    """First step of a training pipeline: seeds the augmentation with the sample's place and records its file."""

    def __init__(self):
        # One row per data-loader worker, in shared memory: the training process reads it if a worker dies.
        self.reading = torch.zeros(MAX_WORKERS, PATH_BYTES, dtype=torch.uint8).share_memory_()

    def transform(self, results: dict) -> dict:
        """Return ``results`` unchanged."""
        worker = get_worker_info()
        if worker is not None and worker.id < MAX_WORKERS:
            note = f'{os.getpid()} {results["img_path"]}'.encode()[: PATH_BYTES - 1] + b'\0'
            self.reading.numpy()[worker.id, : len(note)] = np.frombuffer(note, np.uint8)
        number = results.get('sample_idx')
        if isinstance(number, SampleNumber):  # other samplers yield plain integers
            _seed_everything(SAMPLE, *number.place)
        return results

    def last_file(self, pid: int) -> str | None:
        """Path of the last image that worker process ``pid`` started to read."""
        for row in self.reading.numpy():
            owner, _, path = row.tobytes().partition(b'\0')[0].decode(errors='replace').partition(' ')
            if owner == str(pid):
                return path
        return None


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seed Python, NumPy and PyTorch before each iteration, so that dropout and drop path can be reproduced."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Seed with the run's seed, the iteration and the rank, after the batch has been loaded."""
        _seed_everything(ITERATION, runner.seed, runner.iter, runner.rank)


def _seed_everything(*place: int) -> None:
    words = np.random.SeedSequence(place).generate_state(6)
    random.seed(words[:2].tobytes())
    np.random.seed(words[2:4])
    torch.manual_seed(int(words[4]) << 32 | int(words[5]))
