"""From a folder of annotated pictures to a config that trains: what a user types and sees."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import annotated
import numpy as np
import pytest
from annotated import CLASSES, NAMES, SIZE
from conftest import ROOT
from mmengine.config import Config
from PIL import Image
from test_extras import hide

from mmseg_volo import FolderDataset
from mmseg_volo.apis import train
from mmseg_volo.apis.dataset_config import bases, choose_base, choose_iterations, choose_sizes, class_weights
from mmseg_volo.apis.new_dataset import new_dataset
from mmseg_volo.config import load_config
from mmseg_volo.datasets.folder import read_list
from mmseg_volo.errors import UserError
from mmseg_volo_cli import main

QUICK = {
    'train_cfg.max_iters': 2,
    'train_cfg.val_interval': 2,
    'default_hooks.checkpoint.interval': 2,
    'train_dataloader.batch_size': 2,
    **{f'{split}_dataloader.num_workers': 0 for split in ('train', 'val', 'test')},
    **{f'{split}_dataloader.persistent_workers': False for split in ('train', 'val', 'test')},
}
FORMATS = dict(labelme=annotated.labelme, coco=annotated.coco, cvat=annotated.cvat, label_studio=annotated.label_studio)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    files = (path for path in sorted(folder.rglob('*')) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def label(path: Path | str) -> np.ndarray:
    return np.array(Image.open(path))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photos(here) -> Path:
    """Pictures with Labelme's polygons beside them, in the folder ``photos``."""
    annotated.write_pictures(here / 'photos')
    annotated.labelme(here / 'photos')
    return here / 'photos'


@pytest.fixture
def masked(here) -> Path:
    """Pictures and masks in parallel folders."""
    annotated.write_pictures(here / 'photos/images')
    annotated.masks(here / 'photos/masks')
    return here / 'photos'


def refused(folder: Path | str, message: str, **options) -> None:
    """``new_dataset`` must raise ``UserError`` and write nothing."""
    before = contents(Path.cwd())
    with pytest.raises(UserError, match=message) as caught:
        new_dataset(str(folder), arch='tiny', **options)
    assert '\n' not in str(caught.value) and contents(Path.cwd()) == before


# The way of a user


def test_toy_streets_with_labelme_polygons_become_a_config_that_trains(here, capsys):
    assert main('toy-streets', ['photos', '--labelme', '--train', '8', '--val', '2', '--size', '64x48']) == 0
    before = contents(here / 'photos')
    capsys.readouterr()

    assert main('new-dataset', ['photos', '--arch', 'tiny']) == 0
    printed = capsys.readouterr().out
    assert printed.startswith('photos: 10 pictures of 64 x 48 pixels with Labelme polygons\n')
    assert 'split: 8 train, 2 val (seed 0; 5 blocks of consecutive pictures' in printed
    assert re.search(r'\|  *4 \| road  *\| *\d\d\.\d{3}% \| *8 \|', printed)
    assert 'photos_data: 10 label maps, train.txt, val.txt\n' in printed
    assert 'photos.py: VOLO-tiny + UPerNet from random weights, 2000 iterations of 4 images' in printed
    assert printed.endswith('next: mmseg-volo check-data photos.py, mmseg-volo train photos.py\n')

    assert main('check-data', ['photos.py']) == 0
    assert 'no errors in the data of photos.py' in capsys.readouterr().out
    runner = train('photos.py', cfg_options=QUICK, seed=0)
    assert runner.iter == 2 and np.isfinite(runner.message_hub.get_scalar('train/loss').current())
    assert contents(here / 'photos') == before
    assert sorted(os.listdir(here / 'photos_data')) == ['labels', 'new_dataset.json', 'train.txt', 'val.txt']


@pytest.mark.parametrize('form', FORMATS)
def test_each_format_gives_the_label_maps_that_were_drawn(form, here, capsys):
    annotated.write_pictures(here / 'photos')
    FORMATS[form](here / 'photos')
    before = contents(here / 'photos')
    config = new_dataset('photos', arch='tiny')
    assert contents(here / 'photos') == before
    ids = {name: i for i, name in enumerate(load_config(str(config), {})['classes'])}
    assert set(ids) == {'background', *CLASSES} and ids['background'] == 0
    for name in NAMES:
        expected, certain = annotated.truth(name, ids, 0)
        drawn = label(f'photos_data/labels/{name}.png')
        assert drawn.shape == SIZE[::-1] and drawn.dtype == np.uint8 and certain.mean() > 0.5
        np.testing.assert_array_equal(drawn[certain], expected[certain])
        assert (drawn != expected).mean() < 0.02
    assert main('check-data', [str(config)]) == 0
    assert 'no errors in the data of photos.py' in capsys.readouterr().out


