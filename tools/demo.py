#!/usr/bin/env python
"""The whole way at once: make toy streets, train on them, measure, look."""

import argparse
from pathlib import Path

from mmseg_volo.apis import run_demo
from mmseg_volo.error_messages import one_sentence_errors

CONFIG = Path(__file__).parents[1] / 'configs/volo_tiny_toy_streets.py'


def main() -> None:
    parser = argparse.ArgumentParser(description='Toy streets: made, trained on, measured and looked at, in minutes.')
    parser.add_argument('--out-dir', default='demo', help='data, checkpoints and pictures (default: %(default)s)')
    with one_sentence_errors():
        run_demo(str(CONFIG), **vars(parser.parse_args()))


if __name__ == '__main__':
    main()
