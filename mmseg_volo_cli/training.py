"""Commands that train, and that show how training went."""

import argparse

from .arguments import DEFAULT, add_compile, add_config, add_device, add_processes, add_verbose


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
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
    add_processes(parser)
    add_verbose(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_pretrain(parser)
    add_compile(parser)
    parser.add_argument(
        '--finetune',
        metavar='CHECKPOINT',
        help="start from a segmentor's weights; its classes may be others and are matched by name",
    )
    parser.add_argument(
        '--same-classes', action='store_true', help='the classes of --finetune are those of the config, in this order'
    )


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
    parser.add_argument('--resume', action='store_true', help='continue an earlier run: keep its files that are whole')
    add_device(parser, numbered=True)


def _make_token_labels(args: dict) -> None:
    from mmseg_volo.pretraining.teacher import make_token_labels

    make_token_labels(**args)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help='work dir of a training run')
    parser.add_argument('--out', metavar='PNG', default='plot.png', help=DEFAULT)


def _plot(args: dict) -> None:
    from mmseg_volo.apis.plotting import plot

    plot(**args)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--out-dir', default='demo', metavar='DIR', help='data, checkpoints and pictures ' + DEFAULT)
    parser.add_argument('--seed', type=int, default=0, help='random seed for training ' + DEFAULT)
    add_verbose(parser)


def _demo(args: dict) -> None:
    from mmseg_volo.apis import run_demo

    run_demo(**args)


COMMANDS = {
    'demo': ('Train on generated street scenes, measure and save predictions, in minutes.', _add_demo, _demo),
    'train': ('Train a segmentor.', _add_train, _train),
    'pretrain': ('Train a classifier with token labels, from which segmentors can start.', _add_pretrain, _pretrain),
    'make-token-labels': (
        'Write token labels for images with a timm classifier.',
        _add_make_token_labels,
        _make_token_labels,
    ),
    'plot': ('Plot loss, learning rate and mIoU of training runs.', _add_plot, _plot),
}
