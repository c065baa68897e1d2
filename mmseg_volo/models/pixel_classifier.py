"""The last layers of a decode head: dropout, classification of each pixel, and the loss at full size."""

from typing import Any

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from torch import Tensor, nn

from ..ops.norm_relu import recomputed
from ..ops.plain import is_plain
from ..ops.strip_loss import resized_cross_entropy


class FullSizeClassifier(BaseDecodeHead):
    """Mixin before one of mmseg's decode heads: the same scores, losses and random numbers, in less time and memory.

    Dropout of whole channels is applied to the weight of the classifier instead of the map. Scores are resized and
    compared with the labels in strips. Heads with other losses, samplers or changed layers run as in mmseg.
    """

    def cls_seg(self, feat: Tensor) -> Tensor:
        """Scores ``[B, K, H, W]`` of features ``[B, C, H, W]``."""
        conv, dropout = self.conv_seg, self.dropout
        plain = is_plain(conv, nn.Conv2d) and conv.kernel_size == (1, 1) and conv.groups == 1
        if not (self.training and dropout is not None and plain and is_plain(dropout, nn.Dropout2d)):
            with recomputed([feat]):
                return super().cls_seg(feat)
        (B, C, H, W), K = feat.shape, conv.out_channels
        noise = dropout(feat.new_ones(B, C, 1, 1))  # the numbers that it draws for a map
        weight = conv.weight.view(K, C) * noise.view(B, 1, C)
        with recomputed([feat]):
            scores = feat.permute(0, 2, 3, 1).reshape(B, H * W, C) @ weight.transpose(1, 2)
        if conv.bias is not None:
            scores = scores + conv.bias.to(scores.dtype)
        return scores.view(B, H, W, K).permute(0, 3, 1, 2)

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list) -> dict[str, Tensor]:
        """Losses and the accuracy of ``seg_logits``, resized to the size of the labels."""
        single = not isinstance(self.loss_decode, nn.ModuleList)
        losses: list[Any] = [self.loss_decode] if single else list(self.loss_decode)
        if torch.compiler.is_compiling() or self.sampler is not None or not all(map(_is_supported, losses)):
            return super().loss_by_feat(seg_logits, batch_data_samples)
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        valid = labels != self.ignore_index
        count = valid.sum()
        found: dict[str, Tensor] = {}
        for loss in losses:
            weight = None if loss.class_weight is None else seg_logits.new_tensor(loss.class_weight)
            total, correct = resized_cross_entropy(seg_logits, labels, weight, self.ignore_index, self.align_corners)
            if weight is not None:
                average = weight[labels.where(valid, 0)].masked_select(valid).sum()
            else:
                average = count if loss.avg_non_ignore else labels.numel()
            value = loss.loss_weight * total / (average + _EPSILON)
            found[loss.loss_name] = found[loss.loss_name] + value if loss.loss_name in found else value
        found['acc_seg'] = ((correct + _EPSILON) * 100 / (count + _EPSILON)).view(1)
        return found


_EPSILON = torch.finfo(torch.float32).eps  # as in mmseg


def _is_supported(loss: Any) -> bool:
    return (
        is_plain(loss, CrossEntropyLoss)
        and not loss.use_sigmoid
        and not loss.use_mask
        and loss.reduction == 'mean'
        and not (loss.class_weight is not None and loss.avg_non_ignore)  # an error in mmseg
    )
