"""Annotations of pictures in several formats, turned into label maps.

Each format is a module with a class behind the interface in ``base.py``: it lists annotated pictures, counts the pixels
of each value in one, chooses the classes and draws label maps.
"""

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from ...errors import UserError
from .base import VOID, Annotations, Classes, RegionAnnotations, Sample, Tree, read_json
from .coco import CocoAnnotations
from .cvat import CvatAnnotations, root_tag
from .label_studio import LabelStudioAnnotations
from .labelme import LabelmeAnnotations
from .masks import MaskAnnotations

REGION_FORMATS: dict[str, type[RegionAnnotations]] = {
    'coco': CocoAnnotations,
    'labelme': LabelmeAnnotations,
    'cvat': CvatAnnotations,
    'label-studio': LabelStudioAnnotations,
}
FORMATS = ('masks', *REGION_FORMATS)

__all__ = ['FORMATS', 'VOID', 'Annotations', 'Classes', 'Sample', 'Tree', 'open_annotations']


def open_annotations(folder: str, form: str | None = None, masks: str | None = None) -> Annotations:
    """Find the pictures of a folder and their annotations.

    Args:
        folder: a folder with pictures and masks, or with an export of one of the other formats, also in subfolders.
        form: one of ``FORMATS``; by default whichever the folder has.
        masks: pattern of the masks, relative to the folder.

    Raises:
        UserError: no pictures, no annotations, several formats, or files that cannot be used.
    """
    if not Path(folder).is_dir():
        raise UserError(f'no folder {folder}')
    if form is not None and form not in FORMATS:
        raise UserError(f'--annotations must be one of {", ".join(FORMATS)}, got {form!r}')
    tree = Tree(Path(folder))
    if not tree.files:
        raise UserError(f'folder {folder} is empty')
    if not tree.images:
        raise UserError(f'folder {folder} has no pictures')
    found: dict[str, Annotations] = {}
    if form != 'masks' and masks is None:
        found.update(_regions(tree, form))
    if form in (None, 'masks'):
        annotations = MaskAnnotations(tree, masks)
        if annotations.samples:
            found['masks'] = annotations
    if len(found) > 1:
        raise UserError(f'folder {folder} has {" and ".join(found)}; choose one with --annotations')
    if not found:
        wanted = (
            f'no {MaskAnnotations.kind if form == "masks" else REGION_FORMATS[form].kind}'
            if form
            else 'neither masks, such as masks/NAME.png, nor files of COCO, Labelme, CVAT for images or Label Studio'
        )
        raise UserError(
            f'folder {folder} has {len(tree.images)} pictures, but {wanted}; docs/finetune.md shows examples'
        )
    [chosen] = found.values()
    return chosen


def _regions(tree: Tree, form: str | None) -> dict[str, Annotations]:
    """The formats whose files are in a folder."""
    found: dict[str, RegionAnnotations] = {}
    wanted = {form: REGION_FORMATS[form]} if form else REGION_FORMATS
    files = [file for file in tree.files if file.lower().endswith(tuple({kind.suffix for kind in wanted.values()}))]
    bar: Iterable[str] = tqdm(files, 'annotations', unit='file', leave=False, delay=1, disable=None)
    for file in bar:
        try:
            document = root_tag(tree.path(file)) if file.lower().endswith('.xml') else read_json(tree.path(file))
        except UserError as error:
            raise UserError(f'{error}; --annotations says which format to read' if form is None else error) from None
        for name, kind in wanted.items():
            if file.lower().endswith(kind.suffix) and kind.recognises(document):
                found.setdefault(name, kind(tree)).add(file, document)
    for annotations in found.values():
        annotations.finish()
    return {name: annotations for name, annotations in found.items() if annotations.samples}
