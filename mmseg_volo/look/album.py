"""The pictures of a folder: segmented one at a time, those that somebody waits for first, and ranked by confidence."""

import json
import os
import threading
import time
import traceback
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from .._files import whole
from ..apis.inference import decode
from ..apis.predictor import Picture, Predictor, Undecodable
from ..models.confidence import CERTAIN

CACHED = 2**28  # bytes of compressed results in memory
WAITING = 8  # requests that may wait for the model
DROPPED = 4  # pictures that were dropped on the page and are kept
MOST_PIXELS = 2**27
SIDE = 4096  # longest side of a view
SAVED_EVERY = 20  # seconds


class Busy(Exception):
    """Too many requests wait for the model, or the command is ending."""


@dataclass
class Entry:
    """A picture with its mean confidence from 0 to 1, or the reason that it has none, and its size (H, W) once known.

    ``version`` changes when the file does.
    """

    path: str
    name: str
    confidence: float | None = None
    problem: str | None = None
    size: tuple[int, int] | None = None
    version: Sequence[int] = ()


class Result(NamedTuple):
    """Size (H, W) of a picture, and its labels and confidence, uint8 ``[H, W]``, compressed by zlib."""

    size: tuple[int, int]
    labels: bytes
    confidence: bytes

    def bytes(self) -> int:
        return len(self.labels) + len(self.confidence)


