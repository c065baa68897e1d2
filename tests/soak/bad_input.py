#!/usr/bin/env python
"""Run the tools with thousands of bad inputs: tests/soak/bad_input.py --short

Hypothesis draws the cases and shrinks those that fail. Each case runs in its own fork, so that a crash or a hang ends
only that case. The exit status is 1 if a case ends neither successfully nor with one sentence.
"""

import argparse
import ast
import contextlib
import gc
import http.client
import io
import json
import multiprocessing
import os
import random
import re
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, reduce
from inspect import signature
from operator import getitem
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image
from prettytable import PrettyTable
from tqdm import tqdm

from mmseg_volo import VOLO
from mmseg_volo.config import load_config
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo_cli import main as run_command

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/volo_tiny_toy_streets.py'
LIMIT = 120  # seconds for one case, on two slow cores beside others
MEMORY = 3 * 2**30  # address space in addition to the parent's, so that a huge number does not exhaust the machine
TRIES = 20  # runs that may shrink a failing case
BATCH = 20  # cases of one draw, which ends at its first difference
DATA, CHECKPOINT = 'data', 'random.pth'  # in a case's folder, as links

SMALL = {  # a run that ends before its first iteration, and starts fast
    'data_root': DATA,
    'train_cfg.max_iters': 0,
    'test_dataloader.dataset.pipeline.1.scale': '(128,64)',
    'vis_backends': '[]',
    **{f'{split}_dataloader.num_workers': 0 for split in ('train', 'val', 'test')},
    **{f'{split}_dataloader.persistent_workers': False for split in ('train', 'val', 'test')},
}


# Damaged bytes, and unusual pictures.

damages = st.one_of(
    st.just(('none',)),
    st.tuples(st.just('cut'), st.floats(0, 1)),
    st.tuples(st.just('flip'), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=8)),
    st.tuples(st.just('noise after'), st.integers(0, 32), st.binary(max_size=64)),
    st.tuples(st.just('append'), st.binary(min_size=1, max_size=64)),
)


def damaged(content: bytes, damage: tuple) -> bytes:
    """``content`` with the damage that ``damages`` describes."""
    kind, *how = damage
    if kind == 'cut':
        return content[: int(how[0] * len(content))]
    if kind == 'flip' and content:
        content = bytearray(content)
        for place, mask in how[0]:
            content[min(int(place * len(content)), len(content) - 1)] ^= mask
        return bytes(content)
    if kind == 'noise after':
        return content[: how[0]] + how[1]
    return content + how[0] if kind == 'append' else content


MODES = ['RGB', 'L', 'LA', 'RGBA', 'P', '1', 'I', 'I;16', 'F', 'CMYK', 'YCbCr', 'PA']
FORMATS = ['PNG', 'JPEG', 'BMP', 'WEBP', 'TIFF', 'PPM', 'GIF', 'JPEG2000', 'AVIF', 'animated PNG', 'animated WEBP']
FORMATS += ['animated GIF', 'MP4', 'AVI']
SIZES = [(64, 48), (1, 1), (1, 2), (2, 1), (7, 31), (64, 48), (1, 3000), (30000, 1), (1, 30000), (30000, 9)]
IMAGE_SUFFIXES = ['.png', '.jpg', '.bmp', '.webp', '.tif', '.ppm', '.gif', '.mp4', '.avi', '.PNG', '', '.txt']
stems = st.one_of(
    st.sampled_from(
        ['a', 'b c', 'ä', '道', 'new\nline', '-x', '[a]', '*', '%s', '.a', '\udcff', 'x' * 240, "'", '{0}']
    ),
    st.text(st.characters(exclude_characters='/\0', exclude_categories=['Cs']), min_size=1, max_size=12),
)


