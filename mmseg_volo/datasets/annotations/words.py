"""What the names of folders and files say: picture or mask, and which split."""

import re
from collections.abc import Sequence
from typing import NamedTuple

SPLIT_NAMES = {
    **dict.fromkeys(('training', 'train'), 'train'),
    **dict.fromkeys(('validation', 'valid', 'val', 'dev'), 'val'),
    **dict.fromkeys(('testing', 'test'), 'test'),
}
PICTURE_NAMES = 'jpegimages images image imgs img leftimgbit photos pictures frames rgb inputs input'.split()
MASK_NAMES = (
    'segmentationclasspng segmentationclass segmentations segmentation annotations annotation annots annot anns ann '
    'labels label masks mask groundtruth gtfine gt targets target segs seg'
).split()
OTHER_NAMES = 'segmentationobjectpng segmentationobject segmentationclassvisualization visualization'.split()
FILLERS = 'folder dir png'.split()

_PARTS = re.compile(
    '|'.join(
        f'(?P<{kind}>{"|".join(names)})'
        for kind, names in dict(
            other=OTHER_NAMES, mask=MASK_NAMES, picture=PICTURE_NAMES, split=list(SPLIT_NAMES), filler=FILLERS
        ).items()
    )
)
_MASK_ENDING = re.compile(r'([_\-. ](gtfine|labeltrainids|labelids|labels?|masks?|gt|seg|segmentation|annotation|l))+$')
_PICTURE_ENDING = re.compile(r'[_\-. ](leftimg8bit|image|img|rgb|sat)$')


class Place(NamedTuple):
    """What the folders of a file say.

    ``kind`` is ``'picture'``, ``'mask'``, ``'other'`` or None, and ``rest`` the folders that say nothing.
    """

    kind: str | None
    split: str | None
    rest: tuple[str, ...]


def place_of(folders: Sequence[str]) -> Place:
    """Read the names of the folders of a file, such as ``train_labels`` or ``JPEGImages``."""
    kind = split = None
    rest = []
    for folder in folders:
        found = _read(folder)
        if found is None:
            rest.append(folder)
        else:
            kind = found.get('kind', kind)
            split = found.get('split', split)
    return Place(kind, split, tuple(rest))


def _read(folder: str) -> dict[str, str] | None:
    """What the name of one folder says, or None unless it consists of known words."""
    letters = re.sub('[^a-z]', '', folder.lower())
    found: dict[str, str] = {}
    at = 0
    while at < len(letters):
        match = _PARTS.match(letters, at)
        if match is None:
            return None
        word = str(match.lastgroup)
        if word == 'split':
            found['split'] = SPLIT_NAMES[match[0]]
        elif word != 'filler':
            found['kind'] = word
        at = match.end()
    return found or None


def split_in_name(name: str) -> str | None:
    """The split that is a word of a file's name, such as ``instances_train2017``."""
    words = [SPLIT_NAMES[word] for word in re.split('[^a-z]+', name.lower()) if word in SPLIT_NAMES]
    return words[-1] if words else None


def without_mask_ending(stem: str) -> str:
    """``a`` for ``a_mask``, ``a_L`` or ``a_gtFine_labelIds``."""
    match = _MASK_ENDING.search(stem.lower())
    return stem[: match.start()] if match else stem


def without_picture_ending(stem: str) -> str:
    """``a`` for ``a_leftImg8bit`` or ``a_sat``."""
    match = _PICTURE_ENDING.search(stem.lower())
    return stem[: match.start()] if match else stem
