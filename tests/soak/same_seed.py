#!/usr/bin/env python
"""Check that a seed gives the same weights, bit for bit, in two runs and with another number of workers."""

from pathlib import Path

import torch
from common import Report, arguments, differences, options, start_training, toy_place, wait

ITERATIONS = {'short': 10, 'long': 100}


def main() -> None:
    args = arguments(__doc__)
    iterations = ITERATIONS['short' if args.short else 'long']
    report = Report(f'--seed 0 --deterministic, {iterations} iterations')
    with toy_place() as place:

        def run(name: str, workers: int) -> Path:
            settings = options(
                place,
                **{
                    'train_cfg.max_iters': iterations,
                    'train_cfg.val_interval': iterations,
                    'train_dataloader.num_workers': workers,
                    'train_dataloader.persistent_workers': workers > 0,
                    'model.backbone.drop_path_rate': 0.2,
                },
            )
            child = start_training(place / name, seed=0, deterministic=True, cfg_options=settings)
            assert wait(child) == 0, Path(f'{place / name}.log').read_text()
            return place / name

        # Forked children may use the GPU as long as this process does not.
        first, second, third = run('first', 2), run('second', 2), run('third', 0)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
        for what, other in (('twice', second), ('with 2 and with 0 data-loader workers', third)):
            found = differences(other, first)
            report.row(f'{device}: bit differences, {what}', '; '.join(found) or 0, 0, not found)
    if not torch.cuda.is_available():
        report.row('CUDA', 'not run: PyTorch finds no GPU', '', True)
    report.finish()


if __name__ == '__main__':
    main()
