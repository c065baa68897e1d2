#!/usr/bin/env python
"""Draw loss, learning rate and mIoU of training runs: tools/plot.py work_dirs/volo_d1_camvid work_dirs/other"""

import argparse

from mmseg_volo.apis.plotting import plot
from mmseg_volo.error_messages import one_sentence_errors


def main() -> None:
    parser = argparse.ArgumentParser(description='Draw loss, learning rate and mIoU of one or several runs.')
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help='where tools/train.py wrote')
    parser.add_argument('--out', metavar='PNG', default='plot.png', help='(default: %(default)s)')
    with one_sentence_errors():
        plot(**vars(parser.parse_args()))


if __name__ == '__main__':
    main()
