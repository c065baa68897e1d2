"""Commands that list what there is."""

import argparse


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('pattern', nargs='?', default='*', help="such as 'volo_d1*' or 'rw'; all by default")
    parser.add_argument(
        '--measure',
        nargs='*',
        metavar='BACKBONE',
        help='measure time and memory of the backbones that match these patterns (default: all); takes minutes',
    )


def _models(args: dict) -> None:
    from mmseg_volo.apis.backbone_table import list_backbones

    list_backbones(**args)


def _add_configs(parser: argparse.ArgumentParser) -> None:
    _add_models(parser)
    parser.add_argument('--backbones', action='store_true', help='list the backbones instead, as a Markdown table')


def _configs(args: dict) -> None:
    from mmseg_volo.apis.listing import list_configs
    from mmseg_volo.errors import UserError

    if args.pop('backbones'):
        return _models(args)
    if args.pop('measure') is not None:
        raise UserError('--measure needs --backbones')
    return list_configs(**args)


COMMANDS = {
    'models': ('List the backbones as a Markdown table, as configs --backbones does.', _add_models, _models),
    'configs': ('List the configs that come with mmseg_volo.', _add_configs, _configs),
}
