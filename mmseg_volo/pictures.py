"""Label maps as pictures."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def overlay(image: np.ndarray, label: np.ndarray, palette: Sequence, opacity: float = 0.55) -> Image.Image:
    """Image ``[H, W, 3]`` uint8 RGB under the colours of ``label`` ``[H, W]``; ids without a colour stay bare."""
    colours = np.asarray(palette, dtype=np.float32)
    known = label < len(colours)
    mixed = image.astype(np.float32)
    mixed[known] = (1 - opacity) * mixed[known] + opacity * colours[label[known]]
    return Image.fromarray(mixed.round().astype(np.uint8))


def with_legend(picture: Image.Image, label: np.ndarray, classes: Sequence[str], palette: Sequence) -> Image.Image:
    """The picture with a column of the classes present in ``label``, largest first, on its right."""
    counts = np.bincount(label.ravel(), minlength=len(classes))[: len(classes)]
    present = [int(i) for i in np.argsort(-counts, kind='stable') if counts[i]]
    size = int(np.clip(picture.height / 24, 11, 40))
    font = ImageFont.load_default(size)
    row = int(size * 1.5)
    height = max(picture.height, row)  # room for one name at least; a low picture gets several columns
    rows = height // row
    width = int(max([font.getlength(classes[i]) for i in present], default=0)) + 3 * size
    page = Image.new('RGB', (picture.width + -(-len(present) // rows) * width, height), 'white')
    page.paste(picture, (0, 0))
    draw = ImageDraw.Draw(page)
    for n, i in enumerate(present):
        x, y = picture.width + n // rows * width + size // 2, n % rows * row + size // 4
        draw.rectangle([x, y, x + size, y + size], fill=tuple(palette[i]), outline='black')
        draw.text((x + 1.5 * size, y + size / 2), classes[i], fill='black', font=font, anchor='lm')
    return page


def label_png(label: np.ndarray, palette: Sequence) -> Image.Image:
    """Label map ``[H, W]`` as an indexed picture: pixel values are class ids, colours those of the palette."""
    picture = Image.fromarray(label.astype(np.uint8))
    picture.putpalette(np.asarray(palette, dtype=np.uint8).ravel().tolist())
    return picture


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height in a row."""
    page = Image.new('RGB', (sum(p.width for p in pictures), max(p.height for p in pictures)), 'white')
    x = 0
    for picture in pictures:
        page.paste(picture, (x, 0))
        x += picture.width
    return page


def save_whole(picture: Image.Image, path: Path) -> None:
    """Save under a temporary name first, so that nobody finds half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        picture.save(partial, format='PNG')
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
