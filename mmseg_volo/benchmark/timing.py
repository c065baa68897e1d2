"""Timing of contenders, and a description of the machine."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from .._version import __version__


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
    """Seconds per contender and round. Contenders alternate; a warm-up round precedes two or more rounds."""
    times = {name: [] for name in contenders}
    warm_up = int(rounds > 1)
    for number in range(rounds + warm_up):
        for name, run in contenders.items():
            _synchronise(device)
            start = time.perf_counter()
            run()
            _synchronise(device)
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def _synchronise(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
