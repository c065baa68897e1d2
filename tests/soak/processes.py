"""Compare two processes with one on a CPU, and kill some; --short skips FSDP2, Slurm and mistakes.

All runs use float64, five validation images, which two processes cannot share equally, augmentation and clipping.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import CONFIG, Report, arguments, toy_place

from mmseg_volo.checkpoints.reading import read_checkpoint
from mmseg_volo.config import SPLITS

ROOT = Path(__file__).parents[2]
IN_FLOAT64 = ROOT / 'tests/soak/float64.py'
STEPS, FIRST_SAVED, BATCH = 5, 2, 4
DIFFERENCE, SECONDS_TO_END, PATIENCE = 1e-10, 60, 600
OPTIONS = [
    *(f'{split}_dataloader.num_workers=0' for split in SPLITS),
    *(f'{split}_dataloader.persistent_workers=False' for split in SPLITS),
    'model.decode_head.dropout_ratio=0',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.max_keep_ckpts=-1',
    'data_root=toy',
]


def add_difference(report: Report, what: str, ours: Path, reference: Path) -> None:
    """Add a row with the largest difference between the weights and running statistics of two checkpoints."""
    one, other = (read_checkpoint(path)['state_dict'] for path in (reference, ours))
    assert one.keys() == other.keys()
    largest = max(float((one[key].double() - other[key].double()).abs().max()) for key in one)
    report.row(f'{what}: largest difference of a weight', f'{largest:.1e}', f'{DIFFERENCE:g}', largest <= DIFFERENCE)


def training(processes: int, work_dir: str, steps: int = STEPS, save_every: int = STEPS) -> list[str]:
    """Arguments of tools/train.py for the same total batch with any number of processes."""
    return [
        *(CONFIG, '--seed', '0', '--work-dir', work_dir),
        *(['--launcher', 'pytorch'] if processes > 1 else []),
        *('--cfg-options', *OPTIONS),
        f'train_dataloader.batch_size={BATCH // processes}',
        f'train_cfg.max_iters={steps}',
        f'train_cfg.val_interval={steps}',
        f'default_hooks.checkpoint.interval={save_every}',
    ]


def measuring(processes: int, out: str) -> list[str]:
    """Arguments of tools/test.py."""
    launcher = ['--launcher', 'pytorch'] if processes > 1 else []
    return [CONFIG, f'one/iter_{STEPS}.pth', '--out-dir', out, *launcher, '--cfg-options', *OPTIONS]


def start(folder: Path, log: str, *command: object, **environment: str) -> subprocess.Popen:
    """Start a command whose output goes to ``<log>.log``."""
    with (folder / f'{log}.log').open('w') as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', **environment},
        )


def finish(folder: Path, **processes: subprocess.Popen) -> None:
    """Wait for processes that must succeed; print the log of one that fails."""
    for log, process in processes.items():
        if process.wait(PATIENCE):
            sys.exit(f'{(folder / f"{log}.log").read_text()}\n{log} ended with status {process.returncode}')


def torchrun(*options: str) -> list[str]:
    return ['-m', 'torch.distributed.run', *options]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def wait_for(what: Callable[[], object], run: subprocess.Popen, log: Path) -> object:
    """First true result of ``what`` while the process runs."""
    while not (result := what()):
        if run.poll() is not None:
            sys.exit(f'{log.read_text()}\nended too early, with status {run.returncode}')
        time.sleep(0.05)
    return result


def process_of_rank(rank: int, launcher: subprocess.Popen) -> int | None:
    """Id of the process with this rank, which torchrun started."""
    children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
    for child in children:
        try:
            if f'RANK={rank}' in Path(f'/proc/{child}/environ').read_text().split('\0'):
                return int(child)
        except FileNotFoundError:  # it ended in the meantime
            continue
    return None


def two_nodes_equal_one_process(folder: Path, report: Report) -> None:
    """Weights after some steps, validation, and the test of one checkpoint."""
    one = start(
        folder, 'one', IN_FLOAT64, 'train', *training(1, 'one', save_every=1), '+', 'test', *measuring(1, 'measured1')
    )
    finish(folder, one=one)
    rendezvous = f'127.0.0.1:{free_port()}'
    nodes = {
        f'node{i}': start(
            folder,
            f'node{i}',
            *torchrun('--nnodes', '2', '--node-rank', str(i), '--nproc-per-node', '1', '--rdzv-id', 'soak'),
            *('--rdzv-backend', 'c10d', '--rdzv-endpoint', rendezvous),
            *(IN_FLOAT64, 'train', *training(2, 'two'), '+', 'test', *measuring(2, 'measured2')),
        )
        for i in range(2)
    }
    finish(folder, **nodes)
    what = f'2 rendezvous clients, {STEPS} steps'
    add_difference(report, what, folder / f'two/iter_{STEPS}.pth', folder / f'one/iter_{STEPS}.pth')
    scores = [validation(folder / work_dir) for work_dir in ('one', 'two')]
    equal = scores[0] == scores[1]
    report.row('their validation of 5 images', f'mIoU {scores[1]["mIoU"]:.2f}', f'{scores[0]["mIoU"]:.2f}', equal)
    for name in ('metrics.json', 'per_image.csv', 'confusion.png', 'bootstrap.npz'):
        contents = [(folder / out / name).read_bytes() for out in ('measured1', 'measured2')]
        if name == 'metrics.json':
            contents = [{**json.loads(content), 'date': None} for content in contents]
        same = contents[0] == contents[1]
        report.row(f'their test of 5 images: {name}', 'same' if same else 'differs', 'same', same)


def validation(work_dir: Path) -> dict:
    """Scores of the last validation."""
    lines = max(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    scores = json.loads(lines[-1])
    return {key: scores[key] for key in ('mIoU', 'mAcc', 'aAcc')}


def a_dead_process_is_replaced_and_then_ends_the_run(folder: Path, report: Report) -> None:
    """torchrun may restart once, and rank 1 is killed twice."""
    run = start(
        folder,
        'elastic',
        *torchrun('--standalone', '--nproc-per-node', '2', '--max-restarts', '1'),
        *(IN_FLOAT64, 'train', *training(2, 'elastic_work', steps=1000, save_every=1), '--resume'),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1',
    )
    saved, log = folder / 'elastic_work', folder / 'elastic.log'
    wait_for((saved / f'iter_{FIRST_SAVED}.pth').exists, run, log)
    first = process_of_rank(1, run)
    os.kill(first, signal.SIGKILL)
    wait_for((saved / f'iter_{STEPS}.pth').exists, run, log)
    second = process_of_rank(1, run)
    os.kill(second, signal.SIGKILL)
    begin = time.monotonic()
    status = run.wait(PATIENCE)
    seconds = time.monotonic() - begin
    output = log.read_text()
    add_difference(
        report,
        f'rank 1 killed, torchrun restarts, {STEPS} steps',
        saved / f'iter_{STEPS}.pth',
        folder / f'one/iter_{STEPS}.pth',
    )
    report.row('resumed from a checkpoint', output.count('resuming from'), 1, output.count('resuming from') == 1)
    report.row('rank 1 killed again: s to the end', f'{seconds:.1f}', SECONDS_TO_END, seconds <= SECONDS_TO_END)
    report.row('    exit status', status, 'not 0', status != 0)
    cause = output.rpartition('Root Cause')[2]
    named = 'rank      : 1' in cause and 'SIGKILL' in cause
    report.row('    rank and reason', 'rank 1, SIGKILL' if named else 'not named', 'named', named)
    ours = output.count('mmseg_volo_cli/__init__.py", line')
    report.row('    tracebacks of ours', ours, 0, ours == 0)


def shares_equal_the_whole(folder: Path, report: Report) -> None:
    """Train with FSDP2 and activation checkpointing, resume without FSDP2 for a step, and then with FSDP2 again."""
    sharded = ['runner_type=ShardedRunner', 'model.backbone.with_cp=True']
    parts = [training(2, 'sharded_work', steps=steps, save_every=steps) for steps in (2, 3, STEPS)]
    run = start(
        folder,
        'sharded',
        *torchrun('--standalone', '--nproc-per-node', '2'),
        *(IN_FLOAT64, 'train', *parts[0], *sharded),
        *('+', 'train', *parts[1], '--resume'),
        *('+', 'train', *parts[2], *sharded, '--resume'),
    )
    finish(folder, sharded=run)
    what = f'FSDP2 with activation checkpointing, plain, FSDP2 again, {STEPS} steps'
    add_difference(report, what, folder / f'sharded_work/iter_{STEPS}.pth', folder / f'one/iter_{STEPS}.pth')


def slurm_equals_torchrun(folder: Path, report: Report) -> None:
    """Two processes that find each other through Slurm's environment variables."""
    variables = dict(
        SLURM_NTASKS='2', SLURM_NODELIST='localhost', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port())
    )
    arguments = ['slurm' if word == 'pytorch' else word for word in training(2, 'slurm_work')]
    tasks = {
        f'task{i}': start(
            folder, f'task{i}', IN_FLOAT64, 'train', *arguments, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **variables
        )
        for i in range(2)
    }
    finish(folder, **tasks)
    add_difference(
        report,
        f'2 Slurm tasks, {STEPS} steps',
        folder / f'slurm_work/iter_{STEPS}.pth',
        folder / f'one/iter_{STEPS}.pth',
    )
    silent = 'Iter(train)' not in (folder / 'task1.log').read_text()
    report.row('only rank 0 prints', 'yes' if silent else 'no', 'yes', silent)


