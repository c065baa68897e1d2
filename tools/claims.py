#!/usr/bin/env python
"""Check the claims of README.md and docs/: each command, config, test and version that they name exists.

Also lists figures that are older than the code they measure, by git's dates; ``--strict`` makes these an error, too.
"""

import argparse
import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mmseg_volo_cli  # noqa: E402

PAGES = sorted({*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('mmseg_volo/ops/*/README.md')})
CONFIGS = {path.stem: path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts}
COMMAND = re.compile(
    r'(?:^|\s)(?:(?:\S*python[\d.]*\s+)?tools/(\w+)\.py|\S*mmseg-volo[ \t]+(?=[a-z])|python (?=tests/soak/))(.*)'
)
PACKAGE = re.compile(
    r'(?<!before )(?<!after )\b(torch|timm|onedl-\w+|onnx|onnxruntime|openvino|Pillow|rasterio|av|ray) '
    r'(\d+(?:\.\d+)+)\b(?! or (?:newer|older))'
)
FIGURE = re.compile(r'\d ?(?:ms|s|x|%|[KMG]i?B|mIoU|images/s|min|minutes|hours|of \d+)(?![\w/-])')
WITH_CONFIG = ('train', 'test', 'infer', 'export', 'check-data', 'profile-step', 'benchmark-sliding')
# What a command measures, besides the configs that it names.
MEASURED = {
    'benchmark': ('mmseg_volo/ops', 'mmseg_volo/models', 'mmseg_volo/benchmark'),
    'benchmark-sliding': ('mmseg_volo/ops', 'mmseg_volo/models', 'mmseg_volo/benchmark/sliding.py'),
    'profile-step': ('mmseg_volo/ops', 'mmseg_volo/models', 'mmseg_volo/benchmark/step.py'),
    'train': ('mmseg_volo/ops', 'mmseg_volo/models', 'mmseg_volo/engine', 'mmseg_volo/datasets/transforms.py'),
    'test': ('mmseg_volo/models/segmentor.py', 'mmseg_volo/evaluation'),
    'demo': ('mmseg_volo/models', 'mmseg_volo/datasets/toy_streets.py', 'configs/volo_tiny_toy_streets.py'),
    'infer': ('mmseg_volo/models', 'mmseg_volo/apis/inference.py', 'mmseg_volo/apis/predictor.py'),
    'models': ('mmseg_volo/ops', 'mmseg_volo/models'),
    'configs': ('mmseg_volo/ops', 'mmseg_volo/models'),
    'tests/soak/hostile_files.py': ('mmseg_volo/checkpoints', 'tests/soak/hostile_files.py'),
    'tests/soak/hostile_rasters.py': (
        'mmseg_volo/rasters.py',
        'mmseg_volo/apis/raster.py',
        'tests/soak/hostile_rasters.py',
    ),
    'tests/soak/large_raster.py': ('mmseg_volo/rasters.py', 'mmseg_volo/apis/raster.py', 'tests/soak/large_raster.py'),
    'tests/soak/kills.py': ('mmseg_volo/checkpoints', 'mmseg_volo/engine', 'tests/soak/kills.py'),
    'tests/soak/processes.py': ('mmseg_volo/engine', 'tests/soak/processes.py'),
}


@dataclass(frozen=True)
class Command:
    """A command of ``mmseg-volo``, or one of the long tests, on a page.

    Args:
        line: number of the line on which it begins, from 1.
        text: the command as printed.
        words: its name and arguments.
    """

    line: int
    text: str
    words: tuple[str, ...]


def commands(page: str) -> Iterator[Command]:
    """Yield the commands in code blocks and code spans of a page."""
    for start, code in _code(page):
        for offset, line in enumerate(code.split('\n')):
            match = COMMAND.search(re.split(r'\s#\s|\s+\|\s|\s*&&', line.strip())[0])
            if match:
                tool, rest = match.groups()
                arguments = f'{tool.replace("_", "-")} {rest}' if tool else rest
                yield Command(start + offset, line.strip(), tuple(shlex.split(arguments.replace('$BACK', 'a=b'))))


def _code(page: str) -> Iterator[tuple[int, str]]:
    """Yield (first line, text) of each shell block and each code span; a span that is wrapped becomes one line."""
    blocks = re.compile(r'^(```|~~~)(\w*)\n(.*?)^\1', re.MULTILINE | re.DOTALL)
    for block in blocks.finditer(page):
        if block[2] in ('bash', 'console', 'sh'):
            yield page.count('\n', 0, block.start(3)) + 1, block[3].replace('\\\n', ' ')
    outside = blocks.sub(lambda block: '\n' * block[0].count('\n'), page)
    for span in re.finditer(r'`([^`]+)`', outside):
        yield outside.count('\n', 0, span.start()) + 1, ' '.join(span[1].split())


def problems(page: str) -> list[str]:
    """What a page names that does not exist, one sentence each."""
    found = []
    for name in re.findall(r'\bconfigs/([\w/]+\.py)', page):
        if not (ROOT / 'configs' / name).is_file():
            found.append(f'there is no configs/{name}')
    families = 'volo|coatnet|hvt|resnet50|swin_t|efficientnet'
    for name in re.findall(rf'`((?:{families})_\w+_?(?:camvid|cityscapes|ade20k|toy_streets)\w*)`', page):
        if name not in CONFIGS:
            found.append(f'there is no config {name}')
    for file, test in re.findall(r'\b((?:tests(?:/soak)?|tools|examples|docs)/\w+\.py)(?:::(\w+))?', page):
        if not (ROOT / file).is_file():
            found.append(f'there is no {file}')
        elif test and f'def {test}(' not in (ROOT / file).read_text():
            found.append(f'{file} has no {test}')
    for command in commands(page):
        found += _problems_of_command(command)
    return list(dict.fromkeys(found))


