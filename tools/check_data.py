#!/usr/bin/env python
"""Look at all the data of a config: tools/check_data.py configs/volo_d1_ade20k.py"""

import argparse
import sys

from mmseg_volo.config import add_config_arguments
from mmseg_volo.datasets.checks import check_all_data
from mmseg_volo.error_messages import one_sentence_errors


def main() -> None:
    parser = argparse.ArgumentParser(description="Look at every image and label of the config's data sets.")
    add_config_arguments(parser)
    parser.add_argument('--out', metavar='PNG', help='labels over images; check_data.png in the work dir by default')
    parser.add_argument('--splits', nargs='+', choices=['train', 'val', 'test'], help="the config's by default")
    with one_sentence_errors():
        findings = check_all_data(**vars(parser.parse_args()))
    sys.exit(any(finding.level == 'error' for finding in findings))


if __name__ == '__main__':
    main()
