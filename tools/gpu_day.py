#!/usr/bin/env python
"""Run in one call what the documentation still calls "not run" for want of a GPU, and collect what it prints.

Each part is a command of this project in a process of its own. What it printed goes to a file, and all of it to
gpu_day.md. A second call goes on with the parts that are missing, and with a training where it stopped.
``--device cpu`` runs the same parts at small sizes, as a rehearsal.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ('torch', 'triton', 'timm', 'onedl-mmcv', 'onedl-mmengine', 'onedl-mmsegmentation')
MINUTES = 40  # of all parts together
TABLES = {  # with seconds
    'backbone': ('operator forward train-step memory', 250),
    'segmentor': ('segmentor', 150),
    'recipes': ('segmentor-memory', 150),
    'attention': ('biased-attention', 120),
}
TABLES_ON_CPU = {'backbone': ('operator', 250)}
ON_CAMVID = {'volo_d1_camvid': 8000, 'resnet50_camvid': 8000, 'swin_t_camvid': 8000, 'coatnet_nano_rw_camvid': 4000}


@dataclass(frozen=True)
class Part:
    """A command to run.

    Args:
        name: names its file.
        words: the arguments of Python.
        seconds: it is stopped after as many; what it has printed until then is kept.
        after: name of a part that must have succeeded.
        resumes: the next call continues it if it was stopped.
    """

    name: str
    words: tuple[str, ...]
    seconds: int
    after: str | None = None
    resumes: bool = False


def command(line: str) -> tuple[str, ...]:
    """Python's arguments for a command of ``mmseg-volo`` from this clone."""
    return ('-m', 'mmseg_volo_cli', *shlex.split(line))


def parts(device: str, data: str | None, out: Path) -> list[Part]:
    """The parts in the order in which they are wanted.

    Args:
        data: CamVid's folder; without it no model is trained on it.
        out: folder for checkpoints.
    """
    small = device == 'cpu'
    tests = 'tests/test_outlook.py -k float64' if small else '-m gpu tests/test_outlook_triton.py tests/test_on_gpu.py'
    sizes = '512' if small else '2048 8192'
    profiled = ['volo_tiny_camvid'] if small else ['volo_d4_cityscapes', 'volo_d5_cityscapes']
    folder = shlex.quote(str(out))
    return [
        Part('tests', ('-m', 'pytest', '-q', *tests.split()), 200),
        *(
            Part(
                f'benchmark_{name}',
                command(f'benchmark --quick --device {device} --tables {tables} --out {folder}/{name}.json'),
                seconds,
            )
            for name, (tables, seconds) in (TABLES_ON_CPU if small else TABLES).items()
        ),
        *(
            Part(f'profile_{config}', command(f'profile-step {config} --device {device} --images 4'), 90)
            for config in profiled
        ),
        Part('sliding', command(f'benchmark-sliding volo_tiny_toy_streets --device {device} --sizes {sizes}'), 60),
        *([] if small else [Part('kernels', ('tools/time_outlook.py',), 120)]),
        *_switches(small, folder),
        *(_inference(data, folder) if data and not small else ()),
        *(part for config in (ON_CAMVID if data and not small else ()) for part in _training(config, data, folder)),
    ]


def _switches(small: bool, folder: str) -> Iterator[Part]:
    """Short trainings with each switch, and a comparison of ``--deterministic`` runs bit by bit."""
    yield Part('toy_streets', command(f'toy-streets {folder}/toy_streets --train 16 --val 4'), 60)
    iterations = 2 if small else 100
    options = (
        f'data_root={folder}/toy_streets train_cfg.max_iters={iterations} train_cfg.val_interval={iterations} '
        f'param_scheduler.0.end=1 param_scheduler.1.begin=1 param_scheduler.1.end={iterations} '
        'default_hooks.logger.interval=1'
    )
    switches = {'plain': '', 'deterministic': '--deterministic'}
    if not small:
        switches |= {'amp': '--amp', 'compile': '--compile'}
    for name, switch in switches.items():
        line = f'train volo_tiny_toy_streets --seed 0 {switch} --work-dir {folder}/{name} --cfg-options {options}'
        yield Part(f'train_{name}', command(line), 120, after='toy_streets')
    yield Part('same_seed', ('tests/soak/same_seed.py', '--short'), 90)


def _inference(data: str, folder: str) -> Iterator[Part]:
    pictures = shlex.quote(f'{data}/images/test')
    switches = {'cpu': '--device cpu', 'batch_1': '--cfg-options model.test_cfg.batch_size=1', 'plain': ''}
    for name, switch in (switches | {'amp': '--amp', 'compile': '--compile'}).items():
        line = f'infer volo_tiny_camvid {pictures} --save labels --out-dir {folder}/infer_{name} {switch}'
        yield Part(f'infer_{name}', command(line), 60)