LAYOUTS = {
    'parallel': ('images/{}.jpg', 'labels/{}.png'),
    'short': ('img/{}.JPG', 'masks/{}.png'),
    'voc': ('JPEGImages/{}.jpg', 'SegmentationClass/{}.png'),
    'mmseg': ('img_dir/{}.jpg', 'ann_dir/{}.png'),
    'side by side': ('{}.jpg', '{}.png'),
    'endings': ('{}.png', '{}_mask.png'),
    'endings in folders': ('pictures/{}.jpg', 'gt/{}_L.png'),
    'one folder each': ('rooms/{}/x.jpg', 'rooms/{}/x_label.png'),
}
SPLIT_LAYOUTS = {
    'below': ('images/{split}/{}.jpg', 'annotations/{split}/{}.png'),
    'above': ('{split}/images/{}.jpg', '{split}/masks/{}.png'),
    'SegNet': ('{split}/{}.png', '{split}annot/{}.png'),
    'long names': ('images/{split}ing/{}.jpg', 'annotations/{split}ing/{}.png'),
}


def lay_out(root: Path, picture: str, mask: str, split: str = '', names=NAMES) -> None:
    annotated.write_pictures(root / '.drawn')
    annotated.masks(root / '.masks')
    for name in names:
        for pattern, source in ((picture, '.drawn'), (mask, '.masks')):
            path = root / pattern.format(name, split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(root / source / f'{name}.png').save(path)
    for folder in ('.drawn', '.masks'):
        shutil.rmtree(root / folder)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_pictures_and_masks_are_paired_in_any_sensible_layout(layout, here):
    lay_out(here / 'photos', *LAYOUTS[layout])
    cfg = load_config(str(new_dataset('photos', arch='tiny')), {})
    dataset = cfg.train_dataloader.dataset
    assert dataset.data_prefix == dict(img_path='photos', seg_map_path='photos')  # the masks are label maps already
    assert not (here / 'photos_data/labels').exists()
    pairs = [pair for split in ('train', 'val') for pair in read_list(here / f'photos_data/{split}.txt')]
    expected = [tuple(pattern.format(name) for pattern in LAYOUTS[layout]) for name in NAMES]
    assert sorted(pairs) == sorted(expected)


@pytest.mark.parametrize('layout', SPLIT_LAYOUTS)
def test_splits_of_the_folder_are_kept(layout, here, capsys):
    parts = dict(train=NAMES[:6], val=NAMES[6:8], test=NAMES[8:])
    if layout == 'long names':
        parts = {'train': NAMES[:6], 'test': NAMES[6:]}  # of which val is divided from train
    for split, names in parts.items():
        lay_out(here / 'photos', *SPLIT_LAYOUTS[layout], split=split, names=names)
    cfg = load_config(str(new_dataset('photos', arch='tiny')), {})
    assert cfg.test_dataloader.dataset.ann_file == 'photos_data/test.txt'
    listed = {
        split: [Path(image).stem for image, _ in read_list(here / f'photos_data/{split}.txt')] for split in cfg_splits()
    }
    assert listed['test'] == list(parts['test'])
    if 'val' in parts:
        assert listed == parts and 'split: 6 train, 2 val, 2 test (as in the folder)' in capsys.readouterr().out
    else:
        assert sorted(listed['train'] + listed['val']) == parts['train'] and len(listed['val']) == 2
    assert main('check-data', ['photos.py']) == 0


def cfg_splits() -> tuple[str, ...]:
    return 'train', 'val', 'test'


def test_lists_of_the_folder_are_kept(here, capsys):
    lay_out(here / 'VOC', *LAYOUTS['voc'])
    lists = here / 'VOC/ImageSets/Segmentation'
    lists.mkdir(parents=True)
    (lists / 'train.txt').write_text('\n'.join(NAMES[:7]))
    (lists / 'val.txt').write_text('\n'.join(NAMES[7:]) + '\n')
    (lists / 'trainval.txt').write_text('\n'.join(NAMES))
    new_dataset('VOC', arch='tiny')
    assert 'splits from ImageSets/Segmentation/train.txt, ImageSets/Segmentation/val.txt' in capsys.readouterr().out
    assert [Path(image).stem for image, _ in read_list(here / 'VOC_data/val.txt')] == NAMES[7:]


def test_frames_of_a_sequence_stay_in_one_split(photos, capsys):
    new_dataset('photos', arch='tiny')
    assert '5 groups, each in one split: names that differ in the numbers at their end' in capsys.readouterr().out
    train_names, val_names = (
        {image.partition('_')[0] for image, _ in read_list(Path(f'photos_data/{split}.txt'))}
        for split in ('train', 'val')
    )
    assert len(val_names) == 1 and len(train_names) == 4 and not train_names & val_names


def test_the_same_seed_gives_the_same_files_and_another_seed_another_split(photos):
    def written(**options) -> dict[str, str]:
        new_dataset('photos', arch='tiny', overwrite=True, **options)
        return contents(Path('photos_data')) | contents(Path()).fromkeys(['photos.py'], Path('photos.py').read_text())

    first = written()
    assert written() == first
    assert any(written(seed=seed)['val.txt'] != first['val.txt'] for seed in (1, 2, 3))


# Masks


def test_rgb_masks_become_ids_by_a_table_in_the_folder(here, capsys):
    colours = np.zeros((256, 3), np.uint8)
    colours[[0, 1, 2, 255]] = [(64, 0, 128), (128, 64, 128), (128, 128, 0), (0, 0, 0)]
    annotated.write_pictures(here / 'photos/images')
    annotated.masks(here / 'photos/labels', change=lambda ids: colours[ids])
    table = '64 0 128\tCar\n128 64 128\tRoad\n128 128 0\tTree\n192 0 0\tBus\n0 0 0\tVoid\n'
    (here / 'photos/label_colors.txt').write_text(table)
    cfg = load_config(str(new_dataset('photos', arch='tiny')), {})
    assert 'classes from photos/label_colors.txt' in capsys.readouterr().out
    assert cfg['classes'] == ['Car', 'Road', 'Tree', 'Bus']
    assert cfg['palette'] == [[64, 0, 128], [128, 64, 128], [128, 128, 0], [192, 0, 0]]
    for name in NAMES:
        np.testing.assert_array_equal(
            label(f'photos_data/labels/images/{name}.png'), annotated.truth(name, dict(car=0, road=1, tree=2), 255)[0]
        )
    (here / 'photos/label_colors.txt').write_text(table.replace('128 128 0\tTree\n', ''))
    refused('photos', r'label_colors.txt lacks 1 of the colours in the masks: \(128, 128, 0\)', overwrite=True)


def test_colours_without_a_table_are_learnt_and_named_by_their_digits(here, capsys):
    colours = np.zeros((256, 3), np.uint8)
    colours[[0, 1, 2, 255]] = [(255, 0, 0), (0, 0, 255), (0, 255, 0), (0, 0, 0)]
    annotated.write_pictures(here / 'photos/images')
    annotated.masks(here / 'photos/labels', change=lambda ids: colours[ids])
    cfg = load_config(str(new_dataset('photos', arch='tiny', void=['#000000'])), {})
    assert cfg['classes'] == ['#0000ff', '#00ff00', '#ff0000']
    assert '4 colours found and named by their hex digits' in capsys.readouterr().out
    expected = annotated.truth(NAMES[0], dict(car=2, road=0, tree=1), 255)[0]
    np.testing.assert_array_equal(label(f'photos_data/labels/images/{NAMES[0]}.png'), expected)
    refused('photos', "--void names 'sky', but the classes are #000000, #0000ff", void=['sky'], overwrite=True)


def test_masks_of_0_and_255_become_0_and_1(here, capsys):
    annotated.write_pictures(here / 'photos/images')
    annotated.masks(here / 'photos/masks', change=lambda ids: np.where(ids == 0, np.uint8(255), np.uint8(0)))
    cfg = load_config(str(new_dataset('photos', arch='tiny')), {})
    printed = capsys.readouterr().out
    assert 'the masks have the values 0 and 255 alone: 255, elsewhere void, becomes class 1, foreground' in printed
    assert cfg['classes'] == ['background', 'foreground']
    expected = annotated.truth(NAMES[0], dict(car=1, road=0, tree=0), 0)[0]
    np.testing.assert_array_equal(label(f'photos_data/labels/images/{NAMES[0]}.png'), expected)


@pytest.mark.parametrize('wide', [False, True], ids=['8 bits', '16 bits'])
def test_ids_with_gaps_are_renumbered_and_named(wide, here, capsys):
    table = np.arange(256).astype(np.uint16 if wide else np.uint8)
    table[:3] = 7, 11, 23
    annotated.write_pictures(here / 'photos/images')
    annotated.masks(here / 'photos/masks', change=lambda ids: table[ids])
    cfg = load_config(str(new_dataset('photos', arch='tiny')), {})
    assert cfg['classes'] == ['class_7', 'class_11', 'class_23']
    assert 'ids are renumbered: 7, 11, 23 become 0 to 2' in capsys.readouterr().out
    expected = annotated.truth(NAMES[0], dict(car=0, road=1, tree=2), 255)[0]
    np.testing.assert_array_equal(label(f'photos_data/labels/images/{NAMES[0]}.png'), expected)
    cfg = load_config(str(new_dataset('photos', arch='tiny', classes=CLASSES, overwrite=True)), {})
    assert cfg['classes'] == CLASSES
    refused('photos', 'names, but the masks have 3 ids: 7, 11, 23', classes=['a', 'b'], overwrite=True)


def test_zero_becomes_void_if_it_is_named_so(masked):
    for path in (masked / 'masks').iterdir():  # as in ADE20K: 0 = other, 1 to 3 = classes
        Image.fromarray(np.where(label(path) == 255, np.uint8(0), label(path) + np.uint8(1))).save(path)
    cfg = load_config(str(new_dataset('photos', arch='tiny', classes=['other', *CLASSES], void=['other'])), {})
    assert cfg['classes'] == CLASSES
    expected = annotated.truth(NAMES[0], dict(car=0, road=1, tree=2), 255)[0]
    np.testing.assert_array_equal(label(f'photos_data/labels/images/{NAMES[0]}.png'), expected)


def test_indexed_masks_whose_palettes_differ_are_read_by_colour(masked):
    colours = [[255, 0, 0], [0, 0, 255], [0, 255, 0]]
    for i, path in enumerate(sorted((masked / 'masks').iterdir())):
        ids = np.where(label(path) == 255, np.uint8(0), label(path))
        turn = i % 3  # each tool counts in its own order
        picture = Image.fromarray((ids + turn).astype(np.uint8) % 3)
        picture.putpalette([value for j in range(3) for value in colours[(j - turn) % 3]])
        picture.save(path)
    cfg = load_config(str(new_dataset('photos', arch='tiny')), {})
    assert cfg['classes'] == ['#0000ff', '#00ff00', '#ff0000']
    for name in NAMES:
        expected = annotated.truth(name, dict(car=2, road=0, tree=1), 2)[0]
        np.testing.assert_array_equal(label(f'photos_data/labels/images/{name}.png'), expected)


def test_colours_of_an_indexed_mask_become_the_palette(masked):
    for path in (masked / 'masks').iterdir():
        picture = Image.open(path)
        picture.load()
        picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, *[0] * 759])  # fewer would be saved with fewer bits
        picture.save(path)
    cfg = load_config(str(new_dataset('photos', arch='tiny')), {})
    assert cfg['palette'] == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert cfg.train_dataloader.dataset.data_prefix.seg_map_path == 'photos'


