"""The convolution of resized maps: value and gradients of every implementation against the definition in float64."""

import pytest
import torch
from parity import assert_close, error
from torch._subclasses.fake_tensor import FakeTensorMode

from mmseg_volo.ops import explain, native, resized_conv
from mmseg_volo.ops.pooling import adaptive_avg_pool
from mmseg_volo.ops.resized_maps import cpu, same_size
from mmseg_volo.ops.resized_maps.operator import (
    FORCE,
    _direct,
    choose,
    resized_conv_backward_op,
    resized_conv_op,
)
from mmseg_volo.ops.resized_maps.reference import resized_conv_reference

# Sizes of the maps, size of the output, channels of each map, output channels, kernel.
CASES = [
    ([(16, 24), (8, 12), (4, 6), (2, 3)], (16, 24), 128, 33, 3),
    ([(37, 51), (19, 26), (10, 13), (5, 7)], (37, 51), 120, 16, 3),
    ([(8, 9), (4, 5), (2, 3), (1, 1)], (8, 9), 100, 20, 1),
    ([(1, 1)], (7, 10), 64, 17, 3),
    ([(3, 5)], (24, 11), 100, 48, 3),  # odd factors
    ([(1, 5), (1, 2)], (1, 5), 300, 16, 3),  # one row
    ([(4, 4), (8, 8)], (2, 2), 8, 8, 3),  # reduced
    ([(6, 6), (3, 3)], (6, 6), 4, 4, 3),  # few channels: resized after all
    ([(64, 64)], (64, 64), 256, 256, 3),  # gradient of the weight by shifted products
]
IDS = [f'{sizes}-{size}-k{kernel}' for sizes, size, _, _, kernel in CASES]


def inputs(case: tuple, dtype: torch.dtype, batch: int = 2) -> tuple:
    sizes, size, channels, outputs, kernel = case
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    maps = [random(batch, channels, *hw) for hw in sizes]
    if dtype != torch.float64:  # as the backbone's maps are; torch's own errors depend on it
        maps = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for x in maps]
    return maps, random(outputs, channels * len(sizes), kernel, kernel), random(outputs), size


