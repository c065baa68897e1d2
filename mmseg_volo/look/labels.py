"""True and corrected labels in the format of the config's data set."""

import hashlib
import os
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image

from .._files import whole
from ..apis.predictor import VOID
from ..config import SPLITS, first_test_set, type_name
from ..datasets.checks import LabelError, open_split
from ..errors import UserError
from ..visualization import label_png


class LabelFormat:
    """How the test data set of a config stores labels: the value in a file for each id, its colour, and file names.

    Args:
        cfg: a whole config.
        palette: a colour for each class.

    Raises:
        UserError: the data set has no value for a class or for void.
    """

    def __init__(self, cfg: Config, palette: Sequence):
        init_default_scope(cfg.get('default_scope', 'mmseg'))
        settings = first_test_set(cfg)
        steps = [step for step in settings.get('pipeline', []) if type_name(step) == 'LoadAnnotations']
        self._load = TRANSFORMS.build(steps[0] if steps else dict(type='LoadAnnotations'))
        self._dataset = DATASETS.build({**settings, 'pipeline': [], 'lazy_init': True})
        self.classes = len(palette)
        if self.classes > VOID:
            raise UserError(f'the model has {self.classes} classes; labels of at most {VOID} can be corrected')
        self._foreign = np.ones(256, bool)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'values.png')
            Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
            ids = self._load(self._info(path))['gt_seg_map'].ravel()  # of each value
        self._values = np.zeros(256, np.uint8)
        self._colours = np.zeros((256, 3), np.uint8)  # all 256: Pillow stores a short palette's pixels in few bits
        for i, colour in [*enumerate(palette), (VOID, 0)]:
            values = np.flatnonzero(ids == i)
            if len(values) == 0:
                raise UserError(f'the data set of this config has no value for id {i}, so its labels cannot be saved')
            self._foreign[i], self._values[i] = False, values[0]
            self._colours[values] = colour

    def names(self, pictures: Sequence[str]) -> list[str]:
        """Files of the labels of pictures, named as the data set does if it knows the pictures' suffix."""
        names = [self._name(picture) for picture in pictures]
        whole_names = [f'{picture}.png' for picture in pictures]
        count = Counter(names)
        chosen = [name if count[name] == 1 else other for name, other in zip(names, whole_names, strict=True)]
        return chosen if len(set(chosen)) == len(chosen) else whole_names

    def read(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, uint8 ``[H, W]``, of a picture of ``size`` (H, W); raises ``LabelError``."""
        try:
            ids = self._load(self._info(path))['gt_seg_map']
        except Exception:  # decoders raise various types
            raise LabelError('these labels cannot be read', str(path)) from None
        if ids.shape != tuple(side for side in size if side > 1):  # mmseg's loader drops the other sides
            raise LabelError('these labels differ in size from the picture', str(path))
        ids = ids.reshape(size)
        if problem := self.why_not(ids):
            raise LabelError(f'these labels do not fit the model: {problem}', str(path))
        return ids

    def write(self, path: Path, ids: np.ndarray) -> None:
        """Write ids as an indexed PNG, atomically."""
        picture = label_png(self._values[ids], self._colours.tolist())
        with whole(path) as partial:
            picture.save(partial, format='PNG')

    def why_not(self, ids: np.ndarray) -> str | None:
        """The first of the ids that is neither a class nor void."""
        foreign = ids[self._foreign[ids]]
        return (
            f'id {foreign[0]} is neither a class (0 to {self.classes - 1}) nor void ({VOID})' if foreign.size else None
        )

    def _name(self, picture: str) -> str:
        known, to = self._dataset.img_suffix, self._dataset.seg_map_suffix
        endings = [known] if isinstance(known, str) else known
        ending = next((ending for ending in endings if picture.lower().endswith(ending.lower())), None)
        if ending and to.endswith('.png'):
            return picture[: -len(ending)] + to
        return os.path.splitext(picture)[0] + '.png'

    def _info(self, path: Path) -> dict:
        stored = {key: getattr(self._dataset, key) for key in ('label_map', 'reduce_zero_label')}
        return dict(seg_map_path=str(path), seg_fields=[], **stored)


def true_labels(cfg: Config, pictures: Sequence[str]) -> dict[int, Path]:
    """Labels that the data sets of a config have, by number of the picture; a split without its folders has none."""
    found: dict[str, Path] = {}
    for split in SPLITS:
        try:
            parts = open_split(cfg, split)
        except UserError:
            continue
        for dataset in (part.dataset for part in parts):
            infos = (dataset.get_data_info(i) for i in range(len(dataset)))
            found |= {os.path.realpath(info['img_path']): Path(info.get('seg_map_path', '')) for info in infos}
    labels = {number: found.get(os.path.realpath(picture), Path()) for number, picture in enumerate(pictures)}
    return {number: label for number, label in labels.items() if label.is_file()}


def labels_in(folder: Path, names: Sequence[str]) -> dict[int, Path]:
    """Files of labels in a folder, by number of the picture; raises ``UserError`` if there are none."""
    found = {number: folder / name for number, name in enumerate(names) if (folder / name).is_file()}
    if not found:
        raise UserError(f'--labels {folder} has none of the labels of these pictures, such as {folder / names[0]}')
    return found


class LabelFiles:
    """Files of true and of corrected labels, with versions, so that none is replaced unseen.

    Args:
        form: their format.
        truth: files of true labels, by number of the picture.
        places: file for the corrected labels of each picture.
        overwrite: save corrected labels over the true ones.

    Raises:
        UserError: that would replace true labels unasked, or there are none to replace.
    """

    def __init__(self, form: LabelFormat, truth: Mapping[int, Path], places: Sequence[Path], overwrite: bool):
        self.form, self.truth = form, truth
        self.saved: set[int] = set()  # numbers, in this run
        self.places = [truth.get(i, place) if overwrite else place for i, place in enumerate(places)]
        self._lock = threading.Lock()  # one file at a time, so that a version and its content belong together
        if overwrite and not truth:
            raise UserError('--overwrite replaces true labels, but these pictures have none')
        replaced = [path for i, path in truth.items() if path.resolve() == self.places[i].resolve()]
        if replaced and not overwrite:
            raise UserError(
                f'corrected labels would replace true ones, such as {replaced[0]}; choose another --out-dir'
            )

    def read(self, number: int, kind: str, size: tuple[int, int]) -> tuple[bytes, str] | None:
        """Ids of the ``'truth'`` or ``'saved'`` labels, compressed by zlib, and their version; None without a file.

        Raises:
            LabelError: the file does not hold labels of a picture of ``size`` (H, W).
        """
        path = self.truth.get(number) if kind == 'truth' else dict(enumerate(self.places)).get(number)
        if path is None or not path.is_file():
            return None
        with self._lock:
            return zlib.compress(self.form.read(path, size).tobytes(), 1), _version(path)

    def write(self, number: int, ids: np.ndarray, expected: str) -> str | None:
        """Write corrected ids if the file's version is ``expected`` or that is ``*``; return the new version.

        Raises:
            OSError: the file cannot be written.
        """
        path = self.places[number]
        with self._lock:
            if expected not in ('*', _version(path)):
                return None
            self.form.write(path, ids)
            self.saved.add(number)
            return _version(path)


def _version(path: Path) -> str:
    """Digest of a file; ``none`` without one."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.is_file() else 'none'
