"""A small scene for tests of annotations: noise pictures, polygons on them, and label maps drawn independently."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 32)  # width, height
CLASSES = ['car', 'road', 'tree']
NAMES = ['a_1', 'a_2', 'b_1', 'b_2', 'c_1', 'c_2', 'd_1', 'd_2', 'e_1', 'e_2']


def write_pictures(folder: Path, names: Sequence[str] = NAMES, suffix: str = '.png', size=SIZE) -> None:
    """Noise, another one in each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        rng = np.random.default_rng(list(name.encode()))
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(folder / f'{name}{suffix}')


def polygons(name: str) -> list[tuple[str, list[list[float]]]]:
    """The polygons of a picture, in the order of drawing: the road below all, a tree, and a car over both."""
    x = 2.0 * (len(name) + sum(name.encode()) % 7)
    road = [[-0.0, 20.0], [48.0, 18.5], [48.0, 32.0], [0.0, 32.0]]
    tree = [[x, 4.3], [x + 9.7, 2.1], [x + 12.2, 24.8], [x + 3.1, 26.4]]
    car = [[x + 2.4, 16.2], [x + 15.1, 17.7], [x + 13.3, 28.9], [x + 1.2, 27.6], [x + 6.0, 22.0]]
    return [('road', road), ('tree', tree), ('car', car)]


