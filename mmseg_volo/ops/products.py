"""Matrix products in float32 on CPUs.

PyTorch's ``linear`` and ``@`` call MKL, which uses at most AVX2 on AMD processors. Its convolutions call oneDNN, which
uses AVX-512 there: a 1x1 convolution is then up to twice as fast as the same matrix product. On Intel processors, where
MKL uses AVX-512 as well, the convolution gains nothing and its gradients take up to 1.4 times as long, so plain
products run. The last bits of both depend on the number of threads. oneDNN adds all products of a sum one after the
other, MKL in blocks, so that a convolution with 768 or more inputs has twice the rounding error.
"""

import platform
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .plain import is_plain

SMALL = 2**23  # multiplications below which the overhead of a convolution is larger than the gain
SLOW = 20480  # elements of one image up to which PyTorch does not call oneDNN


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` for an ``nn.Linear``; a module that was replaced or has hooks is called as usual."""
    if torch.compiler.is_compiling() or not (is_plain(module, nn.Linear) and _as_convolution(x, module.out_features)):
        return module(x)
    return _Linear.apply(x, module.weight, module.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.t() + bias``.

    Args:
        x: ``[..., C]``.
        weight: ``[O, C]``.
        bias: ``[O]`` or None.

    Returns:
        ``[..., O]``.
    """
    if not _as_convolution(x, len(weight)):
        return F.linear(x, weight, bias)
    y = F.conv2d(_image(x), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight of ``linear``: ``grad.t() @ x`` over all rows.

    Args:
        grad: ``[..., O]``.
        x: ``[..., C]``.

    Returns:
        ``[O, C]``.
    """
    if not _as_convolution(x, grad.shape[-1]):
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)
    weight = x.new_empty(grad.shape[-1], x.shape[-1], 1, 1)  # only its shape is used
    geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    gradients = torch.ops.aten.convolution_backward(
        _image(grad), _image(x), weight, None, *geometry, [False, True, False]
    )
    return gradients[1][:, :, 0, 0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if need_x else None,
            weight_gradient(grad, x) if need_weight else None,
            grad.flatten(0, -2).sum(0) if need_bias else None,
        )


def _as_convolution(x: Tensor, outputs: int) -> bool:
    return (
        x.device.type == 'cpu'
        and x.dtype == torch.float32
        and mkl_lacks_avx512()
        and x.numel() * outputs >= SMALL
        and x.numel() > SLOW
        and not torch.is_autocast_enabled('cpu')
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
    )


@lru_cache
def mkl_lacks_avx512() -> bool:
    """Whether this is an AMD processor with AVX-512."""
    info = Path('/proc/cpuinfo')
    vendor = info.read_text() if info.is_file() else platform.processor()
    return 'AuthenticAMD' in vendor and torch.backends.cpu.get_cpu_capability() == 'AVX512'


def _image(x: Tensor) -> Tensor:
    """The rows of ``x`` as the pixels of a channels-last image with one line."""
    return x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