def a_mistake_is_one_sentence(folder: Path, report: Report) -> None:
    """A mistake that all processes report, and a mistake that only one process meets."""
    shutil.copytree(folder / 'toy', folder / 'broken')
    last = sorted((folder / 'broken').glob('gtFine/val/*/*_labelTrainIds.png'))[1]  # read by rank 1 of 2
    last.write_bytes(b'no PNG')
    for what, mistake in {
        'a wrong option': ['model.decode_head.channels=many'],
        'a broken label, found by rank 0': ['data_root=broken'],
    }.items():
        run = start(
            folder,
            'mistake',
            *torchrun('--standalone', '--nproc-per-node', '2'),
            *(ROOT / 'tools/train.py', *training(2, 'mistaken'), *mistake),
        )
        status = run.wait(PATIENCE)
        log = (folder / 'mistake.log').read_text()
        sentences = [line for line in log.splitlines() if line.startswith('error: ')]
        good = status != 0 and len(sentences) == 1 and 'train.py", line' not in log
        report.row(f'{what}: sentences', len(sentences), 1, good)
        print(*sentences, sep='\n')


def main() -> None:
    args = arguments(__doc__)
    report = Report('several processes')
    with toy_place(train=9) as folder:
        two_nodes_equal_one_process(folder, report)
        a_dead_process_is_replaced_and_then_ends_the_run(folder, report)
        if not args.short:
            shares_equal_the_whole(folder, report)
            slurm_equals_torchrun(folder, report)
            a_mistake_is_one_sentence(folder, report)
    report.finish()


if __name__ == '__main__':
    main()