def inside(ring: Sequence, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Which pixels have their centre in a polygon, by the even-odd rule: bool ``[H, W]``."""
    columns, rows = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    result = np.zeros(rows.shape, bool)
    for (x1, y1), (x2, y2) in zip(ring, [*ring[1:], ring[0]], strict=True):
        if y1 != y2:
            crosses = (y1 > rows) != (y2 > rows)
            result ^= crosses & (columns < x1 + (rows - y1) / (y2 - y1) * (x2 - x1))
    return result


def near(ring: Sequence, size: tuple[int, int] = SIZE, reach: float = 0.75) -> np.ndarray:
    """Which pixels have their centre within ``reach`` of an edge of a polygon, where rasterisers may differ."""
    centres = np.stack(np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5), axis=-1)
    result = np.zeros(centres.shape[:2], bool)
    for start, end in zip(np.array(ring, float), np.roll(np.array(ring, float), -1, axis=0), strict=True):
        along = end - start
        at = np.clip(((centres - start) @ along) / max(along @ along, 1e-9), 0, 1)
        result |= np.linalg.norm(centres - start - at[..., None] * along, axis=-1) < reach
    return result


def truth(name: str, ids: dict[str, int], rest: int) -> tuple[np.ndarray, np.ndarray]:
    """The label map of a picture, and where it is certain."""
    label, certain = np.full(SIZE[::-1], rest), np.ones(SIZE[::-1], bool)
    for kind, ring in polygons(name):
        label[inside(ring)] = ids[kind]
        certain &= ~near(ring)
    return label, certain


def flat(ring: Sequence) -> list[float]:
    return [number for corner in ring for number in corner]


# Each writes one format's annotations of the pictures ``names`` into ``folder``.


def labelme(folder: Path, names: Sequence[str] = NAMES, **more) -> None:
    for name in names:
        shapes = [dict(label=label, points=ring, shape_type='polygon') for label, ring in polygons(name)]
        document = dict(version='5.5.0', flags={}, shapes=shapes, imagePath=f'{name}.png', imageData=None)
        document |= dict(imageWidth=SIZE[0], imageHeight=SIZE[1]) | more
        (folder / f'{name}.json').write_text(json.dumps(document))


def coco(folder: Path, names: Sequence[str] = NAMES, file: str = 'instances.json') -> dict:
    """Larger regions are drawn first, whatever their order in the file."""
    images = [dict(id=i, file_name=f'{name}.png', width=SIZE[0], height=SIZE[1]) for i, name in enumerate(names)]
    annotations = [
        dict(
            id=len(names) * i + j,
            image_id=i,
            category_id=CLASSES.index(label) + 3,
            segmentation=[flat(ring)],
            iscrowd=0,
        )
        for i, name in enumerate(names)
        for j, (label, ring) in enumerate(reversed(polygons(name)))
    ]
    categories = [dict(id=i + 3, name=label) for i, label in enumerate(CLASSES)]
    document = dict(images=images, annotations=annotations, categories=categories)
    (folder / file).write_text(json.dumps(document))
    return document


def cvat(folder: Path, names: Sequence[str] = NAMES) -> None:
    """Polygons in the reverse order, with z_order."""
    colours = dict(car='#ff0000', road='#804080', tree='#00ff00')
    labels = ''.join(
        f'<label><name>{label}</name><color>{colours[label]}</color><type>any</type><attributes/></label>'
        for label in CLASSES
    )
    images = ''
    for i, name in enumerate(names):
        shapes = ''
        for order, (label, ring) in reversed(list(enumerate(polygons(name)))):
            points = ';'.join(f'{x:.2f},{y:.2f}' for x, y in ring)
            shapes += f'<polygon label="{label}" source="manual" occluded="0" points="{points}" z_order="{order}"/>'
        images += f'<image id="{i}" name="{name}.png" width="{SIZE[0]}" height="{SIZE[1]}">{shapes}</image>'
    text = f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta><task><labels>{labels}'
    (folder / 'annotations.xml').write_text(f'{text}</labels></task></meta>{images}</annotations>')


def label_studio(folder: Path, names: Sequence[str] = NAMES) -> None:
    """An export of uploaded pictures, whose names Label Studio changes; the tree is a brush stroke."""
    tasks = []
    for i, name in enumerate(names):
        results = []
        for label, ring in polygons(name):
            result = dict(original_width=SIZE[0], original_height=SIZE[1], image_rotation=0, to_name='image')
            if label == 'tree':
                runs = brush(np.where(inside(ring), 255, 0).astype(np.uint8))
                result |= dict(type='brushlabels', value=dict(format='rle', rle=runs, brushlabels=[label]))
            else:
                points = (np.array(ring) / SIZE * 100).tolist()
                result |= dict(type='polygonlabels', value=dict(points=points, polygonlabels=[label]))
            results.append(result)
        entry = dict(id=i, was_cancelled=False, updated_at='2026-01-02', result=results)
        older = dict(id=i, was_cancelled=False, updated_at='2026-01-01', result=[])
        cancelled = dict(id=i, was_cancelled=True, updated_at='2026-01-03', result=[])
        data = dict(image=f'/data/upload/1/{i:08x}-{name}.png', caption='a street')
        tasks.append(dict(id=i, data=data, annotations=[older, entry, cancelled]))
    (folder / 'project-1.json').write_text(json.dumps(tasks))


def brush(mask: np.ndarray) -> list[int]:
    """Label Studio's run lengths of a mask, with runs of equal values, and single values as runs of different ones."""
    values = np.repeat(mask.ravel(), 4).tolist()
    bits = f'{len(values):032b}{7:05b}' + ''.join(f'{width - 1:04b}' for width in (3, 4, 8, 16))
    at = 0
    while at < len(values):
        end = at + 1
        while end < len(values) and values[end] == values[at] and end - at < 2**16:
            end += 1
        if end - at == 4:  # one pixel: four values that are not written as a run
            bits += f'000{3:03b}' + ''.join(f'{value:08b}' for value in values[at:end])
        else:
            bits += f'111{end - at - 1:016b}{values[at]:08b}'
        at = end
    bits += '0' * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def png_text(mask: np.ndarray) -> str:
    """A mask as Labelme stores it."""
    data = io.BytesIO()
    Image.fromarray(mask).save(data, format='PNG')
    return base64.b64encode(data.getvalue()).decode()


def masks(folder: Path, names: Sequence[str] = NAMES, change: Callable[[np.ndarray], np.ndarray] = np.copy) -> None:
    """Masks with the ids of ``CLASSES``, and 255 elsewhere, after ``change``."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {label: i for i, label in enumerate(CLASSES)}
    for name in names:
        label = truth(name, ids, 255)[0].astype(np.uint8)
        Image.fromarray(change(label)).save(folder / f'{name}.png')
