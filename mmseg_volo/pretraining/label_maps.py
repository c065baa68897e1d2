"""Token labels in files: the most likely classes of a teacher at each place of an image, with their logits."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .._files import whole
from ..checkpoints.reading import read_plain_data
from ..errors import UserError

SUFFIX = '.safetensors'
SUFFIXES = (SUFFIX, '.pt')  # those of the published files
MAX_CLASSES = 2**15  # class numbers are stored in 16 bits


def write_label_map(path: Path, label_map: Tensor) -> None:
    """Write a label map ``[2, k, h, w]`` (logits, class numbers) in 16 bits per number, whole or not at all."""
    logits, classes = label_map
    with whole(path) as partial:
        save_file(dict(logits=logits.half().contiguous(), classes=classes.to(torch.int16).contiguous()), partial)


def read_label_map(path: Path) -> Tensor:
    """Read a label map ``[2, k, h, w]`` (logits, class numbers) in float32, without running code in it.

    Args:
        path: a file of ``write_label_map``, or a published one: ``torch.save`` of a tensor ``[2, 5, h, w]``.

    Raises:
        UserError: the file is missing, damaged or unsafe, or contains something else.
    """
    if not path.is_file():
        raise UserError(f'no token labels {path}; mmseg-volo make-token-labels writes them')
    contents: Any = read_plain_data(str(path))
    if isinstance(contents, dict) and contents.keys() == {'logits', 'classes'}:
        logits, classes = contents['logits'].float(), contents['classes'].float()
        contents = torch.stack([logits, classes]) if logits.shape == classes.shape else None
    is_map = isinstance(contents, Tensor) and contents.dim() == 4 and len(contents) == 2 and contents.numel() > 0
    if not is_map or not contents.isfinite().all() or contents[1].min() < 0:
        raise UserError(f'{path} contains no token labels, which are logits and class numbers of shape [2, k, h, w]')
    return contents.float()


def find_label_maps(folder: Path) -> dict[str, Path]:
    """Token-label files below ``folder``, by their path relative to it without suffix."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.suffix in SUFFIXES:
                found[str(path.relative_to(folder).with_suffix(''))] = path
    return found


def size_text(shape: torch.Size | tuple[int, ...]) -> str:
    """A size in words, such as ``5 x 14 x 14``."""
    return ' x '.join(map(str, shape))
