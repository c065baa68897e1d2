"""Damaged images, and scores on them."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_extras import hide
from test_report import run, streets_and_model

from mmseg_volo.datasets.corruptions import CORRUPTIONS, STRENGTHS, Corruption
from mmseg_volo.errors import UserError
from mmseg_volo.evaluation import robustness
from mmseg_volo.evaluation.robustness import corruption_table

pytest.importorskip('imagecorruptions')
IMAGE = cv2.imread(str(ROOT / 'docs/demo.png'))[:90, :121]


def damaged(kind: str, strength: int, image: np.ndarray = IMAGE) -> np.ndarray:
    return Corruption(kind, strength)(dict(img=image.copy(), img_path='a.png'))['img']


# The images


@pytest.mark.parametrize('kind', CORRUPTIONS)
def test_damage_grows_with_strength_and_is_the_same_each_time(kind):
    np.random.seed(3)
    following = np.random.rand()
    np.random.seed(3)
    distances = []
    for strength in STRENGTHS:
        image = damaged(kind, strength)
        assert image.shape == IMAGE.shape and image.dtype == np.uint8
        assert np.array_equal(image, damaged(kind, strength))
        distances.append(np.abs(image.astype(float) - IMAGE).mean())
    assert 0 < distances[0] < distances[1] < distances[2]
    assert np.random.rand() == following  # the random numbers of others are left alone


def test_each_image_is_damaged_in_its_own_way():
    other = IMAGE[::-1].copy()
    noise = [damaged('noise', 1, image).astype(int) - image for image in (IMAGE, other)]
    assert (noise[0] != noise[1][::-1]).mean() > 0.5 and (noise[0] != noise[1]).mean() > 0.5


def test_jpeg_gets_the_channels_in_its_order():
    file = io.BytesIO()
    Image.fromarray(IMAGE[..., ::-1]).save(file, 'JPEG', quality=15)
    assert np.array_equal(damaged('JPEG', 3), np.asarray(Image.open(file))[..., ::-1])


def test_darkness_halves_the_light():
    light = np.full((32, 32, 3), 200, np.uint8)
    assert (damaged('darkness', 1, light) == round(255 * ((200 / 255) ** 2.2 / 2) ** (1 / 2.2))).all()


@pytest.mark.parametrize(
    'image', [IMAGE[:31], IMAGE[..., :2], IMAGE[..., 0], IMAGE.astype(np.uint16)], ids=['small', 'bands', 'grey', '16']
)
def test_images_that_cannot_be_damaged(image):
    with pytest.raises(UserError, match='a.png: only 8-bit colour images of at least 32 x 32 can be damaged'):
        damaged('darkness', 1, image)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('rain', 1), "must be one of noise, blur, JPEG, darkness, fog, got 'rain'"),
        (('fog', 0), 'must be 1 to 5, got 0'),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Corruption(*arguments)


def test_without_the_package(monkeypatch):
    hide(monkeypatch, 'imagecorruptions')
    with pytest.raises(UserError, match=r"needs imagecorruptions: pip install 'mmseg-volo\[corruptions\]'"):
        Corruption('fog', 1)


# The scores


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    return streets_and_model(tmp_path_factory.mktemp('corruptions'))


def scores(place: Path, name: str) -> dict:
    return json.loads((place / name / 'metrics.json').read_text())


@pytest.fixture(scope='module')
def record(place) -> dict:
    run(place, 'damaged', corruptions=True)
    return scores(place, 'damaged')


def test_scores_are_those_of_images_that_were_damaged_before(place, record):
    rows = record['corruptions']['rows']
    assert [(row['kind'], row['strength']) for row in rows] == [(k, s) for k in CORRUPTIONS for s in STRENGTHS]
    mean = np.mean([row['mIoU'] for row in rows])
    assert record['corruptions']['mPC'] == pytest.approx(mean)
    assert record['corruptions']['rPC'] == pytest.approx(100 * mean / record['metrics']['mIoU'])
    assert f'damaged images (mPC) {mean:.2f}' in corruption_table(record['corruptions'])

    for row in (rows[1], rows[-1]):
        for path in sorted((place / 'toy').glob('leftImg8bit/val/**/*.png')):
            copy = place / 'before' / path.relative_to(place / 'toy/leftImg8bit/val')
            copy.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(copy), damaged(row['kind'], row['strength'], cv2.imread(str(path))))
        prefix = {'test_dataloader.dataset.data_prefix.img_path': str(place / 'before')}
        run(place, row['kind'], options=prefix)
        assert row['mIoU'] == pytest.approx(scores(place, row['kind'])['metrics']['mIoU'], abs=1e-9)
        low, high = row['mIoU_interval']
        assert low <= row['mIoU'] <= high

    run(place, 'plain')
    plain = scores(place, 'plain')
    assert plain['metrics'] == record['metrics'] and 'corruptions' not in plain
    page = (place / 'damaged/report.html').read_text()
    assert page.count('<figcaption>fog ') == 3 and 'Damaged images' in page
    assert 'Damaged images' not in (place / 'plain/report.html').read_text()
    assert {path.name for path in (place / 'damaged').iterdir()} == {path.name for path in (place / 'plain').iterdir()}


def test_several_processes_give_the_same_scores(place, record):
    torch.multiprocessing.start_processes(_one_of_two, (place,), nprocs=2, start_method='fork')
    assert scores(place, 'two')['corruptions'] == record['corruptions']
    assert not (place / 'two/.corruptions').exists()


def _one_of_two(rank: int, place: Path) -> None:
    torch.distributed.init_process_group('gloo', init_method=f'file://{place}/store', rank=rank, world_size=2)
    run(place, 'two', corruptions=True)
    torch.distributed.destroy_process_group()


def test_scores_of_the_images_as_they_are_outlive_an_interruption(place, monkeypatch):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(robustness, '_totals', interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(place, 'interrupted', corruptions=True)
    assert scores(place, 'interrupted')['metrics']['mIoU'] > 0 and not (place / 'interrupted/.corruptions').exists()


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (dict(server_format='cityscapes'), '--format neither measures .* --corruptions cannot be used'),
        (dict(options={'test_dataloader.dataset.pipeline': []}), '--corruptions needs 8-bit colour images'),
    ],
)
def test_what_does_not_go_with_corruptions(place, more, message):
    with pytest.raises(UserError, match=message):
        run(place, 'refused', corruptions=True, **more)
