"""The command line: arguments here, the work in ``mmseg_volo``, which is imported only once there is work to do.

It is a module of its own because importing any part of ``mmseg_volo`` imports torch and mmseg, which takes seconds, and
``--help`` should answer at once.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

DEFAULT = '(default: %(default)s)'


class _Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one sentence, with a suggestion for a mistyped command.

    Files may follow options even where they may be left out, which argparse's ``nargs='*'`` does not allow.
    """

    _is_inner = False  # Python 3.11's parse_known_intermixed_args() calls parse_known_args()

    def parse_known_args(self, args=None, namespace=None):
        may_be_empty = any(action.nargs == '*' for action in self._get_positional_actions())
        if self._is_inner or not may_be_empty:
            return super().parse_known_args(args, namespace)
        self._is_inner = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inner = False

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}; {self.prog} --help lists what it takes\n')

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = difflib.get_close_matches(str(value), action.choices, n=3)
            hint = f'did you mean {" or ".join(near)}?' if near else f'choose from {", ".join(action.choices)}'
            self.error(f'no command named {value!r}: {hint}')
        super()._check_value(action, value)


class _KeyValue(argparse.Action):
    """Collects ``KEY=VALUE`` words; mmengine reads the values later."""

    def __call__(self, parser, namespace, values, option_string=None):
        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'{option_string} takes KEY=VALUE, got {wrong[0]!r}')
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *values])


# Arguments that several commands share.


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='a config file, or the name of one that comes with mmseg_volo')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_KeyValue,
        metavar='KEY=VALUE',
        help='override the config, for example data_root=/data/cityscapes train_dataloader.batch_size=2',
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', help='a checkpoint trained with this config')


def _add_device(parser: argparse.ArgumentParser, numbered: bool = False) -> None:
    if numbered:
        parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N ' + DEFAULT)
    else:
        parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'], default='auto', help=DEFAULT)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of this run ' + DEFAULT,
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--verbose', action='store_true', help='print everything that goes into the log file')


def _add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--compile', action='store_true', help='torch.compile the backbone; no gain measured on a CPU')


