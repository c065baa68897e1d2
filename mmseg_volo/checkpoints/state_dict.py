"""Tensors of a model, found in the contents of a checkpoint."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UserError


def backbone_tensors(contents: Mapping, source: str) -> dict[str, Tensor]:
    """Return the tensors of a backbone by name, without the prefixes ``module.`` and ``backbone.``.

    Raises:
        UserError: ``contents``, read from ``source``, contain no tensors.
    """
    state = state_tensors(contents)
    if any(key.startswith('backbone.') for key in state):
        state = {key.removeprefix('backbone.'): value for key, value in state.items() if key.startswith('backbone.')}
    if not state:
        raise UserError(f'{source} contains no tensors')
    return state


def state_tensors(contents: Mapping) -> dict[str, Tensor]:
    """Return the dense tensors of a model in ``contents`` by name, without the prefix ``module.``.

    Averaged weights come first: timm stores them as ``state_dict_ema``. mmengine stores them as ``state_dict``, and the
    others as ``ema_state_dict``.
    """
    for key in ('state_dict_ema', 'state_dict', 'model'):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
            break
    return {
        key.removeprefix('module.'): value
        for key, value in contents.items()
        if isinstance(key, str) and isinstance(value, Tensor) and not is_not_dense(value)
    }


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that contain NaN or infinity."""
    floats = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    # torch 2.11 has no isfinite() for numbers of 8 bits.
    return [key for key, x in floats.items() if not (x if x.element_size() > 1 else x.float()).isfinite().all()]


def is_not_dense(value: object) -> bool:
    """Whether ``value`` is a tensor that is not an array of numbers in memory, so that no model can copy it."""
    return isinstance(value, Tensor) and (
        value.layout is not torch.strided or value.is_meta or value.is_quantized or value.is_nested
    )
