"""Data sets of one's own, without a class for each."""

import os
from collections.abc import Sequence
from pathlib import Path

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from .._files import IMAGE_SUFFIXES, files_below, whole
from ..errors import UserError


@DATASETS.register_module()
class FolderDataset(BaseSegDataset):
    """Pictures and label maps in folders, with classes from the config.

    Pictures may have different suffixes. The label map of ``img_path/a/b.jpg`` is ``seg_map_path/a/b.png``, unless a
    list says otherwise; both folders may be the same.

    Args:
        metainfo: ``dict(classes=[...])``; ``palette=[[R, G, B], ...]`` chooses their colours.
        data_prefix: the folders ``img_path`` and ``seg_map_path``, relative to ``data_root`` if there is one; without
            ``seg_map_path``, there are no label maps.
        ann_file: text file with the pictures of this data set, one per line, relative to ``img_path``; after a tab may
            follow the label map, relative to ``seg_map_path``. By default, all pictures of ``img_path`` are taken.
        img_suffix: endings of pictures in any case.
        seg_map_suffix: ending of label maps, which replaces that of the picture.

    The other arguments are those of mmseg's ``BaseSegDataset``.

    Raises:
        UserError: no classes, no list, or one label map for two pictures.
    """

    def __init__(
        self,
        metainfo: dict | None = None,
        img_suffix: str | Sequence[str] = IMAGE_SUFFIXES,
        seg_map_suffix: str = '.png',
        **kwargs,
    ):
        if not (metainfo or {}).get('classes'):
            raise UserError('FolderDataset needs metainfo=dict(classes=[...]), the names of the classes')
        suffixes = (img_suffix,) if isinstance(img_suffix, str) else tuple(img_suffix)
        super().__init__(metainfo=metainfo, img_suffix=suffixes, seg_map_suffix=seg_map_suffix, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Find the pictures and their label maps, in the order of the list or of their names."""
        images, labels = self.data_prefix['img_path'], self.data_prefix.get('seg_map_path')
        pairs = read_list(Path(self.ann_file)) if self.ann_file else self._found(Path(images))
        samples = []
        owner: dict[str, str] = {}
        for image, label in pairs:
            sample = dict(img_path=os.path.join(images, image), label_map=self.label_map, seg_fields=[])
            sample['reduce_zero_label'] = self.reduce_zero_label
            if labels is not None:
                path = os.path.join(labels, label or self._label_of(image))
                if path in owner:
                    raise UserError(f'{image} and {owner[path]} in {images} have one label map, {path}; remove one')
                owner[path] = image
                sample['seg_map_path'] = path
            samples.append(sample)
        return samples

    def labels_without_image(self) -> list[str]:
        """Label maps of the folder that belong to no picture; a list leaves none."""
        if self.ann_file:
            return []
        samples = [self.get_data_info(index) for index in range(len(self))]
        used = {os.path.normpath(sample[key]) for sample in samples for key in ('img_path', 'seg_map_path')}
        folder = self.data_prefix['seg_map_path']
        paths = [os.path.join(folder, file) for file in files_below(Path(folder)) if file.endswith(self.seg_map_suffix)]
        return [path for path in paths if os.path.normpath(path) not in used]

    def _found(self, folder: Path) -> list[tuple[str, None]]:
        """Pictures of the folder and its subfolders that are not the label maps of others."""
        names = [file for file in files_below(folder) if file.lower().endswith(self.img_suffix)]
        same = Path(self.data_prefix.get('seg_map_path') or '').absolute() == folder.absolute()
        labels = {label for name in names if (label := self._label_of(name)) != name} if same else set()
        return [(name, None) for name in names if name not in labels]

    def _label_of(self, image: str) -> str:
        ending = next((suffix for suffix in self.img_suffix if image.lower().endswith(suffix)), '')
        return image[: len(image) - len(ending)] + self.seg_map_suffix


def read_list(path: Path) -> list[tuple[str, str | None]]:
    """Pictures and label maps, or None, from a list; see ``FolderDataset``.

    Raises:
        UserError: the file does not exist or is no text.
    """
    try:
        lines = path.read_text('utf-8', errors='surrogateescape').split('\n')
    except OSError as error:
        raise UserError(
            f'cannot read the list {path} ({error.strerror}); --cfg-options data_root=FOLDER sets another folder'
        ) from None
    rows = [line.rstrip('\r').split('\t') for line in lines if line.strip()]
    wrong = next((row for row in rows if len(row) > 2), None)
    if wrong:
        raise UserError(f'{path} must have a picture per line, and after a tab its label map, got {wrong}')
    return [(row[0], row[1] if len(row) > 1 else None) for row in rows]


def write_list(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Write pictures and their label maps, atomically; see ``FolderDataset``.

    Raises:
        UserError: a name that a list cannot hold.
    """
    for name in (name for pair in pairs for name in pair):
        if any(character in name for character in '\t\n\r'):
            raise UserError(f'the name {name!r} has a tab or a line break; rename the file')
    text = ''.join(f'{image}\t{label}\n' for image, label in pairs)
    with whole(path) as partial:
        partial.write_text(text, 'utf-8', errors='surrogateescape')
