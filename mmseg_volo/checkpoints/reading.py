"""Checkpoints read without running any code in them."""

import argparse
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from zipfile import ZipFile

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, get_external_models, get_mmcls_models, get_torchvision_models
from mmengine.runner.checkpoint import get_deprecated_model_names
from torch import Tensor

from ..errors import UserError
from .download import local_copy
from .wording import first_sentence, some

# mmengine's schemes that stand for a URL in one of its tables, and those that it fetches by other means.
ZOOS = {
    'torchvision': get_torchvision_models,
    'modelzoo': get_torchvision_models,
    'open-mmlab': get_external_models,
    'openmmlab': get_external_models,
    'mmcls': get_mmcls_models,
}
STORES = [r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://']
MapLocation = str | torch.device | Callable
_READ_AHEAD: dict[tuple | None, dict] = {}  # at most one: contents by file


def read_checkpoint(source: str, map_location: MapLocation = 'cpu') -> dict:
    """Contents of a checkpoint, read without running any code in it.

    Args:
        source: path to ``.safetensors`` or to anything ``torch.save`` wrote, http(s) URL, or ``timm://name``.
        map_location: as in ``torch.load``; ``.safetensors`` come to the CPU.

    Raises:
        UserError: missing, damaged, unreachable, or holding more than tensors and plain data.
    """
    try:
        path = Path(local_copy(str(source))).expanduser()
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a home that nobody has
        raise UserError(f'checkpoint not found: {source} ({first_sentence(error)})') from None
    if not found:
        raise UserError(f'checkpoint not found: {source}; docs/weights.md lists where weights come from')
    name = f'{source}, kept as {path},' if '://' in str(source) else source
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(path)
        with path.open('rb') as file:
            start = file.read(16)
        if not start.startswith((b'PK', b'\x80')):  # neither a zip archive nor a pickle
            raise ValueError(f'it starts with {start!r}')
        if start.startswith(b'PK'):
            _check_archive(path)
        with _plain_data_only():
            contents = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        if 'weights_only' not in str(error).lower() and 'Unsupported' not in str(error):
            raise UserError(f'{name} is not a checkpoint or is damaged ({first_sentence(error)})') from None
        blamed = re.search(r'(?:GLOBAL|class) ([\w.]+)', str(error))
        raise UserError(
            f'{name} is refused: it {f"asks to run {blamed[1]}" if blamed else "holds more than tensors"}, '
            'and only tensors are read; ask its author for a .safetensors file'
        ) from None
    except Exception as error:  # torch and safetensors raise a dozen kinds for a damaged file
        raise UserError(f'{name} is not a checkpoint or is damaged ({first_sentence(error)})') from None
    if not isinstance(contents, Mapping):
        raise UserError(f'{source} holds a {type(contents).__name__}, not a state dict')
    return dict(contents)


def read_ahead(path: str) -> dict:
    """``read_checkpoint`` for a file that mmengine loads next: ``load_from_plain_data`` then takes over the contents.

    A file of gigabytes is so checked and read once, before the run begins, and freed when mmengine has copied it.
    """
    contents = read_checkpoint(path)
    _READ_AHEAD.clear()
    _READ_AHEAD[_version(path)] = contents
    return contents


def _version(path: str) -> tuple | None:
    """What changes when another file takes the place of ``path``; None for a URL and the like."""
    if '://' in path or not os.path.isfile(path):
        return None
    status = os.stat(path)
    return os.path.abspath(path), status.st_mtime_ns, status.st_size, status.st_ino


def load_from_plain_data(filename: str, map_location: MapLocation | None = None) -> dict:
    """A checkpoint as mmengine wants it, for all that mmengine loads itself.

    Left out is the text of the config, because mmengine would execute it, and names of files that mmengine would delete
    on resuming, unless they are of this run: ``docs/security.md``.

    Args:
        filename: as for ``read_checkpoint``, or a name in a table of mmengine's, ``torchvision://resnet50``.
        map_location: as in ``torch.load``, but None means the CPU.

    Raises:
        UserError: as ``read_checkpoint``, and for parts of another type than mmengine's.
    """
    scheme, separator, model = filename.partition('://')
    source = _url_in_zoo(scheme, model) if separator and scheme in ZOOS else filename
    if any(re.match(store, source) for store in STORES):
        raise UserError(f'{source} cannot be checked before it is read; fetch it by hand and give its path')
    contents = _READ_AHEAD.pop(_version(source), None)
    if contents is None:
        contents = read_checkpoint(source, 'cpu' if map_location is None else map_location)
    if scheme == 'mmcls':
        return dict(state_dict=OrderedDict(backbone_tensors(contents, source)))
    for key in ('state_dict', 'ema_state_dict', 'meta', 'message_hub'):
        if key in contents and not isinstance(contents[key], dict):
            raise UserError(f'{source} holds a {type(contents[key]).__name__} as {key}, not a dict')
    for key in ('state_dict', 'ema_state_dict'):
        if key in contents:
            contents[key] = _plain_state(contents[key], source)
    if 'state_dict' not in contents:
        contents = _plain_state(contents, source)
    if 'meta' in contents:
        contents['meta'] = {key: value for key, value in contents['meta'].items() if key not in ('cfg', 'config')}
    if 'message_hub' in contents:
        contents['message_hub'] = _plain_hub(contents['message_hub'], source)
    return contents


def use_safe_loader() -> None:
    """Make ``load_from_plain_data`` mmengine's loader of checkpoints, for the whole process.

    ``load_from``, ``--resume``, ``init_model`` and ``MMSegInferencer`` then run no code from a checkpoint either.
    """
    schemes = ['', 'http://', 'https://', *(f'{zoo}://' for zoo in ZOOS), *STORES]
    CheckpointLoader.register_scheme(schemes, load_from_plain_data, force=True)


def _url_in_zoo(zoo: str, model: str) -> str:
    if 'mmlab' in zoo:
        model = get_deprecated_model_names().get(model, model)
    urls = ZOOS[zoo]()
    if model not in urls:
        raise UserError(f'mmengine knows no {zoo}://{model}; it knows {some(sorted(urls))}')
    return urls[model]


def _plain_state(state: Mapping, source: str) -> OrderedDict:
    """``state`` without attributes of its own, which mmengine would call."""
    strange = [key for key, value in state.items() if not isinstance(key, str) or _is_empty_shell(value)]
    if strange:
        raise UserError(f'{source} holds what is no plain tensor with a name: {some([str(key) for key in strange])}')
    return OrderedDict(state)


def _plain_hub(hub: Mapping, source: str) -> dict:
    parts = {key: hub.get(key) for key in ('log_scalars', 'runtime_info', 'resumed_keys')}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise UserError(f"{source} holds a message hub that is not mmengine's")
    folder = Path(source).expanduser().resolve().parent
    info = parts['runtime_info']
    return parts | {'runtime_info': {key: info[key] for key in info if not _commands(key, info[key], folder)}}


def _commands(key: str, value: object, folder: Path) -> bool:
    """Whether mmengine would execute this entry of a message hub, or delete a file by it that is not of the run."""
    if key == 'cfg':
        return True
    if str(key).startswith('best_ckpt'):
        path = Path(str(value)).resolve()
        return path.parent != folder or not re.fullmatch(r'best_.+\.pth', path.name)
    if key == 'keep_ckpt_ids':
        return not isinstance(value, list) or not all(type(step) is int for step in value)
    if key == 'outdated_checkpoints':
        return not isinstance(value, list) or not all(re.fullmatch(r'[^/]+\.pth', str(name)) for name in value)
    return False


def backbone_tensors(contents: Mapping, source: str) -> dict[str, Tensor]:
    """Unwrap the state dict and strip ``module.`` and ``backbone.``."""
    for key in ('state_dict_ema', 'state_dict', 'model'):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
            break
    state = state_tensors(contents)
    if any(key.startswith('backbone.') for key in state):
        state = {key.removeprefix('backbone.'): value for key, value in state.items() if key.startswith('backbone.')}
    if not state:
        raise UserError(f'{source} holds no tensors')
    return state


def state_tensors(contents: Mapping) -> dict[str, Tensor]:
    return {
        key.removeprefix('module.'): value
        for key, value in contents.items()
        if isinstance(key, str) and isinstance(value, Tensor) and not _is_empty_shell(value)
    }


def _is_empty_shell(value: object) -> bool:
    """Whether ``value`` is a tensor that is no array of numbers in memory, and that models cannot copy."""
    return isinstance(value, Tensor) and (
        value.layout is not torch.strided or value.is_meta or value.is_quantized or value.is_nested
    )


def _check_archive(path: Path) -> None:
    """Raise if a zip archive would unpack to more than its size, or has a changed byte; torch looks at neither."""
    with ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise ValueError('it unpacks to more than its size, which torch.save never writes')
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f'the checksum of {damaged} is wrong')


