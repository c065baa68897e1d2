#!/usr/bin/env python
"""Speed and memory of VOLO on this machine, against timm and the authors' mathematics."""

import argparse
from pathlib import Path

from mmseg_volo.benchmark.backbone import benchmark_backbone
from mmseg_volo.error_messages import one_sentence_errors

CONFIGS = Path(__file__).parents[1] / 'configs'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='fewer rounds: minutes on two CPU cores')
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'], default='auto', help='(default: %(default)s)')
    parser.add_argument('--compiled', action='store_true', help='measure timm under torch.compile, too')
    parser.add_argument('--json', dest='json_path', metavar='FILE', help='also write every time to this file')
    with one_sentence_errors():
        segmentors = [str(CONFIGS / f'volo_{arch}_cityscapes.py') for arch in ('d4', 'd5')]
        benchmark_backbone(**vars(parser.parse_args()), segmentors=segmentors)


if __name__ == '__main__':
    main()