def test_one_kind_of_masks_is_chosen_by_a_pattern(here):
    assert main('toy-streets', ['toy', '--train', '4', '--val', '2', '--size', '32x32']) == 0
    refused(
        'toy',
        '^leftImg8bit/train/.* has two masks, gtFine/train/.*_labelIds.png and gtFine/train/.*_labelTrainIds.png; '
        r"choose with --masks '\*_gtFine_labelTrainIds.png'$",
    )
    new_dataset('toy', arch='tiny', masks='*_gtFine_labelTrainIds.png')
    image, name = read_list(here / 'toy_data/val.txt')[0]
    assert image == 'leftImg8bit/val/toytown/toytown_000000_000000_leftImg8bit.png'
    kept = [0, 1, 2, 5, 7, 8, 10, 11, 13]  # the classes that occur
    stem = image.removeprefix('leftImg8bit/').removesuffix('_leftImg8bit.png')
    drawn, ids = label(f'toy_data/labels/{name}'), label(f'toy/gtFine/{stem}_gtFine_labelTrainIds.png')
    np.testing.assert_array_equal(np.array([*kept, *[255] * 247])[drawn], ids)


# The config


def test_weights_of_rare_classes_are_those_of_the_config_for_camvid(camvid):
    pixels = np.zeros(11, np.int64)
    for path in (camvid / 'annotations/train').iterdir():
        pixels += np.bincount(label(path).ravel(), minlength=256)[:11]
    expected = Config.fromfile(ROOT / 'configs/volo_tiny_camvid.py').class_weight
    np.testing.assert_allclose(class_weights(pixels.tolist()), expected, atol=0.011)
    assert class_weights([50, 30, 20]) is None


