#!/usr/bin/env python
"""Measure a checkpoint: tools/test.py configs/volo_d1_ade20k.py work_dirs/volo_d1_ade20k/best_mIoU_iter_160000.pth"""

import argparse
import os

from mmseg_volo.apis import test
from mmseg_volo.config import add_config_arguments
from mmseg_volo.error_messages import one_sentence_errors


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a checkpoint on the config's test set.")
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='a checkpoint of the same config')
    parser.add_argument('--out', metavar='DIR', help='gets report.html, metrics.json and more; the work dir by default')
    parser.add_argument(
        '--show-dir', metavar='DIR', help='write image, truth and prediction side by side, one per image'
    )
    parser.add_argument('--tta', action='store_true', help='average over several scales and flips')
    parser.add_argument('--compare', metavar='JSON', help='metrics.json of another run, to compare with')
    parser.add_argument(
        '--format',
        dest='server_format',
        choices=['cityscapes', 'ade20k'],
        help="write label maps for the benchmark's server; measure nothing",
    )
    parser.add_argument('--work-dir', help="logs; work_dirs/<config's name> by default")
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by launchers')
    args = vars(parser.parse_args())
    os.environ.setdefault('LOCAL_RANK', str(args.pop('local_rank')))
    with one_sentence_errors():
        test(**args)


if __name__ == '__main__':
    main()
