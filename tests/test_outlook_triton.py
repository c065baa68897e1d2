"""The Triton kernels: run by Triton's interpreter, compiled for several GPUs, and run on a GPU if there is one.

Run as a program with TRITON_INTERPRET=1, this file writes the interpreter's result of every case to a file.
"""

import os
import subprocess
import sys
import tempfile

import pytest
import torch
from parity import assert_close, error

from mmseg_volo.ops.outlook.reference import outlook_attention_reference

pytest.importorskip('triton')

CASES = [
    # B, H, W, heads, d, dtype, layout
    (2, 3, 4, 2, 16, torch.float32, 'contiguous'),  # batch and heads
    (1, 5, 3, 1, 32, torch.float32, 'windows last'),  # odd sides
    (1, 1, 17, 1, 32, torch.float32, 'contiguous'),  # one row, two programs wide
    (1, 1, 1, 2, 16, torch.float32, 'heads first'),  # one token
    (1, 4, 9, 1, 64, torch.float32, 'windows last'),  # width no power of two, two programs wide
    (2, 3, 3, 1, 8, torch.float32, 'heads first'),
    (1, 2, 3, 2, 128, torch.float32, 'heads first'),
    (1, 3, 4, 2, 16, torch.bfloat16, 'contiguous'),
    (1, 5, 4, 1, 32, torch.bfloat16, 'windows last'),
    (1, 3, 5, 2, 64, torch.float16, 'heads first'),
    (1, 4, 3, 1, 32, torch.float16, 'windows last'),
]
REAL = [
    (2, 64, 64, 6, 32),  # a layer of D1 at 512 x 512
    (2, 128, 128, 12, 32),  # a layer of D4 at 1024 x 1024
]
# Memory layouts. Only 'heads first' cannot be described by one stride for windows and one for taps.
LAYOUTS = {'contiguous': (0, 1, 2, 3, 4, 5), 'windows last': (3, 4, 5, 0, 1, 2), 'heads first': (3, 0, 1, 2, 4, 5)}
COMPILED = [
    # kernel, dtype, d, compute capability, layout of the logits or matrices
    ('softmax_kernel', 'bf16', 32, 90, 'contiguous'),
    ('softmax_kernel', 'bf16', 32, 80, 'windows last'),
    ('softmax_kernel', 'fp32', 32, 90, 'windows last'),
    ('softmax_kernel', 'fp16', 32, 90, 'contiguous'),
    ('gather_kernel', 'bf16', 32, 90, 'straight'),
    ('gather_kernel', 'bf16', 32, 80, 'transposed'),
    ('gather_kernel', 'fp16', 16, 80, 'straight'),
    ('gather_kernel', 'fp32', 64, 90, 'transposed'),
    ('gather_kernel', 'fp32', 128, 80, 'straight'),
    ('dlogits_kernel', 'bf16', 32, 90, 'windows last'),
    ('dlogits_kernel', 'fp32', 32, 80, 'contiguous'),
    ('dlogits_kernel', 'fp16', 64, 90, 'contiguous'),
    ('dlogits_kernel', 'bf16', 16, 80, 'windows last'),
    ('dlogits_kernel', 'fp32', 128, 90, 'windows last'),
]


