"""FolderDataset: folders and lists, what check-data says about it, and what it refuses."""

import annotated
import numpy as np
import pytest
from annotated import CLASSES, NAMES, SIZE
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from PIL import Image

from mmseg_volo import FolderDataset
from mmseg_volo.datasets.checks import CheckedDataSet
from mmseg_volo.datasets.folder import read_list, write_list
from mmseg_volo.errors import UserError
from mmseg_volo.export.description import classes_of

LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]


@pytest.fixture
def root(tmp_path):
    annotated.write_pictures(tmp_path / 'images', NAMES[:2])
    annotated.write_pictures(tmp_path / 'images/sub', NAMES[2:3], '.JPG')
    annotated.masks(tmp_path / 'labels', NAMES[:2])
    annotated.masks(tmp_path / 'labels/sub', NAMES[2:3])
    init_default_scope('mmseg')
    return tmp_path


def build(root, **more) -> FolderDataset:
    prefix = dict(img_path='images', seg_map_path='labels')
    settings = dict(type='FolderDataset', data_root=str(root), data_prefix=prefix, metainfo=dict(classes=CLASSES))
    return DATASETS.build({**settings, **more})


def images(dataset: FolderDataset) -> list[str]:
    return [dataset.get_data_info(i)['img_path'].split('/images/')[-1] for i in range(len(dataset))]


def test_pictures_of_any_suffix_and_in_subfolders_are_read_with_their_label_maps(root):
    dataset = build(root, pipeline=LOAD)
    assert images(dataset) == ['a_1.png', 'a_2.png', 'sub/b_1.JPG']
    for i, name in enumerate(NAMES[:3]):
        sample = dataset[i]
        assert sample['img'].shape == (*SIZE[::-1], 3)
        expected = annotated.truth(name, {label: i for i, label in enumerate(CLASSES)}, 255)[0]
        np.testing.assert_array_equal(sample['gt_seg_map'], expected)
    assert dataset.metainfo['classes'] == CLASSES and len(dataset.metainfo['palette']) == 3


def test_a_list_selects_and_may_name_label_maps(root):
    (root / 'labels/other.png').write_bytes((root / 'labels/a_2.png').read_bytes())
    (root / 'list.txt').write_text('sub/b_1.JPG\na_1.png\tother.png\n\n')
    dataset = build(root, ann_file='list.txt', pipeline=LOAD)
    assert images(dataset) == ['sub/b_1.JPG', 'a_1.png']
    np.testing.assert_array_equal(dataset[1]['gt_seg_map'], np.array(Image.open(root / 'labels/a_2.png')))


def test_label_maps_may_lie_beside_the_pictures_or_be_missing(root):
    for path in (root / 'images').rglob('*.png'):
        Image.open(path).save(path.with_suffix('.jpg'))
        (root / 'labels' / path.name).replace(path)
    dataset = build(root, data_prefix=dict(img_path='images', seg_map_path='images'))
    assert images(dataset) == ['a_1.jpg', 'a_2.jpg', 'sub/b_1.JPG']
    assert dataset.get_data_info(0)['seg_map_path'].endswith('images/a_1.png')
    unlabelled = build(root, data_prefix=dict(img_path='images'), img_suffix='.jpg')
    assert images(unlabelled) == ['a_1.jpg', 'a_2.jpg', 'sub/b_1.JPG']
    assert 'seg_map_path' not in unlabelled.get_data_info(0)


def test_label_maps_without_picture_are_found_where_no_list_says_what_to_read(root):
    (root / 'images/a_1.png').unlink()
    settings = dict(
        type='FolderDataset',
        data_root=str(root),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        metainfo=dict(classes=CLASSES),
        pipeline=LOAD,
    )
    assert CheckedDataSet(settings, 'train', 3, 3).labels_without_image() == [str(root / 'labels/a_1.png')]
    (root / 'list.txt').write_text('a_2.png\n')
    assert CheckedDataSet({**settings, 'ann_file': 'list.txt'}, 'train', 3, 3).labels_without_image() == []


def test_what_cannot_be_read_is_one_sentence(root):
    with pytest.raises(UserError, match=r'FolderDataset needs metainfo=dict\(classes=\[...\]\)'):
        build(root, metainfo=None)
    with pytest.raises(UserError, match='cannot read the list .*/nowhere.txt .No such file'):
        build(root, ann_file='nowhere.txt')
    (root / 'list.txt').write_text('a\tb\tc\n')
    with pytest.raises(UserError, match=r"must have a picture per line, .*, got \['a', 'b', 'c'\]"):
        build(root, ann_file='list.txt')
    Image.open(root / 'images/a_1.png').save(root / 'images/a_1.jpg')
    with pytest.raises(UserError, match='^a_1.png and a_1.jpg in .* have one label map, .*a_1.png; remove one$'):
        build(root)


def test_lists_keep_every_name_or_refuse_it(tmp_path):
    pairs = [('a b.jpg', 'ä/道.png'), ('\udcff.jpg', "'.png"), (' x.jpg', 'x .png')]
    write_list(tmp_path / 'list.txt', pairs)
    assert read_list(tmp_path / 'list.txt') == pairs
    for name in ('a\tb', 'a\nb'):
        with pytest.raises(UserError, match='has a tab or a line break; rename the file'):
            write_list(tmp_path / 'other.txt', [(name, 'x')])
    assert not (tmp_path / 'other.txt').exists()


def test_classes_are_known_without_a_checkpoint_that_names_them(root):
    dataset = Config(dict(type='FolderDataset', metainfo=dict(classes=CLASSES, palette=[[1, 2, 3]] * 3)))._cfg_dict
    assert classes_of(dataset)['classes'] == CLASSES and classes_of(dataset)['palette'] == [[1, 2, 3]] * 3
