#!/usr/bin/env python
"""Time and memory of the sliding window, against mmseg's and over growing images."""

import argparse

from mmseg_volo.benchmark.sliding import benchmark_sliding
from mmseg_volo.config import add_config_arguments
from mmseg_volo.error_messages import one_sentence_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--sizes', type=int, nargs='+', default=[2048, 4096, 8192, 16384], help='sides of the images')
    parser.add_argument('--crop', type=int, default=512, help='side of a window (default: %(default)s)')
    parser.add_argument('--stride', type=int, default=384, help='from window to window (default: %(default)s)')
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'], default='auto', help='(default: %(default)s)')
    with one_sentence_errors():
        benchmark_sliding(**vars(parser.parse_args()))


if __name__ == '__main__':
    main()
