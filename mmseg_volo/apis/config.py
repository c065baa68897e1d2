"""A config: its arguments, its file, and where its results go."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mmengine.config import Config, DictAction

from ..errors import UserError


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
                for settings in data_sets(cfg[f'{split}_dataloader'].dataset):
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


def data_sets(dataset: dict) -> list[dict]:
    """The data sets inside RepeatDataset, ConcatDataset and the like."""
    if 'dataset' in dataset:
        return data_sets(dataset['dataset'])
    if 'datasets' in dataset:
        return [settings for part in dataset['datasets'] for settings in data_sets(part)]
    return [dataset]
