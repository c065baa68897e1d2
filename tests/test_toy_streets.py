import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmseg.datasets import CityscapesDataset
from mmseg.utils import register_all_modules
from PIL import Image

from mmseg_volo.datasets.annotations import open_annotations
from mmseg_volo.datasets.toy_streets import make_toy_streets, parse_size, render_scene
from mmseg_volo.errors import UserError
from mmseg_volo_cli import main

ROOT = Path(__file__).parents[1]
SIZE = (128, 64)
# id -> trainId, from cityscapesScripts' labels.py and not from the generator under test.
CITYSCAPES = {0: 255, 1: 255, 7: 0, 8: 1, 11: 2, 17: 5, 20: 7, 21: 8, 23: 10, 24: 11, 26: 13}
CITYSCAPES_NAMES = {0: 'road', 1: 'sidewalk', 2: 'building', 5: 'pole', 7: 'traffic sign', 8: 'vegetation'}
CITYSCAPES_NAMES |= {10: 'sky', 11: 'person', 13: 'car'}


@pytest.fixture(scope='module')
def streets(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('data') / 'toy'
    make_toy_streets(out, train=5, val=3, size=SIZE, seed=3)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes(streets, tmp_path):
    make_toy_streets(tmp_path / 'again', train=5, val=3, size=SIZE, seed=3)
    assert contents(tmp_path / 'again') == contents(streets)


def test_another_seed_gives_other_scenes():
    images = [render_scene(seed, SIZE)[0] for seed in (0, 1, [0, 1, 0], [1, 1, 0])]
    assert len({image.tobytes() for image in images}) == 4


def test_no_scene_occurs_twice_in_train_and_val(streets):
    images = list(streets.glob('leftImg8bit/*/toytown/*.png'))
    assert len({image.read_bytes() for image in images}) == len(images) == 8


def test_files_are_named_as_in_cityscapes(streets):
    name = 'toytown/toytown_000002_000000'
    for split in ('train', 'val'):
        assert (streets / f'leftImg8bit/{split}/{name}_leftImg8bit.png').is_file()
        assert (streets / f'gtFine/{split}/{name}_gtFine_labelIds.png').is_file()
        assert (streets / f'gtFine/{split}/{name}_gtFine_labelTrainIds.png').is_file()
    assert len(contents(streets)) == 3 * 8 + 1


def test_files_hold_what_render_scene_returns(streets):
    image, labels = render_scene([3, 1, 2], SIZE)
    name = 'val/toytown/toytown_000002_000000'
    np.testing.assert_array_equal(Image.open(streets / f'leftImg8bit/{name}_leftImg8bit.png'), image)
    np.testing.assert_array_equal(Image.open(streets / f'gtFine/{name}_gtFine_labelIds.png'), labels)


def test_train_ids_are_cityscapes_for_every_pixel(streets):
    paths = sorted(streets.glob('gtFine/*/toytown/*_labelIds.png'))
    for path in paths:
        ids = np.array(Image.open(path))
        expected = np.vectorize(CITYSCAPES.__getitem__)(ids)
        train_ids = np.array(Image.open(str(path).replace('labelIds', 'labelTrainIds')))
        np.testing.assert_array_equal(train_ids, expected)
    assert len(paths) == 8


def test_all_nine_classes_have_a_sensible_share_of_16_scenes():
    labels = np.stack([render_scene([0, 1, index], (256, 128))[1] for index in range(16)])
    assert set(np.unique(labels)) == set(CITYSCAPES)
    for label_id, least, most in (
        (7, 0.2, 0.45),  # road
        (8, 0.03, 0.15),  # sidewalk
        (11, 0.15, 0.4),  # building
        (17, 0.02, 0.08),  # pole
        (20, 0.006, 0.04),  # traffic sign
        (21, 0.03, 0.15),  # vegetation
        (23, 0.06, 0.25),  # sky
        (24, 0.01, 0.06),  # person
        (26, 0.01, 0.08),  # car
    ):
        share = (labels == label_id).mean(axis=(1, 2))
        assert least < share.mean() < most, label_id
        assert (share > 0).sum() >= 14, label_id


def test_polygons_for_labelme_draw_the_label_maps(tmp_path):
    pytest.importorskip('pycocotools')
    make_toy_streets(tmp_path / 'toy', 3, 1, (128, 64), seed=5, labelme=True)
    assert sorted(path.name for path in (tmp_path / 'toy').glob('*00[03].*')) == [
        'street_000000.json',
        'street_000000.png',
        'street_000003.json',
        'street_000003.png',
    ]
    annotations = open_annotations(str(tmp_path / 'toy'))
    ids = {name: train_id for train_id, name in CITYSCAPES_NAMES.items()} | {'__ignore__': 255, '': 254}
    for sample, seed in zip(annotations.samples, ([5, 0, 0], [5, 0, 1], [5, 0, 2], [5, 1, 0]), strict=True):
        image, labels = render_scene(seed, (128, 64))
        np.testing.assert_array_equal(Image.open(tmp_path / 'toy' / sample.image), image)
        expected = np.vectorize(CITYSCAPES.__getitem__)(labels)
        drawn = annotations.draw(sample, (128, 64), ids)
        different = drawn != expected
        inner = cv2.erode((cv2.Laplacian(expected.astype(np.float32), -1) == 0).astype(np.uint8), np.ones((3, 3)))
        assert not different[inner > 0].any() and different.mean() < 0.1


@pytest.mark.parametrize('size', [(32, 32), (333, 97), (97, 333), (32, 400), (400, 32)])
def test_any_size_gives_a_street(size):
    for seed in range(4):
        image, labels = render_scene(seed, size)
        assert image.shape == (size[1], size[0], 3) and image.dtype == np.uint8
        assert labels.shape == (size[1], size[0]) and labels.dtype == np.uint8
        assert {7, 23} <= set(np.unique(labels)) <= set(CITYSCAPES)


def test_larger_pictures_show_things_at_the_same_share():
    def shares(size):
        labels = np.stack([render_scene(seed, size)[1] for seed in range(12)])
        return np.bincount(labels.ravel(), minlength=27) / labels.size

    np.testing.assert_allclose(shares((128, 64)), shares((512, 256)), atol=0.03)


@pytest.mark.parametrize(('split', 'count'), [('train', 5), ('val', 3)])
def test_mmseg_reads_it_as_cityscapes(streets, split, count):
    register_all_modules(init_default_scope=True)
    dataset = CityscapesDataset(
        data_root=str(streets),
        data_prefix=dict(img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}'),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')],
    )
    assert len(dataset) == count
    samples = [dataset[index] for index in range(count)]
    assert all(sample['img'].shape == (SIZE[1], SIZE[0], 3) for sample in samples)
    seen = set(np.unique([sample['gt_seg_map'] for sample in samples]).tolist())
    assert set(CITYSCAPES_NAMES) <= seen <= {*CITYSCAPES_NAMES, 255}
    assert all(dataset.metainfo['classes'][index] == name for index, name in CITYSCAPES_NAMES.items())


