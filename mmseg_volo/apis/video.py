"""Inference on a video: the overlay of each frame as H.264 in MP4, with the video's timestamps and sound."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from .._extras import require
from .._files import whole
from ..errors import UserError
from ..visualization import overlay
from .predictor import Picture, Predictor, Undecodable
from .threads import in_threads

VIDEO_SUFFIXES = ('.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm')
MISSING = 0.01  # share of a video that may be missing: some containers only estimate its length
# Losses that are hardly visible, in less time than a model takes. B-frames would shift the times of the others.
QUALITY = {'crf': '20', 'preset': 'fast', 'bf': '0'}
BT709 = 1  # number of these colours in H.264; without it players guess from the size
COPIED = 'aac', 'mp3', 'opus', 'flac'  # codecs of sound that browsers play in MP4, which FFmpeg fills with others, too
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)


@dataclass
class Frame(Picture):
    """A frame with its time in units of the video's time base, and the quarter turns that made it upright."""

    pts: int = 0
    turns: int = 0


def pyav() -> ModuleType:
    """PyAV, which brings FFmpeg; raises ``UserError`` if it is not installed."""
    return require('av', 'video', 'a video')


def segment_video(path: str, out: Path, predictor: Predictor, opacity: float, beside: bool = False) -> str | None:
    """Write the overlay of each frame to ``out``; frames are read and written while others are computed.

    Args:
        beside: show the frame to the left of its overlay.

    Returns:
        Why the result is incomplete, or None.

    Raises:
        Undecodable: not a video, or not a single frame can be decoded.
        UserError: ``out`` cannot be written.
    """
    av = pyav()
    with ExitStack() as stack:
        try:
            source = stack.enter_context(av.open(path))
            video = source.streams.video[0]
        except (av.FFmpegError, IndexError):
            raise Undecodable(f'{path} cannot be decoded as a video') from None
        video.thread_type = 'AUTO'
        frames = _frames(av, path, source, video)
        read = stack.enter_context(in_threads(lambda _: next(frames, None), repeat(None), ahead=predictor.batch_size()))
        decoded = iter(lambda: next(read), None)
        first = next(decoded, None)
        if first is None:
            raise Undecodable(f'{path} cannot be decoded as a video')
        pictures: Iterator[Any] = predictor.predict(chain([first], decoded))
        try:
            with whole(out) as partial, _Film(av, partial, path, video, first, beside) as film:
                palette = np.asarray(predictor.palette)[:, ::-1]  # BGR, as the frames

                def write(frame: Frame) -> None:
                    if frame.problem:
                        raise frame.problem
                    film.add(frame, np.asarray(overlay(frame.image, frame.label, palette, opacity)))
                    frame.forget()

                with in_threads(write, pictures) as written:
                    expected = video.frames or None
                    bar = tqdm(written, Path(path).name, expected, unit='frame', leave=False, disable=None)
                    done = sum(1 for _ in bar)
                film.finish()
        except av.FFmpegError as error:  # those of reading have ended the frames
            raise UserError(f'cannot write {out}: {error.strerror}') from None
        length = source.duration and (source.start_time + source.duration) / av.time_base
        if video.frames and done < video.frames * (1 - MISSING) - 1:
            return f'{path} ends after {done} of {video.frames} frames; {out} holds these'
        if not video.frames and length and film.end < length * (1 - MISSING) - 1:
            return f'{path} ends after {film.end:.1f} of {length:.1f} s; {out} holds these'
    return None


def _frames(av: ModuleType, path: str, source: Any, video: Any) -> Iterator[Frame]:
    """Decode the frames that can be decoded, upright, and with times that increase."""
    step = max(1, round(1 / (video.average_rate or 25) / video.time_base))  # for frames without a time
    pts: int | None = None
    try:
        for packet in source.demux(video):
            try:
                decoded = packet.decode()
            except av.FFmpegError:  # a damaged packet; others may follow
                continue
            for frame in decoded:
                expected = 0 if pts is None else pts + step
                time = expected if frame.pts is None else frame.pts
                pts = time if pts is None else max(time, pts + 1)
                turns = round(frame.rotation / 90)
                image = np.rot90(frame.to_ndarray(format='bgr24'), turns)
                yield Frame(path, '', image=np.ascontiguousarray(image), pts=pts, turns=turns)
    except av.FFmpegError:  # the file ends in the middle of a packet
        return


