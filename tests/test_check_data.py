"""Each kind of damage to the toy streets gets its own message; sound data gets no error."""

import gc
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from mmseg_volo.config import load_config
from mmseg_volo.datasets.checks import check_data
from mmseg_volo.datasets.full_check import DRAWN, FILES_NAMED, ROW_HEIGHT, check_all_data
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo_cli import main

CONFIG = str(ROOT / 'configs/volo_tiny_toy_streets.py')
TRAIN, VAL = 8, 4


@pytest.fixture(scope='module')
def streets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'streets'
    make_toy_streets(root, TRAIN, VAL, (96, 64))
    gc.freeze()  # mmengine runs the garbage collector for every data set that it builds, which takes 0.2 s
    return root


@pytest.fixture
def copy(streets, tmp_path, monkeypatch) -> Path:
    """A copy of the toy streets in the working directory, which a test may damage."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(streets, tmp_path / 'toy')


def check(root: Path, config: str = CONFIG, **options) -> list:
    return check_all_data(config, cfg_options={'data_root': str(root), **options})


def errors(findings: list) -> list:
    return [finding for finding in findings if finding.level == 'error']


def files(root: Path, kind: str, split: str = 'train') -> list[Path]:
    return sorted((root / ('leftImg8bit' if kind == 'leftImg8bit' else 'gtFine') / split).rglob(f'*_{kind}.png'))


def labels(root: Path, split: str = 'train') -> list[Path]:
    return files(root, 'labelTrainIds', split)


def change(path: Path, function) -> None:
    """Replace the pixels of an image file with ``function(pixels)``."""
    Image.fromarray(function(np.array(Image.open(path)))).save(path)


def jpeg(path: Path, quality: int = 50) -> None:
    Image.open(path).convert('L').save(path, format='JPEG', quality=quality)


# Each function damages some files and returns their number.


def image_without_label(root):
    shutil.rmtree(root / 'gtFine/train/toytown')
    (root / 'gtFine/train/toytown').mkdir()
    return TRAIN


def no_train_ids(root):
    for path in labels(root):
        path.unlink()
    return TRAIN


def label_without_image(root):
    for path in files(root, 'leftImg8bit')[:2]:
        path.unlink()
    return 2


def truncated_image(root):
    path = files(root, 'leftImg8bit')[0]
    path.write_bytes(path.read_bytes()[:-2000])
    return 1


def damaged_label(root):
    labels(root)[0].write_bytes(b'not a picture')
    return 1


def other_size(root):
    change(labels(root)[0], lambda label: label[:, :-1])
    return 1


def label_ids_in_the_place_of_train_ids(root):
    for path in labels(root):
        shutil.copy(str(path).replace('labelTrainIds', 'labelIds'), path)
    return TRAIN


def colours(root):
    for path in labels(root):
        Image.open(path).convert('RGB').save(path)
    return TRAIN


def jpeg_named_png(root):
    jpeg(labels(root)[0])
    return 1


def png_that_was_a_jpeg(root):
    for path in labels(root):
        change(path, lambda label: np.where(label == 10, np.uint8(255), label))  # void gives edges of high contrast
        jpeg(path)
        change(path, np.copy)
    return TRAIN


def counted_from_one(root):
    for path in labels(root):
        change(path, lambda label: np.where(label == 255, label, label + 1))
    change(labels(root)[0], lambda label: np.where(label == 11, np.uint8(19), label))
    return 1


def zero_is_void(root):
    for path in labels(root):
        change(path, lambda label: np.where(label == 255, np.uint8(0), label + 1))
    change(labels(root)[0], lambda label: np.concatenate([label[:-1], [[0] * 95 + [19]]]).astype(np.uint8))
    return 1


def beyond_a_byte(root):
    change(labels(root)[0], lambda label: label.astype(np.uint16) + 256)
    return 1


def another_id(root):
    change(labels(root)[0], lambda label: np.where(label == 0, np.uint8(77), label))
    return 1


MISTAKES = {
    image_without_label: 'image has no label; docs/data.md',
    no_train_ids: 'image has no labelTrainIds, only labelIds',
    label_without_image: 'label has no image that ends in _leftImg8bit.png',
    truncated_image: 'image cannot be decoded',
    damaged_label: 'label cannot be read',
    other_size: 'label differs in size from its image',
    label_ids_in_the_place_of_train_ids: "they look like Cityscapes' labelIds",
    colours: 'label must have one class id per pixel, not colours',
    jpeg_named_png: 'label is a JPEG',
    png_that_was_a_jpeg: 'a lossy format or an interpolating resize',
    counted_from_one: 'id 0 never occurs, so the classes count from 1: set reduce_zero_label=True',
    zero_is_void: 'if 0 is void, as in ADE20K, set reduce_zero_label=True',
    beyond_a_byte: 'label has values outside 0 to 255',
    another_id: 'id 77 in labels of 19 classes (0 to 18, and 255 for void); docs/data.md',
}


@pytest.mark.parametrize('plant', MISTAKES, ids=lambda plant: plant.__name__)
def test_each_mistake_is_one_error_that_names_its_files(plant, copy, capsys):
    count = plant(copy)
    (error,) = errors(check(copy))
    assert error.split == 'train' and MISTAKES[plant] in error.what
    assert len(error.files) == count
    printed = capsys.readouterr().out
    assert printed.count(MISTAKES[plant]) == 1 and '1 error in' in printed
    assert f'({count} file{"s" * (count > 1)})' in printed
    named = sum(line.startswith(f'  {copy}') for line in printed.splitlines())
    assert named == min(count, FILES_NAMED) and (f'and {count - 3} more' in printed) == (count > 3)


@pytest.mark.parametrize(
    'plant', [plant for plant in MISTAKES if plant not in (label_without_image, truncated_image, other_size)]
)
def test_the_quick_check_finds_mistakes_in_labels(plant, copy):
    plant(copy)
    with pytest.raises(UserError) as caught:
        check_data(load_config(CONFIG, {'data_root': str(copy)}), ('train', 'val'))
    assert str(copy) in str(caught.value)


def test_mistakes_in_val_are_reported_for_val(copy):
    colours_of_val = labels(copy, 'val')
    for path in colours_of_val:
        Image.open(path).convert('RGB').save(path)
    (error,) = errors(check(copy))
    assert error.split == 'val' and len(error.files) == VAL


def test_sound_data_gives_a_table_and_a_picture(copy, capsys):
    findings = check(copy)
    printed = capsys.readouterr().out
    assert errors(findings) == [] and 'no errors' in printed
    assert 'train: 8 images' in printed and 'val: 4 images' in printed and 'test: same data as val' in printed
    picture = Image.open('work_dirs/volo_tiny_toy_streets/check_data.png')
    assert picture.height == 2 * ROW_HEIGHT and picture.width > DRAWN * 1.5 * ROW_HEIGHT
    pixels = np.concatenate([np.array(Image.open(path)).ravel() for path in labels(copy)])
    road = next(line.split() for line in printed.splitlines() if line.startswith('| road '))
    assert road[3] == f'{np.mean(pixels == 0):.3%}' and road[5] == '8' and road[9] == '4'


def test_classes_that_never_occur_are_a_warning_in_train_and_a_note_in_val(copy):
    warning, note = check(copy)
    assert (warning.level, warning.split) == ('warning', 'train') and (note.level, note.split) == ('note', 'val')
    assert warning.what.startswith('10 of 19 classes never occur: wall, fence,') and 'never occur' in note.what


def test_the_picture_shows_label_colours_over_images(copy):
    check_all_data(CONFIG, out='here/seen.png', cfg_options={'data_root': str(copy)})
    picture = np.array(Image.open('here/seen.png').convert('RGB')).astype(int)
    first = files(copy, 'leftImg8bit')[0]
    size = (360, ROW_HEIGHT)  # of 96 x 64
    image = np.asarray(Image.open(first).resize(size)).astype(int)
    sky = np.asarray(Image.open(labels(copy)[0]).resize(size, Image.Resampling.NEAREST)) == 10
    shown = picture[: size[1], : size[0]][sky]
    assert np.abs(shown - (0.45 * image[sky] + 0.55 * np.array([70, 130, 180]))).max() <= 1
    assert not Path('work_dirs').exists()


def test_images_of_train_in_val_are_an_error_however_they_are_stored(copy):
    train, val = files(copy, 'leftImg8bit')[0], files(copy, 'leftImg8bit', 'val')[0]
    Image.open(train).save(val, compress_level=0)
    shutil.copy(labels(copy)[0], labels(copy, 'val')[0])
    assert train.read_bytes() != val.read_bytes()
    (error,) = errors(check(copy))
    assert error.split == 'val' and 'image is also in train' in error.what
    assert error.files == [f'{val} = {train}']


def test_the_same_folder_for_train_and_val_is_an_error(copy):
    options = {'val_dataloader.dataset.data_prefix': dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')}
    (error,) = errors(check(copy, **options))
    assert error.split == 'val' and len(error.files) == TRAIN


def test_the_same_image_twice_in_a_split_is_a_note(copy):
    first, second = files(copy, 'leftImg8bit')[:2]
    shutil.copy(first, second)
    findings = check(copy)
    (note,) = (finding for finding in findings if 'duplicate images' in finding.what)
    assert errors(findings) == [] and note.level == 'note' and note.files == [f'{first} = {second}']


def test_indexed_labels_with_the_classes_colours_are_fine(copy):
    for path in labels(copy):
        picture = Image.open(path)
        picture.putpalette(np.arange(768, dtype=np.uint8).tolist())
        picture.save(path)
        assert Image.open(path).mode == 'P'
    assert errors(check(copy)) == []


def test_sixteen_bits_that_hold_bytes_are_fine(copy):
    for path in labels(copy):
        change(path, lambda label: label.astype(np.uint16))
        assert Image.open(path).mode == 'I;16'
    assert errors(check(copy)) == []


def test_exif_rotation_is_applied_as_in_training(copy):
    image = files(copy, 'leftImg8bit')[0]
    turned = Image.open(image).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # image viewers rotate it back
    turned.save(image, exif=exif)
    assert errors(check(copy)) == []


def test_a_repeated_data_set_is_checked_once_and_parts_are_summed(copy, tmp_path, capsys):
    cfg = load_config(CONFIG, {'data_root': str(copy)})
    train, val = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
    again = dict(train, pipeline=train.pipeline[:-1])
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[train, val, train, again])
    cfg.dump(tmp_path / 'joined.py')
    findings = check_all_data(str(tmp_path / 'joined.py'), splits=['train'])
    assert not any('duplicate images' in finding.what for finding in findings)
    printed = capsys.readouterr().out
    assert 'train: 8 images\ntrain: 4 images\ntrain: 8 images\n+' in printed
    seen = [np.array(Image.open(path)) for path in [*labels(copy) * 2, *labels(copy, 'val')]]
    road = next(line.split() for line in printed.splitlines() if line.startswith('| road '))
    assert road[3] == f'{np.mean(np.stack(seen) == 0):.3%}' and road[5] == '20'
    assert errors(findings) == []


def test_images_are_checked_in_a_split_without_labels(copy, tmp_path, capsys):
    cfg = load_config(CONFIG, {'data_root': str(copy)})
    cfg.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    cfg.dump(tmp_path / 'blind.py')
    labels(copy, 'val')[0].unlink()
    truncated = files(copy, 'leftImg8bit', 'val')[0]
    truncated.write_bytes(truncated.read_bytes()[:-2000])
    (error,) = errors(check_all_data(str(tmp_path / 'blind.py'), splits=['test']))
    assert error.split == 'test' and 'image cannot be decoded' in error.what
    printed = capsys.readouterr().out
    assert 'test: 4 images; the config loads no labels' in printed and '| road' not in printed


def test_only_the_requested_splits_are_checked(copy, capsys):
    shutil.rmtree(copy / 'leftImg8bit/val')
    findings = check_all_data(CONFIG, 'seen.png', ['train'], {'data_root': str(copy)})
    assert errors(findings) == [] and {finding.split for finding in findings} == {'train'}
    with pytest.raises(UserError, match='no folder .*leftImg8bit/val'):
        check(copy)
    assert not Path('work_dirs').exists()


def run_tool(*arguments) -> int:
    try:
        return main('check-data', list(map(str, arguments)))
    except SystemExit as end:
        return int(end.code)


def test_the_exit_status_is_0_without_errors_1_with_and_2_for_bad_input(copy, capsys):
    options = ['--cfg-options', f'data_root={copy}']
    assert run_tool(CONFIG, '--splits', 'val', '--out', 'seen.png', *options) == 0
    assert Path('seen.png').is_file()
    colours(copy)
    assert run_tool(CONFIG, *options) == 1
    capsys.readouterr()
    blocked = copy / 'file'
    blocked.write_text('')
    for arguments, words in [
        (['nowhere.py'], 'config not found'),
        ([CONFIG, '--cfg-options', 'data_root=nowhere'], 'no folder nowhere/leftImg8bit/train'),
        ([CONFIG, '--out', 'seen.jpg', *options], 'must be a .png file'),
        ([CONFIG, '--out', blocked / 'seen.png', *options], f'cannot write to {blocked}'),
        ([CONFIG, '--cfg-options', 'val_dataloader=None', '--splits', 'val'], 'no val_dataloader'),
    ]:
        assert run_tool(*arguments) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith('error: '))
        assert words in line


def test_the_tool_runs_as_a_command(copy):
    label_without_image(copy)
    command = [sys.executable, ROOT / 'tools/check_data.py', CONFIG, '--cfg-options', f'data_root={copy}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and 'error: train: label has no image' in done.stdout and 'Traceback' not in done.stderr


def test_real_camvid_has_no_errors(camvid, tmp_path):
    config = str(ROOT / 'configs/volo_tiny_camvid.py')
    findings = check_all_data(config, out=str(tmp_path / 'seen.png'), cfg_options={'data_root': str(camvid)})
    assert errors(findings) == []


def test_real_ade20k_has_no_errors(ade20k, tmp_path):
    config = str(ROOT / 'configs/volo_d1_ade20k.py')
    findings = check_all_data(config, out=str(tmp_path / 'seen.png'), cfg_options={'data_root': str(ade20k)})
    assert errors(findings) == []


def test_ade20k_without_reduce_zero_label_is_an_error_even_without_its_last_class(ade20k, tmp_path):
    options = {'data_root': str(ade20k), 'train_dataloader.dataset.reduce_zero_label': False}
    options['train_dataloader.dataset.pipeline.2.reduce_zero_label'] = False
    config = str(ROOT / 'configs/volo_d1_ade20k.py')
    (error,) = errors(check_all_data(config, out=str(tmp_path / 'seen.png'), cfg_options=options))
    assert error.split == 'train' and error.what.startswith('ADE20K counts classes from 1 and uses 0 for void: set')
