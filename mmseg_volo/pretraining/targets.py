"""Targets of token labelling, and mixing of tokens.

Papers: https://arxiv.org/abs/2104.10858, section 3, and https://arxiv.org/abs/2106.13112. K are the classes and
N = h * w the tokens, row by row.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

Box = tuple[int, int, int, int]  # rows and columns of tokens: top, left, bottom, right; the last two are excluded


def crop_targets(
    label_maps: Tensor, crops: Tensor, grid: tuple[int, int], num_classes: int, smoothing: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Cut the targets of training crops out of the label maps of whole images.

    As in the published code, a class that is not in the label map has the logit 0 there, RoIAlign averages logits, and
    the softmax comes last. Targets sum to 1; the published ones sum to ``1 + smoothing / K``.

    Args:
        label_maps: ``[B, 2, k, H, W]``, logits and class numbers of the k most likely classes at each place.
        crops: ``[B, 4]``, left, top, right and bottom of each crop as fractions of its image.
        grid: rows and columns of tokens, h and w.
        num_classes: K.
        smoothing: share of each target that is spread evenly over all classes.

    Returns:
        Targets of the class token ``[B, K]``, from the whole crop, and of the other tokens ``[B, N, K]``.
    """
    B, _, _, H, W = label_maps.shape
    logits = label_maps.new_zeros(B, num_classes, H, W)
    logits.scatter_(1, label_maps[:, 1].long(), label_maps[:, 0])
    numbers = torch.arange(B, dtype=crops.dtype, device=crops.device)
    boxes = torch.cat([numbers[:, None], crops * crops.new_tensor([W, H, W, H])], 1)
    tokens = roi_align(logits, boxes, grid, aligned=True)  # B, K, h, w
    whole = roi_align(logits, boxes, (1, 1), aligned=True)
    smooth = [x.flatten(2).softmax(1) * (1 - smoothing) + smoothing / num_classes for x in (whole, tokens)]
    return smooth[0].squeeze(2), smooth[1].transpose(1, 2)


def add_ground_truth(class_targets: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Average the teacher's targets of the class token ``[B, K]`` with the true classes ``labels`` ``[B]``.

    Follows the published code (``TokenLabelGTCrossEntropy`` in sail-sg/volo): the teacher has the weight 0.5 where its
    most likely class is the true one and 0.9 where it is not. The comment there says the reverse.
    """
    K = class_targets.shape[1]
    truth = F.one_hot(labels, K) * (1 - smoothing) + smoothing / K
    agrees = class_targets.argmax(1) == labels
    return torch.lerp(truth.to(class_targets), class_targets, (0.9 - 0.4 * agrees[:, None]).to(class_targets))


def random_box(h: int, w: int) -> Box:
    """Draw the box of MixToken on a grid of h x w tokens: a share of the area uniform in 0 to 1, cut at the border."""
    side = np.sqrt(1 - np.random.beta(1.0, 1.0))
    half_height, half_width = int(h * side) // 2, int(w * side) // 2
    y, x = np.random.randint(h), np.random.randint(w)
    return max(y - half_height, 0), max(x - half_width, 0), min(y + half_height, h), min(x + half_width, w)


def swap_tokens(tokens: Tensor, box: Box, scale: int = 1) -> Tensor:
    """Replace the tokens in a box by those of the flipped batch.

    Args:
        tokens: ``[B, h, w, C]``.
        box: in units of ``scale`` tokens.
        scale: tokens per unit, in rows and columns.
    """
    top, left, bottom, right = (scale * edge for edge in box)
    mixed = tokens.clone()
    mixed[:, top:bottom, left:right] = tokens.flip(0)[:, top:bottom, left:right]
    return mixed


def mix_targets(class_targets: Tensor, token_targets: Tensor, box: Box, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Targets of a batch whose tokens in ``box`` were swapped: those of the class token are mixed by area."""
    h, w = grid
    top, left, bottom, right = box
    area = (bottom - top) * (right - left) / (h * w)
    token_targets = swap_tokens(token_targets.unflatten(1, grid), box).flatten(1, 2)
    return torch.lerp(class_targets, class_targets.flip(0), area), token_targets
