"""LayerNorm and GELU, recomputed in the backward pass so that their outputs need not be stored.

A transformer block then stores 9 C numbers per token instead of 14 C, and recomputes two element-wise operations. The
results equal those of the plain modules. Under autocast, matrix products run in its dtype and LayerNorm in the dtype of
its input. A module that has hooks or parametrizations, or that was replaced (by a LoRA adapter, for example), is called
as usual, and its outputs are stored. Tokens are ``[B, H, W, C]``, or maps ``[B, C, H, W]`` where the modules are timm's
``LayerNorm2d`` and 1x1 convolutions.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timm.layers import ConvMlp, LayerNorm2d, Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import products
from .plain import is_plain

ROWS = 2048  # tokens that an MLP processes at a time on a CPU; fewer would slow its products down


def norm_linear(x: Tensor, norm: nn.Module, linear: nn.Module) -> Tensor:
    """``linear(norm(x))``, for which only ``x`` is stored."""
    maps = type(norm) is LayerNorm2d
    if not (_is_plain_norm(norm, maps) and _is_plain_linear(linear, maps)):
        return linear(norm(x))
    parameters = (norm.weight, norm.bias, norm.eps, linear.weight.flatten(1), linear.bias)
    return _on_tokens(maps, _NormLinear.apply if torch.is_grad_enabled() else _norm_linear, x, *parameters)


def norm_linear_pool(x: Tensor, norm: nn.Module, linear: nn.Module, pool: nn.Module) -> tuple[Tensor, Tensor]:
    """``linear(norm(x))`` and ``pool(norm(x))``, for which only ``x`` ``[B, H, W, C]`` is stored."""
    plain = _is_plain_norm(norm) and is_plain(linear, nn.Linear) and is_plain(pool, nn.AvgPool2d)
    if not plain or linear.bias is not None:
        y = norm(x)
        return linear(y), pool(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    parameters = (norm.weight, norm.bias, norm.eps, linear.weight, pool.stride)
    return (_NormLinearPool.apply if torch.is_grad_enabled() else _norm_linear_pool)(x, *parameters)


def norm_mlp(x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
    """``mlp(norm(x))`` for timm's ``Mlp`` or ``ConvMlp``; only ``x`` and the output of ``fc1`` are stored."""
    maps = type(norm) is LayerNorm2d
    if not (_is_plain_norm(norm, maps) and _is_plain_mlp(mlp, maps)):
        return mlp(norm(x))
    fc1, fc2 = mlp.fc1, mlp.fc2
    parameters = (norm.weight, norm.bias, norm.eps, fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias)
    return _on_tokens(maps, _NormMlp.apply if torch.is_grad_enabled() else _norm_mlp, x, *parameters)


def _on_tokens(maps: bool, function: Callable[..., Tensor], x: Tensor, *parameters: Tensor | float) -> Tensor:
    """Call ``function`` with tokens, or with the tokens of maps."""
    return function(x.permute(0, 2, 3, 1), *parameters).permute(0, 3, 1, 2) if maps else function(x, *parameters)


def _is_plain_norm(norm: nn.Module, maps: bool = False) -> bool:
    return is_plain(norm, LayerNorm2d if maps else nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def _is_plain_linear(module: nn.Module, maps: bool) -> bool:
    if not maps:
        return is_plain(module, nn.Linear)
    return (
        is_plain(module, nn.Conv2d)
        and module.kernel_size == module.stride == (1, 1)
        and module.groups == 1
        and module.padding == (0, 0)
    )


def _is_plain_mlp(mlp: nn.Module, maps: bool) -> bool:
    return (
        is_plain(mlp, ConvMlp if maps else Mlp)
        and all(_is_plain_linear(linear, maps) and linear.bias is not None for linear in (mlp.fc1, mlp.fc2))
        and all(is_plain(drop, nn.Dropout) and drop.p == 0 for drop in ([mlp.drop] if maps else [mlp.drop1, mlp.drop2]))
        and is_plain(mlp.act, nn.GELU)
        and mlp.act.approximate == 'none'
        and is_plain(mlp.norm, nn.Identity)
    )


def _matmul_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class _WithoutAutocast:
    """Context like ``torch.autocast(device, enabled=False)``, for less of a GPU's waiting time."""

    def __init__(self, x: Tensor):
        self.device = x.device.type

    def __enter__(self) -> None:
        available = torch.amp.is_autocast_available(self.device)
        self.enabled = available and torch.is_autocast_enabled(self.device)
        if self.enabled:
            torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *error: object) -> None:
        if self.enabled:
            torch.set_autocast_enabled(self.device, True)


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
    dbias = None if bias is None else dy.flatten(0, -2).sum(0, dtype=bias.dtype)
    return products.weight_gradient(dy, x).to(weight.dtype), dbias


