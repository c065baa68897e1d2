#!/usr/bin/env python
"""Time the Triton kernels of outlook attention on this GPU for several blocks and numbers of warps, in bfloat16."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

SHAPES = {'d1@512, 8 images': (8, 64, 64, 6), 'd4@1024, 2 images': (2, 128, 128, 12)}  # B, H, W and heads N
HEAD_WIDTH = 32
SOFTMAX = [(64, 1), (128, 1), (128, 2), (256, 2), (256, 4), (512, 4)]  # windows and warps of a program
GATHER = [(4, 1), (8, 1), (8, 2), (16, 1), (16, 2), (16, 4), (32, 2), (32, 4), (32, 8), (64, 4), (64, 8)]
DLOGITS = [(4, 1), (8, 1), (8, 2), (16, 1), (16, 2), (16, 4), (32, 2), (32, 4)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        print('error: PyTorch finds no GPU', file=sys.stderr)
        sys.exit(2)
    import triton

    from mmseg_volo.ops.outlook.reference import outlook_attention_reference

    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; microseconds')
    bandwidth = _bandwidth()
    for label, shape in SHAPES.items():
        logits, value, grad = _tensors(shape)
        bytes_of = dict(softmax=2 * logits.nbytes, gather=2 * value.nbytes + logits.nbytes)
        bytes_of['dlogits'] = 2 * value.nbytes + 2 * logits.nbytes
        floors = ', '.join(f'{name} {size / bandwidth * 1e6:.1f}' for name, size in bytes_of.items())
        print(f'{label}: least time at {bandwidth / 1e12:.2f} TB/s: {floors}')
        found = defaultdict(list)
        for kernel, choice, run in _runs(logits, value, grad):
            found[kernel].append((_microseconds(run), choice))
        for kernel, times in found.items():
            print(f'  {kernel}:', ', '.join(f'{choice} {time:.1f}' for time, choice in sorted(times)))
        for what, ours, theirs in _passes(logits, value, grad, outlook_attention_reference):
            fast, slow = _microseconds(ours), _microseconds(theirs)
            print(f'  {what}: ours {fast:.1f}, unfold form {slow:.1f}, {slow / fast:.2f}x', flush=True)


def _tensors(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, ...]:
    B, H, W, N = shape
    generator = torch.Generator('cuda').manual_seed(0)
    sizes = (B, H // 2, W // 2, N, 9, 9), *[(B, H, W, N * HEAD_WIDTH)] * 2
    return tuple(torch.randn(size, generator=generator, device='cuda').bfloat16() for size in sizes)


def _bandwidth() -> float:
    source = torch.empty(2**28, dtype=torch.uint8, device='cuda')
    target = torch.empty_like(source)
    return 2 * source.nbytes / _microseconds(lambda: target.copy_(source)) * 1e6


def _runs(logits, value, grad) -> Iterator[tuple[str, str, Callable]]:
    """Kernel, choice of windows/warps, and its call."""
    import triton

    from mmseg_volo.ops.outlook import triton_kernels as kernels

    B, h, w, N, _, _ = logits.shape
    scale = HEAD_WIDTH**-0.5
    flat, out = kernels._flat(logits), torch.empty_like(value)
    weights, dlogits = kernels._weights(logits, scale), torch.empty_like(flat)
    tiles = weights.shape[1]
    sizes = (*kernels._sizes(logits, value), tiles)
    for block, warps in SOFTMAX:
        grid = (triton.cdiv(len(flat), block), N * 9)
        args = (flat, weights, len(flat), *flat.stride(), tiles, scale * 1.4427)
        run = _launch(kernels.softmax_kernel, grid, args, BLOCK=block, num_warps=warps)
        yield 'softmax', f'{block}/{warps}', run
    for transposed, name in ((False, 'gather'), (True, 'gather, transposed')):
        for block, warps in GATHER:
            constants = dict(N=N, D=HEAD_WIDTH, TRANSPOSED=transposed, BW=block, num_warps=warps)
            grid = (triton.cdiv(w, block) * B * h, N)
            yield (
                name,
                f'{block}/{warps}',
                _launch(kernels.gather_kernel, grid, (value, weights, out, *sizes), **constants),
            )
    for block, warps in DLOGITS:
        grid = (triton.cdiv(w, block) * B * h, N)
        args = (grad, value, weights, dlogits, *sizes, *flat.stride(), scale)
        run = _launch(kernels.dlogits_kernel, grid, args, N=N, D=HEAD_WIDTH, BW=block, num_warps=warps)
        yield 'dlogits', f'{block}/{warps}', run


def _launch(kernel, grid: tuple[int, int], args: tuple, **constants) -> Callable:
    return lambda: kernel[grid](*args, **constants)


def _passes(logits, value, grad, reference: Callable) -> Iterator[tuple[str, Callable, Callable]]:
    from mmseg_volo.ops.outlook import triton_kernels as kernels

    geometry = dict(kernel_size=3, stride=2, scale=HEAD_WIDTH**-0.5)
    leaves = logits.clone().requires_grad_(), value.clone().requires_grad_()
    output = reference(*leaves, **geometry)
    yield (
        'forward',
        lambda: kernels.forward(logits, value, *geometry.values()),
        lambda: reference(logits, value, **geometry),
    )
    yield (
        'backward',
        lambda: kernels.backward(grad, logits, value, *geometry.values()),
        lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True),
    )


def _microseconds(run: Callable) -> float:
    from triton.testing import do_bench

    return 1e3 * do_bench(run, warmup=10, rep=40, return_mode='median')


if __name__ == '__main__':
    main()
