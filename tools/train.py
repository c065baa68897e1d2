#!/usr/bin/env python
"""Train a segmentor: tools/train.py configs/volo_d1_ade20k.py"""

import argparse
import os

from mmseg_volo.apis import train
from mmseg_volo.config import add_config_arguments
from mmseg_volo.error_messages import one_sentence_errors


def main() -> None:
    parser = argparse.ArgumentParser(description='Train a segmentor.')
    add_config_arguments(parser)
    parser.add_argument('--work-dir', help="checkpoints and logs; work_dirs/<config's name> by default")
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from the newest whole checkpoint of the work dir, or PATH',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision, on a GPU')
    parser.add_argument('--auto-scale-lr', action='store_true', help="scale the learning rate to this run's batch")
    parser.add_argument('--seed', type=int, help='of Python, numpy and torch')
    parser.add_argument('--deterministic', action='store_true', help='the same bits each time; slower on a GPU')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by launchers')
    args = vars(parser.parse_args())
    os.environ.setdefault('LOCAL_RANK', str(args.pop('local_rank')))
    with one_sentence_errors():
        train(**args)


if __name__ == '__main__':
    main()
