"""Denormal numbers: too small to matter, and slow on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Compute with zeros instead of denormal numbers on the CPU, in this thread and in those that it starts.

    Denormals are the numbers below 1.2e-38 in float32. The softmax of a sharp attention map has many, and an x86 CPU
    computes with them many times more slowly. Threads that torch has already started keep their own setting, so enter
    this before the first parallel operation. Does nothing on a CPU without the setting, and on a GPU.
    """
    before = bool(torch.tensor([1e-38]).mul(1e-3) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
