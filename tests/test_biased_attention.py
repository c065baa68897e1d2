"""Attention with relative bias: value and gradients of the chunked form against its definition in float64."""

import pytest
import torch
from parity import assert_close, error

from mmseg_volo.benchmark.memory import peak_bytes
from mmseg_volo.ops import biased_attention
from mmseg_volo.ops.biased_attention import (
    CHUNK,
    biased_attention_backward_op,
    biased_attention_op,
    biased_attention_reference,
    relative_bias,
)

NAMES = ['d q', 'd k', 'd v', 'd table']
CASES = [
    # B, heads, d, grid
    (1, 2, 4, (3, 5)),
    (2, 3, 5, (7, 6)),
    (3, 2, 4, (1, 9)),
    (2, 2, 8, (9, 1)),
    (2, 4, 32, (8, 12)),
]


def inputs(case: tuple, dtype: torch.dtype = torch.float64, table_dtype: torch.dtype | None = None) -> list:
    B, heads, d, (h, w) = case
    generator = torch.Generator().manual_seed(0)
    shapes = (3, B, heads, h * w, d), (heads, 2 * h - 1, 2 * w - 1)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape, dtype in zip(shapes, (dtype, table_dtype or dtype), strict=True)
    ]


def results(function, tensors: list, grid: tuple, **options) -> dict:
    """Output and all gradients, for a random cotangent that all dtypes share."""
    y = function(*tensors, grid=grid, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    dqkv, dtable = torch.autograd.grad(y, tensors, cotangent)
    return {'output': y.detach(), **dict(zip(NAMES, (*dqkv, dtable), strict=True))}


@pytest.fixture(params=['one row of one head', 'two rows of all heads', 'everything'])
def chunk(request, monkeypatch):
    """Set the size of a chunk for a case in float64."""

    def set_for(case: tuple) -> None:
        _, heads, _, (h, w) = case
        row = w * h * w * 8
        monkeypatch.setitem(CHUNK, 'cpu', {'o': 1, 't': 2 * heads * row, 'e': 1000 * heads * h * row}[request.param[0]])

    return set_for


def test_the_bias_is_that_of_the_definition():
    h, w = 3, 5
    table = torch.randn(2, 2 * h - 1, 2 * w - 1)
    bias = relative_bias(table, (h, w)).view(2, h, w, h, w)
    for i in range(h):
        for j in range(w):
            for i2 in range(h):
                for j2 in range(w):
                    expected = table[:, i - i2 + h - 1, j - j2 + w - 1]
                    assert torch.equal(bias[:, i, j, i2, j2], expected)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_equals_attention_with_the_whole_bias_in_float64(case, chunk):
    chunk(case)
    grid = case[-1]

    def plain(qkv, table, grid):
        q, k, v = qkv
        scores = q @ k.mT * q.shape[-1] ** -0.5 + relative_bias(table, grid)
        return scores.softmax(-1) @ v

    tensors = inputs(case)
    ours = results(biased_attention, tensors, grid)
    for definition in (plain, biased_attention_reference):
        for name, exact in results(definition, tensors, grid).items():
            assert error(ours[name], exact) < 1e-13, name


@pytest.mark.parametrize('rows', range(1, 8))
def test_every_size_of_chunk_gives_the_same(rows, monkeypatch):
    case = B, heads, _, (h, w) = 2, 2, 3, (7, 4)
    tensors = inputs(case)
    exact = results(biased_attention_reference, tensors, (h, w))
    monkeypatch.setitem(CHUNK, 'cpu', rows * heads * w * h * w * 8)
    for name, found in results(biased_attention, tensors, (h, w)).items():
        assert error(found, exact[name]) < 1e-13, name


def test_images_that_fit_are_processed_together(monkeypatch):
    case = B, heads, _, (h, w) = 5, 2, 3, (3, 4)
    tensors = inputs(case)
    exact = results(biased_attention_reference, tensors, (h, w))
    monkeypatch.setitem(CHUNK, 'cpu', 2 * heads * (h * w) ** 2 * 8)  # two images, two and one
    for name, found in results(biased_attention, tensors, (h, w)).items():
        assert error(found, exact[name]) < 1e-13, name


def test_one_token_is_its_value():
    qkv, table = inputs((2, 3, 4, (1, 1)))
    found = results(biased_attention, [qkv, table], (1, 1))
    assert torch.equal(found['output'], qkv[2])
    assert all(torch.equal(found[name], torch.zeros_like(found[name])) for name in ('d q', 'd k', 'd table'))


def test_gradients_equal_finite_differences():
    tensors = inputs((2, 2, 3, (2, 3)))
    assert torch.autograd.gradcheck(
        lambda *x: biased_attention(*x, grid=(2, 3), scale=0.7), tensors, fast_mode=True, atol=1e-8
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_other_dtypes_err_at_most_twice_as_much_as_torch(case, dtype, chunk):
    chunk(case)
    low = inputs(case, dtype, torch.float32)
    exact = results(biased_attention_reference, [x.double().detach().requires_grad_() for x in low], case[-1])
    theirs = results(biased_attention_reference, low, case[-1])
    ours = results(biased_attention, low, case[-1])
    assert ours['d table'].dtype == torch.float32
    for name in exact:
        eager = error(theirs[name], exact[name])
        if dtype != torch.float32 and name == 'd table':  # it has autocast's errors, but the dtype of the table
            assert error(ours[name], exact[name]) <= 2 * eager
        else:
            assert_close(ours[name], exact[name], eager, name)


def test_autocast_has_the_dtypes_of_torchs_attention():
    case = CASES[-1]
    tensors = inputs(case, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        ours = results(biased_attention, tensors, case[-1])
        theirs = results(biased_attention_reference, tensors, case[-1])
    assert ours['output'].dtype == theirs['output'].dtype == torch.bfloat16
    exact = results(biased_attention_reference, [x.detach().double().requires_grad_() for x in tensors], case[-1])
    for name in NAMES:
        assert ours[name].dtype == torch.float32
        assert error(ours[name], exact[name]) <= 2 * error(theirs[name], exact[name]), name
    doubles = [x.detach().double() for x in tensors]
    with torch.autocast('cpu', torch.bfloat16):
        assert biased_attention(*doubles, grid=case[-1]).dtype == torch.float64


@pytest.mark.parametrize('order', [(3, 0, 2, 1, 4), (2, 0, 3, 1, 4), (4, 0, 1, 3, 2)], ids=str)
def test_other_strides_give_the_same_and_gradients_of_the_same_strides(order):
    qkv, table = inputs(case := CASES[-1])
    expected = results(biased_attention, [qkv, table], case[-1])
    inverse = sorted(range(5), key=order.__getitem__)
    strided = qkv.detach().permute(inverse).contiguous().permute(order).requires_grad_()
    assert not strided.is_contiguous()
    transposed = table.detach().mT.contiguous().mT.requires_grad_()
    found = results(biased_attention, [strided, transposed], case[-1])
    for name in expected:
        assert error(found[name], expected[name]) < 1e-13, name
    gradient, _ = biased_attention_backward_op(found['output'], strided, table, *case[-1], 1.0)
    assert gradient.stride() == strided.stride()


def test_expanded_tensors_give_the_same():
    qkv, table = inputs(case := CASES[-1])
    one = qkv[:, :1].detach().requires_grad_()  # one image for the batch
    for packed in (qkv, one.expand_as(qkv)):
        leaf = qkv if packed is qkv else one
        ours, theirs = (  # the gradient of a sum is expanded from one number
            torch.autograd.grad(function(packed, table, grid=case[-1]).sum(), leaf)[0]
            for function in (biased_attention, biased_attention_reference)
        )
        assert error(ours, theirs) < 1e-13


@pytest.mark.parametrize('number', range(2), ids=['qkv', 'table'])
def test_one_gradient_alone_is_the_same(number):
    case = CASES[1]
    tensors = inputs(case)
    expected = results(biased_attention, tensors, case[-1])
    frozen = [x if i == number else x.detach() for i, x in enumerate(tensors)]
    y = biased_attention(*frozen, grid=case[-1])
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad(y, frozen[number], cotangent)
    assert torch.equal(found, expected['d table'] if number else torch.stack([expected[name] for name in NAMES[:3]]))


def test_two_runs_give_the_same_bits():
    case = 2, 3, 32, (16, 20)
    tensors = inputs(case, torch.float32)
    first, second = (results(biased_attention, tensors, case[-1]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_uninitialised_memory_never_comes_out(chunk):
    case = CASES[1]
    chunk(case)
    tensors = inputs(case)
    expected = results(biased_attention, tensors, case[-1])
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        found = results(biased_attention, tensors, case[-1])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_only_the_arguments_are_stored():
    tensors = inputs(CASES[1])
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.data_ptr()) or x, lambda x: x):
        biased_attention(*tensors, grid=CASES[1][-1])
    assert stored == [x.data_ptr() for x in tensors]


def test_memory_at_4096_tokens_is_that_of_a_few_chunks():
    case = 1, 12, 32, (64, 64)  # a block of CoAtNet-0 at 1024 x 1024
    tensors = inputs(case, torch.float32)
    found = {}
    peak = peak_bytes(lambda: found.update(results(biased_attention, tensors, case[-1])), 'cpu')
    own = sum(x.nbytes for x in found.values())
    assert own < peak < own + 128 * 2**20  # the scores of all pairs are 768 MiB


def test_dropout_drops_weights():
    qkv, table = inputs((1, 1, 4, (8, 8)))
    y = biased_attention(torch.cat([qkv[:2], torch.ones_like(qkv[:1])]), table, grid=(8, 8), dropout=0.5)
    assert y.std() > 0.01 and abs(y.mean() - 1) < 0.1


@pytest.mark.parametrize('case', [CASES[0], CASES[2]], ids=str)
def test_torchs_checks_of_operators(case):
    torch.library.opcheck(biased_attention_op, (*inputs(case), *case[-1], 0.5))
    torch.library.opcheck(biased_attention_op, (*inputs(case, torch.bfloat16, torch.float32), *case[-1], 0.5))


def test_compiles_as_one_operator_and_exports_as_its_definition():
    case = CASES[1]
    tensors = inputs(case, torch.float32)

    class Model(torch.nn.Module):
        def forward(self, qkv, table):
            return biased_attention(qkv, table, grid=case[-1]).relu()

    compiled = torch.compile(Model(), backend='aot_eager', fullgraph=True)
    assert torch.equal(compiled(*tensors), Model()(*tensors))
    gradients = [torch.autograd.grad(model(*tensors).sum(), tensors) for model in (compiled, Model())]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    exported = torch.export.export(Model(), tuple(tensors)).module()
    assert error(exported(*tensors), Model()(*tensors).double()) < 1e-6
    assert not any('mmseg_volo' in str(node.target) for node in exported.graph.nodes)


def test_the_definition_can_be_traced():
    case = CASES[1]
    tensors = [x.detach() for x in inputs(case, torch.float32)]
    traced = torch.jit.trace(lambda *x: biased_attention_reference(*x, grid=case[-1]), tensors)
    assert error(traced(*tensors), biased_attention(*tensors, grid=case[-1]).double()) < 1e-6


def test_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    tensors = inputs(CASES[-1], torch.float32)
    with FlopCounterMode(display=False) as counter:
        biased_attention(*tensors, grid=CASES[-1][-1])
    assert counter.get_total_flops() == 2 * 2 * (2 * 4 * 96 * 96 * 32)


def test_an_empty_batch_gives_an_empty_batch():
    tensors = inputs((0, 2, 4, (3, 5)))
    found = results(biased_attention, tensors, (3, 5))
    assert found['output'].shape == (0, 2, 15, 4) and torch.equal(found['d table'], torch.zeros_like(tensors[1]))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(grid=(3,)), r'grid must be two positive numbers, got \(3,\)'),
        (dict(grid=(0, 5)), r'grid must be two positive numbers, got \(0, 5\)'),
        (dict(grid=(4, 5)), r'qkv must be \[3, B, heads, 4 \* 5, d\] for grid \(4, 5\), got .*\(3, 1, 2, 15, 4\)'),
        (dict(qkv=torch.zeros(3, 2, 15, 4)), r'qkv must be .* got shape \(3, 2, 15, 4\)'),
        (dict(qkv=torch.zeros(2, 1, 2, 15, 4)), r'qkv must be .* got shape \(2, 1, 2, 15, 4\)'),
        (dict(qkv=torch.zeros(3, 1, 2, 15, 0)), r'qkv must be .* got shape \(3, 1, 2, 15, 0\)'),
        (dict(table=torch.zeros(2, 9, 5)), r'table must have shape \(2, 5, 9\) for grid \(3, 5\), got \(2, 9, 5\)'),
        (dict(table=torch.zeros(2, 5, 9, dtype=torch.int64)), 'floating-point dtypes, got torch.float32 and .*int64'),
        (dict(table=torch.zeros(2, 5, 9, device='meta')), 'must be on one device, got cpu and meta'),
    ],
)
def test_wrong_arguments_are_errors_with_the_values(change, message):
    arguments = dict(qkv=torch.zeros(3, 1, 2, 15, 4), table=torch.zeros(2, 5, 9), grid=(3, 5)) | change
    with pytest.raises(ValueError, match=message):
        biased_attention(**arguments)
