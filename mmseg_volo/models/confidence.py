"""The probability of each label, kept in 1/65535: sums are exact in any order, and a map takes half of float32."""

import torch
from torch import Tensor

CERTAIN = 65535  # probability 1


def labels_and_confidence(logits: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """Labels and their probabilities in 1/65535, uint16, both ``[n, W]``, without those of the other classes.

    Args:
        logits: ``[classes, n, W]``; those of a single class belong to a binary head.
        threshold: probability above which a binary head's label is 1; not used with several classes.
    """
    if len(logits) == 1:
        return most_probable(logits.sigmoid(), threshold)
    best, labels = logits.max(0)  # on a CPU argmax(0) takes ten times as long (torch 2.11)
    return labels, _fixed((logits.float() - best).exp_().sum(0).reciprocal_())


def most_probable(prob: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """The same from the probabilities ``[classes, n, W]``."""
    if threshold is None or len(prob) > 1:
        best, labels = prob.max(0)
        return labels, _fixed(best)
    labels = prob[0] > threshold
    return labels, _fixed(torch.where(labels, prob[0], 1 - prob[0]))


def _fixed(prob: Tensor) -> Tensor:
    return (prob.float() * CERTAIN).round_().to(torch.uint16)
