"""Arguments that several commands share."""

import argparse

DEFAULT = '(default: %(default)s)'


class KeyValue(argparse.Action):
    """Collects ``KEY=VALUE`` words; mmengine reads the values later."""

    def __call__(self, parser, namespace, values, option_string=None):
        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'{option_string} takes KEY=VALUE, got {wrong[0]!r}')
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *values])


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='a config file, or the name of one that comes with mmseg_volo')
    _add_options(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'config',
        metavar='MODEL',
        help='a config file, or the name of one that comes with mmseg_volo; or a model that brings its weights: '
        'hf://owner/name, hf://owner/name@revision, or a folder that mmseg-volo push wrote',
    )
    parser.add_argument(
        'checkpoint',
        nargs='?',
        metavar='CHECKPOINT',
        help='weights for MODEL, needed unless it brings its own: a file ending in .pth, .pth.tar, .pt, .ckpt, .bin, '
        '.safetensors, .onnx or .pt2, or http(s)://..., hf://..., timm://...',
    )
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValue,
        metavar='KEY=VALUE',
        help='override the config, for example data_root=/data/cityscapes train_dataloader.batch_size=2',
    )


def add_device(parser: argparse.ArgumentParser, numbered: bool = False) -> None:
    if numbered:
        parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N ' + DEFAULT)
    else:
        parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'], default='auto', help=DEFAULT)


def add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of this run ' + DEFAULT,
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--verbose', action='store_true', help='print everything that goes into the log file')


def add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--compile', action='store_true', help='torch.compile the backbone; no gain measured on a CPU')
