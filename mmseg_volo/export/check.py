"""Comparison of an exported file with the model that it came from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Largest difference of logits, relative to the largest logit, that each precision may have.
TOLERANCES = {'float32': 1e-4, 'float16': 2e-2, 'int8': math.inf}
SIZES = ((1, 96, 128), (3, 100, 90), (2, 160, 224))  # none of them recorded: multiples of the strides, and none


@dataclass(frozen=True)
class Difference:
    """How much the logits of one batch differ.

    ``largest`` and ``scale`` are the largest difference and the largest logit; ``labels`` is the number of pixels or
    pictures, ``changed`` that of those with another label, ``ties`` that of those among them whose best two logits are
    within the tolerance, so that rounding decides, or None without a tolerance.
    """

    shape: tuple[int, ...]
    largest: float
    scale: float
    labels: int
    changed: int
    ties: int | None

    def __str__(self) -> str:
        size = ' x '.join(str(side) for side in (self.shape[0], *self.shape[2:]))
        ties = f', {self.ties:,} of them ties' if self.ties else ''
        return (
            f'{size}: logits up to {self.scale:.3g} differ by at most {self.largest:.1e}; '
            f'{self.changed:,} of {self.labels:,} labels differ{ties}'
        )

    def exceeds(self, tolerance: float) -> bool:
        """Whether the logits differ by more than the tolerance or are not finite, or a label differs without a tie."""
        return not self.largest <= tolerance * self.scale or (self.ties is not None and self.changed > self.ties)


def difference(
    network: Callable[[Tensor], Tensor],
    runtime: Callable[[Tensor], Tensor],
    images: Tensor,
    tolerance: float,
    threshold: float | None = None,
) -> Difference:
    """Compare the logits of both for normalised ``images`` ``[B, C, H, W]``.

    Args:
        network: the model.
        runtime: the file.
        images: any batch.
        tolerance: largest difference, relative to the largest logit, that makes a tie.
        threshold: probability from which a single logit means the class.
    """
    cut = 0.0 if threshold is None else math.log(threshold / (1 - threshold))
    with torch.inference_mode():
        exact = network(images)
    found = runtime(images)
    if found.shape != exact.shape:
        return Difference(tuple(images.shape), float('inf'), exact.abs().max().item(), exact[:, 0].numel(), 0, 0)
    changed = _labels(found, cut) != _labels(exact, cut)
    scale = exact.abs().max().item()
    return Difference(
        tuple(images.shape),
        (found - exact).abs().max().item(),
        scale,
        changed.numel(),
        int(changed.sum()),
        None if tolerance == math.inf else int((_margins(exact, cut)[changed] <= tolerance * scale).sum()),
    )


def random_images(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Normalised images of noise, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _labels(logits: Tensor, cut: float) -> Tensor:
    return logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > cut


def _margins(logits: Tensor, cut: float) -> Tensor:
    """By how much the best logit of each pixel exceeds the next one; of a single logit, the distance from ``cut``."""
    if logits.shape[1] == 1:
        return (logits[:, 0] - cut).abs()
    best, second = logits.topk(2, 1).values.unbind(1)
    return best - second
