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


def _add_new_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'folder', help='pictures with masks, or with annotations of COCO, Labelme, CVAT or Label Studio'
    )
    parser.add_argument('--out', metavar='FILE', help="the config (default: FOLDER's name + .py)")
    parser.add_argument(
        '--arch', metavar='NAME', help='backbone, such as d1 or coatnet_nano_rw (default: d1; on a CPU tiny)'
    )
    parser.add_argument(
        '--classes', nargs='+', default=[], metavar='NAME', help='class names, or a file that lists them'
    )
    parser.add_argument('--void', nargs='+', default=[], metavar='NAME', help='classes that shall not count')
    parser.add_argument(
        '--rest', choices=['background', 'void'], help='what pixels in no region are (default: by number)'
    )
    parser.add_argument(
        '--annotations',
        dest='form',
        choices=['masks', 'coco', 'labelme', 'cvat', 'label-studio'],
        help='format of the annotations (default: whichever is found)',
    )
    parser.add_argument('--masks', metavar='PATTERN', help="which files are masks, such as '*_labelTrainIds.png'")
    parser.add_argument('--val-share', type=float, default=0.2, help='share of pictures for validation ' + DEFAULT)
    parser.add_argument('--test-share', type=float, default=0.0, help='share of pictures for testing ' + DEFAULT)
    parser.add_argument('--seed', type=int, default=0, help='random seed of the split ' + DEFAULT)
    parser.add_argument('--group', metavar='REGEX', help='pictures whose names match alike stay in one split')
    parser.add_argument('--overwrite', action='store_true', help='replace what an earlier run wrote')


def _new_dataset(args: dict) -> None:
    from mmseg_volo.apis.new_dataset import new_dataset

    new_dataset(**args)


def _add_toy_streets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('out', metavar='DIR', help='new folder for the data set')
    parser.add_argument('--train', type=int, default=400, help='number of training scenes ' + DEFAULT)
    parser.add_argument('--val', type=int, default=40, help='number of validation scenes ' + DEFAULT)
    parser.add_argument('--size', default='256x128', help='width x height in pixels ' + DEFAULT)
    parser.add_argument('--seed', type=int, default=0, help='random seed; each gives other scenes ' + DEFAULT)
    parser.add_argument(
        '--labelme', action='store_true', help="write Labelme's polygons in one folder instead, to try new-dataset on"
    )


def _toy_streets(args: dict) -> None:
    from mmseg_volo.datasets.toy_streets import make_toy_streets, parse_size

    make_toy_streets(**{**args, 'size': parse_size(args['size'])})


COMMANDS = {
    'new-dataset': ('Write a config for annotated pictures of your own.', _add_new_dataset, _new_dataset),
    'check-data': ("Check every image and label in a config's data sets.", _add_check_data, _check_data),
    'toy-streets': (
        "Write a small data set of generated street scenes in Cityscapes' layout.",
        _add_toy_streets,
        _toy_streets,
    ),
}