def _problems_of_command(command: Command) -> list[str]:
    name, *words = command.words
    if name.startswith('tests/'):
        return []  # ``problems`` looks for the file
    if name not in mmseg_volo_cli.COMMANDS and (ROOT / 'tools' / f'{name.replace("-", "_")}.py').is_file():
        return []  # a tool of this repository alone
    if name not in mmseg_volo_cli.COMMANDS:
        return [f'there is no command {name}: {command.text}']
    if not words or words[0].startswith('--') or {'...', '…'} & set(words):  # not a whole command
        unknown = [word for word in words if word.startswith('--') and word not in _option_names(name)]
        return [f'{name} has no {word}: {command.text}' for word in unknown]
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            mmseg_volo_cli.parser().parse_args(command.words)
    except SystemExit as stop:
        if stop.code:
            return [f'{command.text}: {error.getvalue().strip()}']
    config = words[0]
    is_file = config.endswith('.py') or '/' in config
    is_classifier = name == 'export' and re.search(r'_\d{3}$', config)  # whose names end with the size of their images
    is_known = config in CONFIGS or config in ('CONFIG', 'MODEL') or is_classifier
    if name in WITH_CONFIG and not (is_known or is_file or config[0] == '-'):
        return [f'there is no config {config}: {command.text}']
    return []


def _option_names(command: str) -> set[str]:
    alone = argparse.ArgumentParser()
    mmseg_volo_cli.COMMANDS[command][1](alone)
    return set(re.findall(r'--[\w-]+', alone.format_help()))


def other_versions(page: str) -> list[str]:
    """Versions on a page that are not those of constraints.txt, which the tests run with."""
    pins = dict(re.findall(r'^([\w.-]+)==([\w.]+)', (ROOT / 'constraints.txt').read_text().lower(), re.MULTILINE))
    named = sorted(set(PACKAGE.findall(page)))
    return [
        f'{package} {version} is not the {pins[package.lower()]} of constraints.txt'
        for package, version in named
        if package.lower() in pins and not f'{pins[package.lower()]}.'.startswith(f'{version}.')
    ]


def older_figures(path: Path) -> list[str]:
    """Figures beside a command whose line was last changed before the code that the command measures."""
    page = path.read_text()
    lines = page.split('\n')
    dates: list[int] = []
    found = []
    for command in commands(page):
        figures = _figures_of(lines, command)
        if not figures:
            continue
        dates = dates or _line_dates(path)
        measured = [*MEASURED.get(command.words[0], ())]
        measured += [str(CONFIGS[word].relative_to(ROOT)) for word in command.words if word in CONFIGS]
        written = min(dates[number - 1] for number in figures)
        changed = max([_date(place) for place in measured], default=0)
        if written < changed:
            days = (changed - written) / 86400
            found.append(f'line {min(figures)} is {days:.1f} days older than what it measures: {command.text[:70]}')
    return list(dict.fromkeys(found))


def _figures_of(lines: list[str], command: Command) -> list[int]:
    """Numbers of the lines with figures that a command printed: its own row, or the table that it introduces."""
    row = lines[command.line - 1]
    if row.lstrip().startswith('|'):
        return [command.line] if FIGURE.search(re.sub(r'`[^`]*`', '', row)) else []
    below = command.line
    while below < min(command.line + 4, len(lines)) and not lines[below].startswith('|'):
        below += 1
    rows = []
    while below < len(lines) and lines[below].startswith('|'):
        rows += [below + 1] if FIGURE.search(lines[below]) else []
        below += 1
    return rows


def _line_dates(path: Path) -> list[int]:
    """Seconds since 1970 at which each line was last committed."""
    blame = _git('blame', '--line-porcelain', '--', str(path.relative_to(ROOT)))
    return [int(seconds) for seconds in re.findall(r'^committer-time (\d+)$', blame, re.MULTILINE)]


_DATES: dict[str, int] = {}


def _date(place: str) -> int:
    if place not in _DATES:
        _DATES[place] = int(_git('log', '-1', '--format=%ct', '--', place) or 0)
    return _DATES[place]


def _git(*words: str) -> str:
    return subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Print what is wrong or old, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--strict', action='store_true', help='fail for old figures and other versions, too')
    strict = parser.parse_args().strict
    wrong = old = 0
    for path in PAGES:
        name, page = path.relative_to(ROOT), path.read_text()
        for problem in problems(page):
            wrong += 1
            print(f'error: {name}: {problem}')
        try:
            notes = [*other_versions(page), *older_figures(path)]
        except (OSError, subprocess.CalledProcessError):  # an archive without git's history
            notes = other_versions(page)
        for note in notes:
            old += 1
            print(f'note: {name}: {note}')
    print(f'{len(PAGES)} pages: {wrong} errors, {old} notes')
    return int(bool(wrong or (strict and old)))


if __name__ == '__main__':
    sys.exit(main())
