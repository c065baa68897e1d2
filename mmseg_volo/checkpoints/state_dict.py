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
    for key in ('state_dict_ema', 'state_dict', 'model'):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
            break
    state = state_tensors(contents)
    if any(key.startswith('backbone.') for key in state):
        state = {key.removeprefix('backbone.'): value for key, value in state.items() if key.startswith('backbone.')}
    if not state:
        raise UserError(f'{source} contains no tensors')
    return state


def segmentor_tensors(contents: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a whole segmentor by name, without the prefix ``module.``."""
    return state_tensors(contents['state_dict'] if isinstance(contents.get('state_dict'), Mapping) else contents)


def state_tensors(contents: Mapping) -> dict[str, Tensor]:
    """Return the dense tensors in ``contents`` by name, without the prefix ``module.``."""
    return {
        key.removeprefix('module.'): value
        for key, value in contents.items()
        if isinstance(key, str) and isinstance(value, Tensor) and not is_not_dense(value)
    }


def is_not_dense(value: object) -> bool:
    """Whether ``value`` is a tensor that is not an array of numbers in memory, so that no model can copy it."""
    return isinstance(value, Tensor) and (
        value.layout is not torch.strided or value.is_meta or value.is_quantized or value.is_nested
    )
