"""Inference: segment images and videos."""

import os
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO

import cv2
import mmcv
import numpy as np
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image
from tqdm import tqdm

from .._files import IMAGE_SUFFIXES, distinct_names, file_sha256, find_files
from .._storage import check_store, existing, find_in_store, is_url, read_file, without_file_scheme, write_file
from ..checkpoints.download import local_file
from ..config import check_tta, first_test_set, make_writable
from ..errors import UserError
from ..export.loading import device_for
from ..models.confidence import CERTAIN
from ..models.segmentor import SlidingTTAModel
from ..rasters import TIFF_SUFFIXES, is_raster
from ..visualization import label_png, overlay, side_by_side, with_legend, write_png
from .label_studio import Tasks
from .predictor import Picture, Predictor, Undecodable, raster_loader
from .raster import RasterRun
from .sources import Model, load_model, try_out
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

# A file and, unless its results are complete, the reason.
Results = Generator[tuple[str, Undecodable | str | None], None, None]


@dataclass(frozen=True)
class Wanted:
    """The kinds of results to write, and how to draw overlays."""

    kinds: Sequence[str]
    opacity: float
    beside: bool

    @property
    def files(self) -> list[str]:
        """The kinds of which each picture has a file."""
        return [kind for kind in self.kinds if kind != 'label-studio']

    @property
    def probabilities(self) -> bool:
        """Whether the probabilities of all classes are needed."""
        return 'prob' in self.kinds

    @property
    def confidence(self) -> bool:
        """Whether the probability of each label is needed."""
        return bool(CONFIDENT & set(self.kinds))

    def paths(self, name: str, video: bool = False) -> list[str]:
        """Paths of the results of a picture or video, from the folder of all results on."""
        if video:
            return [f'{RESULTS["overlay"]}/{name}.mp4']
        return [f'{RESULTS[kind]}/{name}.{"npy" if kind == "prob" else "png"}' for kind in self.files]


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
    openvino: bool = False,
    void_below: float = 0,
    beside: bool = False,
    bands: Sequence[int] | None = None,
    resume: bool = False,
    ray: str | None = None,
    workers: int | None = None,
    cfg_options: dict | None = None,
) -> list[str]:
    """Segment images, videos and rasters. A video gives an overlay only, a raster a GeoTIFF and a reduced overlay.

    Args:
        config: a config's path or name; ``hf://owner/name``; or a folder that ``mmseg-volo push`` wrote.
        checkpoint: the weights; None takes those of ``config``, if it has any.
        images: files, folders with their subfolders, glob patterns, and ``@FILE`` for the lines of a text file. With
            ``ray`` also URLs that fsspec opens.
        out_dir: folder for the results; with ``ray`` also a URL.
        device: ``'auto'`` uses a GPU if one is available.
        save: ``'labels'`` writes indexed PNG files to ``out_dir/pred``, ``'overlay'`` writes overlays with a legend to
            ``out_dir/vis``, ``'prob'`` writes float16 ``[classes, H, W]`` as ``.npy`` files to ``out_dir/prob``,
            ``'confidence'`` writes the probability of each label as grey PNG files to ``out_dir/confidence``, and
            ``'label-studio'`` writes tasks with predictions to ``out_dir/label-studio``.
        opacity: opacity of the overlay, from 0 to 1.
        tta: average over the scales and flips of the config's ``tta_pipeline``.
        amp: mixed precision: autocast to bfloat16, or to float16 on a GPU without bfloat16.
        compile: run the backbone under ``torch.compile``, which compiles once per size of picture or window.
        openvino: run an exported file with OpenVINO.
        void_below: probability from 0 to 1; labels with a lower one become 255 in all results.
        beside: show the picture or frame to the left of its overlay.
        bands: numbers of the bands of TIFF files to use, from 1; TIFF files are then rasters.
        resume: leave out the files whose results are all there, and go on with rasters where a run was stopped.
        ray: segment in several processes, on the cluster at this address, or ``'local'`` for one of its own.
        workers: number of processes with ``ray``; by default 2 on this machine, and all GPUs or CPUs of a cluster.

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
    if 'label-studio' in save and (resume or ray):
        raise UserError('--save label-studio does not go with --resume and --ray: it writes one file for all pictures')
    if workers is not None and (not ray or workers < 1):
        raise UserError(f'--workers must be at least 1, and goes with --ray, got {workers}')
    out_dir = without_file_scheme(out_dir)
    outputs = _outputs(images, out_dir, ray)
    videos = [path for path in outputs if is_video(path)]
    if videos and 'overlay' not in save:
        raise UserError(f'{videos[0]} is a video, which becomes an overlay only; add overlay to --save')
    if videos and is_url(out_dir):
        raise UserError(f'{videos[0]} is a video, whose result needs a folder as --out-dir, got {out_dir}')
    if videos:
        pyav()  # before the model is loaded
    wanted = Wanted(tuple(save), opacity, beside)
    model = load_model(config, checkpoint, cfg_options or {})
    if tta:
        check_tta(model.config, config)
        if (void_below or wanted.confidence) and not _keeps_confidence(model.config):
            raise UserError('the probability of a label with --tta needs tta_model.type=SlidingTTAModel in the config')
    rasters = _rasters(model.config, outputs, bands)
    unfit = {'--tta': tta, '--void-below': void_below, '--side-by-side': beside, '--ray': ray}
    _check_rasters(rasters, save, bands, [option for option, value in unfit.items() if value])
    out = check_store(out_dir) if is_url(out_dir) else out_dir
    count = len(outputs)
    if resume:
        outputs = _unfinished(outputs, out, wanted, rasters)
        if not outputs:
            print(f'all {count} results are in {out}')
            return []
    tasks = None
    if ray:
        from .ray_inference import Setup, segment_on_ray  # which imports this module

        out = out if is_url(out) else os.path.abspath(make_writable(out))
        setup = Setup(model, config, device, tta, amp, compile, openvino, void_below, out, wanted)
        results, where = segment_on_ray(outputs, setup, ray, workers), f'Ray ({ray})'
    else:
        predictor = make_predictor(model, config, device, tta, amp, compile, openvino, void_below)
        make_writable(out)
        tasks = _tasks(outputs, out, predictor, model.checkpoint) if 'label-studio' in save else None
        run = RasterRun(rasters, predictor, Path(out), save, opacity, bands, resume) if rasters else None
        results, where = segment_files(outputs, out, predictor, wanted, tasks, run), predictor.device
    bad = _report(results, outputs, count, out, save, where)
    if tasks:
        print(f'to import {tasks.path}, start Label Studio with LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={tasks.root}')
    return bad


def make_predictor(
    model: Model, config: str, device: str, tta: bool, amp: bool, compile: bool, openvino: bool, void_below: float
) -> Predictor:
    """Load the weights, and try the model out if it comes from strangers; ``config`` names it in errors."""
    device = device_for(model.checkpoint, device, compile, openvino)
    predictor = Predictor(model.config, model.checkpoint, device, tta, amp, compile, openvino, void_below)
    if model.is_foreign:
        try_out(predictor.model, config)
    return predictor


def _report(
    results: Results, outputs: dict[str, str], count: int, out: str, save: Sequence[str], where: str
) -> list[str]:
    """Show the progress and a summary; returns the files without results, or with incomplete ones.

    Args:
        count: number of files, finished ones included.
    """
    skipped, broken, start = [], [], time.perf_counter()
    with closing(results), tqdm(desc='files', total=len(outputs), unit='file', disable=None) as progress:
        try:
            for path, problem in results:
                progress.update()
                if isinstance(problem, Undecodable):
                    if count == 1:
                        raise problem
                    tqdm.write(f'warning: {problem}; skipped')
                    skipped.append(path)
                elif problem:
                    tqdm.write(f'warning: {problem}')
                    broken.append(path)
        except OSError as error:
            raise UserError(f'cannot write to {out} ({error.strerror}); files written before are complete') from None
    what = 'images and videos' if any(map(is_video, outputs)) else 'images'
    print(
        f'{len(outputs) - len(skipped)} of {len(outputs)} {what} segmented on {where} '
        f'in {time.perf_counter() - start:.1f} s: '
        + ', '.join(f'{kind} in {out}/{RESULTS[kind]}' for kind in save)
        + (f'; {len(skipped)} skipped' if skipped else '')
        + (f'; {len(broken)} incomplete' if broken else '')
        + (f'; {count - len(outputs)} kept' if count > len(outputs) else '')
    )
    return skipped + broken


def _outputs(images: Sequence[str], out_dir: str, ray: str | None) -> dict[str, str]:
    """Input files and their output names: the stem, preceded by folders where stems repeat."""
    written = [f'{out_dir}/{folder}' for folder in RESULTS.values()]
    items = [without_file_scheme(line) for item in images for line in _listed(item)]
    urls, paths = ([item for item in items if is_url(item) == kind] for kind in (True, False))
    if not ray and (urls or is_url(out_dir)):
        raise UserError(f'{[*urls, out_dir][0]} is a URL, which needs --ray')
    files = find_files(paths, {'image': IMAGE_SUFFIXES, 'video': VIDEO_SUFFIXES}, written) if paths else []
    if ray:
        files = [os.path.abspath(file) for file in files]  # workers may run in another folder
    for url in urls:
        found = find_in_store(url, IMAGE_SUFFIXES, written)
        if not found:
            raise UserError(f'{url} has no images ({", ".join(IMAGE_SUFFIXES)})')
        files += found
    return distinct_names(list(dict.fromkeys(files)))


def _listed(item: str) -> list[str]:
    """The lines of a text file for ``@FILE``, and otherwise the item itself."""
    if not item.startswith('@') or os.path.exists(item):
        return [item]
    try:
        lines = [line.strip() for line in Path(item[1:]).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read the list of files {item[1:]} ({error})') from None
    if not any(lines):
        raise UserError(f'the list of files {item[1:]} is empty')
    return [line for line in lines if line]


def _unfinished(outputs: dict[str, str], out: str, wanted: Wanted, rasters: Collection[str]) -> dict[str, str]:
    """Files that lack a result, and rasters, which find out by themselves."""
    exists = existing(out)
    return {
        path: name
        for path, name in outputs.items()
        if path in rasters or not all(exists(result) for result in wanted.paths(name, is_video(path)))
    }


def _keeps_confidence(cfg: Config) -> bool:
    """Whether the average over scales and flips returns the probability of each label."""
    kind = cfg.tta_model['type']
    return issubclass(MODELS.get(kind) if isinstance(kind, str) else kind, SlidingTTAModel)


def is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_SUFFIXES)


def _rasters(cfg: Config, files: Iterable[str], bands: Sequence[int] | None) -> set[str]:
    """Those of the files that are read in windows: all, if the config loads rasters."""
    if raster_loader(first_test_set(cfg).pipeline) is None:
        tiffs = [path for path in files if path.lower().endswith(TIFF_SUFFIXES) and not is_url(path)]
        return {path for path in tiffs if bands or is_raster(path)}
    other = [path for path in files if is_video(path) or is_url(path)]
    if other:
        raise UserError(f'{other[0]} is a {"video" if is_video(other[0]) else "URL"}, but the config loads rasters')
    return set(files)


def _check_rasters(rasters: set[str], save: Sequence[str], bands: Sequence[int] | None, unfit: Sequence[str]) -> None:
    """Raise ``UserError`` if there are rasters and options for other pictures, or bands without rasters."""
    if bands and not rasters:
        raise UserError('--bands is for rasters, and there are none')
    unfit = [*sorted(set(save) - {'labels', 'overlay'}), *unfit]
    if rasters and (unfit or 'labels' not in save):
        remedy = f'leave out {" and ".join(unfit)}' if unfit else 'add labels to --save'
        raise UserError(f'{min(rasters)} is a raster, which becomes labels and an overlay of them; {remedy}')


def _tasks(outputs: dict[str, str], out: str, predictor: Predictor, checkpoint: str) -> Tasks | None:
    pictures = [path for path in outputs if not is_video(path)]
    if not pictures:
        return None
    file = local_file(checkpoint)
    return Tasks(Path(out, RESULTS['label-studio']), pictures, predictor, f'{file.stem} {file_sha256(file)[:8]}')


def segment_files(
    outputs: dict[str, str],
    out: str,
    predictor: Predictor,
    wanted: Wanted,
    tasks: Tasks | None = None,
    raster_run: RasterRun | None = None,
) -> Results:
    """Yield each file in order when its results are written, and the reason if they are missing or incomplete.

    Args:
        outputs: files, and names of their results.
        out: folder or URL for all results.
        tasks: gets a task for each picture.
        raster_run: segments its rasters.
    """
    rasters = raster_run.paths if raster_run else ()
    with tasks.opened() if tasks else nullcontext():
        for kind, files in groupby(outputs.items(), key=lambda item: (is_video(item[0]), item[0] in rasters)):
            if kind == (True, False):
                yield from _segment_videos(dict(files), out, predictor, wanted)
            elif raster_run and kind == (False, True):
                yield from ((path, raster_run.problem(path, name)) for path, name in files)
            else:
                yield from _segment_pictures(dict(files), out, predictor, wanted, tasks)


def _segment_videos(videos: dict[str, str], out: str, predictor: Predictor, wanted: Wanted) -> Results:
    """Yield each video and, unless its overlay is complete, the reason."""
    for path, name in videos.items():
        [film] = wanted.paths(name, video=True)
        try:
            yield path, segment_video(path, Path(out, film), predictor, wanted.opacity, wanted.beside)
        except Undecodable as error:
            yield path, error


def _segment_pictures(
    pictures: dict[str, str], out: str, predictor: Predictor, wanted: Wanted, tasks: Tasks | None
) -> Results:
    """Yield each picture when its results are written, and the reason if it has none."""

    def write(picture: Picture) -> Picture:
        if picture.problem is None:
            _write(picture, out, predictor, wanted)
            picture.task = tasks.task(picture) if tasks else ''
        picture.forget()
        return picture

    files = (Picture(path, name) for path, name in pictures.items())
    with in_threads(_read, files, ahead=predictor.batch_size()) as read:
        predicted = predictor.predict(read, wanted.probabilities, wanted.confidence)
        with in_threads(write, predicted, WRITERS, ahead=WRITERS) as written:
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


def _write(picture: Picture, out: str, predictor: Predictor, wanted: Wanted) -> None:
    for path, write in _results(picture, predictor, wanted):
        write_file(f'{out}/{path}', write)


def _results(
    picture: Picture, predictor: Predictor, wanted: Wanted
) -> Iterator[tuple[str, Callable[[IO[bytes]], object]]]:
    """Yield the path of each result, from the folder of all results on, and a function that writes it."""
    label = picture.label
    for kind, path in zip(wanted.files, wanted.paths(picture.name), strict=True):
        if kind == 'prob':
            yield path, partial(_save_array, picture.prob)
            continue
        if kind == 'labels':
            page = label_png(label, predictor.palette)
        elif kind == 'confidence':
            page = Image.fromarray(cv2.convertScaleAbs(picture.confidence, alpha=255 / CERTAIN))
        else:
            image = picture.image[..., ::-1]
            page = overlay(image, label, predictor.palette, wanted.opacity)
            page = side_by_side([Image.fromarray(image), page]) if wanted.beside else page
            page = with_legend(page, label, predictor.classes, predictor.palette)
        yield path, partial(write_png, page)


def _save_array(array: np.ndarray, file: IO[bytes]) -> None:
    np.save(file, array)


def decode(path: str) -> np.ndarray:
    """Image as uint8 BGR. 8-bit images equal those of mmseg's loader; 16-bit images are scaled to 8 bits."""
    problem = f'{path} cannot be decoded as an image'
    try:
        content = read_file(path)
    except Exception as error:  # each store has types of its own
        raise Undecodable(f'{path} cannot be read ({type(error).__name__}: {error})') from None
    try:
        image = mmcv.imfrombytes(content, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except Exception as error:  # decoders raise various types
        if 'MAX_IMAGE_PIXELS' in str(error):
            problem += ": it exceeds OpenCV's limit; set the environment variable OPENCV_IO_MAX_IMAGE_PIXELS"
        raise Undecodable(problem) from None
    if image is None:
        raise Undecodable(problem)
    if image.dtype not in (np.uint8, np.uint16):
        raise Undecodable(f'{problem}: it holds {image.dtype}; 8 or 16 bits are supported')
    return image if image.dtype == np.uint8 else cv2.convertScaleAbs(image, alpha=1 / 257)
