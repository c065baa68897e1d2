#!/usr/bin/env python
"""Where the time and memory of a config's train step go, and how many workers feed it."""

import argparse

from mmseg_volo.benchmark.step import profile_step
from mmseg_volo.config import add_config_arguments
from mmseg_volo.error_messages import one_sentence_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'], default='auto', help='(default: %(default)s)')
    parser.add_argument('--batch', type=int, help="images per step (default: the config's)")
    parser.add_argument('--images', type=int, default=20, help='images through the pipeline (default: %(default)s)')
    with one_sentence_errors():
        profile_step(**vars(parser.parse_args()))


if __name__ == '__main__':
    main()
