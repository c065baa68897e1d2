"""Label maps as pictures."""

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ._files import whole

ROWS = 64  # processed at a time: images may be huge
PIXELS = 2**20  # counted at a time: np.bincount converts them to int64


def overlay(image: np.ndarray, label: np.ndarray, palette: Sequence | np.ndarray, opacity: float = 0.55) -> Image.Image:
    """Blend the colours of ``label`` ``[H, W]`` over an RGB image ``[H, W, 3]``; ids without a colour stay clear."""
    colours = np.asarray(palette, dtype=np.uint8)
    picture = Image.new('RGB', label.shape[::-1])
    for top in range(0, len(label), ROWS):
        bare, ids = np.ascontiguousarray(image[top : top + ROWS]), label[top : top + ROWS]
        known = ids < len(colours)
        mixed = cv2.addWeighted(bare, 1 - opacity, colours.take(np.where(known, ids, 0), axis=0), opacity, 0)
        shown = mixed if known.all() else np.where(known[..., None], mixed, bare)
        picture.paste(Image.fromarray(shown), (0, top))
    return picture


def with_legend(picture: Image.Image, label: np.ndarray, classes: Sequence[str], palette: Sequence) -> Image.Image:
    """Append a legend of the classes in ``label``, largest area first, to the right of the picture."""
    pixels = label.ravel()
    counts = np.zeros(len(classes), np.int64)
    for first in range(0, pixels.size, PIXELS):
        counts += np.bincount(pixels[first : first + PIXELS], minlength=len(classes))[: len(classes)]
    present = [int(i) for i in np.argsort(-counts, kind='stable') if counts[i]]
    size = int(np.clip(picture.height / 24, 11, 40))
    font = ImageFont.load_default(size)
    row = int(size * 1.5)
    height = max(picture.height, row)  # room for at least one name; a low picture gets several columns
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
    """Convert a label map ``[H, W]`` to an indexed picture: class ids as pixel values, with the palette's colours."""
    picture = Image.fromarray(label.astype(np.uint8, copy=False))
    picture.putpalette(np.asarray(palette, dtype=np.uint8).ravel().tolist())
    return picture


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Join pictures of the same height in a row."""
    page = Image.new('RGB', (sum(p.width for p in pictures), max(p.height for p in pictures)), 'white')
    x = 0
    for picture in pictures:
        page.paste(picture, (x, 0))
        x += picture.width
    return page


def truth_and_prediction(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, classes: Sequence[str], palette: Sequence
) -> Image.Image:
    """Join the image ``[H, W, 3]`` (uint8 RGB), an overlay of each label map ``[H, W]`` and a legend in a row."""
    page = side_by_side([Image.fromarray(image), *(overlay(image, label, palette) for label in (truth, prediction))])
    return with_legend(page, np.concatenate([truth, prediction]), classes, palette)


def jpeg(picture: Image.Image) -> bytes:
    """A picture as a JPEG file of quality 85."""
    buffer = io.BytesIO()
    picture.save(buffer, format='JPEG', quality=85)
    return buffer.getvalue()


def save_whole(picture: Image.Image, path: Path) -> None:
    """Save as PNG, atomically."""
    with whole(path) as partial, partial.open('wb') as file:
        write_png(picture, file)


def write_png(picture: Image.Image, file: IO[bytes]) -> None:
    """Write as PNG."""
    # Repetitions are rare in photographs: without a search for them PNG takes a quarter of the time and 1 % more bytes.
    strategy = {'compress_type': zlib.Z_RLE} if picture.mode == 'RGB' else {}
    picture.save(file, format='PNG', **strategy)