# The commands: arguments, then work. A command returns its exit status, or None for success.


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument('--work-dir', metavar='DIR', help='checkpoints and logs (default: work_dirs/<config name>)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from CHECKPOINT, or from the newest intact one in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision; requires a GPU')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    parser.add_argument('--seed', type=int, help='random seed for Python, NumPy and PyTorch')
    parser.add_argument('--deterministic', action='store_true', help='bit-identical results; slower on a GPU')
    _add_processes(parser)
    _add_verbose(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_pretrain(parser)
    _add_compile(parser)


def _train(args: dict) -> None:
    from mmseg_volo.apis import train

    train(**args)


def _pretrain(args: dict) -> None:
    from mmseg_volo.apis.pretraining import pretrain

    pretrain(**args)


def _add_make_token_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', help='images, also in subfolders')
    parser.add_argument('out', metavar='DIR', help='folder for the token labels, one file per image')
    parser.add_argument('--model', required=True, metavar='NAME', help="timm's name of the classifier that labels")
    parser.add_argument('--checkpoint', metavar='FILE', help="its weights (default: download timm's)")
    parser.add_argument('--batch-size', type=int, default=32, help='images per forward pass ' + DEFAULT)
    parser.add_argument('--workers', type=int, default=4, help='processes that read images ' + DEFAULT)
    parser.add_argument('--skip-existing', action='store_true', help='keep whole files of an earlier run, and continue')
    _add_device(parser, numbered=True)


def _make_token_labels(args: dict) -> None:
    from mmseg_volo.pretraining.teacher import make_token_labels

    make_token_labels(**args)


def _add_test(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    _add_checkpoint(parser)
    parser.add_argument('--out-dir', metavar='DIR', help='scores and report.html (default: the work dir)')
    parser.add_argument('--show-dir', metavar='DIR', help='save image, ground truth and prediction side by side')
    parser.add_argument('--tta', action='store_true', help='average predictions over several scales and flips')
    parser.add_argument('--compare', metavar='JSON', help='metrics.json of another run to compare with')
    parser.add_argument(
        '--format',
        dest='server_format',
        choices=['cityscapes', 'ade20k'],
        help="write label maps for the benchmark's server instead of scores",
    )
    parser.add_argument('--work-dir', metavar='DIR', help='logs (default: work_dirs/<config name>)')
    _add_processes(parser)
    _add_verbose(parser)


def _test(args: dict) -> None:
    from mmseg_volo.apis import test

    test(**args)


def _add_infer(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    _add_checkpoint(parser)
    parser.add_argument('images', nargs='+', help='images, videos, folders (with subfolders) or patterns')
    parser.add_argument('--out-dir', default='out', metavar='DIR', help='gets vis/, pred/ and prob/ ' + DEFAULT)
    parser.add_argument(
        '--save',
        nargs='+',
        choices=['labels', 'overlay', 'prob'],
        default=['labels', 'overlay'],
        help='results to save (default: labels overlay)',
    )
    parser.add_argument('--opacity', type=float, default=0.55, help='opacity of the overlay, 0 to 1 ' + DEFAULT)
    parser.add_argument('--tta', action='store_true', help='average predictions over several scales and flips')
    parser.add_argument('--amp', action='store_true', help='mixed precision: bfloat16, or float16 on older GPUs')
    _add_compile(parser)
    _add_device(parser, numbered=True)


def _infer(args: dict) -> int:
    from mmseg_volo.apis import infer

    undecoded = infer(**args)
    return 1 if undecoded else 0


def _add_classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help="timm's name of the classifier, such as volo_d1_224")
    parser.add_argument('checkpoint', help='its weights: a path, a URL or timm://NAME')
    parser.add_argument('images', nargs='*', default=[], help='images, folders (with subfolders) or patterns')
    parser.add_argument('--imagenet', metavar='DIR', help='measure on the 1,000 class folders of ImageNet in DIR')
    parser.add_argument(
        '--labels',
        choices=['val', 'real', 'v2'],
        default='val',
        help='labels for --imagenet: the original ones, ReaL, or those of ImageNet-V2 ' + DEFAULT,
    )
    parser.add_argument('--out', metavar='JSON', help='also write the results to this file')
    parser.add_argument('--batch-size', type=int, default=32, help='images per forward pass ' + DEFAULT)
    parser.add_argument('--workers', type=int, help='processes that decode images (default: one per core, at most 4)')
    parser.add_argument('--amp', action='store_true', help='mixed precision: bfloat16, or float16 on older GPUs')
    _add_device(parser, numbered=True)


def _classify(args: dict) -> int:
    from mmseg_volo.apis.classification import classify

    return 1 if classify(**args).get('skipped') else 0


def _add_check_data(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument('--out', metavar='PNG', help='labels over images (default: check_data.png in the work dir)')
    parser.add_argument('--splits', nargs='+', choices=['train', 'val', 'test'], help='(default: all in the config)')


def _check_data(args: dict) -> int:
    from mmseg_volo.datasets.full_check import check_all_data

    return int(any(finding.level == 'error' for finding in check_all_data(**args)))


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help='work dir of a training run')
    parser.add_argument('--out', metavar='PNG', default='plot.png', help=DEFAULT)


def _plot(args: dict) -> None:
    from mmseg_volo.apis.plotting import plot

    plot(**args)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--out-dir', default='demo', metavar='DIR', help='data, checkpoints and pictures ' + DEFAULT)
    parser.add_argument('--seed', type=int, default=0, help='random seed for training ' + DEFAULT)
    _add_verbose(parser)


def _demo(args: dict) -> None:
    from mmseg_volo.apis import run_demo

    run_demo(**args)


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


def _add_toy_streets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('out', metavar='DIR', help='new folder for the data set')
    parser.add_argument('--train', type=int, default=400, help='number of training scenes ' + DEFAULT)
    parser.add_argument('--val', type=int, default=40, help='number of validation scenes ' + DEFAULT)
    parser.add_argument('--size', default='256x128', help='width x height in pixels ' + DEFAULT)
    parser.add_argument('--seed', type=int, default=0, help='random seed; each gives other scenes ' + DEFAULT)


def _toy_streets(args: dict) -> None:
    from mmseg_volo.datasets.toy_streets import make_toy_streets, parse_size

    make_toy_streets(**{**args, 'size': parse_size(args['size'])})


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--quick', action='store_true', help='fewer rounds: minutes on two CPU cores')
    parser.add_argument('--compiled', action='store_true', help='also measure timm under torch.compile')
    names = ['operator', 'forward', 'train-step', 'memory', 'segmentor', 'segmentor-memory', 'biased-attention']
    parser.add_argument('--tables', nargs='+', choices=names, default=names, help='tables to print (default: all)')
    parser.add_argument('--out', metavar='JSON', help='also write every measurement to this file')
    _add_device(parser)


def _benchmark(args: dict) -> None:
    from mmseg_volo.benchmark.suite import run_benchmark

    run_benchmark(**args)


def _add_benchmark_sliding(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument('--sizes', type=int, nargs='+', default=[2048, 4096, 8192, 16384], help='image sides')
    parser.add_argument('--crop', type=int, default=512, help='window side ' + DEFAULT)
    parser.add_argument('--stride', type=int, default=384, help='distance between windows ' + DEFAULT)
    _add_device(parser)


def _benchmark_sliding(args: dict) -> None:
    from mmseg_volo.benchmark.sliding import benchmark_sliding

    benchmark_sliding(**args)


def _add_profile_step(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument('--batch', type=int, help="images per step (default: the config's)")
    parser.add_argument('--images', type=int, default=20, help='images read by the data pipeline ' + DEFAULT)
    _add_device(parser)


def _profile_step(args: dict) -> None:
    from mmseg_volo.benchmark.step import profile_step

    profile_step(**args)


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('shell', choices=['bash', 'zsh', 'tcsh'])


def _completion(args: dict) -> int:
    try:
        import shtab
    except ImportError:
        print("error: completion requires shtab; type: pip install 'mmseg-volo[completion]'", file=sys.stderr)
        return 2
    print(shtab.complete(parser(), args['shell']))
    return 0


COMMANDS: dict[str, tuple[str, Callable, Callable]] = {
    'demo': ('Train on generated street scenes, measure and save predictions, in minutes.', _add_demo, _demo),
    'configs': ('List the configs that come with mmseg_volo.', _add_configs, _configs),
    'models': ('List the backbones as a Markdown table, as configs --backbones does.', _add_models, _models),
    'check-data': ("Check every image and label in a config's data sets.", _add_check_data, _check_data),
    'train': ('Train a segmentor.', _add_train, _train),
    'test': ("Measure a checkpoint on a config's test set.", _add_test, _test),
    'pretrain': ('Train a classifier with token labels, from which segmentors can start.', _add_pretrain, _pretrain),
    'make-token-labels': (
        'Write token labels for images with a timm classifier.',
        _add_make_token_labels,
        _make_token_labels,
    ),
    'infer': ('Segment images and videos: overlays, label maps, probabilities.', _add_infer, _infer),
    'classify': ('Classify images, or measure a classifier on ImageNet.', _add_classify, _classify),
    'plot': ('Plot loss, learning rate and mIoU of training runs.', _add_plot, _plot),
    'toy-streets': (
        "Write a small data set of generated street scenes in Cityscapes' layout.",
        _add_toy_streets,
        _toy_streets,
    ),
    'benchmark': ('Measure speed and memory against timm and mmseg.', _add_benchmark, _benchmark),
    'benchmark-sliding': ("Measure the sliding window against mmseg's.", _add_benchmark_sliding, _benchmark_sliding),
    'profile-step': ('Profile a training step and the data pipeline of a config.', _add_profile_step, _profile_step),
    'completion': ('Print a completion script for a shell.', _add_completion, _completion),
}


def parser() -> argparse.ArgumentParser:
    """Parser for ``mmseg-volo COMMAND ...``."""
    top = _Parser(prog='mmseg-volo', description='VOLO backbones for MMSegmentation.')
    commands = top.add_subparsers(dest='command', metavar='COMMAND', title='commands')
    for name, (description, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=description, description=description))
    return top


def main(command: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        command: a key of ``COMMANDS``; None reads it from the first argument.
        arguments: those after the program's name; None takes ``sys.argv``'s.
    """
    if command is None:
        top = parser()
        args = vars(top.parse_args(arguments))
        command = args.pop('command')
        if command is None:
            top.print_help()
            return 2
    else:
        description, add_arguments, _ = COMMANDS[command]
        single = _Parser(description=description)
        add_arguments(single)
        args = vars(single.parse_args(arguments))
    work = COMMANDS[command][2]
    return work(args) if work is _completion else _run(work, args)


def _run(work: Callable[[dict], int | None], args: dict) -> int:
    if 'local_rank' in args:
        os.environ.setdefault('LOCAL_RANK', str(args.pop('local_rank')))
    try:
        from mmseg_volo.config import parse_options
        from mmseg_volo.error_messages import one_sentence_errors
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        if error.name is not None:  # a module that is missing or broken, not mmseg_volo's own sentence about packages
            raise
        print('error:', error, file=sys.stderr)
        return 2
    with one_sentence_errors():
        if 'cfg_options' in args:
            args['cfg_options'] = parse_options(args['cfg_options'] or [])
        return work(args) or 0


if __name__ == '__main__':
    sys.exit(main())