@pytest.mark.parametrize(
    ('sizes', 'limit', 'scale', 'crop', 'mode'),
    [
        ([(480, 360)] * 3, 512, (480, 360), (352, 480), 'whole'),
        ([(2048, 1024)] * 3, 512, (1024, 512), (512, 512), 'whole'),
        ([(3000, 1000)] * 3, 512, (1536, 512), (512, 512), 'slide'),
        ([(480, 360)] * 3, 320, (480, 360), (320, 320), 'whole'),
        ([(600, 800)], 320, (683, 512), (320, 320), 'slide'),
        ([(400, 300), (500, 400), (900, 600)], 512, (1600, 400), (384, 384), 'whole'),
        ([(20, 10)], 512, (20, 10), (32, 32), 'whole'),
    ],
    ids=str,
)
def test_sizes_follow_from_those_of_the_pictures(sizes, limit, scale, crop, mode):
    chosen = choose_sizes(sizes, limit)
    assert (chosen.scale, chosen.crop) == (scale, crop) and f"mode='{mode}'" in chosen.test_cfg


def test_iterations_follow_from_the_number_of_pictures():
    assert [choose_iterations(count, 8, True) for count in (8, 100, 10**6)] == [1000, 1300, 4000]
    assert [choose_iterations(count, 4, True) for count in (8, 100, 10**6)] == [2000, 2500, 8000]
    assert [choose_iterations(count, 4, False) for count in (8, 100, 10**6)] == [2000, 5000, 40000]