def inputs(B, H, W, N, d, dtype, layout, device='cpu'):
    """Logits stored in ``layout``, value and cotangent; the last two are contiguous only if the logits are."""
    generator = torch.Generator().manual_seed(0)
    order = LAYOUTS[layout]
    sizes = (B, -(-H // 2), -(-W // 2), N, 9, 9)
    logits = torch.randn([sizes[dim] for dim in order], generator=generator).permute(*map(order.index, range(6)))
    value, cotangent = torch.randn(2, B, H, W, N * d, generator=generator)
    if layout != 'contiguous':
        value, cotangent = (tensor.mT.contiguous().mT for tensor in (value, cotangent))
    return tuple(tensor.to(device, dtype) for tensor in (logits, value, cotangent))


def by_reference(logits, value, cotangent, scale, dtype):
    logits, value = (tensor.detach().to(dtype).requires_grad_() for tensor in (logits, value))
    out = outlook_attention_reference(logits, value, kernel_size=3, stride=2, scale=scale)
    out.backward(cotangent.to(dtype))
    return {'output': out.detach(), 'd logits': logits.grad, 'd value': value.grad}


def by_triton(logits, value, cotangent, scale):
    from mmseg_volo.ops.outlook import triton_kernels

    assert triton_kernels.why_not(logits, value, 3, 2) is None
    before = logits.clone(), value.clone()
    out = triton_kernels.forward(logits, value, 3, 2, scale)
    dlogits, dvalue = triton_kernels.backward(cotangent, logits, value, 3, 2, scale)
    assert torch.equal(logits, before[0]) and torch.equal(value, before[1])
    assert dlogits.stride() == torch.empty_like(logits).stride()
    assert out.is_contiguous() and dvalue.is_contiguous()
    return {'output': out, 'd logits': dlogits, 'd value': dvalue}


def interpret(path):
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    assert torch.empty_like(torch.zeros(3)).isnan().all()
    torch.save({str(case): by_triton(*inputs(*case), case[4] ** -0.5) for case in CASES}, path)


def assert_parity(found, logits, value, cotangent, scale, tolerated=1):
    exact = by_reference(logits, value, cotangent, scale, torch.float64)
    eager = by_reference(logits, value, cotangent, scale, value.dtype)
    for what, tensor in found.items():
        assert tensor.dtype == value.dtype
        assert_close(tensor, exact[what], tolerated * error(eager[what], exact[what]), what)


@pytest.fixture(scope='module')
def interpreted(tmp_path_factory):
    # A separate process, because triton.jit reads the variable when a kernel is defined.
    path = tmp_path_factory.mktemp('triton') / 'interpreted.pt'
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True, timeout=300)
    return torch.load(path)


@pytest.fixture
def kernels():
    from mmseg_volo.ops.outlook import triton_kernels

    if triton_kernels.INTERPRETED:
        pytest.skip('TRITON_INTERPRET is set: there is nothing to compile')
    return triton_kernels


@pytest.mark.parametrize('case', CASES, ids=str)
def test_interpreted_output_and_gradients_equal_the_reference_in_float64(case, interpreted):
    # The interpreter truncates to bfloat16 and GPUs round, so the interpreter's error is twice as large.
    tolerated = 2 if torch.bfloat16 in case else 1
    assert_parity(interpreted[str(case)], *inputs(*case), case[4] ** -0.5, tolerated)


@pytest.mark.parametrize(('name', 'dtype', 'd', 'capability', 'layout'), COMPILED)
def test_compiles_without_spills(name, dtype, d, capability, layout, kernels):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    block, warps = (0, 1) if name == 'softmax_kernel' else kernels.blocks(kernel, d)
    constants = {'N': 12, 'D': d, 'BW': block, 'BLOCK': kernels.SOFTMAX_WINDOWS}
    constants['TRANSPOSED'] = layout == 'transposed'
    constants['tap_stride' if layout == 'contiguous' else 'window_stride'] = 1
    constants = {name: constant for name, constant in constants.items() if name in kernel.arg_names}
    tensors = ('logits', 'value', 'weights', 'grad', 'out', 'dlogits')
    types = dict.fromkeys(tensors, f'*{dtype}') | {'scale': 'fp32', 'scale_log2e': 'fp32'}
    types |= dict.fromkeys(constants, 'constexpr')
    signature = {name: types.get(name, 'i32') for name in kernel.arg_names}
    aligned = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(kernel.arg_names) if name in tensors}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget('cuda', capability, 32),
        options={'num_warps': warps},
    )
    assert f'.target sm_{capability}' in compiled.asm['ptx']
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, '-res-usage', file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert 'STACK:0 ' in usage and 'LOCAL:0 ' in usage, usage


def test_every_thread_has_eight_elements_of_a_token(kernels):
    for d in kernels.HEAD_WIDTHS:
        for kernel in (kernels.gather_kernel, kernels.dlogits_kernel):
            block, warps = kernels.blocks(kernel, d)
            assert block * d == 8 * 32 * warps


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (dict(), None),
        (dict(device='cpu'), 'the tensors are on cpu'),
        (dict(kernel_size=5), 'not 5 with 2'),
        (dict(stride=1), 'not 3 with 1'),
        (dict(dtype=torch.float64), 'not torch.float64'),
        (dict(logits_dtype=torch.float16), 'not torch.float16 with torch.float32'),
        (dict(d=48), 'not 48'),
        (dict(d=256), 'not 256'),
        (dict(capability=(7, 5)), 'a GPU is older than compute capability 8.0'),
        (dict(triton='3.2.0'), 'triton 3.2.0 is older than 3.3'),
    ],
    ids=str,
)
def test_why_not_names_what_does_not_fit(change, reason, kernels, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    asked = dict(device='cuda', dtype=torch.float32, d=32, kernel_size=3, stride=2, capability=(9, 0)) | change
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: asked['capability'])
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    monkeypatch.setattr(kernels.triton, '__version__', asked.get('triton', kernels.triton.__version__))
    with FakeTensorMode():
        value = torch.empty(1, 4, 4, 2 * asked['d'], device=asked['device'], dtype=asked['dtype'])
        logits = torch.empty(1, 2, 2, 2, 9, 9, device=asked['device'], dtype=asked.get('logits_dtype', asked['dtype']))
    found = kernels.why_not(logits, value, asked['kernel_size'], asked['stride'])
    assert found is None if reason is None else reason in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('shape', REAL, ids=str)
def test_on_a_gpu_output_and_gradients_equal_the_reference_in_float64(shape, dtype, layout, kernels):
    tensors, scale = inputs(*shape, dtype, layout, device='cuda'), shape[4] ** -0.5
    assert_parity(by_triton(*tensors, scale), *tensors, scale)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_two_runs_give_the_same_bits(dtype, kernels):
    tensors = inputs(2, 37, 51, 3, 32, dtype, 'windows last', device='cuda')
    first, second = (by_triton(*tensors, 32**-0.5) for _ in range(2))
    assert all(torch.equal(second[what], first[what]) for what in first)


if __name__ == '__main__':
    interpret(sys.argv[1])
