#!/usr/bin/env python
"""Segment pictures: tools/infer.py CONFIG CHECKPOINT street.jpg folder 'more/*.png'"""

import argparse
import sys

from mmseg_volo.apis import add_config_arguments, infer
from mmseg_volo.errors import one_sentence_errors


def main() -> None:
    parser = argparse.ArgumentParser(description='Segment pictures: overlays with a legend, and label maps.')
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='a checkpoint of the same config')
    parser.add_argument('images', nargs='+', help='files, folders or patterns')
    parser.add_argument('--out-dir', default='out', help='vis/ and pred/ appear here (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N (default: %(default)s)')
    with one_sentence_errors():
        skipped = infer(**vars(parser.parse_args()))
    sys.exit(1 if skipped else 0)


if __name__ == '__main__':
    main()
