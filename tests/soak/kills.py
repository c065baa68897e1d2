#!/usr/bin/env python
"""Kill and resume a short training, also while it writes; it must end with the weights of an undisturbed run."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

from common import Report, arguments, differences, kill, options, start_training, toy_place, wait
from tqdm import tqdm

from mmseg_volo._files import PARTIAL

SAVED_EVERY = 2
SHORT, LONG = (24, 5), (120, 50)  # iterations, kills


def main() -> None:
    args = arguments(__doc__)
    iterations, count = SHORT if args.short else LONG
    draw = random.Random(0)
    report = Report('kill it anywhere')
    with toy_place() as place:
        settings = dict(
            resume='auto',
            cfg_options=options(
                place,
                **{
                    'train_cfg.max_iters': iterations,
                    'train_cfg.val_interval': 3 * SAVED_EVERY,
                    'default_hooks.checkpoint.interval': SAVED_EVERY,
                    'custom_hooks': [dict(type='EMAHook', momentum=0.1)],
                    'model.backbone.drop_path_rate': 0.2,
                },
            ),
        )
        whole = place / 'whole'
        start = time.monotonic()
        pid = start_training(whole, seed=0, **settings)
        wait_for_writing(whole, pid)
        seconds = time.monotonic() - start
        assert wait(pid) == 0, Path(f'{whole}.log').read_text()

        kills(count, draw, report, place, settings, seconds)
        asked_to_stop(draw, report, place, settings, seconds)
        damaged(report, place, settings)
        no_space(report, place, settings)
        full_disk(report, place, settings)
    report.finish()


def kills(count, draw, report, place, settings, seconds) -> None:
    """Kill ``count`` times; a training takes ``seconds`` to its first checkpoint."""
    work_dir = place / 'killed'
    survived = in_writing = runs = 0
    found = []
    with tqdm(total=count, desc='kills') as progress:
        while survived < count:
            pid = start_training(work_dir, seed=0, **settings)
            if survived % 2:  # at any moment: during start-up, iterations or validations
                time.sleep(draw.uniform(0, 1.5 * seconds))
            else:
                wait_for_writing(work_dir, pid, files=draw.randint(1, 3))
            writing = any(work_dir.glob(f'{PARTIAL}*'))
            if kill(pid) is None:
                survived, in_writing = survived + 1, in_writing + writing
                progress.update()
            else:  # the run had finished, so start another
                found += differences(work_dir, place / 'whole')
                shutil.rmtree(work_dir)
                runs += 1
    assert wait(start_training(work_dir, seed=0, **settings)) == 0, Path(f'{work_dir}.log').read_text()
    found += differences(work_dir, place / 'whole')
    measured = f'{survived}, {in_writing} of which while a checkpoint was being written'
    report.row('survived SIGKILLs at random moments', measured, count, survived == count)
    report.row(
        f'bit differences of {runs + 1} runs from one that was never killed', '; '.join(found) or 0, 0, not found
    )


def wait_for_writing(work_dir: Path, pid: int, files: int = 1) -> None:
    """Return while the ``files``-th next file is being written, or when the training ends."""

    def writing() -> bool:
        time.sleep(0.0002)
        return any(work_dir.glob(f'{PARTIAL}*'))

    def ended() -> bool:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    for number in range(files):
        while not writing() and not ended():
            pass
        while number < files - 1 and writing() and not ended():
            pass


def asked_to_stop(draw, report, place, settings, seconds) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        work_dir = place / number.name
        pid = start_training(work_dir, seed=0, **settings)
        while not list(work_dir.glob('iter_*.pth')):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, seconds / 2))
        os.killpg(pid, number)  # to the data-loader workers, too, as a terminal does
        start = time.monotonic()
        status = wait(pid)
        took = time.monotonic() - start
        assert wait(start_training(work_dir, **settings)) == 0, Path(f'{work_dir}.log').read_text()
        found = differences(work_dir, place / 'whole')
        report.row(f'{number.name}: exit status', f'{status} after {took:.1f} s', 128 + number, status == 128 + number)
        report.row(f'{number.name}: bit differences after --resume', '; '.join(found) or 0, 0, not found)


def damaged(report, place, settings) -> None:
    work_dir = place / 'damaged'
    pid = start_training(work_dir, seed=0, **settings)
    while len(list(work_dir.glob('iter_*.pth'))) < 2 or not (work_dir / 'iter_8.pth').exists():
        time.sleep(0.01)
    kill(pid)
    newest = max(work_dir.glob('iter_*.pth'), key=lambda path: int(path.stem.split('_')[1]))
    os.truncate(newest, newest.stat().st_size // 2)
    assert wait(start_training(work_dir, seed=0, **settings)) == 0, Path(f'{work_dir}.log').read_text()
    said = f'skipped when resuming: {newest}' in Path(f'{work_dir}.log').read_text()
    found = differences(work_dir, place / 'whole')
    report.row('newest checkpoint cut in half: skipped with a warning', said, True, said)
    report.row('bit differences after --resume', '; '.join(found) or 0, 0, not found)


def no_space(report, place, settings) -> None:
    """Limit the size of files, so that writing a checkpoint fails as on a full disk. This needs no rights."""
    work_dir = place / 'limited'
    pid = start_training(work_dir, seed=0, **settings)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (2**20, 2**20))
    report_failure(report, 'files limited to 1 MiB', wait(pid, 120), work_dir)
    left = [path.name for path in work_dir.glob('*.pth')] + [path.name for path in work_dir.glob(f'{PARTIAL}*')]
    report.row('checkpoints and partial files left by it', left or 0, 0, not left)
    report_resumed(report, 'the limit was lifted', work_dir, place, settings)


def full_disk(report, place, settings) -> None:
    """Mount a file system that is too small for the run, if this user is allowed to."""
    disk = place / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=45m', 'tmpfs', str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        report.not_run('full disk', 'needs the right to mount a tmpfs; limited files are checked above')
        return
    try:
        work_dir = disk / 'full'
        report_failure(report, 'full disk', wait(start_training(work_dir, seed=0, **settings), 120), work_dir)
        subprocess.run(['mount', '-o', 'remount,size=400m', str(disk)], check=True)
        report_resumed(report, 'space was freed', work_dir, place, settings)
    finally:
        subprocess.run(['umount', '--lazy', str(disk)], check=True)  # data-loader workers may exit later


def report_failure(report, what: str, status: int | None, work_dir: Path) -> None:
    log = Path(f'{work_dir}.log').read_text()
    sentence = [line for line in log.splitlines() if line.startswith('error: ')]
    clean = status == 2 and len(sentence) == 1 and 'continue with --resume' in sentence[0] and 'Traceback' not in log
    report.row(f'{what}: one sentence, status', f'{sentence[-1:] or log[-300:]}, {status}', 2, clean)


def report_resumed(report, when: str, work_dir: Path, place: Path, settings: dict) -> None:
    settings = {'seed': 0, **settings}
    assert wait(start_training(work_dir, **settings)) == 0, Path(f'{work_dir}.log').read_text()
    found = differences(work_dir, place / 'whole')
    report.row(f'bit differences after {when}', '; '.join(found) or 0, 0, not found)


if __name__ == '__main__':
    main()