class _Film:
    """An MP4 file in the making: H.264 that browsers play, with the index in front, and the sound of the source.

    Args:
        first: the first frame, whose size all get.
        beside: whether the frame is shown to the left of its overlay.
    """

    def __init__(self, av: ModuleType, file: Path, source: str, video: Any, first: Frame, beside: bool):
        self.av, self.beside, self.time_base = av, beside, video.time_base
        height, width = first.image.shape[:2]
        width *= 1 + beside
        self.file = av.open(str(file), 'w', format='mp4', options={'movflags': '+faststart'})
        size = dict(height=height + height % 2, width=width + width % 2)  # H.264 halves the size of the colours
        self.stream = self.file.add_stream(
            'libx264', video.average_rate or 25, QUALITY, time_base=self.time_base, **size
        )
        context = self.stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = BT709
        if ratio := video.sample_aspect_ratio:
            context.sample_aspect_ratio = 1 / ratio if first.turns % 2 else ratio
        self.sound = _Sound(av, source, self.file)
        self.end = 0.0

    def __enter__(self) -> '_Film':
        return self

    def __exit__(self, *error: object) -> None:
        self.sound.source.close()
        self.file.close()

    def add(self, frame: Frame, image: np.ndarray) -> None:
        """Append an image, BGR of the frame's size, at the frame's time."""
        image = np.hstack([frame.image, image]) if self.beside else image
        height, width = image.shape[:2]
        image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        picture = self.av.VideoFrame.from_ndarray(image, 'bgr24').reformat(
            self.stream.width, self.stream.height, 'yuv420p', dst_colorspace='ITU709', dst_color_range='MPEG'
        )
        picture.pts, picture.time_base = frame.pts, self.time_base
        self.end = float(frame.pts * self.time_base)
        self.sound.write_until(self.end)
        self.file.mux(self.stream.encode(picture))

    def finish(self) -> None:
        """Write what the encoders hold back, and the rest of the sound."""
        self.file.mux(self.stream.encode(None))
        self.sound.write_until(float('inf'))
        self.end = max(self.end, self.sound.end)


class _Sound:
    """The sound of a video on its way to another file: copied if browsers play its codec, otherwise encoded as AAC."""

    def __init__(self, av: ModuleType, path: str, target: Any):
        self.av, self.target = av, target
        self.source = av.open(path)  # once more, because the frames are read ahead
        self.end = 0.0
        self.tracks = {
            stream.index: self._track(stream) for stream in self.source.streams.audio if stream.codec_context
        }
        self._pieces = self._read()
        self._next = next(self._pieces, None)

    def write_until(self, time: float) -> None:
        """Write everything up to a time in seconds."""
        while self._next and self._next[0] <= time:
            self.end, track, piece = self._next
            self.target.mux(piece if isinstance(piece, self.av.Packet) else track.encode(piece))
            self._next = next(self._pieces, None)
        if time == float('inf'):
            for track, copied in self.tracks.values():
                self.target.mux([] if copied else track.encode(None))

    def _track(self, stream: Any) -> tuple[Any, bool]:
        """A track for a stream, and whether its packets are copied."""
        if stream.codec.canonical_name in COPIED:
            return self.target.add_stream_from_template(stream), True
        rate = stream.rate if stream.rate in AAC_RATES else 48000
        return self.target.add_stream('aac', rate, layout=stream.layout.name), False

    def _read(self) -> Iterator[tuple[float, Any, Any]]:
        """Packets to copy and frames to encode, with their times and tracks, as far as they can be read."""
        streams = [self.source.streams[index] for index in self.tracks]
        try:
            for packet in self.source.demux(*streams) if streams else ():
                track, copied = self.tracks[packet.stream.index]
                if not copied:
                    for frame in packet.decode():
                        yield frame.time, track, frame
                elif packet.dts is not None:  # the last ones are empty
                    time = float(packet.dts * packet.time_base)
                    packet.stream = track
                    yield time, track, packet
        except self.av.FFmpegError:  # the file ends in the middle of a packet
            return
