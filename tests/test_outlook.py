import os
import subprocess
import sys

import pytest
import torch
from parity import assert_close, error
from timm.models.volo import OutlookAttention as TimmOutlookAttention

from mmseg_volo.models.volo import OutlookAttention
from mmseg_volo.ops import explain, native, outlook_attention
from mmseg_volo.ops.outlook import cpu
from mmseg_volo.ops.outlook.dispatch import FORCE, choose, outlook_attention_backward_op, outlook_attention_op, why_not
from mmseg_volo.ops.outlook.reference import outlook_attention_reference

SHAPES = [
    # B, H, W, heads, d, k, stride
    (2, 8, 8, 2, 4, 3, 2),  # even sides
    (1, 7, 9, 3, 5, 3, 2),  # odd sides, head width no power of two
    (1, 1, 12, 2, 4, 3, 2),  # one row
    (3, 1, 1, 2, 4, 3, 2),  # one token
    (1, 6, 5, 1, 4, 3, 1),  # stride 1
    (1, 9, 8, 2, 3, 5, 2),  # larger window
    (1, 7, 7, 2, 4, 3, 3),  # windows that do not overlap
    (1, 5, 6, 2, 4, 1, 1),  # windows of one token
    (1, 13, 20, 3, 32, 3, 2),  # VOLO's head width
    (2, 128, 128, 12, 32, 3, 2),  # a layer of D4 at 1024 x 1024
]
LARGE = SHAPES[-1]
SMALL_SHAPES = SHAPES[:-1]
ON_CPU = ('reference', 'torch', 'cpu')


def inputs(shape, seed=0, dtype=torch.float64):
    B, H, W, N, d, k, stride = shape
    generator = torch.Generator().manual_seed(seed)
    h, w = -(-H // stride), -(-W // stride)
    logits = torch.randn(B, h, w, N, k * k, k * k, dtype=torch.float64, generator=generator)
    value = torch.randn(B, H, W, N * d, dtype=torch.float64, generator=generator)
    return logits.to(dtype), value.to(dtype), dict(kernel_size=k, stride=stride, scale=d**-0.5)


def results(function, logits, value, geometry, dtype):
    """Output and gradients, for a random cotangent that all dtypes share."""
    logits, value = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (logits, value))
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = function(logits, value, **geometry)
    out.backward(cotangent)
    return {'output': out.detach(), 'd logits': logits.grad, 'd value': value.grad}


@pytest.fixture
def force(monkeypatch):
    """Choose an implementation, or skip with the reason why it cannot run."""

    def choose_or_skip(name, logits, value, geometry):
        reason = why_not(name, logits, value, geometry['kernel_size'], geometry['stride'])
        if reason is not None:
            pytest.skip(f'{name}: {reason}')
        monkeypatch.setenv(FORCE, name)

    return choose_or_skip


def by_definition(logits, value, *, kernel_size, stride, scale):
    """Section 3.1 of the paper in loops: each position of a window is a weighted sum of the window's values."""
    B, H, W, C = value.shape
    _, h, w, N, K, _ = logits.shape
    d, r = C // N, kernel_size // 2
    out = torch.zeros_like(value)
    for b in range(B):
        for i in range(h):
            for j in range(w):
                for n in range(N):
                    weights = (logits[b, i, j, n] * scale).softmax(-1)
                    places = [
                        (i * stride + p - r, j * stride + q - r) for p in range(kernel_size) for q in range(kernel_size)
                    ]
                    inside = [0 <= y < H and 0 <= x < W for y, x in places]
                    for to, (y, x) in enumerate(places):
                        if inside[to]:
                            for source, (v, u) in enumerate(places):
                                if inside[source]:
                                    part = slice(n * d, (n + 1) * d)
                                    out[b, y, x, part] += weights[to, source] * value[b, v, u, part]
    return out


@pytest.mark.parametrize('shape', SMALL_SHAPES[:-1], ids=str)
def test_reference_equals_the_definition(shape):
    logits, value, geometry = inputs(shape)
    assert_close(outlook_attention_reference(logits, value, **geometry), by_definition(logits, value, **geometry))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('name', ON_CPU)
