"""Commands about data sets."""

import argparse

from .arguments import DEFAULT, add_config


def _add_check_data(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument('--out', metavar='PNG', help='labels over images (default: check_data.png in the work dir)')
    parser.add_argument('--splits', nargs='+', choices=['train', 'val', 'test'], help='(default: all in the config)')


def _check_data(args: dict) -> int:
    from mmseg_volo.datasets.full_check import check_all_data

    return int(any(finding.level == 'error' for finding in check_all_data(**args)))


def _add_toy_streets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('out', metavar='DIR', help='new folder for the data set')
    parser.add_argument('--train', type=int, default=400, help='number of training scenes ' + DEFAULT)
    parser.add_argument('--val', type=int, default=40, help='number of validation scenes ' + DEFAULT)
    parser.add_argument('--size', default='256x128', help='width x height in pixels ' + DEFAULT)
    parser.add_argument('--seed', type=int, default=0, help='random seed; each gives other scenes ' + DEFAULT)


def _toy_streets(args: dict) -> None:
    from mmseg_volo.datasets.toy_streets import make_toy_streets, parse_size

    make_toy_streets(**{**args, 'size': parse_size(args['size'])})


COMMANDS = {
    'check-data': ("Check every image and label in a config's data sets.", _add_check_data, _check_data),
    'toy-streets': (
        "Write a small data set of generated street scenes in Cityscapes' layout.",
        _add_toy_streets,
        _toy_streets,
    ),
}
