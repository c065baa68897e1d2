"""Outlook attention fused in C++, for CPUs: ``cpu.cpp``, built once into the user's cache and called through ctypes."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name('cpu.cpp')
SUFFIXES = {torch.float32: 'float32', torch.bfloat16: 'bfloat16'}
COMPILERS = ('c++', 'g++', 'clang++')


def why_not(logits: Tensor, value: Tensor, kernel_size: int, stride: int) -> str | None:
    """Reason why this implementation cannot process these tensors, or None."""
    if value.device.type != 'cpu':
        return f'the tensors are on {value.device}'
    if (kernel_size, stride) != (3, 2):
        return f'it supports only window 3 with stride 2, not {kernel_size} with {stride}'
    if value.dtype not in SUFFIXES:
        return f'it supports only float32 and bfloat16, not {value.dtype}'
    return why_not_built(value.shape[-1] // logits.shape[3])


def why_not_built(head_width: int) -> str | None:
    """Reason why the library for this head width cannot be built or loaded, or None; builds it if necessary."""
    library = _library(head_width)
    return library if isinstance(library, str) else None


def forward(logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float) -> Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`."""
    logits, value = logits.contiguous(), value.contiguous()
    out = torch.empty_like(value)
    _call('forward', logits, value, (value, logits, out), scale)
    return out


def backward(
    grad: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and value."""
    grad, logits, value = grad.contiguous(), logits.contiguous(), value.contiguous()
    dlogits = torch.empty_like(logits)
    dvalue = torch.empty_like(value, dtype=torch.float32)
    _call('backward', logits, value, (value, logits, grad, dvalue, dlogits), scale)
    return dlogits, dvalue.to(value.dtype)


def _call(name: str, logits: Tensor, value: Tensor, tensors: tuple[Tensor, ...], scale: float) -> None:
    B, H, W, C = value.shape
    N = logits.shape[3]
    function = getattr(_library(C // N), f'{name}_{SUFFIXES[value.dtype]}')
    function(
        *[ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors],
        *[ctypes.c_int64(size) for size in (B, H, W, N)],
        ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
    )


@lru_cache
def _library(head_width: int) -> ctypes.CDLL | str:
    """The library for this head width, or the reason why it is missing."""
    compiler = os.environ.get('CXX') or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return f'there is no C++ compiler ({", ".join(COMPILERS)}, or $CXX)'
    command = [*compiler.split(), '-O3', '-std=c++17', '-shared', '-fPIC', '-fopenmp', f'-DHEAD_WIDTH={head_width}']
    # Not -march=native, because different machines may share the home directory with the cache.
    command += {'AVX2': ['-march=x86-64-v3'], 'AVX512': ['-march=x86-64-v4']}.get(
        torch.backends.cpu.get_cpu_capability(), []
    )
    key = hashlib.sha256(f'{command} {platform.machine()}'.encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'mmseg_volo')
    path = folder / f'outlook_{key}.so'
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch, path.name)
                subprocess.run([*command, str(SOURCE), '-o', str(built)], check=True, capture_output=True, text=True)
                built.replace(path)  # atomic, because other processes may build it now
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return f'{compiler} failed: {(error.stderr.strip() or str(error)).splitlines()[-1]}'
    except OSError as error:
        return f'its library cannot be built in or loaded from {folder}: {error}'
