"""The command that exports models."""

import argparse
from typing import Any

from .arguments import DEFAULT, add_model


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument('--out', metavar='FILE', required=True, help='an .onnx or .pt2 file')
    parser.add_argument('--opset', type=int, metavar='N', help="version of ONNX's operators (default: 18)")
    precision = parser.add_mutually_exclusive_group()
    chosen: dict[str, Any] = dict(dest='precision', action='store_const', default='float32')
    precision.add_argument('--fp16', const='float16', help='16-bit numbers: half the size of the file', **chosen)
    precision.add_argument('--int8', const='int8', help='8-bit integers, calibrated on training images', **chosen)
    parser.add_argument(
        '--calibration-images', type=int, default=64, metavar='N', help='training images for --int8 ' + DEFAULT
    )
    parser.add_argument('--seed', type=int, default=0, help='random seed for the choice of these images ' + DEFAULT)


def _export(args: dict) -> None:
    from mmseg_volo.apis.exporting import export

    export(**args)


COMMANDS = {'export': ('Write a model as an ONNX file or a program of torch.export.', _add_export, _export)}
