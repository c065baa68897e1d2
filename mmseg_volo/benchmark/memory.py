"""Memory of a call."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .timing import _lines


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Peak memory that ``run`` adds; on a CPU this includes the scratch memory of torch's libraries."""
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    before = _status_bytes('VmRSS')
    run()
    return _status_bytes('VmHWM') - before


class LiveMemory(TorchDispatchMode):
    """Track tensors created inside the context."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id for id, _ in map(_storage, tree_flatten((args, kwargs))[0])}
        result = func(*args, **(kwargs or {}))
        for key, tensor in map(_storage, tree_flatten(result)[0]):
            if key is not None and key not in given and key not in self.storages:
                storage = tensor.untyped_storage()
                self.storages[key] = StorageWeakRef(storage), storage.nbytes()
        return result

    def live(self) -> int:
        """Bytes of the tensors that are still alive."""
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        return sum(size for _, size in self.storages.values())


def _storage(x: object) -> tuple[int | None, object]:
    return (x.untyped_storage()._cdata if isinstance(x, Tensor) else None), x


def _status_bytes(field: str) -> int:
    return next(int(line.split()[1]) for line in _lines('/proc/self/status') if line.startswith(field)) * 1024
