"""Inference in several processes on one or more machines, through Ray Data."""

import logging
import os
import socket
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .._extras import require
from .._files import partial_file
from .._storage import is_url
from ..errors import UserError
from .inference import Results, Wanted, is_video, make_predictor, segment_files
from .predictor import Undecodable
from .sources import Model

LOCAL = 'local'  # address of a cluster that exists for this run only
BATCH = 16  # files: what a worker that dies has to do again
BLOCKS = 10_000  # at most so many batches, which Ray keeps track of one by one
DEATHS = 5  # of workers at the same batch, or per worker before any model is ready; Ray itself would go on for ever
STORE = 200 * 2**20  # bytes of shared memory for what workers and driver exchange: names
PATIENCE = 10.0  # seconds in which an address must answer
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # an empty frame of settings, with which HTTP/2 begins on both sides
MODEL = 'the model'  # what a worker begins before any batch
SKIPPED, INCOMPLETE, FATAL = 'skipped', 'incomplete', 'fatal'


@dataclass(frozen=True)
class Setup:
    """What each worker needs to build its model and write results."""

    model: Model
    config: str
    device: str
    tta: bool
    amp: bool
    compile: bool
    void_below: float
    out: str
    wanted: Wanted


def attempts_type() -> type:
    """A class that counts what workers begin, in a process that outlives them."""

    class Attempts:  # in a function, or else its process would import torch to find it, in 0.5 GiB
        def __init__(self) -> None:
            self.counts = Counter[str]()

        def begin(self, what: str) -> int:
            """How often this was begun, now included."""
            self.counts[what] += 1
            return self.counts[what]

        def forget(self, what: str) -> None:
            """Count from 0 again."""
            self.counts.pop(what, None)

    return Attempts


class Worker:
    """A model in a process of its own. Mistakes of the user travel to the driver as text.

    Args:
        attempts: handle of an ``attempts_type()`` that all workers share, or None if nobody restarts this worker.
        workers: number of workers that begin at once.
    """

    def __init__(self, setup: Setup, attempts: Any = None, workers: int = 1):
        self.setup, self.attempts = setup, attempts
        self.mistake = ''
        if self._is_hopeless(MODEL, workers):
            return
        try:
            more = (setup.device, setup.tta, setup.amp, setup.compile, setup.void_below)
            self.predictor = make_predictor(setup.model, setup.config, *more)
            if attempts is not None:
                attempts.forget.remote(MODEL)
        except UserError as error:
            self.mistake = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Segment files and write their results; returns for each what is missing, and why."""
        outputs = {
            os.fsdecode(path): os.fsdecode(name) for path, name in zip(batch['path'], batch['name'], strict=True)
        }
        done: list[tuple[str, str]] = []
        if not self.mistake and not self._is_hopeless(next(iter(outputs))):
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

    def _is_hopeless(self, what: str, workers: int = 1) -> bool:
        """Whether workers have died of this too often, which is then the mistake."""
        if self.attempts is None:
            return False
        import ray

        if hopeless := ray.get(self.attempts.begin.remote(what)) > (DEATHS + 1) * workers:
            self.mistake = (
                f'workers died again and again at {what}, perhaps for lack of memory: fewer --workers need less, '
                'and --resume keeps what is finished'
            )
        return hopeless


def segment_on_ray(outputs: dict[str, str], setup: Setup, address: str, workers: int | None) -> Results:
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
    if ':' in setup.device:
        raise UserError(f'--ray gives each worker a GPU of its own: use --device cuda, got {setup.device}')
    weights = os.path.expanduser(setup.model.checkpoint)
    if os.path.exists(weights):  # workers may run in another folder
        setup = replace(setup, model=replace(setup.model, checkpoint=os.path.abspath(weights)))
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, address, workers)
    unfinished = dict(outputs)
    try:
        count, gpus = _pool(ray, setup.device, workers if workers or address != LOCAL else 2)
        for path, problem in _rows(ray, outputs, setup, count, gpus):
            del unfinished[path]
            yield path, problem
    finally:
        if started:
            ray.shutdown()
        if not is_url(setup.out):  # workers that were stopped may have left partial files
            for path, name in unfinished.items():
                for result in setup.wanted.paths(name, is_video(path)):
                    partial_file(Path(setup.out, result)).unlink(missing_ok=True)


def _rows(ray: ModuleType, outputs: dict[str, str], setup: Setup, workers: int, gpus: int) -> Results:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    size = max(1, min(BATCH, len(outputs) // (4 * workers)), len(outputs) // BLOCKS)
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(attempts_type()).remote()
    files = [dict(path=os.fsencode(path), name=os.fsencode(name)) for path, name in outputs.items()]
    done = ray.data.from_items(files, override_num_blocks=-(-len(files) // size)).map_batches(
        Worker,
        fn_constructor_args=(setup, attempts, workers),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=0 if gpus else 1,
        num_gpus=gpus,
    )
    for row in done.iter_rows():
        if row['kind'] == FATAL:
            raise UserError(row['text'])
        problem = Undecodable(row['text']) if row['kind'] == SKIPPED else row['text'] or None
        yield os.fsdecode(row['path']), problem


def _ray() -> ModuleType:
    """Ray with Ray Data, which sends nothing home."""
    os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
    os.environ.setdefault('RAY_BACKEND_LOG_LEVEL', 'fatal')
    ray = require('ray', 'ray', '--ray')
    require('ray.data', 'ray', '--ray')
    logging.getLogger('ray.data').setLevel(logging.ERROR)
    return ray


def _connect(ray: ModuleType, address: str, workers: int | None) -> None:
    quiet = dict(logging_level=logging.ERROR, log_to_driver=False)
    if address == LOCAL:
        ray.init(LOCAL, num_cpus=workers or 2, object_store_memory=STORE, include_dashboard=False, **quiet)
        return
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal():
        raise UserError(f'--ray takes HOST:PORT of a cluster, or nothing for one of its own, got {address!r}')
    try:
        _check_answers(host, int(port))
        ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f'no Ray cluster answers at {address} ({_first_line(error)})') from None


def _check_answers(host: str, port: int) -> None:
    """Raise ``OSError`` unless something answers as gRPC, which Ray speaks, does; Ray itself would wait for minutes."""
    if os.environ.get('RAY_USE_TLS', '0') != '0':
        return
    with socket.create_connection((host, port), PATIENCE) as connection:
        connection.sendall(b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n' + SETTINGS)
        if connection.recv(len(SETTINGS))[3:4] != SETTINGS[3:4]:
            raise OSError('another service uses this port')


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