def _norm_linear(x, norm_weight, norm_bias, eps, weight, bias):
    with _WithoutAutocast(x):
        y = _normalise(x, norm_weight, norm_bias, eps)[0]
    return products.linear(y, weight, bias)  # autocast keeps the weight that it casts, until its end


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias)
        ctx.eps, ctx.dtype = eps, _matmul_dtype(x)
        return _norm_linear(x, norm_weight, norm_bias, eps, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
        y, mean, rstd = _normalise(x, norm_weight, norm_bias, ctx.eps)
        dweight, dbias = _linear_backward(grad, y.to(ctx.dtype), weight, bias)
        del y
        dy = products.linear(grad, weight.to(ctx.dtype).t())
        need = list(ctx.needs_input_grad[:3])
        return *_normalise_backward(dy, x, mean, rstd, norm_weight, norm_bias, need), None, dweight, dbias


def _norm_linear_pool(x, norm_weight, norm_bias, eps, weight, stride):
    with _WithoutAutocast(x):
        y = _normalise(x, norm_weight, norm_bias, eps)[0]
    y = y.to(_matmul_dtype(x))
    return products.linear(y, weight), _pool(y, stride)


class _NormLinearPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, stride):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)
        ctx.eps, ctx.stride, ctx.dtype = eps, stride, _matmul_dtype(x)
        return _norm_linear_pool(x, norm_weight, norm_bias, eps, weight, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, dvalue, dcentres):
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        y, mean, rstd = _normalise(x, norm_weight, norm_bias, ctx.eps)
        dweight, _ = _linear_backward(dvalue, y.to(ctx.dtype), weight, None)
        dy = products.linear(dvalue, weight.to(ctx.dtype).t())
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
        return *_normalise_backward(dy, x, mean, rstd, norm_weight, norm_bias, need), None, dweight, None


def _norm_mlp(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, keep=None):
    """``keep`` is called with the output of the first layer, which is otherwise overwritten."""
    with _WithoutAutocast(x):
        y = _normalise(x, norm_weight, norm_bias, eps)[0]
    hidden = products.linear(y, weight1, bias1)
    del y
    if keep:
        keep(hidden)
    gelu = F.gelu if keep else torch.ops.aten.gelu_
    parts = [products.linear(gelu(rows), weight2, bias2) for (rows,) in _by_rows(hidden)]
    return _joined(parts).view(*x.shape[:-1], len(weight2))


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2):
        ctx.eps, ctx.dtype = eps, _matmul_dtype(x)

        def keep(hidden: Tensor) -> None:
            ctx.save_for_backward(x, norm_weight, norm_bias, hidden, weight1, bias1, weight2, bias2)

        parameters = (norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2)
        return _norm_mlp(x, *parameters, keep if any(ctx.needs_input_grad) else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, norm_weight, norm_bias, hidden, weight1, bias1, weight2, bias2 = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:3])
        first, second = (weight.to(ctx.dtype).t() for weight in (weight1, weight2))
        gradients, parts = None, []
        for hidden_rows, x_rows, grad_rows in _by_rows(hidden, x, grad):
            of_second = _linear_backward(grad_rows, F.gelu(hidden_rows), weight2, bias2)
            dhidden = products.linear(grad_rows, second)
            torch.ops.aten.gelu_backward.grad_input(dhidden, hidden_rows, grad_input=dhidden)
            y, mean, rstd = _normalise(x_rows, norm_weight, norm_bias, ctx.eps)
            of_first = _linear_backward(dhidden, y.to(ctx.dtype), weight1, bias1)
            dy = products.linear(dhidden, first)
            part, *of_norm = _normalise_backward(dy, x_rows, mean, rstd, norm_weight, norm_bias, need)
            parts.append(part)
            gradients = _sums(gradients, [*of_norm, *of_first, *of_second])
            del of_second, dhidden, y, of_first, dy
        dx = _joined(parts).view(x.shape) if need[0] else None
        dnorm_weight, dnorm_bias, *others = gradients
        return dx, dnorm_weight, dnorm_bias, None, *others


def _by_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the tensors, on a CPU at most ``ROWS`` at a time."""
    rows = ROWS if tensors[0].device.type == 'cpu' else max(1, tensors[0].shape[:-1].numel())
    return zip(*(x.flatten(0, -2).split(rows) for x in tensors), strict=True)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sums(totals: list[Tensor | None] | None, parts: list[Tensor | None]) -> list[Tensor | None]:
    """``totals`` plus ``parts``, in the memory of ``totals``; gradients that are not needed are None."""
    if totals is None:
        return parts
    return [
        None if total is None or part is None else total.add_(part) for total, part in zip(totals, parts, strict=True)
    ]


def _pool(y: Tensor, stride: int) -> Tensor:
    """``[B, H, W, C]`` to ``[B, ceil(H / stride), ceil(W / stride), C]``; border windows average fewer tokens."""
    return F.avg_pool2d(y.permute(0, 3, 1, 2), stride, stride, ceil_mode=True).permute(0, 2, 3, 1)