@pytest.mark.parametrize('arch', ['d1', 'd5_segformer', 'coatnet_nano_rw', 'hvt_tiny'])
def test_any_backbone_with_a_config_can_be_chosen(arch, photos):
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    path = new_dataset('photos', arch=arch)
    cfg = load_config(str(path), {'model.backbone.init_cfg': None})
    own = load_config(choose_base(arch).name, {})
    assert cfg.model.backbone.arch == own.model.backbone.arch and bases()[arch] == choose_base(arch).name
    assert cfg.train_dataloader.batch_size == own.train_dataloader.batch_size
    assert cfg.model.backbone.img_size == cfg.crop_size and len(cfg['classes']) == 4
    assert load_config(str(path), {}).model.backbone.get('init_cfg') == own.model.backbone.get('init_cfg')
    init_default_scope('mmseg')
    import torch

    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert model.decode_head.num_classes == 4
    assert 'ade20k' not in json.dumps(cfg.to_dict(), default=str).lower()


def test_every_value_of_the_base_that_depends_on_the_data_is_replaced(photos):
    text = new_dataset('photos', arch='tiny').read_text()
    cfg = load_config('photos.py', {})
    for step, kind in ((3, 'RandomResize'), (4, 'RandomCrop')):
        assert getattr(kind, '__name__', kind) in str(cfg.train_dataloader.dataset.pipeline[step].type)
    for pipeline in (cfg.val_dataloader.dataset.pipeline, cfg.tta_pipeline):
        assert pipeline[1].type == 'Resize' and tuple(pipeline[1].scale) == (48, 32)
    assert cfg.train_dataloader.dataset.type is FolderDataset or cfg.train_dataloader.dataset.type == 'FolderDataset'
    assert cfg.param_scheduler[1].end == cfg.train_cfg.max_iters == cfg.max_iters
    assert cfg.num_classes == cfg.model.auxiliary_head.num_classes == 4 and cfg.data_root is None
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) <= 120


