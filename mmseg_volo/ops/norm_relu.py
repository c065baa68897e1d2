"""BatchNorm and ReLU whose result is computed again in the backward pass instead of stored.

A convolution followed by BatchNorm and ReLU stores its input, its output and the result of ReLU, which is the input of
the next layer. :func:`norm_relu` stores the output of the convolution only, and :func:`recomputed` lets the next layer
store a recipe instead of its input. This halves the memory of a chain of convolutions for two passes over each map.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .plain import is_plain

Recipe = Callable[[], Tensor]


def norm_relu(x: Tensor, norm: nn.Module, activate: nn.Module) -> Tensor:
    """``activate(norm(x))``, for which only ``x`` is stored if they are BatchNorm in training mode and ReLU."""
    if not (torch.is_grad_enabled() and x.requires_grad and _is_supported(norm, activate)):
        return activate(norm(x))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    y, factor, offset = _NormRelu.apply(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm)
    x = x.detach()
    set_recipe(y, lambda: torch.addcmul(offset, x, factor).relu_())
    return y


def set_recipe(y: Tensor, recipe: Recipe) -> None:
    """Remember how to compute ``y`` again, in the same memory format."""
    y._mmseg_volo_recipe = recipe


def recipe_of(y: Tensor) -> Recipe | None:
    """How to compute ``y`` again, or None."""
    return getattr(y, '_mmseg_volo_recipe', None)


def recomputed(maps: Iterable[Tensor]) -> AbstractContextManager:
    """Context in which operators store recipes instead of those ``maps`` that have one."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    recipes = {y.untyped_storage().data_ptr(): recipe for y in maps if (recipe := recipe_of(y)) is not None}
    if not recipes:
        return nullcontext()

    def pack(x: Tensor) -> Tensor | tuple:
        recipe = recipes.get(x.untyped_storage().data_ptr())
        return x if recipe is None else (recipe, x.shape, x.stride(), x.storage_offset())

    def unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recipe, *layout = packed
        with torch.no_grad():
            return recipe().as_strided(*layout)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_supported(norm: nn.Module, activate: nn.Module) -> bool:
    return (
        not torch.compiler.is_compiling()
        and is_plain(norm, nn.BatchNorm2d)
        and is_plain(activate, nn.ReLU)
        and norm.training
        and norm.affine
        and norm.momentum is not None
    )


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, norm):
        y, mean, scale = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, norm.momentum, norm.eps
        )
        factor = weight.to(mean.dtype) * scale  # scale is the inverse standard deviation
        offset = bias.to(mean.dtype) - mean * factor
        factor, offset = (z.to(x.dtype)[:, None, None] for z in (factor, offset))
        ctx.save_for_backward(x, weight, mean, scale, factor, offset)
        ctx.eps = norm.eps
        ctx.mark_non_differentiable(factor, offset)
        ctx.set_materialize_grads(False)
        return y.relu_(), factor, offset

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, weight, mean, scale, factor, offset = ctx.saved_tensors
        y = torch.addcmul(offset, x, factor)  # the result of BatchNorm
        torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=y)
        gradients = torch.ops.aten.native_batch_norm_backward(
            y, x, weight, None, None, mean, scale, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return *gradients, None, None, None
