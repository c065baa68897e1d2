"""Checkpoints read without running any code in them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from zipfile import ZipFile

import torch

from ..errors import UserError
from .download import local_file
from .plain_data import plain_data_only
from .wording import first_sentence

MapLocation = str | torch.device | Callable


def read_checkpoint(source: str, map_location: MapLocation = 'cpu') -> dict:
    """Read a checkpoint without running any code in it.

    Args:
        source: path to ``.safetensors`` or to anything ``torch.save`` wrote, http(s) URL, ``timm://name``,
            ``hf://owner/name``, or a folder that ``mmseg-volo push`` wrote.
        map_location: as in ``torch.load``; ``.safetensors`` are always read to the CPU.

    Raises:
        UserError: missing, damaged, unreachable, or contains more than tensors and plain data.
    """
    contents = read_plain_data(source, map_location)
    if not isinstance(contents, Mapping):
        raise UserError(f'{source} contains a {type(contents).__name__}, not a state dict')
    return dict(contents)


def read_plain_data(source: str, map_location: MapLocation = 'cpu') -> object:
    """Read what ``torch.save`` or safetensors wrote, such as a single tensor; see ``read_checkpoint``."""
    try:
        path = local_file(str(source))
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # the name is too long, or ~user does not exist
        raise UserError(f'checkpoint not found: {source} ({first_sentence(error)})') from None
    if not found:
        raise UserError(f'checkpoint not found: {source}; docs/weights.md lists where weights come from')
    name = f'{source}, downloaded to {path},' if '://' in str(source) else source
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
        with plain_data_only():
            contents = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        if 'weights_only' not in str(error).lower() and 'Unsupported' not in str(error):
            raise UserError(f'{name} is not a checkpoint or is damaged ({first_sentence(error)})') from None
        blamed = re.search(r'(?:GLOBAL|class) ([\w.]+)', str(error))
        if blamed and _ends_within(path, blamed[1]):
            raise UserError(f'{name} is not a checkpoint or is damaged (it ends in the middle of a name)') from None
        raise UserError(
            f'{name} is refused: it {f"asks to run {blamed[1]}" if blamed else "contains more than tensors"}, '
            'but only tensors are read; ask its author for a .safetensors file'
        ) from None
    except Exception as error:  # torch and safetensors raise a dozen kinds for a damaged file
        raise UserError(f'{name} is not a checkpoint or is damaged ({first_sentence(error)})') from None
    return contents


def _ends_within(path: Path, blamed: str) -> bool:
    """Whether the file ends in the middle of the name ``blamed``, of which torch drops the last character."""
    with path.open('rb') as file:
        file.seek(max(0, path.stat().st_size - 1000))
        last_line = file.read().rpartition(b'\n')[2]
    return blamed.endswith('.') or last_line[:-1] == blamed.rpartition('.')[2].encode()


def _check_archive(path: Path) -> None:
    """Raise ``ValueError`` if an archive unpacks to more than its size or a checksum is wrong; torch checks neither."""
    with ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise ValueError('it unpacks to more than its size, which torch.save never writes')
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f'the checksum of {damaged} is wrong')
