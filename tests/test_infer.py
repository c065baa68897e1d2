"""Inference on images and videos."""

import resource
import shutil
import signal
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from PIL import Image, ImageOps

from mmseg_volo.apis import inference
from mmseg_volo.apis.inference import infer
from mmseg_volo.apis.predictor import Picture, Predictor
from mmseg_volo.config import load_config
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo.models.segmentor import SlidingSegmentor
from mmseg_volo.visualization import label_png, overlay, with_legend
from mmseg_volo_cli import main

CONFIG = str(ROOT / 'configs/volo_tiny_toy_streets.py')
SIZE = WIDTH, HEIGHT = 96, 64
SLIDE = {
    'model.test_cfg.mode': 'slide',
    'model.test_cfg.crop_size': (64, 64),
    'model.test_cfg.stride': (48, 48),
}
BINARY = {
    'model.decode_head.num_classes': 2,
    'model.decode_head.out_channels': 1,
    'model.decode_head.loss_decode.use_sigmoid': True,
}
PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A folder with toy streets."""
    folder = tmp_path_factory.mktemp('place')
    make_toy_streets(folder / 'toy', train=1, val=2, size=SIZE)
    return folder


@pytest.fixture(scope='module')
def checkpoint(place) -> str:
    return saved(place / 'random.pth', {})


def saved(path: Path, options: dict) -> str:
    """A checkpoint with random weights that predicts several classes."""
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(load_config(CONFIG, options).model)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    meta = DATASETS.get('CityscapesDataset').METAINFO
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)), path)
    return str(path)


def scenes(place: Path) -> list[Path]:
    return sorted((place / 'toy/leftImg8bit/val').rglob('*.png'))


def expected(place: Path, checkpoint: str, options: dict, tta: bool = False) -> list[np.ndarray]:
    """Predictions of the test loop for the val scenes."""
    cfg = load_config(CONFIG, {'data_root': str(place / 'toy'), **options})
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    if tta:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        model = MODELS.build(dict(**cfg.tta_model, module=model)).eval()
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    with torch.no_grad():
        samples = [model.test_step(pseudo_collate([dataset[i]]))[0] for i in range(len(dataset))]
    return [sample.pred_sem_seg.data.numpy().reshape(HEIGHT, WIDTH) for sample in samples]


def labels(out: Path, names: list[str]) -> list[np.ndarray]:
    return [np.asarray(Image.open(out / 'pred' / f'{name}.png')) for name in names]


@pytest.mark.parametrize(
    ('options', 'tta'),
    [({}, False), (SLIDE, False), ({'model.type': 'EncoderDecoder'}, False), (SLIDE, True)],
    ids=['whole', 'slide', 'plain EncoderDecoder', 'tta'],
)
def test_labels_equal_those_of_the_test_loop(place, checkpoint, tmp_path, options, tta):
    paths = scenes(place)
    infer(CONFIG, checkpoint, [str(p) for p in paths], str(tmp_path), save=['labels'], tta=tta, cfg_options=options)
    found, exact = labels(tmp_path, [p.stem for p in paths]), expected(place, checkpoint, options, tta)
    assert len(np.unique(exact)) > 3
    assert np.array_equal(found, exact)
    assert not (tmp_path / 'vis').exists()


@pytest.mark.parametrize('options', [{}, {'model.type': 'EncoderDecoder'}, BINARY], ids=['ours', 'plain', 'binary'])
def test_probabilities_sum_to_one_and_agree_with_the_labels(place, checkpoint, tmp_path, options):
    if options is BINARY:
        checkpoint = saved(tmp_path / 'binary.pth', options)
    path = scenes(place)[0]
    infer(CONFIG, checkpoint, [str(path)], str(tmp_path), save=['prob', 'labels'], cfg_options=options)
    prob, [label] = np.load(tmp_path / f'prob/{path.stem}.npy'), labels(tmp_path, [path.stem])
    assert prob.dtype == np.float16
    if options is BINARY:
        assert prob.shape == (1, HEIGHT, WIDTH) and 0 < label.mean() < 1
        assert label[prob[0] > 0.31].all() and not label[prob[0] < 0.29].any()  # mmseg's threshold is 0.3
    else:
        assert prob.shape == (19, HEIGHT, WIDTH)
        np.testing.assert_allclose(prob.sum(0, dtype=np.float32), 1, atol=5e-3)
        assert np.array_equal(np.take_along_axis(prob, label[None].astype(int), 0)[0], prob.max(0))
        infer(CONFIG, checkpoint, [str(path)], str(tmp_path / 'alone'), save=['labels'], cfg_options=options)
        assert np.array_equal(labels(tmp_path / 'alone', [path.stem])[0], label)


def test_mixed_precision_is_close_but_not_equal(place, checkpoint, tmp_path):
    path = scenes(place)[0]
    for amp in (False, True):
        infer(CONFIG, checkpoint, [str(path)], str(tmp_path / str(amp)), save=['prob'], amp=amp)
    single, mixed = (np.load(tmp_path / str(amp) / f'prob/{path.stem}.npy').astype(float) for amp in (False, True))
    assert 0 < np.abs(single - mixed).mean() < 0.01


@pytest.mark.parametrize('kind', [None, 'NoSuchDataset'])
def test_classes_that_neither_checkpoint_nor_config_names_are_one_sentence(kind, place, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(torch.load(saved(tmp_path / 'random.pth', {}))['state_dict'], path)
    with pytest.raises(UserError, match=f'does not name its classes.*{kind!r}'):
        options = {'test_dataloader.dataset.type': kind}
        infer(CONFIG, str(path), [str(scenes(place)[0])], str(tmp_path / 'out'), cfg_options=options)


# Files of all kinds. At opacity 0 an overlay is the image as it was decoded.


def street(place: Path) -> Image.Image:
    return Image.open(scenes(place)[0])


def turned(image: Image.Image, orientation: int) -> dict:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return dict(exif=exif.tobytes())


def save_deep(image: Image.Image, path: Path) -> None:
    """Save with 16 bits per channel; the high byte differs from the nearest 8-bit value by up to 1."""
    pixels = np.asarray(image) if image.mode == 'L' else np.asarray(image)[..., ::-1]
    cv2.imwrite(str(path), (pixels.astype(int) * 257 + 120).clip(max=65535).astype(np.uint16))


def translucent(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(100)
    return image


KINDS: dict[str, Callable[[Image.Image, Path], object]] = {
    'plain.png': lambda image, path: image.save(path),
    'plain.jpg': lambda image, path: image.save(path, quality=90),
    'plain.bmp': lambda image, path: image.save(path),
    'plain.webp': lambda image, path: image.save(path),
    'plain.tif': lambda image, path: image.save(path),
    'grey.png': lambda image, path: image.convert('L').save(path),
    'bilevel.png': lambda image, path: image.convert('1').save(path),
    'grey_alpha.png': lambda image, path: image.convert('LA').save(path),
    'rgba.png': lambda image, path: translucent(image).save(path),
    'palette.png': lambda image, path: image.quantize(16).save(path),
    'palette_transparent.png': lambda image, path: image.quantize(16).save(path, transparency=0),
    'cmyk.jpg': lambda image, path: image.convert('CMYK').save(path, quality=95),
    'cmyk.tif': lambda image, path: image.convert('CMYK').save(path),
    'upside_down.jpg': lambda image, path: image.save(path, **turned(image, 3)),
    'on_its_side.jpg': lambda image, path: image.save(path, **turned(image, 6)),
    'on_its_side.png': lambda image, path: image.save(path, **turned(image, 8)),
    'mirrored.tif': lambda image, path: image.save(path, **turned(image, 5)),
    'deep.png': save_deep,
    'deep.tif': save_deep,
    'deep_grey.png': lambda image, path: save_deep(image.convert('L'), path),
}


@pytest.fixture(scope='module')
def seen(place, checkpoint) -> Path:
    """Files of each kind, and their decoded images."""
    (place / 'kinds').mkdir()
    for name, save in KINDS.items():
        save(street(place), place / 'kinds' / name)
    assert infer(CONFIG, checkpoint, [str(place / 'kinds')], str(place / 'seen'), opacity=0) == []
    return place / 'seen'


def named(name: str) -> str:
    """Outputs are named by stem, or by file name where stems repeat."""
    stem = Path(name).stem
    return f'{name}.png' if sum(Path(other).stem == stem for other in KINDS) > 1 else f'{stem}.png'


def decoded(seen: Path, name: str, width: int, height: int) -> np.ndarray:
    """The overlay without its legend."""
    return np.asarray(Image.open(seen / 'vis' / named(name)).crop((0, 0, width, height)))


@pytest.mark.parametrize('name', KINDS)
def test_every_kind_of_file_is_decoded_as_in_a_viewer(place, seen, name):
    source = Image.open(place / 'kinds' / name)
    if name.startswith('deep'):
        source = street(place).convert('L' if 'grey' in name else 'RGB')  # PIL has no 16-bit colours
    shown = ImageOps.exif_transpose(source).convert('RGB')
    tolerance = 2 if name.endswith('.jpg') else 0  # decoders round differently
    assert np.abs(decoded(seen, name, *shown.size).astype(int) - shown).max() <= tolerance
    assert Image.open(seen / 'pred' / named(name)).size == shown.size


@pytest.mark.parametrize('name', [name for name in KINDS if not name.startswith('deep')])
def test_8_bit_files_are_decoded_as_in_training(place, seen, name):
    trained_on = mmcv.imread(place / 'kinds' / name)[..., ::-1]
    height, width = trained_on.shape[:2]
    assert np.array_equal(decoded(seen, name, width, height), trained_on)


def test_float_images_are_refused(place, checkpoint, tmp_path):
    cv2.imwrite(str(tmp_path / 'heights.tif'), np.random.default_rng(0).random((8, 8, 3), np.float32))
    with pytest.raises(UserError, match=r'heights\.tif cannot be decoded as an image: it holds float32'):
        infer(CONFIG, checkpoint, [str(tmp_path / 'heights.tif')], str(tmp_path / 'out'))


def test_a_picture_above_opencvs_limit_names_the_remedy(checkpoint, tmp_path):
    content = b'\x89PNG\r\n\x1a\n'
    for kind, data in ((b'IHDR', struct.pack('>IIBBBBB', 40000, 40000, 8, 0, 0, 0, 0)), (b'IDAT', b''), (b'IEND', b'')):
        content += struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    (tmp_path / 'huge.png').write_bytes(content)
    with pytest.raises(
        UserError, match=r'huge\.png cannot be decoded .*; set the environment variable OPENCV_IO_MAX_IMAGE_PIXELS'
    ):
        infer(CONFIG, checkpoint, [str(tmp_path / 'huge.png')], str(tmp_path / 'out'))


# Which files are read, and the names of their results.


def test_a_folder_includes_subfolders_but_no_earlier_results(place, checkpoint, tmp_path):
    folder = tmp_path / 'pictures'
    for name in ('a.png', 'left/b.PNG', 'left/deep/a.png', 'left/deep/a.bmp', 'left/notes.txt'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes(place)[0], folder / name)
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    shutil.copy(scenes(place)[0], elsewhere / 'c.png')
    (folder / 'linked').symlink_to(elsewhere)
    for images in ([str(folder)], [str(folder), str(folder / '../pictures/**/*.png')]):
        assert infer(CONFIG, checkpoint, images, str(folder)) == []
        for kind in ('pred', 'vis'):
            names = {str(path.relative_to(folder / kind)) for path in (folder / kind).rglob('*') if path.is_file()}
            assert names == {'a.png', 'left/b.png', 'left/deep/a.png.png', 'left/deep/a.bmp.png', 'linked/c.png'}


def test_an_empty_folder_is_named_and_nothing_is_written(checkpoint, tmp_path):
    (tmp_path / 'empty/within').mkdir(parents=True)
    with pytest.raises(UserError, match=r'folder .*empty has no images and no videos \(\.jpg, .*\.mp4'):
        infer(CONFIG, checkpoint, [str(tmp_path / 'empty')], str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(opacity=1.5), '--opacity must be between 0 and 1, got 1.5'),
        (dict(opacity=float('nan')), 'got nan'),
        (dict(tta=True, save=['prob']), '--save prob does not go with --tta'),
        (dict(save=['labels']), r'drive\.mp4 is a video, which becomes an overlay only'),
    ],
)
def test_impossible_options(tmp_path, arguments, message):
    (tmp_path / 'drive.mp4').touch()
    with pytest.raises(UserError, match=message):
        infer(CONFIG, 'never_read.pth', [str(tmp_path / 'drive.mp4')], str(tmp_path / 'out'), **arguments)
    assert not (tmp_path / 'out').exists()


def test_tta_without_tta_pipeline(place, tmp_path):
    (tmp_path / 'bare.py').write_text("model = dict(backbone={}, decode_head=dict(type='FCNHead', num_classes=2))")
    with pytest.raises(UserError, match=r'--tta requires tta_pipeline and tta_model in .*bare\.py'):
        infer(str(tmp_path / 'bare.py'), 'never_read.pth', [str(scenes(place)[0])], str(tmp_path / 'out'), tta=True)


def unlabelled(predictor: Predictor, pictures: Iterable[Picture], *wanted: bool) -> Iterator[Picture]:
    """In place of ``Predictor.predict``: class 0 everywhere, at once."""
    for picture in pictures:
        picture.label = None if picture.image is None else np.zeros(picture.image.shape[:2], np.uint8)
        yield picture


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Limit the size of files to ``size``. Python ignores the signal, so writing fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_tool_exits_with_1_if_files_were_skipped(place, checkpoint, tmp_path, capsys):
    shutil.copy(scenes(place)[0], tmp_path / 'a.png')
    (tmp_path / 'broken.mp4').write_bytes(b'no video')
    (tmp_path / 'broken.jpg').write_bytes(b'no picture')
    arguments = [CONFIG, checkpoint, str(tmp_path), '--out-dir', str(tmp_path / 'out'), '--device', 'cpu', '--amp']
    arguments += ['--save', 'overlay', 'prob', '--opacity', '0.3']
    assert main('infer', arguments) == 1
    output = capsys.readouterr().out
    assert 'broken.mp4 cannot be decoded as a video; skipped' in output
    assert 'broken.jpg cannot be decoded as an image; skipped' in output
    assert '1 of 3 images and videos segmented on cpu' in output
    files = {str(path.relative_to(tmp_path / 'out')) for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    assert files == {'vis/a.png', 'prob/a.npy'}


# Reading, computing and writing overlap.


@pytest.fixture
def folder(place, tmp_path) -> Path:
    """Twelve pictures of two sizes, the fourth and the ninth of which cannot be decoded."""
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for i in range(12):
        picture = Image.open(scenes(place)[i % 2])
        picture.resize((80, 48) if i in (6, 7) else SIZE).save(folder / f'{i:02}.png')
    for i in (3, 8):
        (folder / f'{i:02}.png').write_bytes(b'no picture')
    return folder


def results_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob('*') if path.is_file()}


def test_a_folder_gives_the_same_files_as_its_pictures_one_by_one(folder, checkpoint, tmp_path, capsys):
    kinds = ['labels', 'overlay', 'prob']
    bad = infer(CONFIG, checkpoint, [str(folder)], str(tmp_path / 'together'), save=kinds)
    assert bad == [str(folder / name) for name in ('03.png', '08.png')]
    output = capsys.readouterr().out
    assert output.index('03.png cannot') < output.index('08.png cannot') < output.index('10 of 12 images segmented')
    for path in sorted(folder.iterdir()):
        if str(path) not in bad:
            infer(CONFIG, checkpoint, [str(path)], str(tmp_path / 'alone'), save=kinds)
    assert results_of(tmp_path / 'together') == results_of(tmp_path / 'alone')
    assert len(results_of(tmp_path / 'alone')) == 30


@pytest.mark.parametrize('options', [{}, SLIDE], ids=['whole', 'slide'])
@pytest.mark.parametrize('kind', ['labels', 'prob'])
def test_batches_of_pictures_of_one_size_give_the_labels_of_single_ones(
    folder, checkpoint, tmp_path, options, kind, monkeypatch
):
    sizes, logits = [], SlidingSegmentor._logits
    monkeypatch.setattr(SlidingSegmentor, '_logits', lambda self, im: sizes.append(len(im)) or logits(self, im))
    for batch in (1, 4):
        sizes.clear()
        batched = options | {'model.test_cfg.batch_size': batch}
        infer(CONFIG, checkpoint, [str(folder)], str(tmp_path / str(batch)), save=[kind], cfg_options=batched)
    if not options:  # 00 to 02 before a broken file, 04 and 05, 06 and 07 of another size, 09 to 11 after a broken file
        assert sizes == [3, 2, 2, 3]
    read = np.load if kind == 'prob' else Image.open
    for path in sorted((tmp_path / '1').rglob('*.*')):
        single, together = (np.asarray(read(tmp_path / str(b) / path.parent.name / path.name)) for b in (1, 4))
        assert single.shape == together.shape
        assert np.mean(single != together) < 1e-3 if kind == 'labels' else np.allclose(single, together, atol=2e-3)


def test_a_slow_disk_does_not_let_pictures_pile_up(checkpoint, tmp_path, monkeypatch):
    side, picture = 500, 500 * 500 * (3 + 1)
    for i in range(30):
        Image.new('RGB', (side, side), (i, i, i)).save(tmp_path / f'{i:02}.png')
    monkeypatch.setattr(Predictor, 'predict', unlabelled)
    monkeypatch.setattr(inference, '_write', lambda *args: time.sleep(0.01))
    peaks = []
    for count in (6, 30):
        paths = [str(tmp_path / f'{i:02}.png') for i in range(count)]
        with traced() as peak:
            infer(CONFIG, checkpoint, paths, str(tmp_path / 'out'), save=['labels'])
        peaks.append(peak[0])
    assert peaks[1] - peaks[0] < 2 * picture


def test_ctrl_c_leaves_whole_files_and_no_thread(folder, checkpoint, tmp_path, monkeypatch):
    seen, segment_all = [], SlidingSegmentor.segment_all

    def interrupted(self, *args):
        seen.append(0)
        if len(seen) == 6:
            signal.raise_signal(signal.SIGINT)
        return segment_all(self, *args)

    monkeypatch.setattr(SlidingSegmentor, 'segment_all', interrupted)
    with pytest.raises(KeyboardInterrupt):
        infer(CONFIG, checkpoint, [str(folder)], str(tmp_path / 'out'))
    names = ['00.png', '01.png', '02.png', '04.png', '05.png']  # 03 cannot be decoded
    for kind in ('pred', 'vis'):
        assert sorted(path.name for path in (tmp_path / 'out' / kind).iterdir()) == names
        for name in names:
            Image.open(tmp_path / 'out' / kind / name).load()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('ThreadPoolExecutor')]


def test_a_full_disk_ends_the_run_after_complete_files(folder, checkpoint, tmp_path):
    with small_disk(6000), pytest.raises(UserError, match=r'cannot write to .*; files written before are complete'):
        infer(CONFIG, checkpoint, [str(folder)], str(tmp_path / 'out'), save=['labels', 'overlay'])
    for path in (tmp_path / 'out').rglob('*.*'):
        assert not path.name.startswith('.')
        Image.open(path).load()


@pytest.mark.parametrize('options', [{}, SLIDE], ids=['whole', 'slide'])
def test_a_compiled_backbone_gives_the_same_probabilities(place, checkpoint, tmp_path, monkeypatch, options):
    compiled = []

    def with_fast_backend(*args, **kwargs):
        compiled.append(kwargs)
        return compile_with(*args, backend='aot_eager', **kwargs)

    compile_with = torch.compile
    monkeypatch.setattr(torch, 'compile', with_fast_backend)  # Inductor takes a minute
    path = scenes(place)[0]
    for on in (False, True):
        out = str(tmp_path / str(on))
        infer(CONFIG, checkpoint, [str(path)], out, save=['prob'], compile=on, cfg_options=options)
    eager, fast = (np.load(tmp_path / str(on) / f'prob/{path.stem}.npy') for on in (False, True))
    np.testing.assert_allclose(fast.astype(float), eager, atol=2e-3)  # float16
    assert compiled == [dict(dynamic=False)]


# Huge pictures


@contextmanager
def traced() -> Iterator[list[int]]:
    """Peak bytes allocated by Python and NumPy."""
    tracemalloc.start()
    peak: list[int] = []
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def test_drawing_makes_no_copy_of_a_huge_picture():
    image = np.zeros((2000, 3000, 3), np.uint8)
    label = np.arange(6_000_000).reshape(2000, 3000).astype(np.uint8)
    with traced() as peak:
        picture = overlay(image[..., ::-1], label, PALETTE)
        with_legend(picture, label, 'abc', PALETTE)
        label_png(label, PALETTE)
    assert peak[0] < 12_000_000  # 36 million as float32 or int64


@pytest.mark.parametrize('opacity', [0, 0.3, 1])
def test_strips_of_a_tall_picture_are_blended_as_the_whole(opacity):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (700, 5, 3), np.uint8)
    label = generator.integers(0, 4, (700, 5))  # class 3 has no colour
    exact = image * (1 - opacity) + PALETTE[label.clip(max=2)] * opacity
    exact[label == 3] = image[label == 3]
    np.testing.assert_allclose(np.asarray(overlay(image, label, PALETTE, opacity)), exact, atol=0.501)
