"""Configs: found by path or name, loaded, checked, and where their results go."""

import os
from argparse import ArgumentParser
from collections.abc import Sequence, Sized
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from .errors import UserError

CONFIGS = Path(__file__).parent / 'configs'  # in a clone, a link to the folder of that name at the top level
SPLITS = ('train', 'val', 'test')
LABEL_LOADERS = ('LoadAnnotations', 'LoadRasterAnnotations')  # steps of a pipeline
# Types of the values that the commands read; mmengine builds or refuses the rest.
KINDS = {
    'model': dict,
    'model.backbone': dict,
    'optim_wrapper': dict | None,
    'auto_scale_lr': dict | None,
    'custom_hooks': list | None,
    'tta_model': dict | None,
    'work_dir': str | None,
}
HEAD_KINDS = {'type': str | type, 'num_classes': int}
LOADER_KINDS = {'dataset': dict, 'batch_size': int, 'sampler': dict}
DATA_SET_KINDS = {'data_root': str | None, 'data_prefix': dict}


def parse_options(words: Sequence[str]) -> dict:
    """``--cfg-options`` as a dict: words ``key=value``, with values as mmengine reads them (numbers, lists, dicts).

    Raises:
        UserError: a value cannot be read, such as a bracket that is never closed.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    try:
        return parser.parse_args(['--cfg-options', *words]).cfg_options if words else {}
    except Exception as error:  # mmengine's parser raises many kinds
        raise UserError(f'--cfg-options cannot be read: {error}') from None


def shipped_configs() -> dict[str, Path]:
    """Paths of the configs that come with the package, by name."""
    leaves = sorted(path for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts and path.stem != '__init__')
    return {path.stem: path for path in leaves}


def find_config(config: str) -> Path:
    """Path of a config: a file, or the name of a shipped config.

    Raises:
        UserError: neither; the message lists the nearest names.
    """
    path = Path(config)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if config in shipped:
        return shipped[config]
    near = get_close_matches(path.stem, shipped, n=3, cutoff=0.5)
    hint = f'did you mean {", ".join(near)}?' if near else ''
    raise UserError(
        f'config not found: {config}; {hint or "no shipped config has a similar name"} (mmseg-volo configs lists them)'
    )


def load_config(path: str, options: dict) -> Config:
    """Load the config of a segmentor and override it.

    Args:
        path: a file, or the name of a shipped config.
        options: values by dotted key; ``data_root`` is set in every data set.

    Raises:
        UserError: not found, does not load, or a value that the commands read has the wrong type.
    """
    cfg = load_any_config(path, options)
    if 'decode_head' not in cfg.model and cfg.get('default_scope') == 'mmpretrain':
        raise UserError(f'{path} trains a classifier, not a segmentor; use mmseg-volo pretrain')
    check_segmentor(cfg)
    return cfg


def check_segmentor(cfg: Config) -> None:
    """Raise ``UserError`` unless the decode heads have the types of values that the commands read."""
    _check_kinds(cfg, {'model.decode_head': dict | list})
    _check_heads(cfg)


def load_any_config(path: str, options: dict) -> Config:
    """Load the config of any model; see ``load_config``."""
    file = find_config(path)
    try:
        cfg = Config.fromfile(file)
    except (Exception, SystemExit) as error:  # a config is a program: anything can go wrong in it
        raise UserError(f'config {path} does not load: {type(error).__name__}: {error}') from None
    return overridden(cfg, path, options)


def overridden(cfg: Config, path: str, options: dict) -> Config:
    """Override and check a config that was read from ``path``; see ``load_config``."""
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
                _check_kinds(settings, {f'data_prefix.{name}': str for name in settings.get('data_prefix', {})})
                _check_steps(settings.get('pipeline', []))
    _check_steps(cfg.get('tta_pipeline') or [])
    return cfg


def decode_heads(cfg: Config) -> list[dict]:
    """Decode heads in the order in which they run: one, or the stages of a cascade such as OCRNet or PointRend."""
    head = cfg.model.decode_head
    return [head] if isinstance(head, dict) else list(head)


def _check_heads(cfg: Config) -> None:
    heads = decode_heads(cfg)
    if not heads:
        raise UserError('invalid config: model.decode_head must not be empty')
    cascade = isinstance(cfg.model.decode_head, list)
    for i, head in enumerate(heads):
        name = f'model.decode_head.{i}' if cascade else 'model.decode_head'
        if not isinstance(head, dict):
            raise UserError(f'invalid config: {name} must be of type dict, got {head!r}')
        _check_kinds(head, HEAD_KINDS, f'{name}.')
    classes = [head['num_classes'] for head in heads]
    if len(set(classes)) > 1:
        raise UserError(f'invalid config: the heads in model.decode_head must have one num_classes, got {classes}')


def _check_kinds(settings: Config | dict, kinds: dict, prefix: str = '') -> None:
    for key, kind in kinds.items():
        value = settings
        for name in key.split('.'):
            value = value.get(name)
        if not isinstance(value, kind):
            raise UserError(
                f'invalid config: {prefix}{key} must be of type {getattr(kind, "__name__", kind)}, got {value!r}'
            )


def _check_steps(pipeline: list | tuple) -> None:
    """Raise ``UserError`` unless each step is a dict with a type; TestTimeAug nests lists of steps."""
    if not isinstance(pipeline, list | tuple):
        raise UserError(f'invalid config: a pipeline must be a list, got {pipeline!r}')
    for step in pipeline:
        if isinstance(step, list | tuple):
            _check_steps(step)
        elif not isinstance(step, dict) or 'type' not in step:
            raise UserError(f'invalid config: a pipeline step must be a dict with a type, got {step!r}')
        else:
            _check_steps(step.get('transforms', []))


def set_work_dir(cfg: Config, config_path: str, work_dir: str | None) -> None:
    """Create the work dir, by default ``work_dirs/<config name>``; raises ``UserError`` if it is not writable."""
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(config_path).stem)
    make_writable(cfg.work_dir)


def make_writable(folder: str | Path) -> Path:
    """Create ``folder`` if necessary; raises ``UserError`` if it is not writable."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f'.probe-{os.getpid()}'
        probe.touch()
        probe.unlink(missing_ok=True)  # another machine's process may have the same number
    except OSError as error:
        raise UserError(f'cannot write to {folder} ({error.strerror}); choose another folder') from None
    return folder


