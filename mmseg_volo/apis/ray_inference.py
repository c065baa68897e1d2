"""Inference in several processes on one or more machines, through Ray Data."""

import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .._device import resolve_device
from .._extras import require
from ..config import load_config
from ..errors import UserError
from .inference import Wanted, segment_files
from .predictor import Predictor, Undecodable

LOCAL = 'local'  # address of a cluster that exists for this run only
BATCH = 16  # files: what a worker that dies has to do again
BLOCKS = 10_000  # at most so many batches, which Ray keeps track of one by one
DEATHS = 5  # of the worker of one batch; then its pictures are to blame
STORE = 200 * 2**20  # bytes of shared memory for what workers and driver exchange: names
PATIENCE = 10.0  # seconds in which an address must answer
SKIPPED, INCOMPLETE, FATAL = 'skipped', 'incomplete', 'fatal'


@dataclass(frozen=True)
class Setup:
    """What each worker needs to build its model and write results."""

    config: str
    cfg_options: dict
    checkpoint: str
    device: str
    tta: bool
    amp: bool
    compile: bool
    void_below: float
    out: str
    wanted: Wanted


class Worker:
    """A model in a process of its own. Mistakes of the user travel to the driver as text."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.mistake = ''
        try:
            cfg = load_config(setup.config, setup.cfg_options)
            device = resolve_device(setup.device)
            more = (setup.tta, setup.amp, setup.compile, setup.void_below)
            self.predictor = Predictor(cfg, setup.checkpoint, device, *more)
        except UserError as error:
            self.mistake = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Segment files and write their results; returns for each what is missing, and why."""
        outputs = {os.fsdecode(path): os.fsdecode(name) for path, name in zip(batch['path'], batch['name'], strict=True)}
        done: list[tuple[str, str]] = []
        if not self.mistake:
            try:
                for _, problem in segment_files(outputs, self.setup.out, self.predictor, self.setup.wanted):
                    kind = SKIPPED if isinstance(problem, Undecodable) else INCOMPLETE if problem else ''
                    done.append((kind, str(problem or '')))
            except OSError as error:
                self.mistake = f'cannot write to {self.setup.out} ({error.strerror}); files written before are complete'
            except UserError as error:
                self.mistake = str(error)
        done += [(FATAL, self.mistake)] * (len(outputs) - len(done))
        return dict(path=list(batch['path']), kind=[kind for kind, _ in done], text=[text for _, text in done])


def segment_on_ray(
    outputs: dict[str, str], setup: Setup, address: str, workers: int | None
) -> Iterator[tuple[str, Undecodable | str | None]]:
    """Yield each file in order when its results are written, and the reason if they are missing or incomplete.

    A worker or machine that dies is replaced, and its batch is segmented again: files are written under their names
    only when they are whole, so nothing is lost or doubled.

    Args:
        outputs: paths or URLs, as every machine sees them, and names of their results.
        address: ``'local'`` for a cluster of this run's own, or that of a running one. A Ray that this process has
            started before is used, and left running.
        workers: number of models; by default 2 locally, and one per GPU or, without any, one per CPU of a cluster.

    Raises:
        UserError: Ray is missing or does not answer, the workers cannot be had, die again and again, or report a
            mistake.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, address, workers)
    try:
        count, gpus = _pool(ray, setup.device, workers if workers or address != LOCAL else 2)
        yield from _rows(ray, outputs, setup, count, gpus)
    finally:
        if started:
            ray.shutdown()


def _rows(
    ray: ModuleType, outputs: dict[str, str], setup: Setup, workers: int, gpus: int
) -> Iterator[tuple[str, Undecodable | str | None]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    size = max(1, min(BATCH, len(outputs) // (4 * workers)), len(outputs) // BLOCKS)
    files = [dict(path=os.fsencode(path), name=os.fsencode(name)) for path, name in outputs.items()]
    done = ray.data.from_items(files, override_num_blocks=-(-len(files) // size)).map_batches(
        Worker,
        fn_constructor_args=(setup,),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=0 if gpus else 1,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=DEATHS,
    )
    try:
        for row in done.iter_rows():
            if row['kind'] == FATAL:
                raise UserError(row['text'])
            problem = Undecodable(row['text']) if row['kind'] == SKIPPED else row['text'] or None
            yield os.fsdecode(row['path']), problem
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise UserError(
            f'workers died {DEATHS + 1} times on the same files, perhaps for lack of memory; fewer --workers need less '
            f'of it, and --resume keeps what is finished ({reason})'
        ) from None


def _ray() -> ModuleType:
    """Ray with Ray Data, which sends nothing home."""
    os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
    ray = require('ray', 'ray', '--ray')
    require('ray.data', 'ray', '--ray')
    logging.getLogger('ray.data').setLevel(logging.ERROR)
    return ray


def _connect(ray: ModuleType, address: str, workers: int | None) -> None:
    quiet = dict(logging_level=logging.ERROR, log_to_driver=False)
    if address == LOCAL:
        ray.init(LOCAL, num_cpus=workers or 2, object_store_memory=STORE, include_dashboard=False, **quiet)
        return
    host, _, port = address.removeprefix('ray://').rpartition(':')
    if not host or not port.isdecimal():
        raise UserError(f'--ray takes HOST:PORT of a cluster, or nothing for one of its own, got {address!r}')
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
        ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f'no Ray cluster answers at {address} ({_first_line(error)})') from None


def _pool(ray: ModuleType, device: str, workers: int | None) -> tuple[int, int]:
    """Number of workers, and of GPUs for each."""
    resources: dict[str, Any] = ray.cluster_resources()
    gpus = int(device != 'cpu' and resources.get('GPU', 0) >= 1)
    kind = 'GPU' if gpus else 'CPU'
    room = int(resources.get(kind, 0))
    if (workers or 1) > room:
        raise UserError(f'--workers {workers or 1} need a {kind} each, and the Ray cluster has {room}')
    return workers or room, gpus


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0]
