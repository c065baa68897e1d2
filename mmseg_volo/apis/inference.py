"""Inference: segment images and videos."""

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path

import cv2
import mmcv
import numpy as np
from tqdm import tqdm

from .._device import resolve_device
from .._files import IMAGE_SUFFIXES, distinct_names, find_files, whole
from ..config import check_tta, load_config, make_writable
from ..errors import UserError
from ..visualization import label_png, overlay, save_whole, with_legend
from .predictor import Picture, Predictor, Undecodable
from .threads import in_threads
from .video import VIDEO_SUFFIXES, segment_video

WRITERS = min(4, max(1, (os.cpu_count() or 1) // 2))  # threads: a GPU computes faster than one core compresses
RESULTS = {'labels': 'pred', 'overlay': 'vis', 'prob': 'prob'}  # kinds of results and their folders


def infer(
    config: str,
    checkpoint: str,
    images: Sequence[str],
    out_dir: str = 'out',
    device: str = 'auto',
    save: Sequence[str] = ('labels', 'overlay'),
    opacity: float = 0.55,
    tta: bool = False,
    amp: bool = False,
    compile: bool = False,
    cfg_options: dict | None = None,
) -> list[str]:
    """Segment images and videos. A video gives an overlay only.

    Args:
        images: files, folders with their subfolders, and glob patterns.
        device: ``'auto'`` uses a GPU if one is available.
        save: ``'labels'`` writes indexed PNG files to ``out_dir/pred``, ``'overlay'`` writes overlays with a legend to
            ``out_dir/vis``, ``'prob'`` writes float16 ``[classes, H, W]`` as ``.npy`` files to ``out_dir/prob``.
        opacity: opacity of the overlay, from 0 to 1.
        tta: average over the scales and flips of the config's ``tta_pipeline``.
        amp: mixed precision: autocast to bfloat16, or to float16 on a GPU without bfloat16.
        compile: run the backbone under ``torch.compile``, which compiles once per size of picture or window.

    Returns:
        The files that could not be decoded, or only in part; each was reported by a warning.

    Raises:
        UserError: no input, the only file cannot be decoded, or config, checkpoint or device is unusable.
    """
    if not 0 <= opacity <= 1:
        raise UserError(f'--opacity must be between 0 and 1, got {opacity}')
    if tta and 'prob' in save:
        raise UserError("--save prob does not go with --tta: mmseg's average over scales and flips keeps labels only")
    outputs = _outputs(images, out_dir)
    videos = [path for path in outputs if _is_video(path)]
    if videos and 'overlay' not in save:
        raise UserError(f'{videos[0]} is a video, which becomes an overlay only; add overlay to --save')
    cfg = load_config(config, cfg_options or {})
    if tta:
        check_tta(cfg, config)
    predictor = Predictor(cfg, checkpoint, resolve_device(device), tta, amp, compile)
    out = make_writable(out_dir)
    skipped, broken, start = [], [], time.perf_counter()
    results = _segment_files(outputs, out, predictor, opacity, save)
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
    return skipped + broken


def _outputs(images: Sequence[str], out_dir: str) -> dict[str, str]:
    """Input files and their output names: the stem, preceded by folders where stems repeat."""
    written = [os.path.join(out_dir, folder) for folder in RESULTS.values()]
    return distinct_names(find_files(images, {'image': IMAGE_SUFFIXES, 'video': VIDEO_SUFFIXES}, written))


def _is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_SUFFIXES)


def _segment_files(
    outputs: dict[str, str], out: Path, predictor: Predictor, opacity: float, save: Sequence[str]
) -> Generator[tuple[str, Undecodable | str | None], None, None]:
    """Yield each file in order when its results are written, and the reason if they are missing or incomplete."""
    for are_videos, files in groupby(outputs.items(), key=lambda item: _is_video(item[0])):
        if are_videos:
            yield from _segment_videos(dict(files), out, predictor, opacity)
        else:
            yield from _segment_pictures(dict(files), out, predictor, opacity, save)


def _segment_videos(
    videos: dict[str, str], out: Path, predictor: Predictor, opacity: float
) -> Iterator[tuple[str, Undecodable | str | None]]:
    """Yield each video and, unless its overlay is complete, the reason."""
    for path, name in videos.items():
        try:
            yield path, segment_video(path, out / 'vis' / f'{name}.mp4', predictor, opacity)
        except Undecodable as error:
            yield path, error


def _segment_pictures(
    pictures: dict[str, str], out: Path, predictor: Predictor, opacity: float, save: Sequence[str]
) -> Iterator[tuple[str, Undecodable | str | None]]:
    """Yield each picture when its results are written, and the reason if it has none."""

    def write(picture: Picture) -> Picture:
        if picture.problem is None:
            _write(picture, out, predictor, opacity, save)
        picture.forget()
        return picture

    files = (Picture(path, name) for path, name in pictures.items())
    with (
        in_threads(_read, files, ahead=predictor.batch_size()) as read,
        in_threads(write, predictor.predict(read, 'prob' in save), WRITERS, ahead=WRITERS) as written,
    ):
        for picture in written:
            yield picture.path, picture.problem


def _read(picture: Picture) -> Picture:
    try:
        picture.image = decode(picture.path)
    except Undecodable as error:
        picture.problem = error
    return picture


def _write(picture: Picture, out: Path, predictor: Predictor, opacity: float, save: Sequence[str]) -> None:
    name, label = picture.name, picture.label
    if 'prob' in save:
        with whole(out / 'prob' / f'{name}.npy') as partial:
            np.save(partial, picture.prob)
    if 'overlay' in save:
        page = overlay(picture.image[..., ::-1], label, predictor.palette, opacity)
        save_whole(with_legend(page, label, predictor.classes, predictor.palette), out / 'vis' / f'{name}.png')
    if 'labels' in save:
        save_whole(label_png(label, predictor.palette), out / 'pred' / f'{name}.png')


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