def test_output_and_gradients_equal_the_reference_in_float64(name, shape, dtype, force):
    if shape == LARGE and (dtype != torch.float32 or name != 'cpu'):
        pytest.skip('the large shape is for the default on CPUs alone, to save time')
    logits, value, geometry = inputs(shape, dtype=dtype)
    force(name, logits, value, geometry)
    exact = results(outlook_attention_reference, logits, value, geometry, torch.float64)
    eager = results(outlook_attention_reference, logits, value, geometry, dtype)
    for what, tensor in results(outlook_attention, logits, value, geometry, dtype).items():
        assert tensor.dtype == dtype and tensor.is_contiguous()
        assert_close(tensor, exact[what], error(eager[what], exact[what]), what)


@pytest.mark.parametrize('shape', SMALL_SHAPES[:3], ids=str)
@pytest.mark.parametrize('name', ['reference', 'torch'])
def test_gradients_equal_differences(name, shape, force):
    logits, value, geometry = inputs(shape)
    force(name, logits, value, geometry)
    torch.autograd.gradcheck(
        lambda a, b: outlook_attention(a, b, **geometry),
        (logits.requires_grad_(), value.requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize('name', ON_CPU)
def test_operator_keeps_torchs_contract(name, force):
    logits, value, geometry = inputs(SMALL_SHAPES[1], dtype=torch.float32)
    force(name, logits, value, geometry)
    arguments = (logits.requires_grad_(), value.requires_grad_(), *geometry.values())
    torch.library.opcheck(outlook_attention_op, arguments)
    # The backward operator has no derivative of its own.
    utilities = ('test_schema', 'test_faketensor')
    grad = torch.randn_like(value)
    detached = (grad, *[a.detach() if torch.is_tensor(a) else a for a in arguments])
    torch.library.opcheck(outlook_attention_backward_op, detached, test_utils=utilities)


@pytest.mark.parametrize('name', ON_CPU)
def test_uninitialised_memory_never_comes_out(name, force):
    logits, value, geometry = inputs((1, 7, 5, 2, 4, 3, 2), dtype=torch.float32)
    force(name, logits, value, geometry)
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        for tensor in results(outlook_attention, logits, value, geometry, torch.float32).values():
            assert tensor.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('name', ON_CPU)
def test_nan_comes_out_where_its_windows_reach_and_nowhere_else(name, force):
    logits, value, geometry = inputs((1, 8, 8, 1, 4, 3, 2), dtype=torch.float32)
    force(name, logits, value, geometry)
    logits[0, 1, 1, 0, 4] = float('nan')  # the centre of window (1, 1)
    found = outlook_attention(logits, value, **geometry).isnan().any(-1)[0].nonzero().tolist()
    assert found == [[2, 2]]


@pytest.mark.parametrize('name', ON_CPU)
def test_noncontiguous_and_expanded_inputs_give_the_same(name, force):
    logits, value, geometry = inputs(SMALL_SHAPES[1], dtype=torch.float32)
    force(name, logits, value, geometry)
    expected = results(outlook_attention, logits, value, geometry, torch.float32)
    strided = value.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    windows_last = logits.permute(3, 4, 5, 0, 1, 2).contiguous().permute(3, 4, 5, 0, 1, 2)
    assert not strided.is_contiguous() and not windows_last.is_contiguous()
    for what, tensor in results(outlook_attention, windows_last, strided, geometry, torch.float32).items():
        assert torch.equal(tensor, expected[what]), what
    one_value = value[:, :1, :1].expand_as(value)
    assert torch.equal(
        outlook_attention(logits, one_value, **geometry), outlook_attention(logits, one_value.clone(), **geometry)
    )


def test_inputs_are_left_alone():
    logits, value, geometry = inputs(SMALL_SHAPES[1], dtype=torch.float32)
    copies = logits.clone(), value.clone()
    results(outlook_attention, logits, value, geometry, torch.float32)
    assert torch.equal(logits, copies[0]) and torch.equal(value, copies[1])


@pytest.mark.parametrize('shape', [(0, 4, 4, 2, 4, 3, 2), (2, 0, 4, 2, 4, 3, 2)], ids=str)
def test_empty_tensors_give_empty_tensors(shape):
    logits, value, geometry = inputs(shape, dtype=torch.float32)
    for what, tensor in results(outlook_attention, logits, value, geometry, torch.float32).items():
        assert tensor.shape == (logits.shape if what == 'd logits' else value.shape)


def test_any_number_of_threads_gives_the_same_bits(force):
    logits, value, geometry = inputs((2, 17, 15, 3, 32, 3, 2), dtype=torch.bfloat16)
    force('cpu', logits, value, geometry)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(results(outlook_attention, logits, value, geometry, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[what], found[0][what]) for what in other)


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_as_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(outlook_attention, fullgraph=True, dynamic=dynamic, backend='aot_eager')
    for shape in ((1, 8, 8, 2, 4, 3, 2), (1, 7, 9, 2, 4, 3, 2)):
        logits, value, geometry = inputs(shape, dtype=torch.float32)
        expected = results(outlook_attention, logits, value, geometry, torch.float32)
        for what, tensor in results(compiled, logits, value, geometry, torch.float32).items():
            assert torch.equal(tensor, expected[what]), what


def test_exports_to_plain_operators():
    logits, value, geometry = inputs(SMALL_SHAPES[1], dtype=torch.float32)

    class Model(torch.nn.Module):
        def forward(self, logits, value):
            return outlook_attention(logits, value, **geometry)

    exported = torch.export.export(Model(), (logits, value)).module()
    assert_close(exported(logits, value), outlook_attention(logits, value, **geometry), what='value')
    assert not any('mmseg_volo' in str(node.target) for node in exported.graph.nodes)


def test_vmap_equals_a_loop_in_value_and_gradients():
    logits, value, geometry = inputs((3, 6, 5, 2, 4, 3, 2))

    def mapped(logits, value, **geometry):
        return torch.vmap(lambda a, b: outlook_attention(a[None], b[None], **geometry)[0])(logits, value)

    expected = results(outlook_attention_reference, logits, value, geometry, torch.float64)
    for what, tensor in results(mapped, logits, value, geometry, torch.float64).items():
        assert_close(tensor, expected[what], what=what)
    shared = torch.vmap(lambda b: outlook_attention(logits[:1], b[None], **geometry))(value)
    assert_close(shared[2], outlook_attention(logits[:1], value[2:], **geometry))


def test_functional_gradients_are_refused_with_words():
    logits, value, geometry = inputs(SMALL_SHAPES[1])
    with pytest.raises(RuntimeError, match='functorch transforms'):  # torch.library's limit, as of torch 2.11
        torch.func.grad(lambda v: outlook_attention(logits, v, **geometry).sum())(value)


def test_double_backward_is_refused_with_words():
    logits, value, geometry = inputs(SMALL_SHAPES[1])
    value.requires_grad_()
    (grad,) = torch.autograd.grad(outlook_attention(logits, value, **geometry).square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula was registered'):
        grad.sum().backward()


def test_autocast_leaves_the_operator_in_its_inputs_dtype():
    logits, value, geometry = inputs(SMALL_SHAPES[1], dtype=torch.float32)
    expected = outlook_attention(logits, value, **geometry)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(outlook_attention(logits, value, **geometry), expected)


# Which implementation runs


def test_float32_on_a_cpu_runs_the_fused_form_and_float64_does_not():
    for dtype, expected in ((torch.float32, 'cpu'), (torch.bfloat16, 'cpu'), (torch.float64, 'torch_form')):
        logits, value, geometry = inputs(SMALL_SHAPES[0], dtype=dtype)
        assert choose(logits, value, 3, 2).__name__ == f'mmseg_volo.ops.outlook.{expected}'


def test_explain_names_every_choice_with_reasons():
    table = explain()
    assert 'the tensors are on cpu' in table and 'not torch.float64' in table.replace('|', ' ')


@pytest.mark.parametrize(
    ('forced', 'dtype', 'message'),
    [
        ('cpu', torch.float64, 'MMSEG_VOLO_OUTLOOK=cpu, but it supports only float32 and bfloat16, not torch.float64'),
        ('triton', torch.float32, 'MMSEG_VOLO_OUTLOOK=triton, but the tensors are on cpu'),
        ('fastest', torch.float32, "must be one of triton, cpu, torch, reference, got 'fastest'"),
    ],
)
def test_a_forced_implementation_that_cannot_run_says_why(forced, dtype, message, monkeypatch):
    monkeypatch.setenv(FORCE, forced)
    logits, value, geometry = inputs(SMALL_SHAPES[0], dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        outlook_attention(logits, value, **geometry)


@pytest.mark.parametrize(
    ('environment', 'reason'),
    [
        (dict(CXX='no-such-compiler'), 'no-such-compiler'),
        (dict(CXX='false'), 'false failed'),
        (dict(PATH='/nowhere'), 'there is no C++ compiler'),
        (dict(XDG_CACHE_HOME='/proc/nowhere'), 'cannot be built in or loaded from /proc/nowhere'),
    ],
    ids=str,
)
def test_without_a_library_the_torch_form_runs_and_the_reason_is_told(environment, reason, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    native.library.cache_clear()
    try:
        assert reason in cpu.why_not_built(32)
        logits, value, geometry = inputs(SMALL_SHAPES[7], dtype=torch.float32)
        assert choose(logits, value, 3, 2).__name__ == 'mmseg_volo.ops.outlook.torch_form'
        assert not list(tmp_path.rglob('*.so'))
    finally:
        native.library.cache_clear()


def test_several_processes_may_build_the_library_at_once(tmp_path):
    code = 'from mmseg_volo.ops.outlook import cpu; assert cpu.why_not_built(16) is None'
    environment = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, '-c', code], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len(list((tmp_path / 'mmseg_volo').iterdir())) == 1


@pytest.mark.parametrize('size', [(8, 8), (7, 9), (1, 5)], ids=str)
def test_module_equals_timms_in_value_and_every_gradient(size):
    torch.manual_seed(0)
    ours, theirs = OutlookAttention(12, 3).double(), TimmOutlookAttention(12, 3, stride=2).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    cotangent = torch.randn(2, *size, 12, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf, torch.nn.Identity()) if module is ours else module(leaf)
        y.backward(cotangent)
        results.append({'output': y, 'x': leaf.grad, **{name: p.grad for name, p in module.named_parameters()}})
    for name in results[1]:
        assert_close(results[0][name].detach(), results[1][name].detach(), what=name)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(kernel_size=2), 'kernel_size must be odd'),
        (dict(stride=4), 'stride must be between'),
        (dict(stride=1), 'do not fit'),
        (dict(kernel_size=5), 'do not fit'),
    ],
)
def test_wrong_geometry_is_an_error_with_the_values(change, message):
    logits, value, geometry = inputs(SHAPES[0])
    with pytest.raises(ValueError, match=message):
        outlook_attention(logits, value, **{**geometry, **change})


def test_wrong_shapes_are_errors_with_the_values():
    logits, value, geometry = inputs(SHAPES[0])
    with pytest.raises(ValueError, match=r'value must be \[B, H, W, C\]'):
        outlook_attention(logits, value[0], **geometry)
    with pytest.raises(ValueError, match='multiple of N=2'):
        outlook_attention(logits, value[..., :7], **geometry)


def test_wrong_dtypes_and_devices_are_errors_with_the_values():
    logits, value, geometry = inputs(SHAPES[0])
    with pytest.raises(ValueError, match='logits are torch.float32 and value is torch.float64'):
        outlook_attention(logits.float(), value, **geometry)
    with pytest.raises(ValueError, match='logits are torch.int64 and value is torch.int64'):
        outlook_attention(logits.long(), value.long(), **geometry)
    with pytest.raises(ValueError, match='logits are on meta and value is on cpu'):
        outlook_attention(logits.to('meta'), value, **geometry)
