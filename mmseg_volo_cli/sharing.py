"""Commands that give models to others."""

import argparse

from .arguments import DEFAULT, add_config


def _add_push(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument('checkpoint', help='a checkpoint trained with this config')
    parser.add_argument('target', help='hf://owner/name on the Hugging Face hub, or a new or empty folder')
    parser.add_argument(
        '--metrics',
        metavar='JSON',
        help='metrics.json of mmseg-volo test (default: the one beside the checkpoint, if any)',
    )
    parser.add_argument('--license', default='unknown', help="the hub's name of the weights' licence " + DEFAULT)
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--message', help="the commit's message (default: Upload NAME with mmseg_volo VERSION)")


def _push(args: dict) -> None:
    from mmseg_volo.apis.push import push

    push(**args)


COMMANDS = {
    'push': ('Upload a model to the Hugging Face hub, or write the same files to a folder.', _add_push, _push),
}
