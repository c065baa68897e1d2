"""Commands that measure speed and memory."""

import argparse

from .arguments import DEFAULT, add_config, add_device


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--quick', action='store_true', help='fewer rounds: minutes on two CPU cores')
    parser.add_argument('--compiled', action='store_true', help='also measure timm under torch.compile')
    names = ['operator', 'forward', 'train-step', 'memory', 'segmentor', 'segmentor-memory', 'biased-attention']
    parser.add_argument(
        '--tables',
        nargs='+',
        choices=[*names, 'runtimes'],
        default=names,
        help='tables to print (default: all but runtimes, which needs the extra export)',
    )
    parser.add_argument('--out', metavar='JSON', help='also write every measurement to this file')
    add_device(parser)


def _benchmark(args: dict) -> None:
    from mmseg_volo.benchmark.suite import run_benchmark

    run_benchmark(**args)


def _add_benchmark_sliding(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument('--sizes', type=int, nargs='+', default=[2048, 4096, 8192, 16384], help='image sides')
    parser.add_argument('--crop', type=int, default=512, help='window side ' + DEFAULT)
    parser.add_argument('--stride', type=int, default=384, help='distance between windows ' + DEFAULT)
    add_device(parser)


def _benchmark_sliding(args: dict) -> None:
    from mmseg_volo.benchmark.sliding import benchmark_sliding

    benchmark_sliding(**args)


def _add_profile_step(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument('--batch', type=int, help="images per step (default: the config's)")
    parser.add_argument('--images', type=int, default=20, help='images read by the data pipeline ' + DEFAULT)
    add_device(parser)


def _profile_step(args: dict) -> None:
    from mmseg_volo.benchmark.step import profile_step

    profile_step(**args)


COMMANDS = {
    'benchmark': ('Measure speed and memory against timm and mmseg.', _add_benchmark, _benchmark),
    'benchmark-sliding': ("Measure the sliding window against mmseg's.", _add_benchmark_sliding, _benchmark_sliding),
    'profile-step': ('Profile a training step and the data pipeline of a config.', _add_profile_step, _profile_step),
}
