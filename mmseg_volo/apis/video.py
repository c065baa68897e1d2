"""Inference on a video: the overlay of each frame."""

import os
from itertools import chain, repeat, takewhile
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from .._files import whole
from ..errors import UserError
from ..visualization import overlay
from .predictor import Picture, Predictor, Undecodable
from .threads import in_threads

VIDEO_SUFFIXES = ('.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm')
MISCOUNTED = 0.01  # share of a video's frames: some containers only estimate their number


def segment_video(path: str, out: Path, predictor: Predictor, opacity: float) -> str | None:
    """Write the overlay of each frame to ``out``; frames are read and written while others are computed.

    Returns:
        Why the result is incomplete, or None.

    Raises:
        Undecodable: not a video, or not a single frame can be decoded.
        UserError: ``out`` cannot be written.
    """
    for name in (path, str(out)):
        if name.encode(errors='replace') != os.fsencode(name):  # OpenCV 5.0.0 would end the interpreter
            raise Undecodable(f'{name!a} is not a valid name for a video: OpenCV requires UTF-8; rename it')
    video = cv2.VideoCapture(path)
    expected, rate = max(0, round(video.get(cv2.CAP_PROP_FRAME_COUNT))), video.get(cv2.CAP_PROP_FPS)
    with in_threads(lambda _: video.read()[1], repeat(None), ahead=predictor.batch_size()) as read:
        frames = takewhile(lambda frame: frame is not None, read)
        first = next(frames, None)
        if first is None:
            raise Undecodable(f'{path} cannot be decoded as a video')
        pictures = predictor.predict(Picture(path, '', image=frame) for frame in chain([first], frames))
        with whole(out) as partial:
            writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*'mp4v'), rate, first.shape[1::-1])
            if not writer.isOpened():
                height, width = first.shape[:2]
                raise UserError(f'cannot write {out}: OpenCV cannot encode {width} x {height} at {rate} Hz')
            palette = np.asarray(predictor.palette)[:, ::-1]  # BGR, as the frames

            def write(picture: Picture) -> None:
                if picture.problem:
                    raise picture.problem
                writer.write(np.asarray(overlay(picture.image, picture.label, palette, opacity)))
                picture.forget()

            with in_threads(write, pictures) as written:
                bar = tqdm(written, Path(path).name, expected or None, unit='frame', leave=False, disable=None)
                done = sum(1 for _ in bar)
            writer.release()
            if cv2.VideoCapture(str(partial)).get(cv2.CAP_PROP_FRAME_COUNT) != done:  # OpenCV does not report errors
                raise UserError(f'cannot write {out}: some frames are missing on disk; is it full?')
    if done < expected * (1 - MISCOUNTED) - 1:
        return f'{path} ends after {done} of {expected} frames; {out} holds these'
    return None
