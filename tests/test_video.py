"""Inference on videos, which are made and read with PyAV."""

import signal
import struct
import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from test_extras import hide
from test_infer import CONFIG, saved, small_disk, traced, unlabelled

from mmseg_volo.apis import video
from mmseg_volo.apis.inference import infer
from mmseg_volo.apis.predictor import Predictor
from mmseg_volo.errors import UserError
from mmseg_volo_cli import main

av = pytest.importorskip('av', reason="pip install 'mmseg-volo[video]'")
SIZE = WIDTH, HEIGHT = 96, 64
EVEN = tuple(range(0, 280, 40))  # seven times in milliseconds
VARIABLE = (0, 40, 200, 230, 600)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp('video') / 'random.pth', {})


def scene(i: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A smooth picture, BGR, whose lower left corner is red; it differs from its neighbours."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    waves = np.stack([np.sin(x + i), np.cos(y - i), np.sin(x * y + 2 * i)], -1)
    image = (127 + 100 * waves).astype(np.uint8)
    image[-height // 4 :, : width // 4] = 0, 0, 255
    return image


def film(
    path: Path,
    times: Sequence[int] = EVEN,
    size: tuple[int, int] = SIZE,
    codec: str = 'libx264',
    colours: str = 'yuv420p',
    sound: str | None = None,
    **settings,
) -> Path:
    """A video with frames at ``times`` in milliseconds; AVI knows only numbers of frames."""
    unit = Fraction(1, 25 if path.suffix == '.avi' else 1000)
    with av.open(str(path), 'w') as file:
        stream = file.add_stream(codec, 25, width=size[0], height=size[1], time_base=unit)
        stream.pix_fmt = colours
        for key, value in settings.items():
            setattr(stream.codec_context, key, value)
        track = sound and file.add_stream(sound, 48000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(scene(i, size), 'bgr24')
            frame.pts, frame.time_base = round(time / 1000 / unit), unit
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if track:
            for i in range(14):
                wave = 9000 * np.sin(np.arange(2048) / (9 + i))
                piece = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], 's16', 'stereo')
                piece.sample_rate, piece.pts, piece.time_base = 48000, 1024 * i, Fraction(1, 48000)
                file.mux(track.encode(piece))
            file.mux(track.encode(None))
    return path


def frames_of(path: Path) -> tuple[list[float], list[np.ndarray]]:
    """Times in seconds and images, BGR."""
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
        return [frame.time for frame in frames], [frame.to_ndarray(format='bgr24') for frame in frames]


def sound_of(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as file:
        streams = file.streams.audio
        packets = [packet for packet in file.demux(*streams) if packet.size] if streams else []
        return [(float(packet.pts * packet.time_base), bytes(packet)) for packet in packets]


@pytest.fixture
def segment(checkpoint, tmp_path, monkeypatch):
    """Segment videos with a model that labels nothing, so that overlays at opacity 0 are the frames."""
    monkeypatch.setattr(Predictor, 'predict', unlabelled)

    def run(*paths: Path, **settings) -> list[str]:
        settings = dict(opacity=0) | settings
        return infer(CONFIG, checkpoint, [str(path) for path in paths], str(tmp_path / 'out'), **settings)

    return run


def closeness(images: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """The largest mean distance between two images."""
    return max(np.abs(a.astype(int) - b).mean() for a, b in zip(images, others, strict=True))


FILMS = {
    'even.mp4': dict(),
    'variable.mp4': dict(times=VARIABLE, sound='aac'),
    'late.mkv': dict(times=[1000 + time for time in VARIABLE], sound='libmp3lame'),
    'raw_sound.mov': dict(sound='pcm_s16le'),
    'old.avi': dict(codec='mjpeg', colours='yuvj420p', sound='libmp3lame'),
    'web.webm': dict(codec='libvpx', sound='libopus'),
    'odd.mkv': dict(codec='ffv1', colours='bgr0', size=(95, 63)),
    'one.mp4': dict(times=[0]),
    'hd_colours.mp4': dict(colorspace=1, color_primaries=1, color_trc=1),
}


@pytest.mark.parametrize('name', FILMS)
def test_frames_times_and_sound_are_kept(name, segment, tmp_path):
    source = film(tmp_path / name, **FILMS[name])
    assert segment(source) == []
    made = tmp_path / f'out/vis/{source.stem}.mp4'
    assert [path.name for path in (tmp_path / 'out').rglob('*') if path.is_file()] == [made.name]
    (times, images), (made_times, made_images) = frames_of(source), frames_of(made)
    assert made_times == pytest.approx(times, abs=1e-6)
    width, height = FILMS[name].get('size', SIZE)
    assert made_images[0].shape == (height + height % 2, width + width % 2, 3)
    shown = [image[:height, :width] for image in made_images]
    assert closeness(shown, images) < 4
    assert len(images) == 1 or closeness(shown[:-1], images[1:]) > 4
    if height % 2:
        below = [image[height:] for image in made_images]
        assert closeness(below, [image[height - 1 : height] for image in made_images]) < 4
    with av.open(str(made)) as file:
        [stream] = file.streams.video
        assert (stream.codec.canonical_name, stream.codec_context.pix_fmt) == ('h264', 'yuv420p')
    content = made.read_bytes()
    assert content.index(b'moov') < content.index(b'mdat')
    before, after = sound_of(source), sound_of(made)
    if name == 'raw_sound.mov':  # which browsers do not play
        with av.open(str(made)) as file:
            assert file.streams.audio[0].codec.canonical_name == 'aac'
        assert after[-1][0] == pytest.approx(before[-1][0], abs=0.05) and len(after) > 10
    else:
        assert [packet for _, packet in after] == [packet for _, packet in before]
        assert [time for time, _ in after] == pytest.approx([time for time, _ in before], abs=2e-3)
        assert bool(after) == ('sound' in FILMS[name])


@pytest.mark.parametrize('name', ['variable.mp4', 'late.mkv', 'web.webm', 'odd.mkv'])
def test_a_browser_plays_the_video_and_its_sound(name, browser, segment, tmp_path):
    source = film(tmp_path / name, **FILMS[name])
    assert segment(source) == []
    made = tmp_path / f'out/vis/{source.stem}.mp4'
    (tmp_path / 'page.html').write_text(f'<video src="{made.relative_to(tmp_path)}"></video>')
    page = browser.new_page()
    page.goto((tmp_path / 'page.html').as_uri())
    played = page.evaluate("""async () => {
        const video = document.querySelector('video');
        await video.play();
        const failed = fail => () => fail(video.error.message);
        await new Promise((done, fail) => Object.assign(video, {onended: done, onerror: failed(fail)}));
        const quality = video.getVideoPlaybackQuality();
        return {
            size: [video.videoWidth, video.videoHeight], end: video.currentTime,
            sound: video.webkitAudioDecodedByteCount > 0, shown: quality.totalVideoFrames,
        };
    }""")
    page.close()
    times, images = frames_of(made)
    assert played['size'] == [images[0].shape[1], images[0].shape[0]]
    assert played['end'] >= times[-1] and 0 < played['shown'] <= len(images)
    assert played['sound'] == ('sound' in FILMS[name])


def test_a_turned_video_is_upright(segment, tmp_path):
    source = film(tmp_path / 'phone.mp4')
    content, unturned = source.read_bytes(), struct.pack('>9i', 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    of_track = content.index(unturned, content.index(b'tkhd'))
    clockwise = struct.pack('>9i', 0, 1 << 16, 0, -1 << 16, 0, 0, HEIGHT << 16, 0, 1 << 30)
    source.write_bytes(content[:of_track] + clockwise + content[of_track + len(clockwise) :])
    assert segment(source) == []
    shown = cv2.VideoCapture(str(source)).read()[1]  # OpenCV turns it
    [first, *_] = frames_of(tmp_path / 'out/vis/phone.mp4')[1]
    assert first.shape == (WIDTH, HEIGHT, 3) and closeness([first], [shown]) < 4
    assert first[5, 5].argmax() == 2 and first[5, 5, 2] > 200  # the red corner has moved to the upper left


def test_pixels_that_are_not_square_stay_so(segment, tmp_path):
    source = film(tmp_path / 'wide.mp4', sample_aspect_ratio=Fraction(4, 3))
    assert segment(source) == []
    with av.open(str(tmp_path / 'out/vis/wide.mp4')) as file:
        assert file.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


def test_the_overlay_of_a_frame_is_that_of_a_picture(checkpoint, tmp_path):
    source = film(tmp_path / 'drive.mp4', EVEN[:3])
    _, before = frames_of(source)
    for i, frame in enumerate(before):
        cv2.imwrite(str(tmp_path / f'{i}.png'), frame)
    settings = dict(save=['overlay'], opacity=0.8, void_below=0.06, beside=True)
    assert infer(CONFIG, checkpoint, [str(tmp_path)], str(tmp_path / 'out'), **settings) == []
    stills = [cv2.imread(str(tmp_path / f'out/vis/{i}.png'))[:, : 2 * WIDTH] for i in range(3)]
    _, shown = frames_of(tmp_path / 'out/vis/drive.mp4')
    assert closeness(shown, stills) < 6  # H.264 halves the size of the colours
    assert closeness([image[:, :WIDTH] for image in shown], before) < 3
    assert closeness([image[:, WIDTH:] for image in shown], before) > 20
    assert closeness([image[..., ::-1] for image in shown], stills) > 20


def test_a_picture_stands_beside_its_overlay(checkpoint, tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), scene(0))
    arguments = [CONFIG, checkpoint, str(tmp_path / 'a.png'), '--out-dir', str(tmp_path), '--save', 'overlay']
    pages = []
    for more in ([], ['--side-by-side']):
        assert main('infer', [*arguments, *more]) == 0
        pages.append(np.asarray(Image.open(tmp_path / 'vis/a.png')))
    assert np.array_equal(pages[1][:, :WIDTH, ::-1], scene(0)) and np.array_equal(pages[1][:, WIDTH:], pages[0])


def test_a_video_is_read_frame_by_frame(segment, tmp_path):
    peaks, size = [], (640, 480)
    for frames in (5, 35):
        source = film(tmp_path / f'{frames}.avi', range(0, 40 * frames, 40), size, 'mjpeg', 'yuvj420p', 'libmp3lame')
        with traced() as peak:
            segment(source)
        peaks.append(peak[0])
    assert peaks[1] - peaks[0] < 5 * size[0] * size[1] * 3


# Files that are not whole


@pytest.mark.parametrize(('name', 'codec'), [('drive.avi', 'mjpeg'), ('drive.mkv', 'mjpeg')])
def test_the_beginning_of_a_truncated_video_is_kept(name, codec, segment, tmp_path, capsys):
    source = film(tmp_path / name, range(0, 6000, 40), codec=codec, colours='yuvj420p')
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    assert segment(source) == [str(source)]
    kept = len(frames_of(tmp_path / 'out/vis/drive.mp4')[0])
    output = capsys.readouterr().out
    assert 60 < kept < 90 and '1 incomplete' in output
    expected = f'{kept} of 150 frames' if name == 'drive.avi' else f'{kept / 25 - 0.04:.1f} of 6.0 s'
    assert f'{name} ends after {expected}' in output


def test_damaged_frames_are_left_out_and_the_others_kept(segment, tmp_path, capsys):
    source = film(tmp_path / 'drive.avi', range(0, 1200, 40), codec='mjpeg', colours='yuvj420p')
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        for packet in packets[10:13]:
            content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    source.write_bytes(content)
    assert segment(source) == [str(source)]
    times, _ = frames_of(tmp_path / 'out/vis/drive.mp4')
    assert len(times) == 27 and times[-1] == pytest.approx(29 / 25)
    assert 'ends after 27 of 30 frames' in capsys.readouterr().out


def test_a_file_without_frames_is_no_video(segment, tmp_path):
    (tmp_path / 'text.mp4').write_text('no video')
    with av.open(str(tmp_path / 'sound.mkv'), 'w') as file:
        track = file.add_stream('libmp3lame', 48000)
        piece = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), 's16', 'stereo')
        piece.sample_rate = 48000
        file.mux(track.encode(piece))
        file.mux(track.encode(None))
    for name in ('text.mp4', 'sound.mkv'):
        with pytest.raises(UserError, match=f'{name} cannot be decoded as a video'):
            segment(tmp_path / name)
    assert not (tmp_path / 'out/vis').exists()


def test_names_need_not_be_text(segment, tmp_path):
    source = film(tmp_path / 'a.mp4', EVEN[:2])
    odd = tmp_path / b'\xff.mp4'.decode(errors='surrogateescape')
    source.rename(odd)
    assert segment(odd) == []
    assert len(frames_of(tmp_path / 'out/vis' / odd.name)[0]) == 2


@pytest.mark.parametrize('size', [0, 700])
def test_a_full_disk_leaves_no_partial_video(size, segment, tmp_path):
    source = film(tmp_path / 'drive.mp4')
    with small_disk(size), pytest.raises(UserError, match=r'cannot write .*drive\.mp4: File too large'):
        segment(source)
    assert list((tmp_path / 'out/vis').iterdir()) == []


def test_ctrl_c_leaves_no_partial_video_and_no_thread(segment, tmp_path, monkeypatch):
    source, add, seen = film(tmp_path / 'drive.mp4', sound='aac'), video._Film.add, []

    def interrupted(*args):
        seen.append(0)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGINT)
        add(*args)

    monkeypatch.setattr(video._Film, 'add', interrupted)
    with pytest.raises(KeyboardInterrupt):
        segment(source)
    assert list((tmp_path / 'out/vis').iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('ThreadPoolExecutor')]


def test_a_video_without_pyav_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / 'a.mp4').touch()
    hide(monkeypatch, 'av')
    with pytest.raises(UserError, match=r"a video needs av: pip install 'mmseg-volo\[video\]'"):
        infer(CONFIG, 'never_read.pth', [str(tmp_path / 'a.mp4')], str(tmp_path / 'out'))