class Album:
    """Pictures by number, with their results.

    One thread runs the model: for requests first, and in between for the mean confidence of every picture.

    Args:
        predictor: the model.
        pictures: paths by name.
        ranking: JSON file for the mean confidences, so that the next run need not compute them again.
        model: identifies the model in that file.
    """

    def __init__(self, predictor: Predictor, pictures: Mapping[str, str], ranking: Path, model: str):
        self.predictor, self._ranking, self._model = predictor, ranking, model
        self.entries = {i: Entry(path, name) for i, (name, path) in enumerate(pictures.items())}
        self.count = len(self.entries)
        self.ranked: list[int] = []  # in the order of computation
        self._asked: SimpleQueue[tuple[int, Entry, Future] | None] = SimpleQueue()
        self._results: dict[int, Result] = {}
        self._viewed: tuple[int, Any] = -1, None  # decoding 100 megapixels takes a second
        # A second Ctrl-C may interrupt the handler of the first one, which holds the lock.
        self._asking, self._viewing = threading.RLock(), threading.Lock()
        self._ending = threading.Event()
        self._dropped = TemporaryDirectory(prefix='mmseg-volo-look-')
        self._worker = threading.Thread(target=self._work, name='model')
        self._hook = predictor.model.backbone.register_forward_pre_hook(self._stop_model)
        self._recall()

    def start(self) -> None:
        """Start ranking and answering."""
        self._worker.start()

    def end(self) -> None:
        """Refuse further requests, and stop the model at its next window."""
        with self._asking:
            self._ending.set()
            self._asked.put(None)

    def close(self) -> None:
        """Wait until the model has stopped, and forget dropped pictures."""
        self.end()
        self._worker.join()
        self._hook.remove()
        self._dropped.cleanup()

    def result(self, number: int) -> Result:
        """Labels and confidence of a picture; raises ``Undecodable`` or ``Busy``."""
        known = self._results.get(number)
        if known is not None:
            return known
        answer: Future[Result] = Future()
        with self._asking:
            if self._ending.is_set() or self._asked.qsize() >= WAITING:
                raise Busy
            self._asked.put((number, self.entries[number], answer))
        return answer.result()

    def view(self, number: int, left: int, top: int, width: int, height: int) -> bytes:
        """Part of a picture as a JPEG of at most ``SIDE`` pixels a side; raises ``Undecodable``."""
        with self._viewing:  # one decoded picture in memory
            if self._viewed[0] != number:
                self._viewed = -1, None
                self._viewed = number, self._decode(number, self.entries[number])
            part = self._viewed[1][top : top + height, left : left + width]
            if part.size == 0:
                raise Undecodable('the picture ends before this part')
            scale = SIDE / max(part.shape[:2])
            if scale < 1:
                size = [max(1, round(side * scale)) for side in part.shape[1::-1]]
                part = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
            return cv2.imencode('.jpg', part, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()

    def drop(self, content: bytes, name: str) -> int:
        """Add a picture that is not in the folder, and forget the oldest if there are many; return its number."""
        with self._asking:
            number = len(self.entries)
            path = Path(self._dropped.name, str(number))
            path.write_bytes(content)
            self.entries[number] = Entry(str(path), name)
            if number >= self.count + DROPPED:
                path.with_name(str(number - DROPPED)).unlink()
        return number

    def _work(self) -> None:
        unranked = deque(number for number, entry in self.entries.items() if entry.confidence is None)
        saved = time.monotonic()
        while not self._ending.is_set():
            try:
                asked = self._asked.get(block=not unranked)
            except Empty:
                number = unranked.popleft()
                asked = number, self.entries[number], Future()
            if asked is not None:
                self._answer(*asked)
            if time.monotonic() > saved + SAVED_EVERY:
                self._remember()
                saved = time.monotonic()
        self._remember()
        while not self._asked.empty():
            if (left := self._asked.get()) is not None:
                left[2].set_exception(Busy())

    def _answer(self, number: int, entry: Entry, answer: Future) -> None:
        new, problem = entry.confidence is None and entry.problem is None, None
        try:
            answer.set_result(self._results.get(number) or self._compute(number, entry))
        except Busy as error:
            answer.set_exception(error)
            return
        except Undecodable as error:
            problem = str(error)
        except Exception:  # out of memory, or a defect: the other pictures go on
            traceback.print_exc()
            problem = f'{entry.name}: the model failed; the terminal shows why'
        entry.problem = problem
        if problem:
            answer.set_exception(Undecodable(problem))
        if new and number < self.count:
            self.ranked.append(number)

    def _compute(self, number: int, entry: Entry) -> Result:
        [picture] = self.predictor.predict([Picture(entry.name, '', self._decode(number, entry))], confidence=True)
        if picture.problem:
            raise picture.problem
        confidence = cv2.convertScaleAbs(picture.confidence, alpha=255 / CERTAIN)
        entry.confidence, entry.size = float(confidence.mean() / 255), picture.label.shape
        result = Result(picture.label.shape, *(zlib.compress(plane, 1) for plane in (picture.label, confidence)))
        self._results[number] = result
        while len(self._results) > 1 and sum(map(Result.bytes, self._results.values())) > CACHED:
            del self._results[next(iter(self._results))]
        return result

    def _decode(self, number: int, entry: Entry) -> np.ndarray:
        try:
            with Image.open(entry.path) as picture:
                pixels = picture.width * picture.height
        except Image.DecompressionBombError:
            pixels = MOST_PIXELS + 1
        except Exception:  # decoders raise various types
            if number >= self.count:  # dropped: what Pillow does not know is not given to another decoder
                if not os.path.exists(entry.path):
                    raise Undecodable(f'{entry.name} is forgotten: {DROPPED} pictures were dropped after it') from None
                raise Undecodable(f'{entry.name} cannot be decoded as an image') from None
            pixels = 0
        if pixels > MOST_PIXELS:
            raise Undecodable(f'{entry.name} has more than {MOST_PIXELS:,} pixels')
        try:
            return decode(entry.path)
        except Undecodable as error:
            raise Undecodable(str(error).replace(entry.path, entry.name)) from None

    def _stop_model(self, *_: object) -> None:
        if self._ending.is_set():
            raise Busy

    def _recall(self) -> None:
        try:
            earlier = json.loads(self._ranking.read_text())
            known = earlier['confidence'] if earlier['model'] == self._model else {}
        except (OSError, ValueError, TypeError, LookupError):  # no file, or not as it was written
            known = {}
        for number, entry in self.entries.items():
            status = os.stat(entry.path)
            entry.version = [status.st_mtime_ns, status.st_size]
            version, confidence = known.get(entry.name, (None, None))
            if version == entry.version:
                entry.confidence = confidence
                self.ranked.append(number)

    def _remember(self) -> None:
        known = {
            e.name: (e.version, e.confidence) for e in self.entries.values() if e.version and e.confidence is not None
        }
        try:
            with whole(self._ranking) as partial:
                partial.write_text(json.dumps(dict(model=self._model, confidence=known)))
        except OSError as error:
            print(f'warning: cannot write {self._ranking} ({error.strerror}); the next run will rank again')
