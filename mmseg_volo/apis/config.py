"""A config, checked before hours are spent on it."""

import os
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, TRANSFORMS
from tqdm import tqdm

from ..errors import UserError

MAX_LABELS_CHECKED = 500  # per split, spread evenly: seconds, where Cityscapes' 2975 labels would take minutes


class Options(DictAction):
    """``--cfg-options key=value ...`` as mmengine reads them; a word without ``=`` is an error of one sentence."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: list[str], option: str | None = None):
        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'{option} takes key=value, got {wrong[0]!r}')
        super().__call__(parser, namespace, values, option)


def add_config_arguments(parser: ArgumentParser) -> None:
    """Arguments that every tool with a config has."""
    parser.add_argument('config', help='a file of configs/, or your own')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Options,
        default={},
        metavar='KEY=VALUE',
        help='override the config, for example data_root=/data/cityscapes train_dataloader.batch_size=2',
    )


def load_config(path: str, options: dict) -> Config:
    """Config at ``path`` with ``options`` merged in; ``data_root`` goes to every data set.

    Raises:
        UserError: no such file, or it does not load.
    """
    if not Path(path).is_file():
        raise UserError(f'config not found: {path}; configs/ holds those that come with mmseg_volo')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise UserError(f'config {path} does not load: {type(error).__name__}: {error}') from None
    cfg.merge_from_dict(options)
    if 'data_root' in options:
        for split in ('train', 'val', 'test'):
            if cfg.get(f'{split}_dataloader'):
                for settings in _data_sets(cfg[f'{split}_dataloader'].dataset):
                    settings['data_root'] = options['data_root']
    return cfg


def set_work_dir(cfg: Config, config_path: str, work_dir: str | None) -> None:
    """Make the work dir, ``work_dirs/<config's stem>`` by default; raises ``UserError`` if nothing can be written."""
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(config_path).stem)
    make_writable(cfg.work_dir)


def make_writable(folder: str | Path) -> Path:
    """Make ``folder`` if need be; raises ``UserError`` if nothing can be written there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f'.probe-{os.getpid()}'
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f'cannot write to {folder} ({error.strerror}); choose another folder') from None
    return folder


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Raise ``UserError`` unless each split's folders exist and its labels are there and within the classes."""
    if int(os.environ.get('RANK', 0)) != 0:  # one process looks for all
        return
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    for split in splits:
        for settings in _data_sets(cfg[f'{split}_dataloader'].dataset):
            root = settings.get('data_root') or ''
            for folder in settings.get('data_prefix', {}).values():
                if not (Path(root) / folder).is_dir():
                    raise UserError(
                        f'no folder {Path(root) / folder}; docs/data.md says how to make it, '
                        'and --cfg-options data_root=FOLDER points elsewhere'
                    )
            _check_labels(settings, split, cfg.model.decode_head.num_classes)


def _check_labels(settings: dict, split: str, num_classes: int) -> None:
    pipeline = settings.get('pipeline', [])
    dataset = DATASETS.build({**settings, 'pipeline': []})
    load = next((TRANSFORMS.build(step) for step in pipeline if step['type'] == 'LoadAnnotations'), None)
    if len(dataset) == 0:
        raise UserError(f'no images for {split} under {dataset.data_root}; docs/data.md says how the folder must look')
    classes = dataset.metainfo['classes']
    if len(classes) != num_classes:
        raise UserError(f'the {split} data has {len(classes)} classes, but decode_head.num_classes is {num_classes}')
    if load is None:
        return

    def problem(index: int) -> str | None:
        info = dataset.get_data_info(index)
        path = info['seg_map_path']
        if not Path(path).is_file():
            return f'image {info["img_path"]} has no label {path}; docs/data.md says how to make it'
        try:
            label = load(info)['gt_seg_map']
        except Exception as error:  # whatever the decoder raises
            return f'label {path} cannot be read ({error})'
        if label.ndim != 2:
            return f'label {path} has shape {label.shape}: class ids are expected, one per pixel, not colours'
        ids = np.flatnonzero(np.bincount(label.ravel()))
        wrong = [int(i) for i in ids if i >= num_classes and i != dataset.ignore_index]
        if wrong:
            return (
                f'label {path} has id {wrong[0]}, but there are {num_classes} classes (0 to {num_classes - 1}) '
                f'and {dataset.ignore_index} for void; docs/data.md says how to make the labels'
            )
        return None

    count = min(len(dataset), MAX_LABELS_CHECKED)
    indices = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in tqdm(pool.map(problem, indices), f'labels of {split}', count, leave=False, delay=1):
            if found:
                pool.shutdown(cancel_futures=True)
                raise UserError(found)
    print_log(f'{split}: {len(dataset)} images, {count} labels checked, ids within {num_classes} classes', 'current')


def _data_sets(dataset: dict) -> list[dict]:
    """The data sets inside RepeatDataset, ConcatDataset and the like."""
    if 'dataset' in dataset:
        return _data_sets(dataset['dataset'])
    if 'datasets' in dataset:
        return [settings for part in dataset['datasets'] for settings in _data_sets(part)]
    return [dataset]
