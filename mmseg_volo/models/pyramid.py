"""From VOLO's strides 8, 16, 16, 16 to the pyramid 4, 8, 16, 32."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

_RESCALERS = {
    2: lambda width: nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
    1: lambda width: nn.Identity(),
    0.5: lambda width: nn.MaxPool2d(kernel_size=2, stride=2),
}


@MODELS.register_module()
class VOLOPyramid(BaseModule):
    """Rescale each level by its own factor, keeping its width: mmseg's ``Feature2Pyramid`` for unequal widths.

    Args:
        in_channels: width of each level.
        rescales: factor of each level: 2 (transposed convolution), 1 or 0.5 (max pooling).
    """

    def __init__(self, in_channels: Sequence[int], rescales: Sequence[float] = (2, 2, 1, 0.5)):
        super().__init__()
        self.levels = nn.ModuleList([_RESCALERS[r](c) for c, r in zip(in_channels, rescales, strict=True)])

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps ``[B, C, h, w]`` to maps ``[B, C, rescale * h, rescale * w]``."""
        return tuple(level(x) for level, x in zip(self.levels, inputs, strict=True))
