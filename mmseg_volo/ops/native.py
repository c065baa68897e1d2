"""C++ sources compiled on first use into the user's cache, and loaded through ctypes."""

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

COMPILERS = ('c++', 'g++', 'clang++')
HEADER = Path(__file__).with_name('exp.h')  # the one header that the sources include


@lru_cache
def library(source: Path, *definitions: str) -> ctypes.CDLL | str:
    """The library built from ``source``, or the reason why it cannot be built or loaded.

    Args:
        source: C++ file, with OpenMP, behind a C ABI.
        definitions: preprocessor definitions, such as ``-DHEAD_WIDTH=32``.
    """
    compiler = os.environ.get('CXX') or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return f'there is no C++ compiler ({", ".join(COMPILERS)}, or $CXX)'
    command = [
        *compiler.split(),
        '-O3',
        '-std=c++17',
        '-shared',
        '-fPIC',
        '-fopenmp',
        f'-I{HEADER.parent}',
        *definitions,
    ]
    # Not -march=native, because different machines may share the home directory with the cache.
    command += {'AVX2': ['-march=x86-64-v3'], 'AVX512': ['-march=x86-64-v4']}.get(
        torch.backends.cpu.get_cpu_capability(), []
    )
    text = f'{command} {platform.machine()}'.encode() + HEADER.read_bytes() + source.read_bytes()
    key = hashlib.sha256(text).hexdigest()[:16]
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'mmseg_volo')
    path = folder / f'{source.parent.name}_{key}.so'
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch, path.name)
                files = [f'-I{HEADER.parent}', str(source), '-o', str(built)]
                subprocess.run([*command, *files], check=True, capture_output=True, text=True)
                built.replace(path)  # atomic, because other processes may build it now
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return f'{compiler} failed: {(error.stderr.strip() or str(error)).splitlines()[-1]}'
    except OSError as error:
        return f'its library cannot be built in or loaded from {folder}: {error}'
