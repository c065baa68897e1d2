"""LayerNorm and GELU that are computed again in the backward pass instead of being stored for it.

A transformer block then keeps 9 C numbers per token instead of 14 C, at the cost of two element-wise operations. The
results are those of the plain modules; under autocast, matrix multiplications run in its dtype and LayerNorm in that of
its input.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """``linear(norm(x))``; keeps x."""
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias, _matmul_dtype(x))


def norm_linear_pool(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, stride: int) -> tuple[Tensor, Tensor]:
    """``linear(norm(x))``, and ``norm(x)`` averaged over stride x stride tokens; keeps x ``[B, H, W, C]``."""
    return _NormLinearPool.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, stride, _matmul_dtype(x))


def norm_mlp(x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """``fc2(gelu(fc1(norm(x))))``; keeps x and fc1's output."""
    parameters = (norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return _NormMlp.apply(x, *parameters, _matmul_dtype(x))


def _matmul_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _without_autocast(x: Tensor) -> AbstractContextManager:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def _normalise_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, need: list):
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(x.dtype), x, weight.shape, mean, rstd, weight.to(x.dtype), bias.to(x.dtype), need
    )
    return dx, _like(dweight, weight), _like(dbias, bias)


def _like(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(parameter.dtype)


def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias."""
    rows = dy.flatten(0, -2)
    dbias = None if bias is None else rows.sum(0, dtype=bias.dtype)
    return (rows.t() @ x.flatten(0, -2)).to(weight.dtype), dbias


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias, dtype):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias)
        ctx.eps, ctx.dtype = eps, dtype
        with _without_autocast(x):
            y = _normalise(x, norm_weight, norm_bias, eps)[0].to(dtype)
            return F.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
        y, mean, rstd = _normalise(x, norm_weight, norm_bias, ctx.eps)
        dweight, dbias = _linear_backward(grad, y.to(ctx.dtype), weight, bias)
        del y
        dy = grad @ weight.to(ctx.dtype)
        need = list(ctx.needs_input_grad[:3])
        return *_normalise_backward(dy, x, mean, rstd, norm_weight, norm_bias, need), None, dweight, dbias, None


class _NormLinearPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, stride, dtype):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)
        ctx.eps, ctx.stride, ctx.dtype = eps, stride, dtype
        with _without_autocast(x):
            y = _normalise(x, norm_weight, norm_bias, eps)[0].to(dtype)
            return F.linear(y, weight.to(dtype)), _pool(y, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, dvalue, dcentres):
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        y, mean, rstd = _normalise(x, norm_weight, norm_bias, ctx.eps)
        dweight, _ = _linear_backward(dvalue, y.to(ctx.dtype), weight, None)
        dy = dvalue @ weight.to(ctx.dtype)
        dy += torch.ops.aten.avg_pool2d_backward(
            dcentres.permute(0, 3, 1, 2),
            dy.permute(0, 3, 1, 2),
            [ctx.stride] * 2,
            [ctx.stride] * 2,
            [0, 0],
            True,
            True,
            None,
        ).permute(0, 2, 3, 1)
        del y
        need = list(ctx.needs_input_grad[:3])
        return *_normalise_backward(dy, x, mean, rstd, norm_weight, norm_bias, need), None, dweight, None, None


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, dtype):
        ctx.eps, ctx.dtype = eps, dtype
        with _without_autocast(x):
            y = _normalise(x, norm_weight, norm_bias, eps)[0].to(dtype)
            hidden = F.linear(y, weight1.to(dtype), bias1.to(dtype))
            del y
            ctx.save_for_backward(x, norm_weight, norm_bias, hidden, weight1, bias1, weight2, bias2)
            hidden = F.gelu(hidden) if any(ctx.needs_input_grad) else torch.ops.aten.gelu_(hidden)
            return F.linear(hidden, weight2.to(dtype), bias2.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, norm_weight, norm_bias, hidden, weight1, bias1, weight2, bias2 = ctx.saved_tensors
        dweight2, dbias2 = _linear_backward(grad, F.gelu(hidden), weight2, bias2)
        dhidden = grad @ weight2.to(ctx.dtype)
        torch.ops.aten.gelu_backward.grad_input(dhidden, hidden, grad_input=dhidden)
        y, mean, rstd = _normalise(x, norm_weight, norm_bias, ctx.eps)
        dweight1, dbias1 = _linear_backward(dhidden, y.to(ctx.dtype), weight1, bias1)
        del y
        dy = dhidden @ weight1.to(ctx.dtype)
        del dhidden
        need = list(ctx.needs_input_grad[:3])
        dx, dnorm_weight, dnorm_bias = _normalise_backward(dy, x, mean, rstd, norm_weight, norm_bias, need)
        return dx, dnorm_weight, dnorm_bias, None, dweight1, dbias1, dweight2, dbias2, None


def _pool(y: Tensor, stride: int) -> Tensor:
    """``[B, H, W, C]`` to ``[B, ceil(H / stride), ceil(W / stride), C]``; the last ones average what there is."""
    return F.avg_pool2d(y.permute(0, 3, 1, 2), stride, stride, ceil_mode=True).permute(0, 2, 3, 1)
