import numpy as np
import pytest
from PIL import Image

from mmseg_volo.visualization import label_png, overlay, save_whole, side_by_side, with_legend

PALETTE = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
CLASSES = ['red', 'green', 'blue']


def test_overlay_blends_classes_and_keeps_void_clear():
    image = np.full((2, 2, 3), 100, np.uint8)
    label = np.array([[0, 1], [2, 255]])
    mixed = np.asarray(overlay(image, label, PALETTE, opacity=0.5))
    assert mixed[0, 0].tolist() == [178, 50, 50] and mixed[1, 0].tolist() == [50, 50, 178]
    assert mixed[1, 1].tolist() == [100, 100, 100]


def test_label_map_keeps_ids_and_palette(tmp_path):
    label = np.array([[0, 1, 2], [2, 2, 0]])
    save_whole(label_png(label, PALETTE), tmp_path / 'sub/a.png')
    again = Image.open(tmp_path / 'sub/a.png')
    assert again.mode == 'P' and np.array_equal(np.asarray(again), label)
    assert again.getpalette()[:9] == [255, 0, 0, 0, 255, 0, 0, 0, 255]


def legend_colours(label: np.ndarray) -> set[tuple]:
    page = with_legend(Image.new('RGB', label.shape[::-1], 'white'), label, CLASSES, PALETTE)
    return {colour for _, colour in page.getcolors(100000)} & {tuple(c) for c in PALETTE}


def test_legend_shows_only_the_classes_present():
    label = np.zeros((60, 80), int)
    assert legend_colours(label) == {(255, 0, 0)}
    label[:10] = 2
    label[20:] = 255
    assert legend_colours(label) == {(255, 0, 0), (0, 0, 255)}


@pytest.mark.parametrize('size', [(1, 1), (12, 300), (400, 20)], ids=str)
def test_legend_has_room_for_every_class_at_any_height(size):
    label = np.arange(size[0] * size[1]).reshape(size[::-1]) % 3
    if size == (1, 1):
        assert legend_colours(label) == {(255, 0, 0)}
    else:
        assert legend_colours(label) == {tuple(c) for c in PALETTE}


def test_side_by_side_keeps_every_picture():
    page = side_by_side([Image.new('RGB', (3, 2), 'red'), Image.new('RGB', (5, 2), 'blue')])
    assert page.size == (8, 2) and page.getpixel((2, 1)) == (255, 0, 0) and page.getpixel((3, 0)) == (0, 0, 255)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, 'save', lambda self, file, **_: file.write(b'half') and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_whole(Image.new('RGB', (1, 1)), tmp_path / 'a.png')
    assert list(tmp_path.iterdir()) == []