# What checkpoints of timm and mmengine hold beside tensors, by the names in the file. Nothing of NumPy, argparse and
# mmengine takes part in reading: their own __setstate__ believes what it is given, down to addresses and methods.


class _Dtype:
    """A numpy.dtype of numbers."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not re.fullmatch(r'[biufc]\d+', code):
            raise UnpicklingError(f'Unsupported dtype {code!r}')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """A numpy.ndarray of numbers; saved again, it is an ordinary one."""

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
    """The data of an array without numbers."""
    return b''


class _Buffer:
    """A HistoryBuffer; the statistics it brings are dropped, for mmengine would make them those of all buffers."""

    def __setstate__(self, state: dict):
        values, counts = state['_log_history'], state['_count_history']
        if not (isinstance(values, _Array) and isinstance(counts, _Array) and isinstance(state['max_length'], int)):
            raise UnpicklingError('Unsupported HistoryBuffer')
        self.__class__ = HistoryBuffer
        self.__init__(values, counts, state['max_length'])


def _method(owner: type, name: str) -> None:
    """The statistics of a HistoryBuffer, which are methods."""
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
READING = threading.Lock()  # torch's list of safe types belongs to the process


@contextmanager
def _plain_data_only() -> Iterator[None]:
    """Make ``PLAIN_DATA`` all that torch takes beside tensors, and put back afterwards what others allowed it."""
    with READING:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(PLAIN_DATA)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)