def output_path(out: str, *suffixes: str) -> Path:
    """Path of the output file ``out``; raises ``UserError`` for another suffix or a folder that is not writable."""
    path = Path(out)
    suffixes = suffixes or ('.png',)
    if path.suffix not in suffixes or path.is_dir():
        raise UserError(f'--out must be a {" or ".join(suffixes)} file, got {out}')
    make_writable(path.parent)
    return path


def data_sets(dataset: dict | Sized) -> list:
    """Innermost data sets, inside RepeatDataset, ConcatDataset and similar wrappers.

    Args:
        dataset: a data set's config, or the data set built from it.

    Raises:
        UserError: the config of a data set is not a dict.
    """
    if hasattr(dataset, 'metainfo'):
        wrapped, parts = getattr(dataset, 'dataset', None), getattr(dataset, 'datasets', None)
    elif isinstance(dataset, dict):
        wrapped, parts = dataset.get('dataset'), dataset.get('datasets')
        _check_kinds(dataset, {'datasets': list | tuple | None})
    else:
        raise UserError(f'invalid config: a data set must be a dict, got {dataset!r}')
    if wrapped is not None:
        return data_sets(wrapped)
    if parts is not None:
        return [leaf for part in parts for leaf in data_sets(part)]
    return [dataset]


def first_test_set(cfg: Config) -> Any:
    """Config of the test data set, of the first one if several are joined."""
    return data_sets(cfg.test_dataloader.dataset)[0]


def check_tta(cfg: Config, name: str) -> None:
    """Raise ``UserError`` unless the config says how to average over scales and flips."""
    if not {'tta_pipeline', 'tta_model'} <= set(cfg):
        raise UserError(f'--tta requires tta_pipeline and tta_model in {name}')


def type_name(settings: dict) -> str:
    """Name of the class that a config asks for by name, by name with a scope (``mmseg.FCNHead``), or as the class."""
    kind = settings['type']
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', repr(kind))


def without_steps(pipeline: Sequence, names: Sequence[str]) -> list:
    """A pipeline without the steps of these names, also inside TestTimeAug; groups left empty are dropped."""
    kept: list = []
    for step in pipeline:
        if isinstance(step, Sequence):
            kept += [group] if (group := without_steps(step, names)) else []
        elif type_name(step) not in names:
            inner = {'transforms': without_steps(step['transforms'], names)} if 'transforms' in step else {}
            kept.append({**step, **inner})
    return kept
