"""mmseg's UPerHead, SegformerHead, FCNHead and MultiLevelNeck, in less time and memory.

These modules resize feature maps and then convolve them. :func:`mmseg_volo.ops.resized_conv` gives the same result for
a fraction of the multiplications. Parameters, their names and the outputs are those of mmseg's modules, so checkpoints
can be exchanged in both directions. Convolutions that were replaced, or that have hooks or parametrizations, run as in
mmseg.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import FCNHead as MmsegFCNHead
from mmseg.models.decode_heads import SegformerHead as MmsegSegformerHead
from mmseg.models.decode_heads import UPerHead as MmsegUPerHead
from mmseg.models.necks import MultiLevelNeck as MmsegMultiLevelNeck
from mmseg.models.utils import resize
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..ops import resized_conv
from ..ops.norm_relu import norm_relu, recipe_of, recomputed, set_recipe
from ..ops.plain import is_plain
from ..ops.pooling import adaptive_avg_pool
from .pixel_classifier import FullSizeClassifier

FOLDED = 2**21  # elements of an output from which merging its BatchNorm into the weight takes less time


class UPerHead(FullSizeClassifier, MmsegUPerHead):
    """mmseg's ``UPerHead`` (https://arxiv.org/abs/1807.10221) for less time and memory; the arguments are the same."""

    def psp_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Pyramid pooling of the last map, ``[B, channels, h, w]``."""
        x = inputs[-1]
        pooled = [_conv(conv, adaptive_avg_pool(x, pool.output_size)) for pool, conv in self.psp_modules]
        return _resized(self.bottleneck, [x, *pooled], x.shape[2:], self.align_corners)

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        inputs = self._transform_inputs(inputs)
        maps = [_conv(conv, x) for conv, x in zip(self.lateral_convs, inputs, strict=False)]
        maps.append(self.psp_forward(inputs))
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = _add_resized(maps[i - 1], maps[i], self.align_corners)
        for i, conv in enumerate(self.fpn_convs):
            maps[i] = _resized(conv, [maps[i]], maps[i].shape[2:], self.align_corners)
        return _resized(self.fpn_bottleneck, maps, maps[0].shape[2:], self.align_corners)


class SegformerHead(FullSizeClassifier, MmsegSegformerHead):
    """mmseg's ``SegformerHead`` (https://arxiv.org/abs/2105.15203) for less time and memory; same arguments."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Scores ``[B, num_classes, H, W]`` in the size of the first map."""
        if self.interpolate_mode != 'bilinear':
            return super().forward(inputs)
        inputs = self._transform_inputs(inputs)
        maps = [_conv(conv, x) for conv, x in zip(self.convs, inputs, strict=True)]
        return self.cls_seg(_resized(self.fusion_conv, maps, inputs[0].shape[2:], self.align_corners))


class FCNHead(FullSizeClassifier, MmsegFCNHead):
    """mmseg's ``FCNHead`` (https://arxiv.org/abs/1411.4038) with a loss for less time and memory; same arguments."""


class MultiLevelNeck(MmsegMultiLevelNeck):
    """mmseg's ``MultiLevelNeck`` for less time and memory; the arguments are the same."""

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One map per scale, ``[B, out_channels, scale * h, scale * w]``."""
        maps = [_conv(conv, x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        if len(maps) == 1:
            maps *= self.num_outs
        outs = []
        for x, scale, conv in zip(maps, self.scales, self.convs, strict=False):
            if scale != int(scale):  # interpolate() uses the scale itself, and not the ratio of the sizes
                x, scale = resize(x, scale_factor=scale, mode='bilinear'), 1
            size = x.shape[2] * int(scale), x.shape[3] * int(scale)
            outs.append(_resized(conv, [x], size, align_corners=False))
        return tuple(outs)


def _resized(module: ConvModule, maps: Sequence[Tensor], size: Sequence[int], align_corners: bool) -> Tensor:
    """``module`` of the concatenation of ``maps``, each resized to ``size``."""
    if not _is_supported(module):
        same = [
            x if x.shape[2:] == torch.Size(size) else resize(x, size, mode='bilinear', align_corners=align_corners)
            for x in maps
        ]
        return module(torch.cat(same, 1))
    conv, norm = module.conv, cast(Any, module.norm if module.with_norm else None)
    weight, bias, size = conv.weight, conv.bias, tuple(size)
    if _is_foldable(norm) and len(weight) * size[0] * size[1] >= FOLDED:
        weight, bias = fuse_conv_bn_weights(
            weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        norm = None
    with recomputed(maps):
        x = resized_conv(maps, weight, bias, size=size, align_corners=align_corners)
    if norm is not None and module.with_activation:
        return norm_relu(x, norm, module.activate)
    if norm is not None:
        x = norm(x)
    return module.activate(x) if module.with_activation else x


def _conv(module: ConvModule, x: Tensor) -> Tensor:
    """``module(x)``."""
    return _resized(module, [x], x.shape[2:], align_corners=False) if _is_supported(module) else module(x)


def _add_resized(x: Tensor, smaller: Tensor, align_corners: bool) -> Tensor:
    """The sum of ``x`` and of ``smaller``, resized to the size of ``x``."""

    def add(x: Tensor, smaller: Tensor) -> Tensor:
        return x + resize(smaller, x.shape[2:], mode='bilinear', align_corners=align_corners)

    y = add(x, smaller)
    recipe, kept = recipe_of(x), smaller.detach()
    if recipe is not None:
        again = recipe_of(smaller) or (lambda: kept)
        set_recipe(y, lambda: add(recipe(), again()))
    return y


def _is_foldable(norm: nn.Module | None) -> bool:
    """Whether ``norm`` is a BatchNorm in inference, which can be merged into the convolution before it."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # no branch on a symbolic size
        and norm is not None
        and is_plain(norm, nn.BatchNorm2d)
        and not norm.training
        and norm.running_mean is not None
    )


def _is_supported(module: ConvModule) -> bool:
    """Whether ``module`` is a plain 1x1 or 3x3 convolution that keeps the size, followed by norm and activation."""
    conv = module.conv
    return (
        is_plain(module, ConvModule)
        and is_plain(conv, nn.Conv2d)
        and module.order == ('conv', 'norm', 'act')
        and not module.with_explicit_padding
        and not module.with_spectral_norm
        and module.efficient_conv_bn_eval_forward is None
        and conv.kernel_size in ((1, 1), (3, 3))
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == 'zeros'
    )
