"""Where a command finds its model: a config with a checkpoint, or something that is both."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from safetensors import safe_open

from .._files import IMAGE_SUFFIXES
from ..checkpoints.hub import WEIGHTS, is_model, model_config, model_file
from ..checkpoints.plain_config import config_of
from ..checkpoints.shipped import shipped_weights
from ..checkpoints.wording import first_sentence
from ..config import (
    check_segmentor,
    data_sets,
    find_config,
    load_config,
    overridden,
    shipped_configs,
    without_steps,
)
from ..errors import UserError
from ..models.pretrained import differences
from .video import VIDEO_SUFFIXES

CHECKPOINTS = ('.pth', '.pth.tar', '.pt', '.ckpt', '.bin', '.safetensors', '.onnx', '.pt2')
SIDE = 64  # pixels of a picture with which foreign models are tried out
SCHEMES = ('http://', 'https://', 'timm://', 'hf://')


@dataclass(frozen=True)
class Model:
    """A config, the weights that fit it, and whether both come from strangers."""

    config: Config
    checkpoint: str
    is_foreign: bool = False


def split_words(model: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the words after MODEL into a checkpoint, or None, and pictures.

    The first word is a checkpoint if it looks like one (``CHECKPOINTS``, ``SCHEMES``), or if ``model`` has no weights.

    Raises:
        UserError: a checkpoint or the pictures are missing.
    """
    first, *others = words or ['']
    if has_weights(model) and not is_checkpoint(first):
        checkpoint, images = None, list(words)
    else:
        checkpoint, images = first, others
    if checkpoint is not None and not is_checkpoint(first) and first.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES):
        _find_config(model)
        raise UserError(f'{model} has no weights of its own: give a checkpoint before {first}')
    if not images:
        raise UserError('no images, videos, folders or patterns were given')
    return checkpoint, images


def is_checkpoint(word: str) -> bool:
    """Whether a word looks like a checkpoint, which need not exist."""
    return word.lower().endswith(CHECKPOINTS) or word.startswith(SCHEMES)


def has_weights(model: str) -> bool:
    """Whether ``model`` is both a config and weights."""
    return is_model(model) or (model in shipped_configs() and shipped_weights(model) is not None)


def load_model(model: str, checkpoint: str | None, options: dict, with_data: bool = False) -> Model:
    """Find a model.

    Args:
        model: a config's path or name; ``hf://owner/name``, which may end in ``@revision``; or a folder that
            ``mmseg-volo push`` wrote.
        checkpoint: weights; by default those of ``model``.
        options: values that override the config, by dotted key.
        with_data: the config must have a test set; for a model without one it is that of the shipped config whose name
            the model keeps.

    Raises:
        UserError: no such model, it is refused, or it has no weights or no test set.
    """
    if not is_model(model):
        _find_config(model)
        weights = checkpoint or (shipped_weights(model) if model in shipped_configs() else None)
        if weights is None:
            raise UserError(f'{model} has no weights of its own: give a checkpoint after it')
        return Model(load_config(model, options), weights)
    content, source = model_config(model)
    if content is None:
        raise UserError(
            f'{model} has no config.json that mmseg-volo push wrote; if its weights fit a config, give that config '
            f'first: CONFIG {model}'
        )
    cfg = config_of(content)
    _check_fits(cfg, source, model)
    if with_data:
        cfg = _with_data(cfg, content['name'], model, options)
    cfg = overridden(cfg, model, options)
    check_segmentor(cfg)
    return Model(cfg, checkpoint or source, is_foreign=True)


def _find_config(model: str) -> None:
    """Raise ``UserError`` unless ``model`` is a config's path or name."""
    if is_checkpoint(model):
        raise UserError(f'{model} is a checkpoint: give the config with which it was trained before it')
    find_config(model)


@torch.no_grad()
def try_out(model: Any, source: str) -> None:
    """Run a foreign model on a small picture; raises ``UserError`` if its config at ``source`` does not allow that."""
    image = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    model.eval()
    with _blamed(source):
        model(model.data_preprocessor(dict(inputs=[image]))['inputs'], mode='tensor')


@contextmanager
def _blamed(source: str) -> Iterator[None]:
    """Turn any exception into a ``UserError``: what is run is as good as its source."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f'{type(error).__name__}: {first_sentence(error)}'
        raise UserError(f'{source} is refused: its config.json describes no model that works ({reason})') from None


def _check_fits(cfg: Config, source: str, name: str) -> None:
    """Raise ``UserError`` unless pipelines and model can be built, the latter in the size of its weights.

    No memory is allocated for the weights.
    """
    init_default_scope('mmseg')
    with _blamed(name), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # from mmseg's losses
        for steps in (cfg.test_pipeline, cfg.get('tta_pipeline', [])):
            steps = without_steps(steps, ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs'))
            Compose(steps)(dict(img=np.zeros((SIDE, SIDE, 3), np.uint8), img_shape=(SIDE, SIDE)))
        MODELS.build(cfg.model.data_preprocessor)
        with torch.device('meta'):
            own = MODELS.build(cfg.model).state_dict()
    try:
        with safe_open(model_file(source, WEIGHTS), 'pt') as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            state = {key: torch.empty(shape, device='meta') for key, shape in shapes.items()}
    except UserError:
        raise
    except Exception as error:  # safetensors raises several kinds for a damaged file
        raise UserError(f'{name} is refused: its {WEIGHTS} is damaged ({first_sentence(error)})') from None
    if problems := differences(own, state):
        raise UserError(f'{name} is refused: its {WEIGHTS} does not fit its config.json: ' + '; '.join(problems))


def _with_data(cfg: Config, config: str, name: str, options: dict) -> Config:
    """The shipped config of this name with the model and the test pipeline of ``cfg``."""
    if config not in shipped_configs():
        raise UserError(
            f'{name} brings no test set, and neither does mmseg_volo for {config}; give a config that has one first: '
            f'CONFIG {name}'
        )
    whole = load_config(config, options)
    for settings in data_sets(whole.test_dataloader.dataset):
        classes = DATASETS.build({**settings, 'pipeline': [], 'lazy_init': True}).metainfo['classes']
        if list(classes) != list(cfg.test_dataloader.dataset.metainfo.classes):
            raise UserError(f'{name} predicts other classes than the test set of {config} has')
        settings.pipeline = cfg.test_pipeline
    for key in ('model', 'test_pipeline', 'tta_model', 'tta_pipeline'):
        if key in cfg:
            whole[key] = cfg[key]
    return whole