@pytest.mark.parametrize(
    ('changed', 'named'),
    [
        (dict(train=0), 'train must be between 1 and 1000000, got 0'),
        (dict(train=10**12), 'train must be between 1 and 1000000, got 1000000000000'),
        (dict(val=-2), 'val must be between 1 and 1000000, got -2'),
        (dict(seed=-1), 'seed must be at least 0, got -1'),
        (dict(size=(256, 16)), r'\(256, 16\)'),
        (dict(size=(100000, 128)), r'\(100000, 128\)'),
    ],
)
def test_invalid_parameters_are_named_and_nothing_is_written(tmp_path, changed, named):
    with pytest.raises(UserError, match=named):
        make_toy_streets(tmp_path / 'toy', **dict(train=1, val=1, size=SIZE) | changed)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('text', ['256', '256x', 'x128', '256*128', '-256x128', '256x128x3', ''])
def test_a_malformed_size_is_named(text):
    with pytest.raises(UserError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


def test_other_parameters_do_not_replace_a_data_set(streets):
    before = contents(streets)
    with pytest.raises(UserError, match='another folder or delete'):
        make_toy_streets(streets, train=5, val=3, size=SIZE, seed=4)
    assert contents(streets) == before


def test_an_empty_folder_is_filled(tmp_path):
    make_toy_streets(tmp_path, train=1, val=1, size=(32, 32))
    assert json.loads((tmp_path / 'toy_streets.json').read_text())['size'] == [32, 32]


@pytest.mark.parametrize(
    ('failure', 'expected'),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, failure, expected):
    written = []

    def fail_at_the_fourth(path, pixels):
        written.append(path)
        if len(written) == 4:
            raise failure

    monkeypatch.setattr('mmseg_volo.datasets.toy_streets._write_png', fail_at_the_fourth)
    with pytest.raises(expected) as caught:
        make_toy_streets(tmp_path / 'toy', train=2, val=1, size=(32, 32))
    assert expected is KeyboardInterrupt or 'No space left on device' in str(caught.value)
    assert len(written) == 4 and not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created_gives_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('mine')
    for out in (tmp_path / 'file', tmp_path / 'file' / 'toy'):
        with pytest.raises(UserError, match='file'):
            make_toy_streets(out, train=1, val=1, size=(32, 32))
    assert contents(tmp_path) == {'file': b'mine'}


def test_a_partial_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / 'toy.partial').mkdir()
    with pytest.raises(UserError, match='toy.partial'):
        make_toy_streets(tmp_path / 'toy', train=1, val=1, size=(32, 32))
    assert [path.name for path in tmp_path.iterdir()] == ['toy.partial']


TOOL = ROOT / 'tools/toy_streets.py'


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, 'PYTHONPATH': paths}
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, env=environment)


def test_the_tool_keeps_an_existing_data_set(tmp_path, capsys):
    arguments = [str(tmp_path / 'toy'), '--train', '2', '--val', '1', '--size', '64x32']
    first = run_tool(*arguments)
    assert first.returncode == 0, first.stderr
    assert len(list(tmp_path.rglob('*_leftImg8bit.png'))) == 3
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    assert main('toy-streets', arguments) == 0  # in this process, because importing torch takes seconds
    said = capsys.readouterr().out
    assert 'already' in said and said.count('\n') == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == files


def test_the_tool_refuses_and_keeps_a_folder_with_other_content(tmp_path):
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / 'cat.jpg').write_bytes(b'meow')
    refused = run_tool(tmp_path / 'photos')
    assert refused.returncode == 2
    assert 'photos already exists' in refused.stderr and 'Traceback' not in refused.stderr
    assert sum(line.startswith('error:') for line in refused.stderr.splitlines()) == 1
    assert contents(tmp_path) == {'photos/cat.jpg': b'meow'}


def test_the_tool_names_a_malformed_size(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main('toy-streets', [str(tmp_path / 'toy'), '--size', '256'])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: size must be WIDTHxHEIGHT, such as 256x128, got '256'\n"
    assert not any(tmp_path.iterdir())
