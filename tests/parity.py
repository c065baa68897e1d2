"""Tolerances: an error must stay below a multiple of eager PyTorch's error against float64, or below a floor."""

import torch

TOLERANCES = {
    torch.float64: (2.0, 1e-10),
    torch.float32: (2.0, 1e-6),
    torch.bfloat16: (2.0, 4e-3),
    torch.float16: (2.0, 5e-4),
}


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference, relative to the largest exact value; NaN and infinity fail."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    assert torch.isfinite(actual).all(), 'not finite'
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def assert_close(actual: torch.Tensor, exact: torch.Tensor, eager_error: float = 0.0, what: str = '') -> None:
    """Assert that the error of ``actual`` is within the tolerance of its dtype."""
    multiple, floor = TOLERANCES[actual.dtype]
    found = error(actual, exact)
    assert found <= max(multiple * eager_error, floor), (
        f'{what}: {found:.2e}, eager {eager_error:.2e}, floor {floor:.0e}'
    )