@cache
def encoded(kind: str, mode: str, size: tuple[int, int], orientation: int) -> bytes:
    """An image or a video in the given format; formats without ``mode`` get the nearest mode."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    if kind in ('MP4', 'AVI'):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, f'film.{kind.lower()}'))
            writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*('mp4v' if kind == 'MP4' else 'MJPG')), 10, (64, 48))
            for frame in range(3):
                writer.write(np.full((48, 64, 3), 60 * frame, np.uint8))
            writer.release()
            return Path(path).read_bytes()
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == 'I;16' else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = dict(exif=exif.tobytes()) if orientation else {}
    if kind.startswith('animated '):
        kind = kind.removeprefix('animated ')
        more |= dict(save_all=True, append_images=[image.rotate(180)])
    for candidate in (image, image.convert('L'), image.convert('RGB')):
        try:
            candidate.save(out := io.BytesIO(), format=kind, **more)
            return out.getvalue()
        except Exception:  # each format raises another error for a mode that it cannot store
            continue
    return b''


pictures = st.tuples(
    st.sampled_from(FORMATS), st.sampled_from(MODES), st.sampled_from(SIZES), st.sampled_from([0, 0, 3, 5, 6, 9, 65535])
)
odd_things = st.sampled_from(['folder', 'fifo', 'broken link', 'link to itself', 'unreadable', 'missing', 'empty'])
files = st.tuples(stems, st.sampled_from(IMAGE_SUFFIXES), st.one_of(st.tuples(pictures, damages), odd_things))


def put(path: Path, content: tuple | str) -> None:
    """Create what ``content``, drawn from ``files``, describes: a file, a folder, a link or a pipe."""
    if content == 'folder':
        path.mkdir()
    elif content == 'fifo':
        os.mkfifo(path)
    elif content in ('broken link', 'link to itself'):
        path.symlink_to(path if content == 'link to itself' else 'nowhere')
    elif content in ('unreadable', 'empty'):
        path.touch(mode=0 if content == 'unreadable' else 0o644)
    elif content != 'missing':
        path.write_bytes(damaged(encoded(*content[0]), content[1]))


# Each function draws a case and turns it into a tool and its arguments, in the case's own folder.


def options(more: dict | None = None) -> list[str]:
    """SMALL and further options as command-line arguments."""
    return ['--cfg-options', *(f'{key}={value}' for key, value in {**SMALL, **(more or {})}.items())]


images_cases = st.tuples(
    st.lists(files, min_size=1, max_size=12, unique_by=lambda file: file[0] + file[1]),
    st.sampled_from([['labels', 'overlay']] * 4 + [['overlay', 'prob'], ['labels']]),
    st.booleans(),
)


def images(case: tuple) -> tuple[str, list]:
    """Files for tools/infer.py, given by name or as a folder."""
    inputs, save, as_folder = case
    Path('in').mkdir()
    for stem, suffix, content in inputs:
        with contextlib.suppress(FileExistsError, OSError):  # '.', '..', or too long a name for the file system
            put(Path('in', stem + suffix), content)
    names = [f'in/{stem}{suffix}' for stem, suffix, _ in inputs]
    if as_folder:
        names = ['in']
    elif len(names) > 2:  # a single missing file would be enough to refuse all of them
        names = [name for name in names if os.path.isfile(name)] or ['in']
    return 'infer', [CONFIG, CHECKPOINT, *names, '--save', *save, *options()]


label_changes = st.one_of(
    st.tuples(st.just('picture'), st.sampled_from(['PNG'] * 3 + FORMATS), st.sampled_from(MODES), st.booleans()),
    st.tuples(st.just('id'), st.integers(0, 255), st.integers(1, 400)),
    st.tuples(st.just('damage'), damages),
    st.tuples(st.just('odd'), odd_things),
)
labels_cases = st.tuples(
    st.lists(
        st.tuples(st.sampled_from(['leftImg8bit', 'gtFine', 'gtFine']), st.integers(0, 2), label_changes),
        min_size=1,
        max_size=3,
        unique_by=lambda change: change[:2],
    ),
    st.sampled_from(['check-data'] * 5 + ['train']),
)


def labels(case: tuple) -> tuple[str, list]:
    """Damaged labels and images of a data set for tools/check_data.py and tools/train.py."""
    changes, tool = case
    paths = sorted(path.relative_to(DATA) for path in Path(DATA).rglob('*.png') if 'labelIds' not in path.name)
    for path in paths:
        Path('in', path).parent.mkdir(parents=True, exist_ok=True)
        Path('in', path).symlink_to(Path(DATA, path).resolve())
    for kind, index, (change, *how) in changes:
        path = [Path('in', path) for path in paths if path.parts[0] == kind][index]
        pixels = np.array(Image.open(path))
        content = path.read_bytes()
        path.unlink()
        if change == 'picture':
            size = (64, 48) if how[2] else (31, 57)
            path.write_bytes(encoded(how[0], how[1], size, 0))
        elif change == 'id':
            pixels.reshape(-1)[: how[1]] = how[0]
            Image.fromarray(pixels).save(path)
        elif change == 'damage':
            path.write_bytes(damaged(content, how[0]))
        else:
            put(path, how[0])
    work_dir = ['--work-dir', 'work'] if tool == 'train' else []
    return tool, [CONFIG, *work_dir, *options({'data_root': 'in'})]


VALUES = ['None', '-1', '0', '1', '1.5', 'nan', '-inf', '1e9', '9' * 30, 'True', '', 'abc', 'é', 'a.b', '[]', '{}']
VALUES += ['()', '(0,0)', '(-1,5)', '[None]', '[1,2,3,4,5]', "['a']", '[[[]]]', "{'type':'VOLO'}", "{'a':1}", 'dict(']
VALUES += ['[1,', 'VOLO', 'ReLU', '../up', '/dev/null', '~', 'x' * 300, '%s', '{0}', '0x10', '1_000', "'", '"', '\\']
VALUES += ['\n', ' ']
ONLY_WRONG = ['None', '-1', '1.5', 'nan', 'abc', '[]', '{}', '']  # values that would take long or start many processes


@cache
def keys() -> list[str]:
    """Every key of the config, at any depth."""

    def inside(value: object, path: str) -> list[str]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        found = [key for name, item in items for key in inside(item, f'{path}.{name}' if path else str(name))]
        return found + ([path] if path else [])

    return sorted(inside(load_config(str(CONFIG), {}).to_dict(), ''))


@st.composite
def one_option(draw: Callable) -> tuple[str, str]:
    """A key that the config has, or almost has, and a value that rarely fits."""
    backbone = [f'model.backbone.{name}' for name in signature(VOLO).parameters]
    key = draw(st.one_of(st.sampled_from(keys()), st.sampled_from(backbone), st.sampled_from(['a', 'model.a', 'a.b'])))
    key += draw(st.sampled_from([''] * 9 + ['.x', '.0', '._delete_', '.']))
    slow = ('num_workers', 'max_iters', 'interval', 'prefetch_factor')
    return key, draw(st.sampled_from(ONLY_WRONG if any(word in key for word in slow) else VALUES))


options_cases = st.tuples(
    st.sampled_from(['train', 'train', 'check-data', 'infer']), st.lists(one_option(), min_size=1, max_size=3)
)


def with_config(tool: str, config: Path | str, changes: dict) -> tuple[str, list]:
    """The tool with sound data and a sound image, and a config that may be broken."""
    more = {'train': ['--work-dir', 'work'], 'check-data': [], 'infer': [CHECKPOINT, 'picture.png']}[tool]
    return tool, [config, *more, *options(changes)]


def config_options(case: tuple) -> tuple[str, list]:
    """--cfg-options for train, check_data and infer."""
    tool, changes = case
    return with_config(tool, CONFIG, dict(changes))


LINES = """\
1/0
raise SystemExit(0)
import nowhere
_base_ = ['nowhere.py']
_base_ = ['config.py']
x = (
model = None
del model
train_dataloader = 3
custom_imports = dict(imports=['nowhere'])
default_scope = 'nowhere'
e = '\\ud800'
""".splitlines()
config_files_cases = st.tuples(
    st.sampled_from(['train', 'check-data', 'infer']),
    st.sampled_from(['config.py'] * 9 + ['a b.py', 'é.py', '1.2.py', 'config.json', 'config.yaml', 'config.txt']),
    st.one_of(
        st.tuples(st.just('damage'), damages),
        st.tuples(st.just('without'), st.lists(st.deferred(lambda: st.sampled_from(keys())), min_size=1, max_size=2)),
        st.tuples(st.just('lines'), st.floats(0, 1), st.lists(st.sampled_from(LINES), max_size=2), st.integers(0, 3)),
        odd_things.map(lambda thing: ('odd', thing)),
    ),
)


def config_text(without: list[str] = ()) -> str:
    """The config as one classic config file, without some of its keys."""
    small = {key: ast.literal_eval(str(value)) for key, value in SMALL.items() if key != 'data_root'}
    tree = load_config(str(CONFIG), small).to_dict()
    for key in without:
        *parents, last = (int(name) if name.isdigit() else name for name in key.split('.'))
        with contextlib.suppress(LookupError):  # removed with a key above it
            del reduce(getitem, parents, tree)[last]
    return "custom_imports = dict(imports=['mmseg_volo'])\n" + Config(tree).pretty_text


def config_files(case: tuple) -> tuple[str, list]:
    """Damaged config files for train, check_data and infer."""
    tool, name, (kind, *how) = case
    if kind == 'odd':
        put(Path(name), how[0])
    elif kind == 'without':
        Path(name).write_text(config_text(*how))
    elif kind == 'damage':
        Path(name).write_bytes(damaged(config_text().encode(), how[0]))
    else:
        lines = config_text().splitlines()
        first = int(how[0] * len(lines))
        lines[first : first + how[2]] = how[1]
        Path(name).write_text('\n'.join(lines))
    return with_config(tool, name, {})


checkpoints_cases = st.tuples(st.sampled_from(['infer'] * 3 + ['test', 'train']), damages)


def checkpoints(case: tuple) -> tuple[str, list]:
    """A damaged checkpoint for infer, test and train --resume."""
    tool, damage = case
    Path('in.pth').write_bytes(damaged(Path(CHECKPOINT).read_bytes(), damage))
    more = dict(infer=['in.pth', 'picture.png'], test=['in.pth', '--work-dir', 'work'], train=['--resume', 'in.pth'])[
        tool
    ]
    return tool, [CONFIG, *more, *(['--work-dir', 'work'] if tool == 'train' else []), *options()]


TOOLS = {  # valid arguments for a run that ends quickly
    'train': [CONFIG, '--work-dir', 'work', '--seed', '0'],
    'test': [CONFIG, CHECKPOINT, '--out-dir', 'out'],
    'infer': [CONFIG, CHECKPOINT, 'picture.png', '--opacity', '0.5', '--save', 'labels', '--device', 'cpu'],
    'check-data': [CONFIG, '--out', 'look.png', '--splits', 'val'],
    'plot': ['work', '--out', 'plot.png'],
    'toy-streets': ['toy', '--train', '1', '--val', '1', '--size', '32x32', '--seed', '0'],
    'profile-step': [CONFIG, '--device', 'tpu'],
    'benchmark-sliding': [CONFIG, '--device', 'tpu'],
    'benchmark': ['--device', 'tpu'],
    'demo': ['--out-dir', 'file/out'],
}
WORDS = ['', '-', '--', '-1', '0', 'nan', 'inf', '1e9', '9' * 25, '0x0', '-1x5', '32x', '1e3x1e3', '5000x5000', 'é']
WORDS += ['~', '.', '..', '/', '/dev/null', '/proc/x/y', 'file', 'file/out', 'empty', 'nowhere', 'x.png', 'x.jpg']
WORDS += ['a=b', '=', 'x' * 300, 'labels', 'prob', 'auto', 'cuda:9', 'train', 'pytorch', '[', '**', 'a\nb', '--help']
WORDS += ['%s', '{}', str(CONFIG)]
FLAGS = ['--work-dir', '--out', '--out-dir', '--save', '--opacity', '--tta', '--device', '--resume']
FLAGS += ['--seed', '--train', '--val', '--size', '--splits', '--show-dir', '--compare', '--format', '--cfg-options']
FLAGS += ['--amp', '--auto-scale-lr', '--batch', '--images', '--sizes', '--crop', '--stride']
FLAGS += ['--local_rank']
edits = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(['replace', 'replace', 'insert', 'delete', 'repeat']),
    st.sampled_from(WORDS + FLAGS),
)
commands_cases = st.tuples(st.sampled_from(sorted(TOOLS)), st.lists(edits, max_size=2))
QUICK = ('profile-step', 'benchmark-sliding', 'benchmark', 'demo')  # tried only with wrong arguments


def commands(case: tuple) -> tuple[str, list]:
    """A valid command line, changed in up to two places."""
    tool, changes = case
    words = list(TOOLS[tool])
    for place, edit, word in changes:
        at = int(place * (len(words) - 2 * (tool in QUICK))) if words else 0
        if edit == 'replace' and tool not in QUICK:
            words[at : at + 1] = [word]
        elif edit == 'delete' and tool not in QUICK:
            del words[at : at + 1]
        else:
            words.insert(at, words[at] if edit == 'repeat' and words else word)
    return tool, words + (options() if tool in ('train', 'test', 'infer', 'check-data') else [])


# Requests to the page of look.

texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
numbers = st.one_of(st.integers(-2, 12), st.integers(), texts)
paths = st.one_of(
    st.builds(
        '/api/pictures/{}{}{}'.format,
        numbers,
        st.sampled_from(['', '/view', '/labels', '/confidence', '/truth', '/saved', '/..']),
        st.one_of(st.just(''), st.builds('?left={}&top={}&width={}&height={}'.format, *[numbers] * 4)),
    ),
    st.sampled_from(['/', '/api/album', '/api/pictures', '/page.js', '/../server.py']),
    numbers.map('/api/ranked?since={}'.format),
    texts.map('/{}'.format),
)
bodies = st.one_of(
    st.none(),
    st.binary(max_size=100),
    st.tuples(pictures, damages).map(lambda drawn: damaged(encoded(*drawn[0]), drawn[1])),
    st.builds(lambda size, value: bytes([value]) * (size[0] * size[1]), st.sampled_from(SIZES), st.integers(0, 255)),
)
headers = st.fixed_dictionaries(
    {},
    optional={
        'X-Version': st.one_of(texts, st.just('*'), st.just('none')),
        **dict.fromkeys(('Content-Encoding', 'Content-Type', 'Host', 'Origin', 'Range', 'X-Name', 'X-Token'), texts),
    },
)
methods = st.sampled_from(['GET', 'GET', 'PUT', 'PUT', 'POST', 'POST', 'DELETE', 'HEAD', 'OPTIONS', 'PATCH'])
requests = st.tuples(paths.map(lambda path: path.replace('#', '')), methods, bodies, headers)


def ask(port: int, request: tuple, token: str) -> tuple[int, bytes]:
    """Status and body of the answer to one of ``requests``, which may replace the token and the host."""
    path, method, body, more = request
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=LIMIT)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in ({'Host': f'127.0.0.1:{port}', 'X-Token': token} | more).items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader('Content-Length', str(len(body)))
    connection.endheaders(body)
    with contextlib.closing(connection):
        answer = connection.getresponse()
        return answer.status, answer.read()


page_cases = st.tuples(
    st.lists(files, max_size=4, unique_by=lambda file: file[0] + file[1]), st.lists(requests, min_size=1, max_size=20)
)


def page(case: tuple) -> tuple[str, list]:
    """Requests to look, which shows a sound picture and others, and ends by Ctrl-C."""
    others, asked = case
    Path('in').mkdir()
    Path('in/sound.png').symlink_to(Path('picture.png').resolve())
    for stem, suffix, content in others:
        with contextlib.suppress(FileExistsError, OSError):
            put(Path('in', stem + suffix), content)

    printed = sys.stdout

    def visit() -> None:
        found = None
        while not found:
            time.sleep(0.01)
            if sys.stdout is not printed:  # ``complaint`` has redirected it
                found = re.search(rb':([0-9]+)/#token=(\S+)', sys.stdout.buffer.getvalue())
        try:
            for request in asked:
                ask(int(found[1]), request, found[2].decode())
        except Exception:  # no answer, or none that is HTTP
            traceback.print_exc()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=visit, daemon=True).start()
    return 'look', [CONFIG, CHECKPOINT, 'in', '--port', '0', *options()]


DOORS = {  # number of draws of BATCH cases with --short
    images: (images_cases, 5),
    labels: (labels_cases, 8),
    config_options: (options_cases, 28),
    config_files: (config_files_cases, 15),
    checkpoints: (checkpoints_cases, 3),
    commands: (commands_cases, 40),
    page: (page_cases, 5),
}


# Running one case, and many.


def complaint(door: Callable, case: tuple) -> tuple[str, int]:
    """What went wrong, ``'fine'`` or ``'refused: ...'``, and the number of warnings. Runs in the current folder."""
    tool, arguments = door(case)
    inputs = set(Path('.').rglob('*'))
    status, printed = 0, io.TextIOWrapper(io.BytesIO(), encoding='utf-8')
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = run_command(tool, list(map(str, arguments)))
        except SystemExit as end:
            status = end.code or 0
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f'traceback: {type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})', 0
    printed.seek(0)
    lines = printed.read().splitlines()
    errors = [line for line in lines if line.startswith('error: ')]
    warnings = sum(line.startswith('warning: ') for line in lines)
    if any(line.startswith('Traceback ') for line in lines):
        return f'traceback printed: {lines[-1]}', warnings
    if status == 2 and len(errors) != 1 or status not in (0, 1, 2):
        return f'status {status} without one sentence: {lines[-3:]}', warnings
    if status == 1 and tool not in ('infer', 'check-data'):
        return f'status 1 of {tool}', warnings
    for path in sorted(set(Path('.').rglob('*')) - inputs):
        if '.partial' in path.name or path.name.startswith('.probe'):
            return f'partial output: {path}', warnings
        if path.is_file() and path.suffix in ('.png', '.json'):
            try:
                Image.open(path).load() if path.suffix == '.png' else json.loads(path.read_text())
            except Exception as error:
                return f'partial output: {path}: {error}', warnings
    return f'refused: {errors[0]}' if status == 2 else 'fine', warnings


def run_alone(door: Callable, case: tuple, place: Path) -> tuple[str, int]:
    """Run ``complaint`` in a fork, which may crash or hang."""
    with tempfile.TemporaryDirectory(prefix='bad_input_') as folder:
        end, other_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()  # so that its children can be ended with it
            os.chdir(folder)
            for path in place.iterdir():
                Path(path.name).symlink_to(path)
            Path('file').touch()
            Path('empty').mkdir()
            nowhere = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):  # decoders write to it directly
                os.dup2(nowhere, descriptor)
            used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            try:
                answer = json.dumps(complaint(door, case))
            except BaseException:
                answer = json.dumps([f'the soak test itself: {traceback.format_exc()}', 0])
            os.write(other_end, answer.encode())
            os._exit(0)
        os.close(other_end)
        try:
            ready = select.select([end], [], [], LIMIT)[0]
            answer = os.read(end, 65536) if ready else b''
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            os.close(end)
    if answer:
        return tuple(json.loads(answer))
    return (f'crash: signal {os.WTERMSIG(status)}' if ready else f'hang: no end after {LIMIT} s'), 0


def draw(door: Callable, number: int, place: Path) -> tuple[Counter, str | None]:
    """Run up to BATCH cases; stop at the first failure and shrink it."""
    seen, counts, failed, tries = {}, Counter(), None, TRIES

    @seed(number)
    @settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(DOORS[door][0])
    def ends_well(case):
        nonlocal failed, tries
        name = repr(case)
        if name not in seen:
            tries -= failed is not None
            if tries < 0:
                return
            seen[name], warnings = run_alone(door, case, place)
            if seen[name].startswith('hang'):
                tries = 0  # each would take the same time
            if failed is None:
                counts.update(cases=len(case[0]) if door is images else 1, warnings=warnings)
                counts[seen[name].split(':')[0]] += 1
        if not seen[name].startswith(('fine', 'refused')):
            failed = f'{door.__name__}, seed {number}: {name}\n  {seen[name]}'
            raise AssertionError(seen[name])

    with contextlib.suppress(AssertionError):
        ends_well()
    return counts, failed


def prepare(place: Path) -> None:
    """Toy streets, a checkpoint of random weights, a picture and a log."""
    make_toy_streets(place / DATA, 2, 1, (64, 48))
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(load_config(str(CONFIG), {}).model)
    torch.save(dict(state_dict=model.state_dict()), place / CHECKPOINT)
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(place / 'picture.png')
    log = place / 'work/1/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('{"loss": 1.0, "lr": 0.1, "step": 1}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--short', action='store_true', help='a tenth of the cases: what CI runs')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    jobs = [
        (door, args.seed * 10**6 + number)
        for door, (_, draws) in DOORS.items()
        for number in range(draws * (1 if args.short else 10))
    ]
    random.Random(args.seed).shuffle(jobs)
    totals, failures = {door: Counter() for door, _ in jobs}, []
    with (
        tempfile.TemporaryDirectory(prefix='bad_input_') as folder,
        mock.patch('yapf.yapflib.yapf_api.FormatCode', plain),
    ):
        prepare(Path(folder))
        keys()
        gc.collect()
        gc.freeze()  # mmengine runs the garbage collector for each data set; freeze what is not part of the case
        fork = multiprocessing.get_context('fork')
        with ProcessPoolExecutor(2, mp_context=fork) as pool:
            draws = [pool.submit(draw, door, number, Path(folder)) for door, number in jobs]
            for (door, _), done in zip(tqdm(jobs, 'bad input', unit='draw', disable=None), draws, strict=True):
                counts, failed = done.result()
                totals[door] += counts
                if failed:
                    failures.append(failed)
                    tqdm.write(failed)
    table = PrettyTable(['door', 'cases', 'fine', 'refused', 'warnings', 'differences'], align='r')
    table.align['door'] = 'l'
    for door, counts in totals.items():
        ended = counts['fine'] + counts['refused']
        runs = sum(number for key, number in counts.items() if key not in ('cases', 'warnings'))
        table.add_row([door.__name__, *(counts[key] for key in ('cases', 'fine', 'refused', 'warnings')), runs - ended])
    total = sum(counts['cases'] for counts in totals.values())
    print(table)
    print(f'{total} cases, {len(failures)} differences, seed {args.seed}, {time.perf_counter() - start:.0f} s')
    sys.exit(bool(failures))


def plain(text: str, **_) -> tuple[str, bool]:
    """Return config text unformatted if it is Python, because yapf takes 1.4 s."""
    ast.parse(text)
    return text, True


if __name__ == '__main__':
    main()