def results(function, case: tuple, dtype: torch.dtype, align_corners: bool = False, batch: int = 2) -> dict:
    """Output and all gradients, for a random cotangent that all dtypes share."""
    maps, weight, bias, size = inputs(case, dtype, batch)
    y = function(maps, weight, bias, size=size, align_corners=align_corners)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(y, [*maps, weight, bias], cotangent)
    names = [*[f'd map {i}' for i in range(len(maps))], 'd weight', 'd bias']
    return {'output': y.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize('implementation', ['cpu', 'matmul'])
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('case', CASES, ids=IDS)
def test_equals_the_definition_in_float64(case, align_corners, implementation, monkeypatch):
    monkeypatch.setenv(FORCE, implementation)
    ours = results(resized_conv, case, torch.float64, align_corners)
    exact = results(resized_conv_reference, case, torch.float64, align_corners)
    for name in exact:
        assert error(ours[name], exact[name]) < 1e-12, name


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('case', CASES, ids=IDS)
def test_other_dtypes_err_no_more_than_torch(case, dtype, batch):
    ours = results(resized_conv, case, dtype, batch=batch)
    theirs = results(resized_conv_reference, case, dtype, batch=batch)
    exact = results(resized_conv_reference, case, torch.float64, batch=batch)
    for name in exact:
        # bfloat16 rounds the products and the rows between the two resizes, where torch rounds the resized map.
        slack = 1.5 if dtype == torch.bfloat16 else 1
        assert_close(ours[name], exact[name], eager_error=slack * error(theirs[name], exact[name]), what=name)


@pytest.mark.parametrize('threads', [2, 3, 5])
def test_the_kernels_give_the_same_bits_with_any_number_of_threads(threads, monkeypatch):
    # The matrix products between them are PyTorch's, whose last bits depend on the number of threads.
    x, weight, grad = torch.randn(2, 8, 12, 6), torch.randn(33, 6, 3, 3), torch.randn(2, 16, 24, 33)
    monkeypatch.setattr(cpu, 'linear', lambda x, weight: (x[..., None, :] * weight).sum(-1))
    found = []
    for number in (1, threads):
        monkeypatch.setattr(torch, 'get_num_threads', lambda number=number: number)
        out = torch.zeros(2, 16, 24, 33)
        cpu.add_forward(x, weight, out, False)
        found.append((out, cpu.backward(grad, x, weight, False, (True, False))[0]))
    assert all(torch.equal(one, several) for one, several in zip(*found, strict=True))


@pytest.mark.parametrize('case', [CASES[0], CASES[8]], ids=[IDS[0], IDS[8]])
def test_two_runs_give_the_same_bits(case):
    first, second = (results(resized_conv, case, torch.float32) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ('batch', 'side', 'channels', 'expected'),
    [(8, 256, 512, [0]), (1, 32, 512, [0, 1]), (8, 256, 48, [0, 1])],
    ids=['large', 'small', 'few channels'],
)
def test_on_a_gpu_only_much_work_is_done_at_the_maps_resolution(batch, side, channels, expected):
    with FakeTensorMode():
        maps = [torch.empty(batch, channels, s, s, device='cuda') for s in (side, side // 2)]
        weight = torch.empty(channels, 2 * channels, 3, 3, device='cuda')
        assert _direct(maps, weight, (side, side)) == expected


def test_only_maps_and_weight_are_stored():
    maps, weight, _, size = inputs(CASES[0], torch.float32)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.shape) or x, lambda x: x):
        resized_conv(maps, weight, size=size)
    assert sorted(stored) == sorted([weight.shape, *[x.shape for x in maps]])


def test_gradients_that_nobody_needs_are_not_computed():
    maps, weight, _, size = inputs(CASES[0], torch.float64)
    frozen = [x.detach() for x in maps]
    (only_weight,) = torch.autograd.grad(resized_conv(frozen, weight, size=size).sum(), [weight])
    only_first = [maps[0], *frozen[1:]]
    (dx,) = torch.autograd.grad(resized_conv(only_first, weight.detach(), size=size).sum(), [maps[0]])
    exact = torch.autograd.grad(resized_conv_reference(maps, weight, size=size).sum(), [maps[0], weight])
    assert error(dx, exact[0]) < 1e-12 and error(only_weight, exact[1]) < 1e-12


def test_autocast_decides_the_dtype():
    maps, weight, bias, size = inputs(CASES[0], torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        y = resized_conv(maps, weight, bias, size=size)
        expected = resized_conv_reference(maps, weight, bias, size=size)
    assert y.dtype == expected.dtype == torch.bfloat16
    y.float().sum().backward()
    assert maps[0].grad.dtype == weight.grad.dtype == torch.float32


def test_torchs_checks_of_operators():
    maps, weight, _, size = inputs(CASES[3], torch.float64)
    torch.library.opcheck(resized_conv_op, (maps, weight, *size, False))
    maps, weight, _, size = inputs(CASES[2], torch.float64)
    torch.library.opcheck(resized_conv_op, (maps, weight, *size, True))


@pytest.mark.parametrize('case', CASES)
def test_the_layouts_of_gradients_are_those_that_a_compiler_is_told(case):
    maps, weight, _, size = inputs(case, torch.float32)
    maps, weight = [x.detach() for x in maps], weight.detach()
    grad = torch.ones(len(maps[0]), len(weight), *size)
    with FakeTensorMode() as mode:
        fake = [[mode.from_tensor(x) for x in maps], mode.from_tensor(weight)]
        told = resized_conv_backward_op(mode.from_tensor(grad), *fake, False, [True] * len(maps), True)
    found = resized_conv_backward_op(grad, maps, weight, False, [True] * len(maps), True)
    assert [x.shape for x in found] == [x.shape for x in told]
    assert found[0].is_contiguous() and told[0].is_contiguous()


def test_compiles_as_one_graph():
    maps, weight, bias, size = inputs(CASES[0], torch.float32)

    def function(*maps):
        return resized_conv(maps, weight, bias, size=size).relu()

    compiled = torch.compile(function, backend='aot_eager', fullgraph=True)
    assert torch.equal(compiled(*maps), function(*maps))


def test_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    maps, weight, _, size = inputs(CASES[3], torch.float32)
    with FlopCounterMode(display=False) as counter:
        resized_conv(maps, weight, size=size)
    assert counter.get_total_flops() == 2 * 2 * 64 * 17 * 9


def test_explain_names_the_choice_with_its_reason():
    table = explain()
    assert 'resized_conv' in table and 'it supports only float32 and float64' in table.replace('\n', ' ')
    assert choose(torch.empty(1)).__name__ == 'mmseg_volo.ops.resized_maps.cpu'
    assert choose(torch.empty(1, dtype=torch.bfloat16)).__name__ == 'mmseg_volo.ops.resized_maps.matmul'


@pytest.mark.parametrize(
    ('forced', 'message'),
    [('cpu', 'but it supports only float32 and float64, not torch.bfloat16'), ('gpu', "must be one of .*, got 'gpu'")],
)
def test_a_forced_choice_that_cannot_run_is_an_error(forced, message, monkeypatch):
    monkeypatch.setenv(FORCE, forced)
    with pytest.raises(RuntimeError, match=message):
        choose(torch.empty(1, dtype=torch.bfloat16))


def test_without_a_compiler_the_matrices_run(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('CXX', 'no-such-compiler')
    native.library.cache_clear()
    try:
        assert 'no-such-compiler' in cpu.why_not(torch.empty(1))
        assert choose(torch.empty(1)).__name__ == 'mmseg_volo.ops.resized_maps.matmul'
    finally:
        native.library.cache_clear()


def test_gradient_of_the_weight_by_shifted_products():
    x, grad = torch.randn(2, 40, 70, 256), torch.randn(2, 40, 70, 257)
    weight = torch.empty(257, 256, 3, 3)
    assert same_size.has_faster_backward(x, weight)
    ours = same_size.backward(grad, x, weight, (False, True))[1]
    arguments = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    exact = torch.ops.aten.convolution_backward(
        grad.double().permute(0, 3, 1, 2), x.double().permute(0, 3, 1, 2), weight.double(), None, *arguments
    )[1]
    assert error(ours, exact) < 1e-5


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(maps=[]), 'maps must be'),
        (dict(maps=[torch.zeros(1, 4, 4)]), r'maps must be \[B, C, h, w\]'),
        (dict(weight=torch.zeros(2, 3, 3, 3)), r'weight must be \[O, 4, k, k\] with k = 1 or 3, got shape \(2, 3, 3'),
        (dict(weight=torch.zeros(2, 4, 5, 5)), r'got shape \(2, 4, 5, 5\)'),
        (dict(size=(0, 4)), r'size must be two positive numbers, got \(0, 4\)'),
        (dict(maps=[torch.zeros(1, 4, 2, 2, dtype=torch.int64)]), 'torch.float32 on cpu.*torch.int64 on cpu'),
        (dict(weight=torch.zeros(2, 4, 3, 3, device='meta')), 'torch.float32 on cpu.*torch.float32 on meta'),
    ],
)
def test_wrong_arguments_are_errors_with_the_values(change, message):
    arguments = dict(maps=[torch.zeros(1, 4, 2, 2)], weight=torch.zeros(2, 4, 3, 3), size=(4, 4)) | change
    with pytest.raises(ValueError, match=message):
        resized_conv(**arguments)


@pytest.mark.parametrize('size', [1, 2, 3, 6, (4, 5)])
@pytest.mark.parametrize('shape', [(1, 3, 32, 32), (2, 4, 7, 11), (1, 2, 3, 2)])
def test_adaptive_pooling_equals_torchs(shape, size):
    x = torch.randn(shape, dtype=torch.float64)
    exact = torch.nn.functional.adaptive_avg_pool2d(x, size)
    assert error(adaptive_avg_pool(x, size), exact) < 1e-14
