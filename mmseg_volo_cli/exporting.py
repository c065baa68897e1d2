"""The command that exports models."""

import argparse

from .arguments import DEFAULT, add_config


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument('checkpoint', help="the model's weights")
    parser.add_argument('--out', metavar='FILE', required=True, help='an .onnx or .pt2 file')
    parser.add_argument('--opset', type=int, metavar='N', help="version of ONNX's operators (default: 18)")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        '--fp16',
        dest='precision',
        action='store_const',
        const='float16',
        default='float32',
        help='half the size of the file',
    )
    precision.add_argument(
        '--int8',
        dest='precision',
        action='store_const',
        const='int8',
        help='8-bit integers, calibrated on training data',
    )
    parser.add_argument(
        '--calibration-images', type=int, default=64, metavar='N', help='training images for --int8 ' + DEFAULT
    )
    parser.add_argument('--seed', type=int, default=0, help='random seed for the choice of these images ' + DEFAULT)


def _export(args: dict) -> None:
    from mmseg_volo.apis.exporting import export

    export(**args)


COMMANDS = {'export': ('Write a model as an ONNX file or a program of torch.export.', _add_export, _export)}
