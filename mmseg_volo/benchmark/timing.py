"""Timing of contenders, and a description of the machine."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from .._version import __version__

ROUND = 0.02  # least seconds of a round on a GPU


def environment(device: str) -> dict:
    """Hardware and versions that the results depend on."""
    processor = next(
        (line.split(':')[1].strip() for line in _lines('/proc/cpuinfo') if line.startswith('model name')),
        platform.processor() or platform.machine(),
    )
    return dict(
        device=torch.cuda.get_device_name() if device == 'cuda' else f'{processor}, {torch.get_num_threads()} threads',
        torch=torch.__version__,
        timm=timm.__version__,
        mmseg_volo=__version__,
        load=os.getloadavg()[0],
    )


def paired_times(contenders: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds per call, by contender and round. Contenders alternate; a warm-up round precedes two or more rounds.

    On a GPU, a round calls a fast contender several times before it waits: in training, too, the CPU prepares the
    next kernels while the GPU works. A contender that runs out of a GPU's memory has no times.
    """
    times = {name: [] for name in contenders}
    calls = dict.fromkeys(contenders, 1)
    warm_up = 2 if device == 'cuda' else int(rounds > 1)  # a kernel's first call compiles it
    for number in range(rounds + warm_up):
        for name in list(times):
            try:
                seconds = _seconds(contenders[name], calls[name], device)
            except torch.OutOfMemoryError:
                del times[name]
                torch.cuda.empty_cache()
                continue
            if number >= warm_up:
                times[name].append(seconds)
            elif device == 'cuda':
                calls[name] = max(1, round(ROUND / seconds))
    return times


def _seconds(run: Callable[[], object], calls: int, device: str) -> float:
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronise(device)
    return (time.perf_counter() - start) / calls


def _synchronise(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
