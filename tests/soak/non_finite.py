#!/usr/bin/env python
"""Check that a non-finite loss stops the run and saves its batch, or is skipped and leaves the weights finite."""

from pathlib import Path

import torch
from common import Report, arguments, options, start_training, toy_place, wait
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from mmseg_volo.checkpoints.reading import read_checkpoint

POISONED = '_000003_'  # in the file's name


@TRANSFORMS.register_module()
class Poison(BaseTransform):
    """Make one training image infinite, as a broken file can be."""

    def transform(self, results: dict) -> dict:
        if POISONED in results['img_path']:
            results['img'] = results['img'].astype('float32') * float('inf')
        return results


def main() -> None:
    arguments(__doc__)
    report = Report('losses that are not finite')
    with toy_place() as place:
        settings = options(place, **{'train_cfg.max_iters': 24, 'train_cfg.val_interval': 24})
        poisoned = {**settings, 'train_dataloader.dataset.pipeline.6': dict(type='Poison')}

        work_dir = place / 'stopped'
        status = wait(start_training(work_dir, seed=0, cfg_options=poisoned))
        sentence = [line for line in Path(f'{work_dir}.log').read_text().splitlines() if line.startswith('error: ')]
        report.row('a poisoned image: exit status', status, 2, status == 2)
        named = len(sentence) == 1 and POISONED in sentence[0] and 'learning rate' in sentence[0]
        report.row('names iteration, learning rate and files', sentence[-1:], 'one sentence', named)
        saved = [read_checkpoint(path) for path in work_dir.glob('non_finite_iter_*.pth')]
        good = len(saved) == 1 and any(POISONED in file for file in saved[0]['files'])
        report.row('the batch is saved', [batch['files'] for batch in saved], 1, good)

        work_dir = place / 'skipped'
        poisoned['default_hooks.non_finite.skip'] = 24
        status = wait(start_training(work_dir, seed=0, cfg_options=poisoned))
        state = read_checkpoint(work_dir / 'iter_24.pth')['state_dict'] if status == 0 else {}
        finite = bool(state) and all(torch.isfinite(tensor).all() for tensor in state.values())
        skipped = Path(f'{work_dir}.log').read_text().count('skipped, ')
        report.row('skipped instead: exit status', status, 0, status == 0)
        report.row(
            'batches skipped of 24, weights and statistics finite', f'{skipped}, {finite}', True, finite and skipped > 0
        )
    report.finish()


if __name__ == '__main__':
    main()
