"""Outlook attention, VOLO's own operator."""

from torch import Tensor

from ..sizes import is_exporting
from . import portable
from .dispatch import explain, outlook_attention_op

__all__ = ['explain', 'outlook_attention']


def outlook_attention(logits: Tensor, value: Tensor, *, kernel_size: int, stride: int, scale: float) -> Tensor:
    """Mix each k x k neighbourhood of ``value`` with attention predicted at its centre.

    Paper: https://arxiv.org/abs/2106.13112, section 3.1. Shape letters: ``ops/outlook/README.md``.

    Args:
        logits: ``[B, h, w, N, K, K]``, unscaled; ``h = ceil(H / stride)``, ``w = ceil(W / stride)``.
        value: ``[B, H, W, C]``, ``C = N * d``.
        kernel_size: window side ``k`` in tokens; odd; the padding is ``k // 2``.
        stride: distance between window centres in tokens, at most ``k``.
        scale: multiplies ``logits`` before the softmax, ``d ** -0.5`` in VOLO.

    Returns:
        ``[B, H, W, C]``, in ``value``'s dtype. Overlapping windows are summed, not averaged.

    Raises:
        ValueError: shapes, dtypes, devices or the window do not match.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size must be odd and positive, got {kernel_size}')
    if not 1 <= stride <= kernel_size:
        raise ValueError(f'stride must be between 1 and kernel_size={kernel_size}, got {stride}')
    if value.dim() != 4 or logits.dim() != 6:
        raise ValueError(
            f'value must be [B, H, W, C] and logits [B, h, w, N, K, K], '
            f'got shapes {tuple(value.shape)} and {tuple(logits.shape)}'
        )
    B, H, W, C = value.shape
    N, K = logits.shape[3], kernel_size**2
    expected = (B, -(-H // stride), -(-W // stride), N, K, K)
    if tuple(logits.shape) != expected or N == 0 or C % N:
        raise ValueError(
            f'logits of shape {tuple(logits.shape)} do not fit value of shape {tuple(value.shape)}: '
            f'expected {expected} with C={C} a multiple of N={N}'
        )
    if logits.dtype != value.dtype or not value.dtype.is_floating_point:
        raise ValueError(f'logits are {logits.dtype} and value is {value.dtype}: expected one floating-point dtype')
    if logits.device != value.device:
        raise ValueError(f'logits are on {logits.device} and value is on {value.device}: expected one device')
    if is_exporting():
        return portable.outlook_attention(logits, value, kernel_size, stride, scale)
    return outlook_attention_op(logits, value, kernel_size, stride, scale)
