"""Inference: segment images and videos."""

import glob
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmseg.apis import init_model
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from torch import Tensor
from tqdm import tqdm

from .._device import resolve_device
from .._files import distinct_names, whole
from ..config import check_tta, data_sets, load_config, make_writable, without_steps
from ..errors import UserError
from ..models.pretrained import load_segmentor
from ..models.segmentor import last_head
from ..visualization import label_png, overlay, save_whole, with_legend

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')
VIDEO_SUFFIXES = ('.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm')
RESULTS = {'labels': 'pred', 'overlay': 'vis', 'prob': 'prob'}  # kinds of results and their folders
ROWS = 256  # of probabilities, computed at a time
SMALL, SLIM = 32, 16  # shortest side in pixels and aspect ratio at which the neck's coarsest level may be empty
MISCOUNTED = 0.01  # share of a video's frames: some containers only estimate their number


class _Undecodable(UserError):
    """A file that cannot be decoded or segmented; it is skipped, and the other files continue."""


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
    predictor = _Predictor(cfg, checkpoint, resolve_device(device), tta, amp)
    out = make_writable(out_dir)
    skipped, broken, start = [], [], time.perf_counter()
    for path, name in tqdm(outputs.items(), 'files', unit='file', disable=None):
        try:
            if not _is_video(path):
                _segment_image(path, out, name, predictor, save, opacity)
            elif not _segment_video(path, out / 'vis' / f'{name}.mp4', predictor, opacity):
                broken.append(path)
        except _Undecodable as error:
            if len(outputs) == 1:
                raise
            tqdm.write(f'warning: {error}; skipped')
            skipped.append(path)
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
    files: list[str] = []
    for item in images:
        if os.path.isdir(item):
            suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
            inside = _matches(os.path.join(glob.escape(item), '**'), out_dir)
            found = [path for path in inside if path.lower().endswith(suffixes)]
            if not found:
                raise UserError(f'folder {item} has no images and no videos ({", ".join(suffixes)})')
        elif os.path.isfile(item):
            found = [item]
        else:
            found = _matches(item, out_dir)
            if not found:
                raise UserError(f'no image, video, folder or pattern matches {item}')
        files += found
    return distinct_names(list({os.path.abspath(file): file for file in files}.values()))


def _matches(pattern: str, out_dir: str) -> list[str]:
    """Matching files, except the results of an earlier run."""
    written = [os.path.abspath(os.path.join(out_dir, folder)) for folder in RESULTS.values()]
    return [
        path
        for path in sorted(glob.glob(pattern, recursive=True))
        if os.path.isfile(path) and not any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in written)
    ]


def _is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_SUFFIXES)


