"""Normalisation of images with any number of channels."""

from collections.abc import Sequence

import torch
from mmseg.models import SegDataPreProcessor
from mmseg.registry import MODELS

from ..errors import UserError


@MODELS.register_module()
class RasterDataPreProcessor(SegDataPreProcessor):
    """mmseg's ``SegDataPreProcessor`` for any number of channels, where mmseg's takes one or three.

    Args:
        mean: mean of each channel, in the order in which the pipeline loads them.
        std: standard deviation of each channel.
        kwargs: other arguments of ``SegDataPreProcessor``.

    Raises:
        UserError: ``mean`` and ``std`` are not equally many numbers, or a standard deviation is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs):
        super().__init__(**kwargs)
        fits = isinstance(mean, Sequence) and isinstance(std, Sequence) and 0 < len(mean) == len(std)
        if not fits or not all(isinstance(value, int | float) for value in (*mean, *std)) or min(std) <= 0:
            raise UserError(f'mean and std must be a number per channel, std positive, got {mean!r} and {std!r}')
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)
        self._enable_normalize = True
