"""Tables of classes: names, and their colours or ids, from a file or the command line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...checkpoints.wording import printable
from ...errors import UserError

LARGEST = 2**20  # bytes
MOST = 256  # classes
_NAME_OF_TABLE = re.compile(r'(label|class|colou?r|palette|codes|categor)[^/]*\.(txt|csv)$', re.IGNORECASE)
_COLOUR = re.compile(r'(?<![\w.])(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})(?![\w.])')


@dataclass
class ClassTable:
    """Names of classes in their order.

    Args:
        names: the names.
        source: where they are from, for messages.
        colours: RGB by name, if the table has colours.
        numbers: id by name, if the table has ids.
    """

    names: list[str]
    source: str
    colours: dict[str, list[int]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)


def read_table(path: Path) -> ClassTable:
    """Read a table with a class per line.

    Lines are ``NAME``, ``ID NAME``, ``R G B NAME``, ``NAME,R,G,B`` or CVAT's ``NAME:R,G,B:PARTS:ACTIONS``; commas,
    semicolons, colons and spaces separate. Empty lines, lines that begin with # and a header are left out.

    Raises:
        UserError: the file cannot be read so.
    """
    try:
        content = path.read_bytes()[: LARGEST + 1].decode('utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read as a table of classes ({error})') from None
    lines = [line for line in content.splitlines() if line.strip() and not line.lstrip().startswith('#')]
    rows = [_row(line) for line in lines[: MOST + 2]]
    if len(rows) > 1 and any(row[1] for row in rows[1:]) and not rows[0][1]:
        rows = rows[1:]  # a header
    names = [name for name, _ in rows]
    kinds = {len(numbers) for _, numbers in rows}
    if len(content) > LARGEST or not names or len(kinds) != 1 or not all(names) or len(names) > MOST:
        raise UserError(f'{path} is no table of classes: each line must be a name, with or without R G B or an id')
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise UserError(f'{path} has the class {twice[0]!r} twice')
    if kinds == {1}:
        names = [name for name, _ in sorted(rows, key=lambda row: row[1])]
        if len({number for _, (number,) in rows}) < len(rows):
            raise UserError(f'{path} gives one id to two classes')
    table = ClassTable(names, str(path))
    if kinds == {3}:
        table.colours = dict(rows)
    elif kinds == {1}:
        table.numbers = {name: numbers[0] for name, numbers in rows}
    return table


def _row(line: str) -> tuple[str, list[int]]:
    """Name and numbers of a line."""
    colour = _COLOUR.search(line)
    if colour and all(int(value) < 256 for value in colour.groups()):
        rest = line[: colour.start()].strip(' \t,;:') or line[colour.end() :]
        name, numbers = rest.partition(':')[0], [int(value) for value in colour.groups()]
    elif first := re.match(r'\s*(\d{1,3})\s*[\s,;:]\s*(\S.*)', line):
        name, numbers = first[2], [int(first[1])]
    elif last := re.match(r'(.*\S)\s*[,;]\s*(\d{1,3})\s*$', line):
        name, numbers = last[1], [int(last[2])]
    else:
        name, numbers = line, []
    return printable(name.strip(' \t,;:"\'')), numbers


def classes_from(words: Sequence[str]) -> ClassTable:
    """The table of ``--classes``: a file, or the names themselves."""
    if len(words) == 1 and (Path(words[0]).is_file() or re.search(r'[/.]', words[0])):
        if not Path(words[0]).is_file():
            raise UserError(f'no file {words[0]} for --classes, which takes a file or names')
        return read_table(Path(words[0]))
    twice = [name for i, name in enumerate(words) if name in words[:i]]
    if twice:
        raise UserError(f'--classes has {twice[0]!r} twice')
    return ClassTable(list(words), '--classes')


def find_table(folder: Path, files: Sequence[str], colours: bool) -> ClassTable | None:
    """The table of classes among the files of a folder, such as ``label_colors.txt``; one with colours if asked for."""
    tables = []
    for file in files:
        if _NAME_OF_TABLE.search(file):
            try:
                tables.append(read_table(folder / file))
            except UserError:
                continue  # some other text
    fitting = [table for table in tables if bool(table.colours) or not colours]
    return min(fitting, key=lambda table: (not table.colours, table.source.count('/')), default=None)
