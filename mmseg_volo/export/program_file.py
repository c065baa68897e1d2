"""``.pt2`` files: a program of torch.export, saved and loaded.

``torch.export.load`` runs what a file tells it to: pickles, functions by name, and expressions of sizes as Python. So a
file is read by torch only if it holds what ``save`` writes: plain tensors, PyTorch's operators and arithmetic on sizes.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..checkpoints.wording import first_sentence, printable
from ..errors import UserError
from .description import KEY

_MEMBERS = re.compile(
    r'archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|extra/mmseg_volo'
    r'|data/sample_inputs/model\.pt|data/(weights|constants)/(model_\w+_config\.json|(weight|tensor)_\d+)'
)
_TENSOR = re.compile(r'(weight|tensor)_\d+')
_OPERATORS = re.compile(
    r'torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.sym_(max|min|float|ite|not)|math\.(trunc|ceil|floor)'
    r'|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|eq|ne|lt|le|gt|ge|and_|or_)'
)
_SYMBOLS = {'Symbol', 'Integer', 'Float', 'Add', 'Mul', 'Pow', 'Max', 'Min', 'FloorDiv', 'Mod', 'PythonMod', 'CeilDiv'}
_SYMBOLS |= {'IntTrueDiv', 'ToFloat', 'TruncToInt', 'FloorToInt', 'CeilToInt', 'Eq', 'Ne', 'Lt', 'Le', 'Gt', 'Ge'}
_SYMBOLS |= {'positive', 'nonnegative', 'integer', 'precision', 'True', 'False'}
_EXPRESSION = re.compile(rf"(?:\b(?:{'|'.join(_SYMBOLS)})\b|'?\b[su]\d+\b'?|'?-?\d[\d.e+-]*'?|[(),=\s-])*")


def save(program: ExportedProgram, path: Path, text: str) -> None:
    """Write a program and its description ``text``."""
    buffer = io.BytesIO()  # torch does not say which errors of a disk it meets
    torch.export.save(program, buffer, extra_files={KEY: text})
    path.write_bytes(buffer.getbuffer())


def load(path: str) -> tuple[Callable[[Tensor], Tensor], str | None]:
    """The network in a file, and its description as JSON, or None.

    Raises:
        UserError: the file is damaged, or holds more than a network.
    """
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f'the checksum of {damaged} is wrong')
            found = next(_foreign_parts(archive), None)
        if found is not None:
            raise UserError(f'{path} is refused: it contains {printable(found)}, which no exported network needs')
        texts: dict[str, str] = {KEY: ''}
        program = torch.export.load(path, extra_files=texts)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f'{path} is not a program of torch.export or is damaged ({first_sentence(error)})') from None
    # The guards of torch 2.11 compare strides and so exclude sizes that give right results.
    return program.module(check_guards=False), texts[KEY] or None


def _foreign_parts(archive: ZipFile) -> Iterator[str]:
    """What in an archive could run code, in words."""
    for name in archive.namelist():
        member = name.partition('/')[2]
        if not _MEMBERS.fullmatch(member):
            yield f'a file {name}'
        elif member.endswith('_config.json'):
            entries = json.loads(archive.read(name))['config'].values()
            yield from (
                'a pickle' for entry in entries if entry['use_pickle'] or not _TENSOR.fullmatch(entry['path_name'])
            )
        elif member == 'models/model.json':
            yield from _foreign_code(json.loads(archive.read(name)))
        elif member == 'data/sample_inputs/model.pt':
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)  # torch tries this first, and then without


def _foreign_code(part: object) -> Iterator[str]:
    if isinstance(part, list):
        for value in part:
            yield from _foreign_code(value)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key == 'target' and not (isinstance(value, str) and _OPERATORS.fullmatch(value)):
                yield f'the function {value}'
            elif key == 'expr_str' and not (isinstance(value, str) and _EXPRESSION.fullmatch(value)):
                yield f'the expression {value}'
            yield from _foreign_code(value)
