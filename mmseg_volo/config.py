"""A config: its arguments, its file, and where its results go."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mmengine.config import Config, DictAction

from .errors import UserError

SPLITS = ('train', 'val', 'test')
# What the tools themselves read of a config; the rest is mmengine's to build or to refuse.
KINDS = {
    'model': dict,
    'model.backbone': dict,
    'model.decode_head': dict,
    'model.decode_head.type': str | type,
    'model.decode_head.num_classes': int,
    'optim_wrapper': dict | None,
    'auto_scale_lr': dict | None,
    'custom_hooks': list | None,
    'tta_model': dict | None,
    'work_dir': str | None,
}
LOADER_KINDS = {'dataset': dict, 'batch_size': int, 'sampler': dict}
DATA_SET_KINDS = {'data_root': str | None, 'data_prefix': dict}


class Options(DictAction):
    """``--cfg-options key=value ...`` as mmengine reads them; a word without ``=`` is an error of one sentence."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: list[str], option: str | None = None):
        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'{option} takes key=value, got {wrong[0]!r}')
        try:
            super().__call__(parser, namespace, values, option)
        except Exception as error:  # of mmengine's parser, for brackets without an end
            parser.error(f'{option} cannot be read: {error}')


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
        UserError: no such file, it does not load, or holds something else than the tools read.
    """
    if not Path(path).is_file():
        raise UserError(f'config not found: {path}; configs/ holds those that come with mmseg_volo')
    try:
        cfg = Config.fromfile(path)
    except (Exception, SystemExit) as error:  # a config is a program: anything can go wrong in it
        raise UserError(f'config {path} does not load: {type(error).__name__}: {error}') from None
    try:
        cfg.merge_from_dict(options)
    except Exception as error:  # mmengine raises what comes its way
        raise UserError(f'{", ".join(options)} cannot be set in {path}: {type(error).__name__}: {error}') from None
    _check_kinds(cfg, KINDS)
    for loader in (f'{split}_dataloader' for split in SPLITS):
        if cfg.get(loader) is not None:
            _check_kinds(cfg, {loader: dict} | {f'{loader}.{key}': kind for key, kind in LOADER_KINDS.items()})
            for settings in data_sets(cfg[loader].dataset):
                if 'data_root' in options:
                    settings['data_root'] = options['data_root']
                _check_kinds(settings, {key: kind for key, kind in DATA_SET_KINDS.items() if key in settings})
                _check_steps(settings.get('pipeline', []))
    _check_steps(cfg.get('tta_pipeline') or [])
    return cfg


def _check_kinds(settings: Config | dict, kinds: dict) -> None:
    for key, kind in kinds.items():
        value = settings
        for name in key.split('.'):
            value = value.get(name)
        if not isinstance(value, kind):
            raise UserError(f'{key} must be {getattr(kind, "__name__", kind)} in a config, got {value!r}')


def _check_steps(pipeline: list) -> None:
    """Each is a dict with a type, or has such steps inside, as those of TestTimeAug do."""
    if not isinstance(pipeline, list | tuple):
        raise UserError(f'the steps of a pipeline must be a list, got {pipeline!r}')
    for step in pipeline:
        if isinstance(step, list | tuple):
            _check_steps(step)
        elif not isinstance(step, dict) or 'type' not in step:
            raise UserError(f'a step of a pipeline must be a dict with a type, got {step!r}')
        else:
            _check_steps(step.get('transforms', []))


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
        probe.unlink(missing_ok=True)  # another machine's process may have the same number
    except OSError as error:
        raise UserError(f'cannot write to {folder} ({error.strerror}); choose another folder') from None
    return folder


def picture_path(out: str) -> Path:
    """``out`` as a path to write a PNG to; raises ``UserError`` if it cannot be one."""
    path = Path(out)
    if path.suffix != '.png' or path.is_dir():
        raise UserError(f'--out {out} is no name for a picture; one that ends in .png is')
    make_writable(path.parent)
    return path


def data_sets(dataset: dict) -> list[dict]:
    """The data sets inside RepeatDataset, ConcatDataset and the like."""
    if not isinstance(dataset, dict):
        raise UserError(f'a data set must be a dict in a config, got {dataset!r}')
    if 'dataset' in dataset:
        return data_sets(dataset['dataset'])
    if 'datasets' in dataset:
        _check_kinds(dataset, {'datasets': list | tuple})
        return [settings for part in dataset['datasets'] for settings in data_sets(part)]
    return [dataset]