def _training(config: str, data: str, folder: str) -> Iterator[Part]:
    options = f'--work-dir {folder}/{config} --cfg-options data_root={shlex.quote(data)}'
    checkpoint = f'{folder}/{config}/iter_{ON_CAMVID[config]}.pth'
    yield Part(f'train_{config}', command(f'train {config} --amp --seed 0 --resume {options}'), 1200, resumes=True)
    test = f'test {config} {checkpoint} --out-dir {folder}/{config} {options}'
    yield Part(f'test_{config}', command(test), 60, after=f'train_{config}')


def run(part: Part, out: Path, seconds: float) -> dict:
    """Run a part for ``seconds`` at most; returns its exit status, 'stopped' or 'failed to start', and its time."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    environment = {**os.environ, 'PYTHONPATH': path, 'PYTHONWARNINGS': 'ignore'}
    with (out / f'{part.name}.txt').open('w') as file:
        process = subprocess.Popen(
            [sys.executable, *part.words],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = 'stopped'
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)  # training saves a checkpoint
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    return dict(status=status, seconds=round(time.monotonic() - start, 1))


def page(chosen: list[Part], done: dict[str, dict], out: Path, device: str) -> str:
    """What every part printed, as Markdown with date and versions."""
    versions = ', '.join(f'{name} {_version(name)}' for name in PACKAGES)
    lines = [
        f'# {datetime.date.today()}: {_device_name(device)}',
        '',
        f'Python {platform.python_version()}, {versions}',
        '',
    ]
    lines += ['| part | status | seconds |', '|---|---|---|']
    lines += [
        f'| {part.name} | {done[part.name]["status"]} | {done[part.name]["seconds"]} |'
        for part in chosen
        if part.name in done
    ]
    for part in chosen:
        if part.name in done:
            printed = (out / f'{part.name}.txt').read_text(errors='replace').rstrip()
            lines += [
                '',
                f'## {part.name}',
                '',
                f'`python {" ".join(part.words)}`',
                '',
                '```',
                printed[-20_000:],
                '```',
            ]
    return '\n'.join(lines) + '\n'


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed'


def _device_name(device: str) -> str:
    if device == 'cpu':
        return f'{platform.machine()} CPU (rehearsal at small sizes)'
    import torch

    return torch.cuda.get_device_name()


def main() -> int:
    """Run what is missing, and return 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('out', type=Path, help='folder for what the parts print, their checkpoints and gpu_day.md')
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda', help='(default: %(default)s)')
    parser.add_argument(
        '--data', metavar='DIR', help="CamVid's folder, as in docs/data.md; without it, nothing is trained on it"
    )
    parser.add_argument('--minutes', type=float, default=MINUTES, help='time for all parts (default: %(default)s)')
    parser.add_argument('--only', nargs='+', metavar='PART', help='run these parts only')
    args = parser.parse_args()
    if args.device == 'cuda':
        import torch

        if not torch.cuda.is_available():
            parser.exit(2, 'error: PyTorch finds no GPU; --device cpu rehearses the parts at small sizes\n')
    out = args.out.resolve()
    chosen = parts(args.device, args.data and str(Path(args.data).resolve()), out)
    unknown = sorted({*(args.only or ())} - {part.name for part in chosen})
    if unknown:
        parser.exit(2, f'error: no part named {unknown[0]}; choose from {", ".join(part.name for part in chosen)}\n')
    out.mkdir(parents=True, exist_ok=True)
    record = out / 'done.json'
    done = json.loads(record.read_text()) if record.exists() else {}
    end = time.monotonic() + 60 * args.minutes
    for part in chosen:
        if part.name in done or (args.only and part.name not in args.only):
            continue
        if part.after and done.get(part.after, {}).get('status') != 0:
            print(f'{part.name} has to wait for {part.after}')
            continue
        left = end - time.monotonic()
        if left < 1:
            print('no time left; the same command goes on here')
            break
        print(f'{part.name} ...', end=' ', flush=True)
        result = run(part, out, min(part.seconds, left))
        print(f'{result["status"]} after {result["seconds"]} s', flush=True)
        if result['status'] == 'stopped' and (part.resumes or result['seconds'] < part.seconds):
            continue  # the next call runs it again
        done[part.name] = result
        record.write_text(json.dumps(done, indent=2))
        (out / 'gpu_day.md').write_text(page(chosen, done, out, args.device))
    return int(any(result['status'] not in (0, 'stopped') for result in done.values()))


if __name__ == '__main__':
    sys.exit(main())