def test_without_a_choice_the_backbone_suits_the_machine(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert choose_base(None).name == 'volo_d1_ade20k'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert choose_base(None).name == 'volo_tiny_camvid'
    with pytest.raises(UserError, match='--arch must be one of .*coatnet_1_rw, .*d1, .*tiny, got .d9.'):
        choose_base('d9')


# Bad input


def test_a_folder_that_holds_no_annotated_pictures_is_refused(here):
    (here / 'empty').mkdir()
    annotated.write_pictures(here / 'pictures/images')
    (here / 'text').mkdir()
    (here / 'text/a.txt').write_text('a')
    refused('nowhere', '^no folder nowhere$')
    refused('empty', '^folder empty is empty$')
    refused('text', '^folder text has no pictures$')
    refused(
        'pictures', '^folder pictures has 10 pictures, but neither masks, such as masks/NAME.png, nor files of COCO'
    )


def test_masks_of_another_size_are_named_and_counted(masked):
    for name in NAMES[:3]:
        Image.open(masked / f'masks/{name}.png').crop((0, 0, 40, 32)).save(masked / f'masks/{name}.png')
    refused(
        'photos', r'^mask differs in size from its picture: photos/masks/a_1.png \(40 x 32, not 48 x 32\) and 2 more$'
    )


def test_masks_that_are_no_ids_are_refused(masked):
    path = masked / 'masks/a_1.png'
    ids = label(path)
    Image.fromarray(ids).save(path, format='JPEG')
    refused('photos', r'^mask is a JPEG, which changes values at every edge; export it as PNG: photos/masks/a_1.png$')
    Image.fromarray(ids.astype(np.uint16) * 1000).save(path)
    refused('photos', r'^mask has values outside 0 to 255, as for instances or depth; .*a_1.png \(0 to 58392\)$')
    path.write_bytes(b'no picture')
    refused('photos', r'^mask cannot be read: photos/masks/a_1.png')
    Image.fromarray(np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint8)).save(path)
    refused('photos', r'^mask has too many values, as after JPEG compression or smoothing; .*a_1.png \(256 ids\)$')
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
    Image.fromarray(noise).save(path)
    refused('photos', r'^mask has too many values, .*a_1.png \(\d+ colours\)$')
    Image.fromarray(np.full((*SIZE[::-1], 3), (1, 2, 3), np.uint8)).save(path)
    refused('photos', r'^some masks have colours and others have ids, such as [12]; use one kind')
    Image.fromarray(ids).save(path)
    (masked / 'images/a_1.png').write_bytes(b'no picture')
    refused('photos', '^picture cannot be read: photos/images/a_1.png')


def test_pictures_and_masks_that_clash_are_refused(masked):
    shutil.copy(masked / 'images/a_1.png', masked / 'images/a_1.jpg')
    refused('photos', r'^photos/masks/a_1.png belongs to two pictures, images/a_1.jpg and images/a_1.png; remove one$')
    (masked / 'images/a_1.jpg').unlink()
    for path in (masked / 'masks').iterdir():
        path.rename(path.with_name(f'x{path.name}'))
    refused('photos', '^no picture and mask in photos have the same name, such as images/a_1.png and masks/xa_1.png$')


def test_what_is_left_out_is_said(masked, capsys):
    (masked / 'masks/a_1.png').unlink()
    (masked / 'images/e_2.png').unlink()
    new_dataset('photos', arch='tiny')
    printed = capsys.readouterr().out
    assert 'left out: 1 pictures without mask, such as images/a_1.png' in printed
    assert 'left out: 1 masks alone, such as masks/e_2.png' in printed


def test_two_formats_in_a_folder_need_a_choice(photos, capsys):
    annotated.coco(photos)
    refused('photos', '^folder photos has (labelme and coco|coco and labelme); choose one with --annotations$')
    new_dataset('photos', arch='tiny', form='coco')
    assert 'with COCO annotations' in capsys.readouterr().out


