#!/usr/bin/env python
"""Check that memory and open files do not grow during a long run, and that a dead data-loader worker is explained."""

import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
from common import Report, arguments, options, start_training, toy_place, wait
from mmcv.transforms import BaseTransform
from mmengine.hooks import Hook
from mmseg.registry import HOOKS, TRANSFORMS

ITERATIONS = {'short': 200, 'long': 2000}
CYCLES = 20
DEADLY = '_000003_'  # in the file's name
LIMIT = 4.0  # MiB. mmengine keeps every logged number, about half a MiB per 1,000 iterations.


@HOOKS.register_module()
class MeterHook(Hook):
    """Record resident memory after each iteration and open file descriptors after each validation."""

    def __init__(self, path: str):
        self.path, self.memory, self.descriptors = Path(path), [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        self.memory.append(pages * resource.getpagesize() / 2**20)

    def after_val_epoch(self, runner, metrics=None):
        self.descriptors.append(len(os.listdir('/proc/self/fd')))
        self.path.write_text(json.dumps([self.memory, self.descriptors]))


@TRANSFORMS.register_module()
class Deadly(BaseTransform):
    """Kill the worker that reads one particular file, as the kernel does when memory runs out."""

    def transform(self, results: dict) -> dict:
        if DEADLY in results['img_path']:
            os.kill(os.getpid(), signal.SIGKILL)
        return results


def main() -> None:
    args = arguments(__doc__)
    iterations = ITERATIONS['short' if args.short else 'long']
    report = Report('bounded')
    with toy_place() as place:
        work_dir, meter = place / 'long', place / 'meter.json'
        settings = options(
            place,
            **{
                'train_cfg.max_iters': iterations,
                'train_cfg.val_interval': iterations // CYCLES,
                'default_hooks.checkpoint.interval': iterations // CYCLES,
                'custom_hooks': [dict(type='MeterHook', path=str(meter))],
            },
        )
        status = wait(start_training(work_dir, seed=0, cfg_options=settings), 3600)
        assert status == 0, Path(f'{work_dir}.log').read_text()
        memory, descriptors = json.loads(meter.read_text())
        settled = np.array(memory[len(memory) // 4 :])  # allocators and caches fill up first
        slope, error = (len(settled) * value for value in slope_and_error(settled))
        report.row(
            f'memory: growth in MiB, fitted to the last {len(settled)} of {iterations} iterations',
            f'{slope:.2f} +- {error:.2f} of {settled.mean():.0f}',
            LIMIT,
            slope <= LIMIT,
        )
        grown = descriptors[-1] - descriptors[1]
        report.row(
            f'file descriptors over {len(descriptors)} validations',
            f'{descriptors[1]} to {descriptors[-1]}',
            0,
            grown <= 0,
        )

        work_dir = place / 'dead'
        settings = options(
            place, **{'train_cfg.max_iters': 24, 'train_dataloader.dataset.pipeline.6': dict(type='Deadly')}
        )
        status = wait(start_training(work_dir, seed=0, cfg_options=settings))
        sentence = [line for line in Path(f'{work_dir}.log').read_text().splitlines() if line.startswith('error: ')]
        report.row('a data-loader worker dies: exit status', status, 2, status == 2)
        report.row(
            'says which file it was reading', sentence[-1:], DEADLY, len(sentence) == 1 and DEADLY in sentence[0]
        )
    report.finish()


def slope_and_error(values: np.ndarray) -> tuple[float, float]:
    """Least-squares slope per step, and its error estimated from twenty blocks with independent noise."""
    blocks = np.array([block.mean() for block in np.array_split(values, 20)])
    (slope, _), covariance = np.polyfit(np.arange(20), blocks, 1, cov=True)
    per_block = len(values) / 20
    return slope / per_block, float(np.sqrt(covariance[0, 0])) / per_block


if __name__ == '__main__':
    main()
