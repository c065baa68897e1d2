#!/usr/bin/env python
"""Segment pictures and videos: tools/infer.py CONFIG CHECKPOINT street.jpg folder 'more/*.png' drive.mp4"""

import argparse
import sys

from mmseg_volo.apis import infer
from mmseg_volo.config import add_config_arguments
from mmseg_volo.error_messages import one_sentence_errors


def main() -> None:
    parser = argparse.ArgumentParser(description='Segment pictures and videos: overlays, label maps, probabilities.')
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='a checkpoint of the same config')
    parser.add_argument('images', nargs='+', help='files, folders (with their subfolders) or patterns')
    parser.add_argument('--out-dir', default='out', help='vis/, pred/ and prob/ appear here (default: %(default)s)')
    results, default = ['labels', 'overlay', 'prob'], ['labels', 'overlay']
    parser.add_argument('--save', nargs='+', choices=results, default=default, help='(default: labels overlay)')
    parser.add_argument('--opacity', type=float, default=0.55, help='of the colours, 0 to 1 (default: %(default)s)')
    parser.add_argument('--tta', action='store_true', help='average over several scales and flips')
    parser.add_argument('--half', action='store_true', help='compute in bfloat16, or float16 on a GPU without it')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N (default: %(default)s)')
    with one_sentence_errors():
        undecoded = infer(**vars(parser.parse_args()))
    sys.exit(1 if undecoded else 0)


if __name__ == '__main__':
    main()