def test_too_few_groups_and_odd_shares_are_refused(photos):
    refused('photos', r'^10 pictures in 1 group cannot be divided into 2 splits; --group chooses', group='_')
    refused('photos', r"^--group '\(' must|^--group must be a regular expression, got '\('", group='(')
    refused('photos', r"^--group 'zebra' matches no part of a_1.png$", group='zebra')
    refused('photos', 'must be above 0 and below 1 together', val_share=0.6, test_share=0.4)
    refused('photos', 'must be above 0', val_share=-1.0)
    refused('photos', 'val-share must be above 0', val_share=0.0)


def test_nothing_of_others_is_overwritten(photos, here):
    (here / 'photos.py').write_text('mine')
    refused('photos', '^photos.py exists; --overwrite replaces it, and --out chooses another name$')
    new_dataset('photos', arch='tiny', out='sub/other.py')
    refused('photos', '^sub/other.py exists; --overwrite', out='sub/other.py')
    assert load_config('sub/other.py', {}).train_dataloader.dataset.ann_file == 'sub/other_data/train.txt'
    (here / 'new_data').mkdir()
    (here / 'new_data/kept').write_text('mine')
    refused('photos', '^new_data was not written by this command', out='new.py', overwrite=True)
    (here / 'more_data.partial').mkdir()
    refused('photos', '^more_data.partial was left by a killed run', out='more.py')
    refused('photos', '^photos/x.py would be in photos, where nothing is written', out='photos/x.py')
    for out in ('x.txt', 'a.b.py', 'photos'):
        refused('photos', r'^--out must be a \.py file', out=out)


def test_a_folder_that_is_not_writable_is_one_sentence(photos, here, monkeypatch, capsys):
    (here / 'file').write_text('')
    refused('photos', '^cannot write to file', out='file/x.py')

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('mmseg_volo.apis.new_dataset.save_whole', full)
    refused('photos', '^cannot write to photos_data: No space left on device$')
    with pytest.raises(SystemExit) as end:
        main('new-dataset', ['photos', '--arch', 'tiny'])
    assert end.value.code == 2 and capsys.readouterr().err.startswith('error: cannot write to photos_data')


@pytest.mark.parametrize(
    ('form', 'package'), [('labelme', 'pycocotools'), ('coco', 'pycocotools'), ('cvat', 'defusedxml')]
)
def test_a_missing_package_names_its_extra(form, package, here, monkeypatch):
    annotated.write_pictures(here / 'photos')
    FORMATS[form](here / 'photos')
    hide(monkeypatch, package)
    refused('photos', rf"needs {package}: pip install 'mmseg-volo\[datasets\]'")


def test_an_interrupted_run_leaves_nothing(here):
    annotated.write_pictures(here / 'photos')
    annotated.labelme(here / 'photos')
    slow = (
        'import sys, time\nimport mmseg_volo.apis.new_dataset as module\nfrom mmseg_volo_cli import main\n'
        'save = module.save_whole\n'
        'def slow(*args):\n    save(*args); print("saved", flush=True); time.sleep(0.5)\n'
        'module.save_whole = slow\nsys.exit(main("new-dataset", ["photos", "--arch", "tiny"]))'
    )
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen([sys.executable, '-c', slow], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    while process.stdout.readline().strip() != 'saved':
        assert process.poll() is None
    assert (here / 'photos_data.partial').is_dir()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert sorted(os.listdir(here)) == ['photos']


# Real data


def test_camvid_is_used_as_it_is(camvid, here, capsys):
    cfg = load_config(str(new_dataset(str(camvid), arch='tiny', classes=[f'c{i}' for i in range(11)])), {})
    printed = capsys.readouterr().out
    assert '701 pictures of 480 x 360 pixels with masks' in printed
    assert 'split: 367 train, 101 val, 233 test (as in the folder)' in printed
    assert cfg.train_dataloader.dataset.data_prefix.seg_map_path == str(camvid)
    expected = Config.fromfile(ROOT / 'configs/volo_tiny_camvid.py').class_weight
    np.testing.assert_allclose(cfg.class_weight, expected, atol=0.011)


def test_ade20k_is_renumbered(ade20k, here, capsys):
    cfg = load_config(str(new_dataset(str(ade20k), arch='tiny', void=['class_0'])), {})
    assert 'split: 3 train, 3 val (as in the folder)' in capsys.readouterr().out
    assert cfg.num_classes == len(cfg['classes']) and 'class_0' not in cfg['classes']
    assert main('check-data', [f'{ade20k.name}.py']) == 0
