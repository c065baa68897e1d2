"""Inference: segment images and videos."""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO

import cv2
import mmcv
import numpy as np
from PIL import Image
from tqdm import tqdm

from .._device import resolve_device
from .._files import IMAGE_SUFFIXES, distinct_names, file_sha256, find_files, whole
from ..checkpoints.download import local_copy
from ..config import check_tta, make_writable
from ..errors import UserError
from ..models.confidence import CERTAIN
from ..models.segmentor import SlidingTTAModel
from ..visualization import label_png, overlay, side_by_side, with_legend, write_png
from .label_studio import Tasks
from .predictor import Picture, Predictor, Undecodable
from .sources import load_model, try_out
from .threads import in_threads
from .video import VIDEO_SUFFIXES, pyav, segment_video

WRITERS = min(4, max(1, (os.cpu_count() or 1) // 2))  # threads: a GPU computes faster than one core compresses
# Kinds of results and their folders.
RESULTS = {
    'labels': 'pred',
    'overlay': 'vis',
    'prob': 'prob',
    'confidence': 'confidence',
    'label-studio': 'label-studio',
}
CONFIDENT = {'confidence', 'label-studio'}  # kinds that need the probability of each label


@dataclass(frozen=True)
class Wanted:
    """The kinds of results to write, and how to draw overlays."""

    kinds: Sequence[str]
    opacity: float
    beside: bool

    @property
    def probabilities(self) -> bool:
        """Whether the probabilities of all classes are needed."""
        return 'prob' in self.kinds

    @property
    def confidence(self) -> bool:
        """Whether the probability of each label is needed."""
        return bool(CONFIDENT & set(self.kinds))


def infer(
    config: str,
    checkpoint: str | None,
    images: Sequence[str],
    out_dir: str = 'out',
    device: str = 'auto',
    save: Sequence[str] = ('labels', 'overlay'),
    opacity: float = 0.55,
    tta: bool = False,
    amp: bool = False,
    compile: bool = False,
    void_below: float = 0,
    beside: bool = False,
    cfg_options: dict | None = None,
) -> list[str]:
    """Segment images and videos. A video gives an overlay only.

    Args:
        config: a config's path or name; ``hf://owner/name``; or a folder that ``mmseg-volo push`` wrote.
        checkpoint: the weights; None takes those of ``config``, if it has any.
        images: files, folders with their subfolders, and glob patterns.
        device: ``'auto'`` uses a GPU if one is available.
        save: ``'labels'`` writes indexed PNG files to ``out_dir/pred``, ``'overlay'`` writes overlays with a legend to
            ``out_dir/vis``, ``'prob'`` writes float16 ``[classes, H, W]`` as ``.npy`` files to ``out_dir/prob``,
            ``'confidence'`` writes the probability of each label as grey PNG files to ``out_dir/confidence``, and
            ``'label-studio'`` writes tasks with predictions to ``out_dir/label-studio``.
        opacity: opacity of the overlay, from 0 to 1.
        tta: average over the scales and flips of the config's ``tta_pipeline``.
        amp: mixed precision: autocast to bfloat16, or to float16 on a GPU without bfloat16.
        compile: run the backbone under ``torch.compile``, which compiles once per size of picture or window.
        void_below: probability from 0 to 1; labels with a lower one become 255 in all results.
        beside: show the picture or frame to the left of its overlay.

    Returns:
        The files that could not be decoded, or only in part; each was reported by a warning.

    Raises:
        UserError: no input, the only file cannot be decoded, or config, checkpoint or device is unusable.
    """
    if not 0 <= opacity <= 1:
        raise UserError(f'--opacity must be between 0 and 1, got {opacity}')
    if not 0 <= void_below <= 1:
        raise UserError(f'--void-below must be between 0 and 1, got {void_below}')
    if tta and 'prob' in save:
        raise UserError('--save prob does not go with --tta: the average keeps the probability of the label only')
    outputs = _outputs(images, out_dir)
    videos = [path for path in outputs if _is_video(path)]
    if videos and 'overlay' not in save:
        raise UserError(f'{videos[0]} is a video, which becomes an overlay only; add overlay to --save')
    if videos:
        pyav()  # before the model is loaded
    wanted = Wanted(save, opacity, beside)
    model = load_model(config, checkpoint, cfg_options or {})
    if tta:
        check_tta(model.config, config)
    predictor = Predictor(model.config, model.checkpoint, resolve_device(device), tta, amp, compile, void_below)
    if tta and (void_below or wanted.confidence) and not isinstance(predictor.tester, SlidingTTAModel):
        raise UserError('the probability of a label with --tta needs tta_model.type=SlidingTTAModel in the config')
    if model.is_foreign:
        try_out(predictor.model, config)
    out = make_writable(out_dir)
    tasks = _tasks(outputs, out, predictor, model.checkpoint) if 'label-studio' in save else None
    skipped, broken, start = [], [], time.perf_counter()
    results = _segment_files(outputs, out, predictor, wanted, tasks)
    with closing(results), tqdm(desc='files', total=len(outputs), unit='file', disable=None) as progress:
        try:
            for path, problem in results:
                progress.update()
                if isinstance(problem, Undecodable):
                    if len(outputs) == 1:
                        raise problem
                    tqdm.write(f'warning: {problem}; skipped')
                    skipped.append(path)
                elif problem:
                    tqdm.write(f'warning: {problem}')
                    broken.append(path)
        except OSError as error:
            raise UserError(f'cannot write to {out} ({error.strerror}); files written before are complete') from None
    what = 'images and videos' if videos else 'images'
    print(
        f'{len(outputs) - len(skipped)} of {len(outputs)} {what} segmented on {predictor.device} '
        f'in {time.perf_counter() - start:.1f} s: '
        + ', '.join(f'{kind} in {out / RESULTS[kind]}' for kind in save)
        + (f'; {len(skipped)} skipped' if skipped else '')
        + (f'; {len(broken)} incomplete' if broken else '')
    )
    if tasks:
        print(f'to import {tasks.path}, start Label Studio with LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={tasks.root}')
    return skipped + broken


def _outputs(images: Sequence[str], out_dir: str) -> dict[str, str]:
    """Input files and their output names: the stem, preceded by folders where stems repeat."""
    written = [os.path.join(out_dir, folder) for folder in RESULTS.values()]
    return distinct_names(find_files(images, {'image': IMAGE_SUFFIXES, 'video': VIDEO_SUFFIXES}, written))


def _is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_SUFFIXES)


def _tasks(outputs: dict[str, str], out: Path, predictor: Predictor, checkpoint: str) -> Tasks | None:
    pictures = [path for path in outputs if not _is_video(path)]
    if not pictures:
        return None
    file = Path(local_copy(checkpoint)).expanduser()
    return Tasks(out / RESULTS['label-studio'], pictures, predictor, f'{file.stem} {file_sha256(file)[:8]}')


def _segment_files(
    outputs: dict[str, str], out: Path, predictor: Predictor, wanted: Wanted, tasks: Tasks | None
) -> Generator[tuple[str, Undecodable | str | None], None, None]:
    """Yield each file in order when its results are written, and the reason if they are missing or incomplete."""
    with tasks.opened() if tasks else nullcontext():
        for are_videos, files in groupby(outputs.items(), key=lambda item: _is_video(item[0])):
            if are_videos:
                yield from _segment_videos(dict(files), out, predictor, wanted)
            else:
                yield from _segment_pictures(dict(files), out, predictor, wanted, tasks)


def _segment_videos(
    videos: dict[str, str], out: Path, predictor: Predictor, wanted: Wanted
) -> Iterator[tuple[str, Undecodable | str | None]]:
    """Yield each video and, unless its overlay is complete, the reason."""
    for path, name in videos.items():
        try:
            film = out / RESULTS['overlay'] / f'{name}.mp4'
            yield path, segment_video(path, film, predictor, wanted.opacity, wanted.beside)
        except Undecodable as error:
            yield path, error


def _segment_pictures(
    pictures: dict[str, str], out: Path, predictor: Predictor, wanted: Wanted, tasks: Tasks | None
) -> Iterator[tuple[str, Undecodable | str | None]]:
    """Yield each picture when its results are written, and the reason if it has none."""

    def write(picture: Picture) -> Picture:
        if picture.problem is None:
            _write(picture, out, predictor, wanted)
            picture.task = tasks.task(picture) if tasks else ''
        picture.forget()
        return picture

    files = (Picture(path, name) for path, name in pictures.items())
    with (
        in_threads(_read, files, ahead=predictor.batch_size()) as read,
        in_threads(write, _predicted(read, predictor, wanted), WRITERS, ahead=WRITERS) as written,
    ):
        for picture in written:
            if tasks and picture.problem is None:
                tasks.add(picture.task)
            yield picture.path, picture.problem


def _read(picture: Picture) -> Picture:
    try:
        picture.image = decode(picture.path)
    except Undecodable as error:
        picture.problem = error
    return picture


def _predicted(pictures: Iterable[Picture], predictor: Predictor, wanted: Wanted) -> Iterator[Picture]:
    return predictor.predict(pictures, wanted.probabilities, wanted.confidence)


def _write(picture: Picture, out: Path, predictor: Predictor, wanted: Wanted) -> None:
    for name, write in results(picture, predictor, wanted):
        with whole(out / name) as unfinished, unfinished.open('wb') as file:
            write(file)


def results(
    picture: Picture, predictor: Predictor, wanted: Wanted
) -> Iterator[tuple[str, Callable[[IO[bytes]], object]]]:
    """Yield the path of each result, from the folder of all results on, and a function that writes it."""
    name, label = picture.name, picture.label
    if 'prob' in wanted.kinds:
        yield f'{RESULTS["prob"]}/{name}.npy', partial(_save_array, picture.prob)
    if 'confidence' in wanted.kinds:
        grey = cv2.convertScaleAbs(picture.confidence, alpha=255 / CERTAIN)
        yield f'{RESULTS["confidence"]}/{name}.png', partial(write_png, Image.fromarray(grey))
    if 'overlay' in wanted.kinds:
        image = picture.image[..., ::-1]
        page = overlay(image, label, predictor.palette, wanted.opacity)
        if wanted.beside:
            page = side_by_side([Image.fromarray(image), page])
        page = with_legend(page, label, predictor.classes, predictor.palette)
        yield f'{RESULTS["overlay"]}/{name}.png', partial(write_png, page)
    if 'labels' in wanted.kinds:
        yield f'{RESULTS["labels"]}/{name}.png', partial(write_png, label_png(label, predictor.palette))


def _save_array(array: np.ndarray, file: IO[bytes]) -> None:
    np.save(file, array)


def decode(path: str) -> np.ndarray:
    """Image as uint8 BGR. 8-bit images equal those of mmseg's loader; 16-bit images are scaled to 8 bits."""
    problem = f'{path} cannot be decoded as an image'
    try:
        image = mmcv.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except Exception as error:  # decoders raise various types
        if 'MAX_IMAGE_PIXELS' in str(error):
            problem += ": it exceeds OpenCV's limit; set the environment variable OPENCV_IO_MAX_IMAGE_PIXELS"
        raise Undecodable(problem) from None
    if image is None:
        raise Undecodable(problem)
    if image.dtype not in (np.uint8, np.uint16):
        raise Undecodable(f'{problem}: it holds {image.dtype}; 8 or 16 bits are supported')
    return image if image.dtype == np.uint8 else cv2.convertScaleAbs(image, alpha=1 / 257)
