"""Formats of annotations: what each draws, against independent rasterisers, and what it refuses."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import annotated
import numpy as np
import pytest
from annotated import NAMES, SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mmseg_volo.datasets.annotations import open_annotations
from mmseg_volo.datasets.annotations.base import palette_for, voc_colour
from mmseg_volo.datasets.annotations.coco import _decompressed, check_run_lengths, decode_run_lengths
from mmseg_volo.datasets.annotations.drawing import UNCOVERED, Region, area, clip, draw
from mmseg_volo.datasets.annotations.label_studio import decode_brush
from mmseg_volo.datasets.annotations.tables import find_table, read_table
from mmseg_volo.datasets.annotations.words import place_of, without_mask_ending
from mmseg_volo.datasets.checks import LabelError
from mmseg_volo.errors import UserError

coco_mask = pytest.importorskip('pycocotools.mask')
pytest.importorskip('defusedxml')
WIDTH, HEIGHT = SIZE
EXAMPLES = int(os.environ.get('EXAMPLES', 30))  # of damage; more for a longer search
# mask2rle of label-studio-converter 0.0.59 for the mask that `test_brush_strokes...` builds.
OFFICIAL = (
    '00005dc0391bff0aa700e03a7ffc064c023ffc2e011ffe17008fff0b8047ff85c023ffc2e011ffe17008fff0b8047ff85c023ffbe01c09ef'
    'fef8047ff85c023ffc2e011ffe17008fff0b8047ff85c023ffc2e011ffe17008fff0b8047ff85c023ffc2e011ffecf00e05d7ffc066c0381'
    '9dfff015300e06f7ffc047c0381d1ffeff00e0777ffbcc0381ddffef300e0777ffbfc0381d1fff011f00e06f7ffc054c03819dfff019b00e'
    '05d7ffc07ec03813dfff028700e03a7ffc3e8c00'
)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    annotated.write_pictures(tmp_path / 'photos', NAMES[:2])
    return tmp_path / 'photos'


def drawn(photos: Path, **ids: int) -> np.ndarray:
    """The label map of the first picture; 9 where there is no region."""
    annotations = open_annotations(str(photos))
    sample = next(sample for sample in annotations.samples if sample.image == f'{NAMES[0]}.png')
    return annotations.draw(sample, SIZE, {UNCOVERED: 9, **ids})


def refused(photos: Path | str, message: str, **options) -> None:
    with pytest.raises(UserError, match=message) as caught:
        annotations = open_annotations(str(photos), **options)
        for sample in annotations.samples:
            annotations.look(sample, SIZE)
    assert '\n' not in str(caught.value)


def write(path: Path, document) -> None:
    path.write_text(document if isinstance(document, str) else json.dumps(document))


# Drawing


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(-30, 90), st.floats(-30, 70)), min_size=3, max_size=9))
def test_polygons_are_filled_where_the_centre_of_a_pixel_is_inside(corners):
    label = draw([Region('a', [np.array(corners)])], SIZE, {UNCOVERED: 0, 'a': 1})
    certain = ~annotated.near(corners)
    np.testing.assert_array_equal(label[certain] == 1, annotated.inside(corners)[certain])


def test_polygons_agree_with_pillow_apart_from_their_edges():
    for name in NAMES:
        for _, ring in annotated.polygons(name):
            picture = Image.new('1', SIZE)
            ImageDraw.Draw(picture).polygon([(x - 0.5, y - 0.5) for x, y in ring], fill=1)
            label = draw([Region('a', [np.array(ring)])], SIZE, {UNCOVERED: 0, 'a': 1})
            different = (label == 1) != np.asarray(picture)
            assert not different[~annotated.near(ring, reach=1.6)].any() and different.mean() < 0.06


@pytest.mark.parametrize('far', [0.0, 1e3, 9.9e6])
def test_the_part_of_a_polygon_in_the_picture_is_kept_however_far_it_reaches(far):
    ring = np.array([[5 - far, 4], [20 + far, 4], [20 + far, 30 + far], [5 - far, 30 + far]])
    label = draw([Region('a', [ring])], SIZE, {UNCOVERED: 0, 'a': 1})
    expected = np.zeros(SIZE[::-1], int)
    expected[4:30, 5:20] = 1
    if far:
        expected[4:, :] = 1
    np.testing.assert_array_equal(label, expected)


def test_parts_of_a_region_are_united_and_later_regions_cover_earlier_ones():
    one, two = (np.array([[x, 2.0], [x + 10, 2], [x + 10, 12], [x, 12]]) for x in (0.0, 5.0))
    label = draw([Region('a', [one, two]), Region('b', [two])], SIZE, {UNCOVERED: 7, 'a': 1, 'b': 2})
    assert (label[2:12, :5] == 1).all() and (label[2:12, 5:15] == 2).all() and (label == 7).sum() == label.size - 150


def test_a_polygon_without_a_pixel_draws_nothing():
    for ring in ([[5, 5], [5, 5], [5, 5]], [[5, 5], [9, 5], [14, 5]], [[100, 5], [109, 5], [114, 9]]):
        label = draw([Region('a', [np.array(ring, float)])], SIZE, {UNCOVERED: 0, 'a': 1})
        assert not label.any()


def test_areas_are_those_of_triangles_and_squares():
    assert area(np.array([[0, 0], [4, 0], [4, 4], [0, 4]])) == 16 and area(np.array([[0, 0], [0, 3], [4, 0]])) == 6
    assert len(clip(np.array([[-5.0, -5], [-1, -5], [-1, -1]]), 10, 10)) == 0


# COCO


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
def test_run_lengths_of_coco_are_decoded_exactly(seed, height, width):
    rng = np.random.default_rng(seed)
    mask = (rng.random((height, width)) < rng.choice([0, 0.1, 0.5, 1])).astype(np.uint8)
    mask[: height // 2, : width // 3] = 1
    column_major = mask.T.ravel()
    borders = [0, *(np.flatnonzero(np.diff(column_major)) + 1), column_major.size]
    counts = ([0] if column_major[0] else []) + np.diff(borders).tolist()
    compressed = coco_mask.encode(np.asfortranarray(mask))['counts'].decode()
    assert _decompressed(compressed) == counts
    for runs in (counts, compressed):
        runs = dict(size=[height, width], counts=runs)
        assert check_run_lengths(runs, (width, height)) == mask.sum()
        decoded, left, top = decode_run_lengths(runs, (width, height))
        assert (left, top) == (0, 0) and decoded.dtype == bool
        np.testing.assert_array_equal(decoded, mask)


@pytest.mark.parametrize(
    ('runs', 'message'),
    [
        (dict(size=[32, 48], counts=[5, 5]), 'run lengths cover 10 pixels, but the image has 1536'),
        (dict(size=[32, 48], counts=[5, 10**9]), 'run lengths cover 1000000005 pixels'),
        (dict(size=[32, 48], counts=[-5, 1541]), 'run lengths must be numbers from 0'),
        (dict(size=[32, 48], counts=[1536.0]), 'run lengths must be numbers from 0'),
        (dict(size=[32, 48], counts='zzzzz\u20ac'), 'run lengths must be numbers from 0'),
        (dict(size=[32, 48], counts='o' * 60), 'run lengths must be numbers from 0'),
        (dict(size=[32, 48], counts=None), 'run lengths must be numbers from 0'),
        (dict(size=[48, 32], counts=[1536]), r'run lengths are for \[48, 32\] \(height, width\)'),
        (dict(counts=[1536]), 'run lengths are for None'),
    ],
    ids=str,
)
def test_damaged_run_lengths_are_refused(runs, message, photos):
    document = annotated.coco(photos, NAMES[:2])
    document['annotations'][0]['segmentation'] = runs
    write(photos / 'instances.json', document)
    refused('photos', f'^photos/instances.json is no valid file of COCO annotations: {message}')


def test_coco_draws_small_regions_over_large_ones_and_reads_both_kinds_of_regions(photos):
    document = annotated.coco(photos, NAMES[:1])
    small = np.zeros(SIZE[::-1], np.uint8)
    small[25:28, 2:5] = 1
    runs = dict(size=[HEIGHT, WIDTH], counts=coco_mask.encode(np.asfortranarray(small))['counts'].decode())
    document['annotations'].insert(0, dict(image_id=0, category_id=5, segmentation=runs, iscrowd=1))
    write(photos / 'instances.json', document)
    expected, certain = annotated.truth(NAMES[0], dict(car=0, road=1, tree=2), 9)
    expected[25:28, 2:5] = 2
    label = drawn(photos, car=0, road=1, tree=2)
    np.testing.assert_array_equal(label[certain], expected[certain])


def test_splits_of_coco_are_in_the_names_of_files_or_folders(photos):
    for split, names in (('train2017', NAMES[:1]), ('val2017', NAMES[1:2])):
        annotated.coco(photos, names, f'instances_{split}.json')
    assert [sample.split for sample in open_annotations('photos').samples] == ['train', 'val']
    for folder, name in (('train', 'x'), ('valid', 'x')):  # pictures of one name in two folders, as some exports have
        annotated.write_pictures(photos.parent / 'export' / folder, [name])
        annotated.coco(photos.parent / 'export' / folder, [name], '_annotations.coco.json')
    samples = open_annotations('export').samples
    assert [(sample.image, sample.split) for sample in samples] == [('train/x.png', 'train'), ('valid/x.png', 'val')]


def coco_with(change) -> dict:
    def changed(photos: Path) -> None:
        document = annotated.coco(photos, NAMES[:2])
        change(document)
        write(photos / 'instances.json', document)

    return changed


def other_list(photos: Path) -> None:
    document = annotated.coco(photos, NAMES[:1], 'train.json')
    document['images'][0].update(file_name=f'{NAMES[1]}.png')
    document['categories'][0]['name'] = 'automobile'
    write(photos / 'val.json', document)


COCO_MISTAKES = {
    'images no list': (coco_with(lambda d: d.update(images=3)), 'images must be a list of objects'),
    'unknown image': (coco_with(lambda d: d['annotations'][0].update(image_id=77)), 'belongs to the image 77, which'),
    'unknown class': (coco_with(lambda d: d['annotations'][0].update(category_id=[1])), 'has the category None'),
    'no size': (coco_with(lambda d: d['images'][0].pop('width')), 'width and height must be numbers, got None and 32'),
    'no name': (coco_with(lambda d: d['images'][0].pop('file_name')), 'an image has no file_name'),
    'equal ids': (coco_with(lambda d: d['images'][0].update(id=1)), 'two images share an id'),
    'equal classes': (coco_with(lambda d: d['categories'][0].update(name='road')), 'two categories share'),
    'two numbers': (coco_with(lambda d: d['annotations'][0].update(segmentation=[[1, 2, 3, 4]])), '3 or more points'),
    'odd numbers': (coco_with(lambda d: d['annotations'][0].update(segmentation=[[1] * 7])), 'points must be pairs'),
    'words': (coco_with(lambda d: d['annotations'][0].update(segmentation=[['a'] * 6])), 'points must be pairs'),
    'infinite': (coco_with(lambda d: d['annotations'][0].update(segmentation=[[1e999] * 6])), 'with finite numbers'),
    'panoptic': (coco_with(lambda d: d['annotations'][0].update(segments_info=[])), 'it has panoptic segments'),
    'lost picture': (
        coco_with(lambda d: d['images'][0].update(file_name='../../etc/x.png')),
        r'^photos lacks 1 of the pictures that its annotations name, such as \.\./\.\./etc/x.png; copy or link',
    ),
    'two lists': (other_list, "^val.json lists the class 'automobile', but train.json does not|^train.json lists the"),
    'twice': (
        lambda photos: [annotated.coco(photos, NAMES[:1], name) for name in ('one.json', 'two.json')],
        r'^a_1.png is annotated in one.json and again in two.json; remove one$',
    ),
}


@pytest.mark.parametrize('mistake', COCO_MISTAKES)
def test_mistakes_in_coco_files_are_one_sentence(mistake, photos):
    change, message = COCO_MISTAKES[mistake]
    change(photos)
    refused('photos', message)


def test_boxes_and_unused_classes_of_coco_are_left_out_and_said(photos):
    coco_with(lambda d: (d['annotations'][0].update(segmentation=[]), d['categories'].append(dict(id=9, name='bus'))))(
        photos
    )
    annotations = open_annotations('photos')
    assert annotations.notes == ['left out: 1 boxes without a segmentation']
    chosen = annotations.classes({'road': 5, 'tree': 5, 'car': 5, UNCOVERED: 5}, None, None, ())
    assert chosen.names == ['background', 'car', 'road', 'tree']
    assert chosen.notes == [
        'left out: classes that never occur: bus',
        '25.0% of the pixels are in no region: they are the class background (--rest void changes that)',
    ]


# Labelme


def test_rectangles_circles_and_masks_of_labelme_are_drawn_and_lines_left_out(photos):
    ring = np.array([[3, 4], [20, 9]])
    mask = np.random.default_rng(0).random((5, 8)) < 0.5
    shapes = [
        dict(label='box', shape_type='rectangle', points=[[20, 9], [3, 4]]),
        dict(label='disc', shape_type='circle', points=[[30, 16], [36, 16]]),
        dict(label='brush', shape_type='mask', points=[[10, 20], [17, 24]], mask=annotated.png_text(mask)),
        dict(label='edge', shape_type='mask', points=[[44, 30], [51, 34]], mask=annotated.png_text(mask)),
        dict(label='wire', shape_type='linestrip', points=ring.tolist()),
        dict(label='dot', shape_type='point', points=[[1, 1]]),
    ]
    annotated.labelme(photos, NAMES[:1], shapes=shapes, imagePath='..\\elsewhere\\a_1.png')
    label = drawn(photos, box=0, disc=1, brush=2, edge=3)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    distance = np.hypot(columns - 30, rows - 16)
    assert (label[4:9, 3:20] == 0).all() and (label == 0).sum() == 85
    assert (label[distance < 5.2] == 1).all() and (label[distance > 6.8] != 1).all()
    np.testing.assert_array_equal(label[20:25, 10:18] == 2, mask)
    np.testing.assert_array_equal(label[30:, 44:] == 3, mask[:2, :4])
    assert open_annotations('photos').notes == [
        'left out: 1 linestrips',
        'left out: 1 points',
        'left out: 1 pictures without Labelme polygons',
    ]


def test_labelme_names_void_and_background(photos):
    shapes = [
        dict(label=label, shape_type='rectangle', points=[[x, 0], [x + 10, 32]])
        for x, label in ((0, '__ignore__'), (10, '_background_'), (20, 'car'))
    ]
    annotated.labelme(photos, NAMES[:1], shapes=shapes)
    annotations = open_annotations('photos')
    pixels = annotations.look(annotations.samples[0], SIZE)
    assert pixels == {'__ignore__': 320, '_background_': 320, 'car': 320, UNCOVERED: 18 * 32}
    chosen = annotations.classes(pixels, None, None, ())
    assert chosen.names == ['background', 'car'] and chosen.palette[0] == [0, 0, 0]
    assert chosen.ids == {'__ignore__': 255, '_background_': 0, 'car': 1, UNCOVERED: 0}
    assert annotations.classes(pixels, None, 'void', ()).ids[UNCOVERED] == 255
    assert annotations.classes(pixels, None, None, ['car']).names == ['background']


LABELME_MISTAKES = {
    'no list': (dict(shapes=3), 'it needs imagePath and a list of shapes'),
    'no shape': (dict(shapes=[3]), 'a shape must be an object, got 3'),
    'no label': (dict(shapes=[dict(points=[[1, 1]] * 3)]), 'a label must be a word, got None'),
    'empty label': (dict(shapes=[dict(label=' ', points=[[1, 1]] * 3)]), "a label must be a word, got ' '"),
    'no points': (dict(shapes=[dict(label='a')]), 'points must be pairs of numbers, got None'),
    'two points': (dict(shapes=[dict(label='a', points=[[1, 1], [2, 2]])]), '3 or more points'),
    'odd shape': (dict(shapes=[dict(label='a', shape_type='star', points=[])]), "unknown shape_type 'star'"),
    'odd mask': (
        dict(shapes=[dict(label='a', shape_type='mask', points=[[0, 0], [3, 3]], mask='!')]),
        'a mask cannot be decoded',
    ),
    'other mask': (
        dict(
            shapes=[dict(label='a', shape_type='mask', points=[[0, 0], [3, 3]], mask=annotated.png_text(np.eye(3) > 0))]
        ),
        r'a mask has \(3, 3\) pixels, but its corners give \(4, 4\)',
    ),
    'mask outside': (
        dict(
            shapes=[
                dict(label='a', shape_type='mask', points=[[-1, 0], [1, 2]], mask=annotated.png_text(np.eye(3) > 0))
            ]
        ),
        'a mask begins outside the picture',
    ),
    'odd size': (dict(imageWidth='wide'), "width and height must be numbers, got 'wide'"),
    'lost picture': (dict(imagePath='b.png'), r'^photos lacks 1 of the pictures .*, such as b.png'),
}


@pytest.mark.parametrize('mistake', LABELME_MISTAKES)
def test_mistakes_in_labelme_files_are_one_sentence(mistake, photos):
    more, message = LABELME_MISTAKES[mistake]
    annotated.labelme(photos, NAMES[:1], **more)
    if mistake == 'lost picture':
        (photos / f'{NAMES[0]}.json').rename(photos / 'c.json')
    refused('photos', message if message.startswith('^') else f'^photos/a_1.json is no valid file of .*: {message}')


def test_two_spellings_of_a_class_are_refused(photos):
    annotated.labelme(photos, NAMES[:2])
    path = photos / f'{NAMES[1]}.json'
    path.write_text(path.read_text().replace('"car"', '"Car"'))
    refused('photos', "^two spellings of one class: 'Car' in a_2.json and 'car' in a_1.json$")


# CVAT


def test_masks_boxes_and_ellipses_of_cvat_are_drawn_by_z_order(photos):
    annotated.cvat(photos, NAMES[:1])
    path = photos / 'annotations.xml'
    shapes = (
        '<box label="box" xtl="2" ytl="2" xbr="22" ybr="12" z_order="1"/>'
        '<mask label="brush" rle="2, 3, 1, 4" left="4" top="5" width="5" height="2" z_order="9"/>'
        '<ellipse label="disc" cx="36" cy="14" rx="8" ry="4" rotation="90" z_order="0"/>'
        '<box label="tilted" xtl="10" ytl="20" xbr="20" ybr="24" rotation="90" z_order="2"/>'
        '<points label="dot" points="1,1"/><polyline label="wire" points="1,1;2,2"/><tag label="night"/>'
    )
    path.write_text(re.sub('<polygon.*?/></image>', f'{shapes}</image>', path.read_text()))
    annotations = open_annotations('photos')
    label = drawn(photos, box=0, brush=1, disc=2, tilted=3)
    assert label[5:7, 4:9].tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    across = np.hypot((columns - 36) / 4, (rows - 14) / 8)
    assert (label[across < 0.8] == 2).all() and (label[across > 1.2] != 2).all()
    assert (label[17:27, 13:17] == 3).all() and (label == 3).sum() == 40
    assert annotations.notes[:2] == ['left out: 1 points', 'left out: 1 polylines']


def test_cvat_lists_classes_and_their_colours(photos):
    annotated.cvat(photos, NAMES[:2])
    annotations = open_annotations('photos')
    chosen = annotations.classes({'tree': 1, 'road': 1, 'car': 98}, None, None, ())
    assert chosen.names == ['car', 'road', 'tree'] and chosen.palette == [[255, 0, 0], [128, 64, 128], [0, 255, 0]]


CVAT_MISTAKES = {
    'cut': (lambda text: text[:-40], '^photos/annotations.xml is no readable XML '),
    'entities': (
        lambda text: text.replace('?>', '?><!DOCTYPE a [<!ENTITY e "eee">]>', 1),
        '^photos/annotations.xml has a document type, which annotations do not need and which could do harm; --annot',
    ),
    'tracks': (lambda text: text.replace('</annotations>', '<track/></annotations>'), 'it has the tracks of a video'),
    'no number': (lambda text: text.replace('points="', 'points="x'), 'numbers are needed, got'),
    'infinite': (lambda text: text.replace('points="', 'points="nan,1;'), 'finite numbers are needed, got'),
    'no label': (lambda text: text.replace('<polygon label="car"', '<polygon'), 'a label must be a word, got None'),
    'no size': (lambda text: text.replace('width=', 'breadth='), 'width and height must be numbers'),
    'unknown shape': (lambda text: text.replace('<polygon', '<blob'), "unknown shape 'blob'"),
    'colour': (lambda text: text.replace('#804080', '#80408z'), 'a colour must be #RRGGBB'),
    'short mask': (
        lambda text: text.replace(
            '</image>', '<mask label="car" rle="1,2" left="0" top="0" width="4" height="4"/></image>'
        ),
        'the run lengths of a mask cover 3 pixels, not 16',
    ),
    'mask outside': (
        lambda text: text.replace(
            '</image>', '<mask label="car" rle="2" left="48" top="0" width="2" height="1"/></image>'
        ),
        'a mask reaches outside its picture of 48 x 32',
    ),
}


@pytest.mark.parametrize('mistake', CVAT_MISTAKES)
def test_mistakes_in_cvat_files_are_one_sentence(mistake, photos):
    annotated.cvat(photos, NAMES[:2])
    change, message = CVAT_MISTAKES[mistake]
    path = photos / 'annotations.xml'
    path.write_text(change(path.read_text()))
    refused('photos', message)


def test_other_xml_is_no_annotation(photos):
    (photos / 'a_1.xml').write_text('<annotation><object/></annotation>')
    refused('photos', '^folder photos has 2 pictures, but neither masks')


# Label Studio


def test_brush_strokes_are_decoded_as_label_studio_encodes_them():
    rows, columns = np.mgrid[:20, :300]
    mask = (((columns - 140) / 120) ** 2 + ((rows - 9) / 8) ** 2 < 1) * np.uint8(255)
    mask[3, ::7] = 255
    for data in (bytes.fromhex(OFFICIAL), bytes(annotated.brush(mask))):
        np.testing.assert_array_equal(
            decode_brush(data, mask.size * 4).reshape(20, 300, 4), mask[..., None].repeat(4, 2)
        )


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=60), st.integers(0, 200))
def test_any_bytes_are_a_brush_stroke_or_a_value_error(data, count):
    for start in (b'', count.to_bytes(4, 'big') + bytes.fromhex('391bfc')):
        try:
            assert decode_brush(start + data, count).shape == (count,)
        except ValueError:
            pass


def test_rectangles_and_ellipses_of_label_studio_are_drawn(photos):
    annotated.label_studio(photos, NAMES[:1])
    path = photos / 'project-1.json'
    tasks = json.loads(path.read_text())
    common = dict(original_width=WIDTH, original_height=HEIGHT)
    tasks[0]['annotations'][1]['result'] = [
        common | dict(value=dict(x=25, y=25, width=50, height=25, rotation=0, rectanglelabels=['box'])),
        common | dict(value=dict(x=50, y=50, radiusX=12.5, radiusY=37.5, rotation=90, ellipselabels=['disc'])),
        common | dict(value=dict(choices=['night'])),
        common | dict(value=dict(x=3, y=3, keypointlabels=['dot'], labels=['dot'])),
    ]
    write(path, tasks)
    label = drawn(photos, box=0, disc=1)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    across = np.hypot((columns - 24) / 12, (rows - 16) / 6)
    assert (label[across < 0.85] == 1).all() and (label[across > 1.15] != 1).all()
    assert (label[8:10, 12:36] == 0).all()
    assert 'left out: 1 results that enclose no region' in open_annotations('photos').notes


def label_studio_with(**more):
    def change(tasks: list) -> None:
        tasks[0]['annotations'][1]['result'][0].update(more)

    return change


LABEL_STUDIO_MISTAKES = {
    'two labels': (
        label_studio_with(value=dict(points=[[1, 1]] * 3, polygonlabels=['a', 'b'])),
        r"a region must have one label, got \['a', 'b'\]",
    ),
    'no value': (label_studio_with(value=3), 'a result has no value'),
    'rotated': (label_studio_with(image_rotation=90), 'a picture was rotated in Label Studio'),
    'two sizes': (label_studio_with(original_width=3), 'the regions of a_1.png are for pictures of several sizes'),
    'short stroke': (
        label_studio_with(value=dict(rle=[0, 0], brushlabels=['a'])),
        r'a brush stroke cannot be decoded \(it ends early\)',
    ),
    'huge stroke': (
        label_studio_with(value=dict(rle=[255] * 80, brushlabels=['a'])),
        'a brush stroke cannot be decoded .it has 4294967295 values of 32 bits, but its picture 6144 of 8',
    ),
    'odd stroke': (label_studio_with(value=dict(rle=10**12, brushlabels=['a'])), 'must be a list of bytes'),
    'odd bytes': (label_studio_with(value=dict(rle=[999], brushlabels=['a'])), 'a brush stroke cannot be decoded'),
    'no points': (label_studio_with(value=dict(points='x', polygonlabels=['a'])), 'points must be pairs'),
    'odd box': (
        label_studio_with(value=dict(x=1, y=1, width='w', height=2, rectanglelabels=['a'])),
        'points must be pairs',
    ),
    'results': (lambda tasks: tasks[0]['annotations'][1].update(result=3), 'result must be a list of objects'),
    'lost picture': (
        lambda tasks: tasks[0]['data'].update(image='s3://bucket/z.png'),
        r'^photos lacks 1 of the pictures that its annotations name, such as s3://bucket/z.png',
    ),
}


@pytest.mark.parametrize('mistake', LABEL_STUDIO_MISTAKES)
def test_mistakes_in_label_studio_files_are_one_sentence(mistake, photos):
    annotated.label_studio(photos, NAMES[:2])
    change, message = LABEL_STUDIO_MISTAKES[mistake]
    path = photos / 'project-1.json'
    tasks = json.loads(path.read_text())
    change(tasks)
    write(path, tasks)
    refused('photos', message)


@pytest.mark.parametrize('name', ['/data/local-files/?d=street/a_1.png', 'https://host/x/a_1.png?token=3', 'a%5F1.png'])
def test_pictures_of_label_studio_are_found_by_the_end_of_their_address(name, photos):
    annotated.label_studio(photos, NAMES[:1])
    path = photos / 'project-1.json'
    tasks = json.loads(path.read_text())
    tasks[0]['data'] = dict(image=name)
    tasks.append(dict(data=dict(image='b.png'), annotations=[]))
    write(path, tasks)
    annotations = open_annotations('photos')
    assert [sample.image for sample in annotations.samples] == ['a_1.png']
    assert 'left out: 1 tasks that nobody has annotated' in annotations.notes


# Files that are not what they should be


@pytest.mark.parametrize('text', ['{', '[' * 10**5, '\x00', '"\\ud800', '{"shapes": NaN'])
def test_damaged_json_is_named(text, photos):
    (photos / 'a_1.json').write_text(text)
    refused('photos', r'^photos/a_1.json is no readable JSON \(')
    assert not open_annotations_of_masks(photos)


def open_annotations_of_masks(photos: Path) -> bool:
    with pytest.raises(UserError, match='has 2 pictures, but no masks'):
        open_annotations(str(photos), 'masks')
    return False


ODD = [None, -1, 0, 1.5, 1e308, float('nan'), '', 'x', '\udcff', '../a_1.png', [], {}, [[]], [None], 10**30, True]


def containers(node) -> list:
    """Every list and dict inside a document, and the document."""
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return ([node] if isinstance(node, dict | list) and node else []) + [
        c for value in inner for c in containers(value)
    ]


def survives(folder: Path) -> None:
    """Reading and drawing must end, with one sentence if not with a result."""
    try:
        annotations = open_annotations(str(folder))
        for sample in annotations.samples:
            pixels = annotations.look(sample, SIZE)
            annotations.draw(sample, SIZE, annotations.classes(pixels, None, None, ()).ids)
    except (UserError, LabelError):
        pass


@pytest.mark.parametrize('form', ['labelme', 'coco', 'label_studio'])
def test_any_odd_value_in_a_file_is_read_or_refused(form, photos):
    getattr(annotated, form)(photos, NAMES[:2])
    path = sorted(photos.glob('*.json'))[0]
    text = path.read_text()

    @settings(deadline=None, max_examples=EXAMPLES)
    @given(st.lists(st.tuples(st.floats(0, 0.999), st.floats(0, 0.999), st.sampled_from(ODD)), min_size=1, max_size=2))
    def change(edits):
        document = json.loads(text)
        for where, which, value in edits:
            found = containers(document)
            if found:
                container = found[int(where * len(found))]
                key = list(container)[int(which * len(container))] if isinstance(container, dict) else None
                container[int(which * len(container)) if key is None else key] = copy.deepcopy(value)
        path.write_text(json.dumps(document))
        survives(photos)

    change()


@settings(deadline=None, max_examples=3 * EXAMPLES)
@given(st.sampled_from(['labelme', 'cvat', 'coco']), st.floats(0, 0.999), st.binary(max_size=5), st.integers(0, 9))
def test_any_damage_to_a_file_is_read_or_refused(tmp_path_factory, form, where, inserted, lost):
    folder = tmp_path_factory.getbasetemp() / 'damaged'
    shutil.rmtree(folder, ignore_errors=True)
    annotated.write_pictures(folder, NAMES[:1])
    getattr(annotated, form)(folder, NAMES[:1])
    [path] = [path for path in folder.iterdir() if path.suffix != '.png']
    content = path.read_bytes()
    at = int(where * len(content))
    path.write_bytes(content[:at] + inserted + content[at + lost :])
    survives(folder)


def test_huge_files_are_refused_before_they_are_read(photos, monkeypatch):
    monkeypatch.setattr('mmseg_volo.datasets.annotations.base.MAX_DOCUMENT', 10)
    annotated.labelme(photos, NAMES[:1])
    refused('photos', '^photos/a_1.json has more than 0 GiB; split it')
    (photos / 'a_1.json').unlink()
    annotated.cvat(photos, NAMES[:1])
    refused('photos', '^photos/annotations.xml has more than 0 GiB; split it')


def test_a_picture_that_could_be_two_is_refused(photos):
    annotated.write_pictures(photos / 'x', NAMES[:1])
    annotated.write_pictures(photos / 'y', NAMES[:1])
    (photos / 'a_1.png').unlink()
    annotated.coco(photos, NAMES[:1])
    refused('photos', '^instances.json names a_1.png, which may be x/a_1.png or y/a_1.png; rename one$')


# Names and tables


@pytest.mark.parametrize(
    ('folders', 'expected'),
    [
        ('images/train', ('picture', 'train', ())),
        ('trainannot', ('mask', 'train', ())),
        ('gtFine/val/aachen', ('mask', 'val', ('aachen',))),
        ('leftImg8bit/test', ('picture', 'test', ())),
        ('SegmentationClassPNG', ('mask', None, ())),
        ('SegmentationObject', ('other', None, ())),
        ('1_images_val2017', ('picture', 'val', ())),
        ('trainers/maskerade', (None, None, ('trainers', 'maskerade'))),
        ('12', (None, None, ('12',))),
    ],
)
def test_words_in_the_names_of_folders_are_understood(folders, expected):
    assert tuple(place_of(folders.split('/'))) == expected


def test_endings_of_masks_are_understood():
    stems = ('a_mask', 'a-label', 'a_L', 'a_gtFine_labelIds', 'a.gt', 'a', 'mask', 'animal')
    assert [without_mask_ending(stem) for stem in stems] == ['a', 'a', 'a', 'a', 'a', 'a', 'mask', 'animal']


@pytest.mark.parametrize(
    ('text', 'names', 'colours', 'numbers'),
    [
        ('64 128 64\tAnimal\n192 0 128\t\tArchway\n', ['Animal', 'Archway'], [[64, 128, 64], [192, 0, 128]], []),
        (
            'name,r,g,b\nSky,128,128,128\nTraffic Light,0,64,64\n',
            ['Sky', 'Traffic Light'],
            [[128] * 3, [0, 64, 64]],
            [],
        ),
        (
            '# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:64,0,128::\n',
            ['background', 'car'],
            [[0] * 3, [64, 0, 128]],
            [],
        ),
        ('5: pole\n0: road\n', ['road', 'pole'], [], [5, 0]),
        ('road,0\npole,5\n', ['road', 'pole'], [], [0, 5]),
        ('__ignore__\n_background_\nroad marking\n', ['__ignore__', '_background_', 'road marking'], [], []),
    ],
    ids=['CamVid', 'csv', 'CVAT', 'ids', 'ids last', 'names'],
)
def test_tables_of_classes_are_read_in_their_usual_forms(text, names, colours, numbers, tmp_path):
    (tmp_path / 'classes.txt').write_text(text)
    table = read_table(tmp_path / 'classes.txt')
    assert table.names == names
    assert [table.colours[name] for name in table.colours] == colours
    assert [table.numbers[name] for name in table.numbers] == numbers


def test_a_list_of_labels_gives_the_order_of_the_classes_of_polygons(photos):
    annotated.labelme(photos, NAMES[:2])
    annotations = open_annotations('photos')
    pixels = {'tree': 1, 'road': 1, 'car': 1, UNCOVERED: 97}
    assert annotations.classes(pixels, None, None, ()).names == ['background', 'car', 'road', 'tree']
    (photos / 'labels.txt').write_text('__ignore__\n_background_\ntree\nroad\nbus\ncar\n')
    table = find_table(photos, open_annotations('photos').tree.files, False)
    assert annotations.classes(pixels, table, None, ()).names == ['background', 'tree', 'road', 'bus', 'car']
    (photos / 'labels.txt').write_text('tree\nroad\n')
    with pytest.raises(UserError, match=r"photos/labels.txt lacks the class 'car' of the annotations$"):
        annotations.classes(pixels, find_table(photos, ['labels.txt'], False), None, ())


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'3 a\n3 b\n', 'gives one id to two classes'),
        (b'', 'is no table of classes'),
        (b'road\n1 2 3 car\n4 x\n', 'is no table of classes'),
        (b'road\nroad\n', "has the class 'road' twice"),
        (b'\xff\xfe\xff', 'cannot be read as a table'),
        (b'a\n' * 2**20, 'is no table of classes'),
    ],
)
def test_other_files_are_no_tables(content, message, tmp_path):
    (tmp_path / 'classes.txt').write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / 'classes.txt')


def test_colours_that_nobody_chose_are_those_of_pascal_voc():
    from mmseg.datasets import PascalVOCDataset

    assert [voc_colour(i) for i in range(21)] == [list(colour) for colour in PascalVOCDataset.METAINFO['palette']]
    palette = palette_for(['background', 'a', 'b'], {'b': [128, 0, 0]})
    assert palette == [[0, 0, 0], [0, 128, 0], [128, 0, 0]]
