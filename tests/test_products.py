"""Matrix products on CPUs: PyTorch's own and as convolutions give the same numbers."""

from pathlib import Path

import pytest
import torch
from parity import assert_close, error

from mmseg_volo.ops import products


@pytest.mark.parametrize('as_convolution', [True, False])
@pytest.mark.parametrize('rows', [(1, 33, 40), (1300,)], ids=str)
def test_products_and_gradients_equal_those_in_float64(as_convolution, rows, monkeypatch):
    monkeypatch.setattr(products, 'mkl_lacks_avx512', lambda: as_convolution)
    calls = []
    monkeypatch.setattr(products, '_image', lambda x, image=products._image: calls.append(1) or image(x))
    torch.manual_seed(0)
    module = torch.nn.Linear(96, 80).double()
    x = torch.randn(*rows, 96, dtype=torch.float64)
    cotangent = torch.randn(*rows, 80, dtype=torch.float64)

    def results(run, dtype: torch.dtype) -> list[torch.Tensor]:
        module.to(dtype).zero_grad()
        inputs = x.to(dtype, copy=True).requires_grad_()
        y = run(inputs)
        y.backward(cotangent.to(dtype))
        return [y.detach(), inputs.grad, *[parameter.grad.clone() for parameter in module.parameters()]]

    exact, eager = results(module, torch.float64), results(module, torch.float32)
    found = results(lambda x: products.call_linear(module, x), torch.float32)
    assert bool(calls) == as_convolution
    for mine, plain, expected in zip(found, eager, exact, strict=True):
        assert_close(mine, expected, eager_error=error(plain, expected))


def test_long_sums_of_a_convolution_round_a_few_times_as_much_as_those_of_a_product(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(64, 2304), torch.randn(768, 2304)
    exact = x.double() @ weight.double().t()

    def rounding(y: torch.Tensor) -> float:
        return (y - exact).square().mean().sqrt().item()

    product = rounding(x @ weight.t())
    monkeypatch.setattr(products, 'mkl_lacks_avx512', lambda: True)
    assert rounding(products.linear(x, weight)) < 6 * product  # 2.4 times on an AMD EPYC


@pytest.mark.parametrize(
    ('vendor', 'capability', 'expected'),
    [('AuthenticAMD', 'AVX512', True), ('AuthenticAMD', 'AVX2', False), ('GenuineIntel', 'AVX512', False)],
)
def test_convolutions_replace_products_on_amd_processors_with_avx512(vendor, capability, expected, monkeypatch):
    monkeypatch.setattr(Path, 'is_file', lambda self: True)
    monkeypatch.setattr(Path, 'read_text', lambda self: f'vendor_id\t: {vendor}\n')
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    assert products.mkl_lacks_avx512.__wrapped__() == expected
