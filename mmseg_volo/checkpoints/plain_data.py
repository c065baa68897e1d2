"""The data besides tensors that a checkpoint may contain."""

import argparse
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

# Stand-ins for the classes that checkpoints of timm and mmengine name. The classes of NumPy, argparse and mmengine are
# not used for reading, because their __setstate__ trusts its arguments, even addresses and methods.


class _Dtype:
    """A numeric numpy.dtype."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not re.fullmatch(r'[biufc]\d+', code):
            raise UnpicklingError(f'Unsupported dtype {code!r}')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """A numeric numpy.ndarray, pickled as an ordinary one."""

    def __new__(cls, *_):
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple):
        _, shape, kind, by_columns, raw = state
        if not isinstance(kind, _Dtype) or not isinstance(raw, bytes):
            raise UnpicklingError('Unsupported array of objects')
        checked = np.frombuffer(raw, kind.dtype).reshape(shape, order='F' if by_columns else 'C')
        super().__setstate__(checked.__reduce__()[2])

    def __reduce_ex__(self, protocol: int):
        return np.asarray(self).__reduce_ex__(protocol)


def _number(kind: _Dtype, raw: bytes) -> np.generic:
    """A NumPy scalar."""
    if not isinstance(kind, _Dtype):
        raise UnpicklingError(f'Unsupported scalar of {type(kind).__name__}')
    (number,) = np.frombuffer(raw, kind.dtype)
    return number


def _no_bytes() -> bytes:
    """The data of an empty array."""
    return b''


class _Buffer:
    """A HistoryBuffer without its statistics functions, which mmengine would install for all buffers."""

    def __setstate__(self, state: dict):
        values, counts = state['_log_history'], state['_count_history']
        if not (isinstance(values, _Array) and isinstance(counts, _Array) and isinstance(state['max_length'], int)):
            raise UnpicklingError('Unsupported HistoryBuffer')
        self.__class__ = HistoryBuffer
        self.__init__(values, counts, state['max_length'])


def _method(owner: type, name: str) -> None:
    """A statistics function of a HistoryBuffer, which pickle stores as a ``getattr``."""
    if owner is not _Buffer or name.startswith('_'):
        raise UnpicklingError(f'Unsupported getattr({owner!r}, {name!r})')


class _Settings:
    """An argparse.Namespace without special methods, which ``copy.deepcopy`` would call."""

    def __setstate__(self, state: dict):
        self.__class__ = argparse.Namespace
        self.__dict__.update({name: value for name, value in state.items() if not name.startswith('__')})


PLAIN_DATA = [
    (_Dtype, 'numpy.dtype'),
    (_Array, 'numpy.ndarray'),
    (_Array, 'numpy._core.multiarray._reconstruct'),
    (_Array, 'numpy.core.multiarray._reconstruct'),
    (_number, 'numpy._core.multiarray.scalar'),
    (_number, 'numpy.core.multiarray.scalar'),
    (_no_bytes, 'builtins.bytes'),
    (_Buffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_method, 'builtins.getattr'),
    (_Settings, 'argparse.Namespace'),
]
READING = threading.Lock()  # because torch's list of safe types is global


@contextmanager
def plain_data_only() -> Iterator[None]:
    """Let torch load only ``PLAIN_DATA`` besides tensors, and afterwards restore the types that others allowed."""
    with READING:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(PLAIN_DATA)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)