class _Predictor:
    """A model for decoded images (BGR, uint8 ``[H, W, 3]``)."""

    def __init__(self, cfg: Config, checkpoint: str, device: str, tta: bool, amp: bool):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # without a checkpoint mmseg guesses the classes; they are set below
            self.model = init_model(cfg, checkpoint=None, device='cpu')
        meta = load_segmentor(self.model, checkpoint).get('dataset_meta')
        meta = meta or DATASETS.get(cfg.test_dataloader.dataset.type).METAINFO
        self.classes, self.palette = meta['classes'], meta['palette']
        self.model.to(device)
        self.device, self.amp = device, amp
        self.tester = MODELS.build(dict(cfg.tta_model, module=self.model)) if tta else self.model
        self.segments = hasattr(self.tester, 'segment')  # SlidingSegmentor does, and needs no packing
        steps = cfg.tta_pipeline if tta else data_sets(cfg.test_dataloader.dataset)[0].pipeline
        # Images are already decoded and have no labels.
        left_out = ('LoadImageFromFile', 'LoadAnnotations', *(['PackSegInputs'] if self.segments else []))
        self.pipeline = Compose([dict(type='LoadImageFromNDArray'), *without_steps(steps, left_out)])

    @torch.no_grad()
    def labels(self, image: np.ndarray) -> np.ndarray:
        """Labels uint8 ``[H, W]``."""
        with self._autocast():
            if self.segments:
                return self._segment(image).numpy()
            return self._test(image).pred_sem_seg.data.reshape(image.shape[:2]).byte().cpu().numpy()

    @torch.no_grad()
    def labels_and_probabilities(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels uint8 ``[H, W]`` and probabilities float16 ``[classes, H, W]``, one of a binary head."""
        with self._autocast():
            if self.segments:
                logits = self._segment(image, logits=True)
            else:
                logits = self._test(image).seg_logits.data.float().cpu()
        if self.model.out_channels == 1:
            prob = logits.sigmoid()
            return (prob[0] > last_head(self.model).threshold).byte().numpy(), prob.half().numpy()
        prob = torch.empty(logits.shape, dtype=torch.half)
        for to, rows in zip(prob.split(ROWS, 1), logits.split(ROWS, 1), strict=True):  # never all rows in float32
            to.copy_(rows.softmax(0))
        return logits.argmax(0).byte().numpy(), prob.numpy()

    def _segment(self, image: np.ndarray, **kwargs) -> Tensor:
        resized = torch.from_numpy(self.pipeline(dict(img=image))['img']).permute(2, 0, 1)
        return self.model.segment(resized, image.shape[:2], **kwargs)

    def _test(self, image: np.ndarray) -> SegDataSample:
        return self.tester.test_step(pseudo_collate([self.pipeline(dict(img=image))]))[0]

    def _autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        lacks_bfloat16 = kind == 'cuda' and not torch.cuda.is_bf16_supported()
        return torch.autocast(kind, torch.float16 if lacks_bfloat16 else torch.bfloat16, enabled=self.amp)


def _segment_image(path: str, out: Path, name: str, predictor: _Predictor, save: Sequence[str], opacity: float) -> None:
    image = _decode(path)
    if 'prob' in save:
        label, prob = _predicted(predictor.labels_and_probabilities, path, image)
        with whole(out / 'prob' / f'{name}.npy') as partial:
            np.save(partial, prob)
    else:
        label = _predicted(predictor.labels, path, image)
    if 'overlay' in save:
        picture = overlay(image[..., ::-1], label, predictor.palette, opacity)
        save_whole(with_legend(picture, label, predictor.classes, predictor.palette), out / 'vis' / f'{name}.png')
    if 'labels' in save:
        save_whole(label_png(label, predictor.palette), out / 'pred' / f'{name}.png')


def _predicted(predict: Callable, path: str, image: np.ndarray):
    """``predict(image)``; raises ``_Undecodable`` if the image is too small or narrow for the model."""
    try:
        return predict(image)
    except (RuntimeError, cv2.error):
        height, width = image.shape[:2]
        if min(height, width) >= SMALL and max(height, width) < SLIM * min(height, width):
            raise
        raise _Undecodable(f'{path} is {width} x {height}, too small or too narrow for this model') from None


def _decode(path: str) -> np.ndarray:
    """Image as uint8 BGR. 8-bit images equal those of mmseg's loader; 16-bit images are scaled to 8 bits."""
    problem = f'{path} cannot be decoded as an image'
    try:
        image = mmcv.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except Exception as error:  # decoders raise various types
        if 'MAX_IMAGE_PIXELS' in str(error):
            problem += ": it exceeds OpenCV's limit; set the environment variable OPENCV_IO_MAX_IMAGE_PIXELS"
        raise _Undecodable(problem) from None
    if image is None:
        raise _Undecodable(problem)
    if image.dtype not in (np.uint8, np.uint16):
        raise _Undecodable(f'{problem}: it holds {image.dtype}; 8 or 16 bits are supported')
    return image if image.dtype == np.uint8 else cv2.convertScaleAbs(image, alpha=1 / 257)


def _segment_video(path: str, out: Path, predictor: _Predictor, opacity: float) -> bool:
    """Write the overlay of each frame; returns whether the whole video could be decoded."""
    for name in (path, str(out)):
        if name.encode(errors='replace') != os.fsencode(name):  # OpenCV 5.0.0 would end the interpreter
            raise _Undecodable(f'{name!a} is not a valid name for a video: OpenCV requires UTF-8; rename it')
    video = cv2.VideoCapture(path)
    expected = max(0, round(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    frames = _frames(video)
    first = next(frames, None)
    if first is None:
        raise _Undecodable(f'{path} cannot be decoded as a video')
    palette = np.asarray(predictor.palette)[:, ::-1]  # BGR, as the frames
    progress = tqdm(chain([first], frames), Path(path).name, expected or None, unit='frame', leave=False, disable=None)
    with whole(out) as partial:
        rate, (width, height) = video.get(cv2.CAP_PROP_FPS), first.shape[1::-1]
        writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*'mp4v'), rate, (width, height))
        if not writer.isOpened():
            raise UserError(f'cannot write {out}: OpenCV cannot encode {width} x {height} at {rate} Hz')
        done = 0
        for frame in progress:
            writer.write(np.asarray(overlay(frame, _predicted(predictor.labels, path, frame), palette, opacity)))
            done += 1
        writer.release()
        if cv2.VideoCapture(str(partial)).get(cv2.CAP_PROP_FRAME_COUNT) != done:  # OpenCV does not report errors
            raise UserError(f'cannot write {out}: some frames are missing on disk; is it full?')
    if done < expected * (1 - MISCOUNTED) - 1:
        tqdm.write(f'warning: {path} ends after {done} of {expected} frames; {out} holds these')
        return False
    return True


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while (frame := video.read()[1]) is not None:
        yield frame
