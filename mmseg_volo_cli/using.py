"""Commands that measure models and use them."""

import argparse

from .arguments import DEFAULT, add_compile, add_device, add_model, add_openvino, add_processes, add_verbose


def _add_test(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
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
    parser.add_argument(
        '--corruptions', action='store_true', help='measure also under noise, blur, JPEG, darkness and fog; takes 16x'
    )
    parser.add_argument('--work-dir', metavar='DIR', help='logs (default: work_dirs/<config name>)')
    add_openvino(parser)
    add_processes(parser)
    add_verbose(parser)


def _test(args: dict) -> None:
    from mmseg_volo.apis import test

    test(**args)


def _add_infer(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        'images', nargs='*', metavar='IMAGE', help='images, videos, folders (with subfolders), patterns or @LIST'
    )
    parser.add_argument('--out-dir', default='out', metavar='DIR', help='gets vis/, pred/ and others ' + DEFAULT)
    parser.add_argument(
        '--save',
        nargs='+',
        choices=['labels', 'overlay', 'prob', 'confidence', 'label-studio'],
        default=['labels', 'overlay'],
        help='results to save (default: labels overlay)',
    )
    parser.add_argument('--opacity', type=float, default=0.55, help='opacity of the overlay, 0 to 1 ' + DEFAULT)
    parser.add_argument(
        '--side-by-side', dest='beside', action='store_true', help='show the picture or frame beside its overlay'
    )
    parser.add_argument(
        '--void-below', type=float, default=0, metavar='P', help='labels less probable than P become 255 (void)'
    )
    parser.add_argument('--tta', action='store_true', help='average predictions over several scales and flips')
    parser.add_argument('--amp', action='store_true', help='mixed precision: bfloat16, or float16 on older GPUs')
    parser.add_argument('--bands', nargs='+', type=int, metavar='N', help='bands of TIFF files to use, from 1')
    add_compile(parser)
    add_openvino(parser)
    parser.add_argument(
        '--resume', action='store_true', help='leave out finished files, and go on with unfinished rasters'
    )
    parser.add_argument(
        '--ray',
        nargs='?',
        const='local',
        metavar='HOST:PORT',
        help='use several processes: of a Ray cluster, or without an address on this machine',
    )
    parser.add_argument(
        '--workers', type=int, metavar='N', help='processes with --ray (default: 2, or all of a cluster)'
    )
    add_device(parser, numbered=True)


def _infer(args: dict) -> int:
    from mmseg_volo.apis import infer
    from mmseg_volo.apis.sources import split_words

    words = [word for word in (args['checkpoint'], *args['images']) if word is not None]
    args['checkpoint'], args['images'] = split_words(args['config'], words)
    undecoded = infer(**args)
    return 1 if undecoded else 0


def _add_look(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument('folder', help='pictures, also in subfolders')
    parser.add_argument('--labels', metavar='DIR', help="true labels (default: those of the config's data sets)")
    parser.add_argument('--port', type=int, default=8000, help='on 127.0.0.1; the next free one if in use ' + DEFAULT)
    parser.add_argument('--out-dir', default='out', metavar='DIR', help='gets corrected labels in labels/ ' + DEFAULT)
    parser.add_argument('--overwrite', action='store_true', help='save corrected labels over the true ones')
    parser.add_argument('--open', action='store_true', help='open the page in a browser')
    parser.add_argument('--amp', action='store_true', help='mixed precision: bfloat16, or float16 on older GPUs')
    add_device(parser, numbered=True)


def _look(args: dict) -> None:
    from mmseg_volo.look import look

    look(**args)


def _add_classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help="timm's name of the classifier, such as volo_d1_224")
    parser.add_argument('checkpoint', help='its weights: a path, a URL or timm://NAME; or an exported file')
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
    add_openvino(parser)
    add_device(parser, numbered=True)


def _classify(args: dict) -> int:
    from mmseg_volo.apis.classification import classify

    return 1 if classify(**args).get('skipped') else 0


COMMANDS = {
    'test': ("Measure a checkpoint on a config's test set.", _add_test, _test),
    'infer': ('Segment images and videos: overlays, label maps, probabilities.', _add_infer, _infer),
    'look': ('Look at predicted labels in a browser, and correct them.', _add_look, _look),
    'classify': ('Classify images, or measure a classifier on ImageNet.', _add_classify, _classify),
}
