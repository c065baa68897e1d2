"""Label maps as picture files: ids, indexed colours or RGB colours."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..._files import IMAGE_SUFFIXES
from ...errors import UserError
from ..checks import LabelError, abbreviated
from .base import MAX_CLASSES, VOID, VOID_NAMES, Annotations, Classes, Sample, Size, Tree, check_void, palette_for
from .tables import ClassTable
from .words import Place, place_of, split_in_name, without_mask_ending, without_picture_ending

MOST_IDS = 64  # ids in one grey mask; more are shades that compression or smoothing made
RGB = tuple[int, int, int]
BINARY = ('background', 'foreground')


class Value(NamedTuple):
    """What a pixel of a mask holds: an id, a colour, or both if it is indexed."""

    id: int | None
    colour: RGB | None


@dataclass
class Pixels:
    """Pixels of a mask as numbers: ids, or red, green and blue packed into one; and the value of each number."""

    numbers: np.ndarray
    indexed: dict[int, RGB] | None
    coloured: bool
    in_place: bool  # whether mmseg can read the file as ids

    def value(self, number: int) -> Value:
        """The value that a number stands for."""
        if self.coloured:
            return Value(None, (number >> 16, number >> 8 & 255, number & 255))
        return Value(number, self.indexed.get(number) if self.indexed else None)

    def counts(self) -> dict[int, int]:
        """Number of pixels by number; runs of equal pixels are counted at once."""
        flat = self.numbers.ravel()
        starts = np.flatnonzero(np.diff(flat, prepend=flat[:1] - 1))
        lengths = np.diff(starts, append=flat.size)
        found, inverse = np.unique(flat[starts], return_inverse=True)
        return dict(zip(found.tolist(), np.bincount(inverse, lengths).astype(int).tolist(), strict=True))


class MaskAnnotations(Annotations):
    """A mask for each picture; ``Sample.content`` is its path relative to the folder.

    Args:
        tree: the files.
        pattern: which files are masks, as paths relative to the folder; by default their names say so.
    """

    kind = 'masks'

    def __init__(self, tree: Tree, pattern: str | None = None):
        super().__init__(tree)
        self.samples = _pair(tree, pattern, self.notes)
        self.read_in_place = True  # until one cannot be
        self.by_colour = False

    def look(self, sample: Sample, size: Size) -> dict[Hashable, int]:
        """Number of pixels of each value."""
        path = self.tree.path(sample.content)
        pixels = read_mask(path)
        height, width = pixels.numbers.shape
        if (width, height) != size:
            sizes = f'{width} x {height}, not {size[0]} x {size[1]}'
            raise LabelError('mask differs in size from its picture', f'{path} ({sizes})')
        if not pixels.in_place:
            self.read_in_place = False
        counts = pixels.counts()
        if len(counts) > (MAX_CLASSES if pixels.coloured or pixels.indexed else MOST_IDS):
            raise LabelError(
                'mask has too many values, as after JPEG compression or smoothing; export it without',
                f'{path} ({len(counts)} {"colours" if pixels.coloured else "ids"})',
            )
        return {pixels.value(number): count for number, count in counts.items()}

    def classes(
        self, pixels: Mapping[Hashable, int], table: ClassTable | None, rest: str | None, void: Sequence[str]
    ) -> Classes:
        """A class per id or colour, with names from the table if there is one."""
        if rest is not None:
            raise UserError('--rest is for annotations with regions; in masks every pixel has a value')
        values = [value for value in pixels if isinstance(value, Value)]
        choose = self._by_colour if self._is_by_colour(values, table) else self._by_id
        names, notes = choose(values, table)  # by value; None for void
        check_void(void, list(dict.fromkeys(name for name in names.values() if name)))
        kept = {
            value: name if name and name.lower() not in VOID_NAMES and name not in void else None
            for value, name in names.items()
        }
        order = list(dict.fromkeys(name for name in kept.values() if name))
        if table:
            order = [name for name in table.names if name in order or name not in names.values()]
            order = [name for name in order if name.lower() not in VOID_NAMES and name not in void]
        if len(order) > MAX_CLASSES:
            raise UserError(f'the masks have {len(order)} classes; at most {MAX_CLASSES} are possible')
        ids: dict[Hashable, int] = {value: order.index(name) if name else VOID for value, name in kept.items()}
        colours = {name: list(value.colour) for value, name in kept.items() if name and value.colour}
        if len({tuple(colour) for colour in colours.values()}) < len(colours):
            colours = {}  # a palette that shows nothing
        return Classes(order, palette_for(order, {**colours, **(table.colours if table else {})}), ids, notes)

    def _is_by_colour(self, values: Sequence[Value], table: ClassTable | None) -> bool:
        coloured = [value for value in values if value.id is None and value.colour is not None]
        if any(len(set(value.colour or ())) > 1 for value in coloured):
            bare = [value.id for value in values if value.colour is None and value.id not in (0, 255)]
            if bare:
                raise UserError(
                    f'some masks have colours and others have ids, such as {bare[0]}; use one kind for all of them'
                )
            return True
        colours = defaultdict(set)
        for value in values:
            if value.id is not None and value.colour is not None:
                colours[value.id].add(value.colour)
        if any(len(same) > 1 for same in colours.values()):
            return True
        listed = {tuple(colour) for colour in table.colours.values()} if table else set()
        return bool(listed) and all(colour in listed for same in colours.values() for colour in same) and bool(colours)

    def _by_colour(
        self, values: Sequence[Value], table: ClassTable | None
    ) -> tuple[dict[Value, str | None], list[str]]:
        """Names by colour: from the table, or the colours in hex digits, sorted."""
        self.by_colour = True
        of = {value: value.colour or (value.id or 0,) * 3 for value in values}
        if table is None:
            named = {colour: '#{:02x}{:02x}{:02x}'.format(*colour) for colour in sorted(set(of.values()))}
            note = f'{len(named)} colours found and named by their hex digits; --classes FILE names them (R G B NAME)'
            return {value: named[of[value]] for value in sorted(values, key=of.__getitem__)}, [note]
        if not table.colours:
            raise UserError(f'{table.source} has no colours, but the masks are in colours; give lines R G B NAME')
        listed = {tuple(colour): name for name, colour in table.colours.items()}
        unknown = sorted({colour for colour in of.values() if colour not in listed})
        if unknown:
            raise UserError(f'{table.source} lacks {len(unknown)} of the colours in the masks: {abbreviated(unknown)}')
        return {value: listed[of[value]] for value in values}, [f'classes from {table.source}']

    def _by_id(self, values: Sequence[Value], table: ClassTable | None) -> tuple[dict[Value, str | None], list[str]]:
        """Names by id, in the order of the ids; 255 is void unless there is no other explanation."""
        of = {value: value.id if value.id is not None else (value.colour or (0,))[0] for value in values}
        found = sorted(set(of.values()))
        inner = [number for number in found if number != VOID]
        names, notes = _invented(found, inner) if table is None else _listed(found, inner, table)
        return {value: names.get(of[value]) for value in sorted(values, key=of.__getitem__)}, notes

    def draw(self, sample: Sample, size: Size, ids: Mapping[Hashable, int]) -> np.ndarray:
        """The mask with class ids."""
        pixels = read_mask(self.tree.path(sample.content))
        found, inverse = np.unique(pixels.numbers, return_inverse=True)
        table = np.array([ids[pixels.value(number)] for number in found.tolist()], np.uint8)
        return table[inverse.reshape(pixels.numbers.shape)]

    def mask_in_place(self, sample: Sample, ids: Mapping[Hashable, int]) -> str | None:
        """The mask, if all are 8-bit PNG files in which each number is the id of its class."""
        same = all(isinstance(value, Value) and value.id == number for value, number in ids.items())
        return sample.content if same and self.read_in_place and not self.by_colour else None


def _invented(found: list[int], inner: list[int]) -> tuple[dict[int, str], list[str]]:
    """Names of the ids found, of which ``inner`` are not 255, and what to say about them."""
    if len(inner) == 1 and found != inner:
        only = f'the masks have the values {inner[0]} and 255 alone'
        return dict(zip(found, BINARY, strict=True)), [f'{only}: 255, elsewhere void, becomes class 1, {BINARY[1]}']
    if len(inner) == 2:
        return dict(zip(inner, BINARY, strict=True)), [f'{inner[1]} becomes class 1'] if inner != [0, 1] else []
    notes = [f'{len(inner)} ids found; --classes FILE or --classes NAME NAME ... names them']
    if inner != list(range(len(inner))):
        notes.append(f'ids are renumbered: {abbreviated(inner)} become 0 to {len(inner) - 1}')
    return {number: f'class_{number}' for number in inner}, notes


def _listed(found: list[int], inner: list[int], table: ClassTable) -> tuple[dict[int, str], list[str]]:
    """Names from a table for the ids found: by its numbers, by its lines, or in the order of the ids."""
    notes = [f'classes from {table.source}'] if table.source != '--classes' else []
    count = len(table.names)
    if table.numbers:
        names = {number: name for name, number in table.numbers.items()}
        missing = [number for number in inner if number not in names]
        if missing:
            raise UserError(f'{table.source} lacks the ids {abbreviated(missing)} of the masks')
    elif not inner or inner[-1] < count:
        names = dict(enumerate(table.names))
    elif count in (len(inner), len(found)):
        ordered = inner if len(inner) == count else found
        names = dict(zip(ordered, table.names, strict=True))
        notes.append(f'names in the order of the ids {abbreviated(ordered)}')
    else:
        raise UserError(f'{table.source} has {count} names, but the masks have {len(inner)} ids: {abbreviated(inner)}')
    return {number: names[number] for number in found if number in names}, notes


def read_mask(path: Path) -> Pixels:
    """Read a mask; raises ``LabelError`` if its pixels cannot be classes."""
    try:
        with Image.open(path) as picture:
            if picture.format in ('JPEG', 'MPO'):
                raise LabelError('mask is a JPEG, which changes values at every edge; export it as PNG', str(path))
            in_place = picture.format == 'PNG' and picture.mode in ('L', 'P')
            if picture.mode[0] in 'IF':
                return Pixels(_bytes(picture, path), None, False, False)
            if picture.mode in ('1', 'L', 'LA', 'P', 'PA'):
                numbers = np.asarray(picture.getchannel(0)).astype(np.int32)
                return Pixels(numbers, _palette(picture), False, in_place)
            rgb = np.asarray(picture.convert('RGB')).astype(np.int32)
    except LabelError:
        raise
    except Exception as error:  # whatever the decoder raises
        raise LabelError('mask cannot be read', f'{path} ({error})') from None
    return Pixels(rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2], None, True, False)


def _bytes(picture: Image.Image, path: Path) -> np.ndarray:
    """Pixels of more than 8 bits that hold ids."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 255 or (values != np.rint(values)).any():
        what = 'mask has values outside 0 to 255, as for instances or depth; a mask of classes holds ids from 0 to 254'
        raise LabelError(what, f'{path} ({values.min()} to {values.max()})')
    return values.astype(np.int32)


def _palette(picture: Image.Image) -> dict[int, RGB] | None:
    if picture.mode not in ('P', 'PA'):
        return None
    colours: Any = picture.getpalette('RGB') or []
    return {i // 3: tuple(colours[i : i + 3]) for i in range(0, len(colours), 3)}


def _pair(tree: Tree, pattern: str | None, notes: list[str]) -> list[Sample]:
    """Pictures with their masks.

    Raises:
        UserError: a picture has two masks, a mask has two pictures, or pictures and masks have no name in common.
    """
    pictures, masks = _sorted_by_kind(tree, pattern)
    if not masks:
        return []
    by_stem: dict[tuple, list[str]] = defaultdict(list)
    for file, (place, stem) in pictures.items():
        for name in {stem, without_picture_ending(stem)}:
            by_stem[(place.split, place.rest, name)].append(file)
    partner: dict[str, str] = {}
    alone = []
    for mask, (place, stem) in masks.items():
        found = next(
            (
                by_stem[key]
                for name in (stem, without_mask_ending(stem))
                if (key := (place.split, place.rest, name)) in by_stem
            ),
            [],
        )
        if len(found) > 1:
            raise UserError(f'{tree.path(mask)} belongs to two pictures, {found[0]} and {found[1]}; remove one')
        if not found:
            alone.append(mask)
        elif found[0] in partner:
            raise UserError(
                f'{found[0]} has two masks, {partner[found[0]]} and {mask}; choose with --masks '
                f"'{_pattern_for(mask, without_picture_ending(pictures[found[0]][1]))}'"
            )
        else:
            partner[found[0]] = mask
    if not pictures:
        raise UserError(f'all pictures in {tree.folder} are masks by their names or --masks; none is left to segment')
    if not partner:
        raise UserError(
            f'no picture and mask in {tree.folder} have the same name, such as '
            f'{next(iter(pictures))} and {next(iter(masks))}'
        )
    for what, files in (('pictures without mask', [f for f in pictures if f not in partner]), ('masks alone', alone)):
        if files:
            notes.append(f'left out: {len(files)} {what}, such as {files[0]}')
    listed = _listed_splits(tree, list(partner), notes)
    return [
        Sample(file, listed.get(file, pictures[file][0].split), mask, mask) for file, mask in sorted(partner.items())
    ]


def _pattern_for(mask: str, stem: str) -> str:
    """A pattern of this mask and of its like, for a picture with this stem."""
    folder, _, name = mask.rpartition('/')
    ending = name.removeprefix(stem)
    return f'*{ending}' if ending.rpartition('.')[0] else f'{folder}/*'


Found = dict[str, tuple[Place, str]]  # place and stem by file


def _sorted_by_kind(tree: Tree, pattern: str | None) -> tuple[Found, Found]:
    """Pictures and masks, by what their folders and names say."""
    prefix = [part for part in (pattern or '').split('/')[:-1] if not set(part) & set('*?[')]
    pictures: Found = {}
    masks: Found = {}
    unclear = []
    for file in tree.files:
        is_picture = file.lower().endswith(IMAGE_SUFFIXES)
        if not is_picture and not file.lower().endswith('.gif'):
            continue
        *folders, name = file.split('/')
        stem = name.rpartition('.')[0]
        place = place_of(folders)
        if pattern and fnmatch(file, pattern):
            below = place_of(folders[len(prefix) :])
            masks[file] = Place(None, below.split or place.split, below.rest), stem
        elif place.kind == 'mask':
            if not pattern:
                masks[file] = place, stem
        elif place.kind is None and not pattern:
            unclear.append((file, place, stem))
        elif place.kind != 'other' and is_picture:
            pictures[file] = place, stem
    known = {(place.split, place.rest, stem) for _, place, stem in unclear}
    elsewhere = bool(masks)
    lossy = {
        (place.split, place.rest, stem) for file, place, stem in unclear if file.lower().endswith(('.jpg', '.jpeg'))
    }
    for file, place, stem in unclear:
        base = without_mask_ending(stem)
        ends_as_mask = base != stem and (place.split, place.rest, base) in known
        beside_photo = file.lower().endswith('.png') and (place.split, place.rest, stem) in lossy
        if not elsewhere and (ends_as_mask or beside_photo):
            masks[file] = place, stem
        elif file.lower().endswith(IMAGE_SUFFIXES):
            pictures[file] = place, stem
    return pictures, masks


def _listed_splits(tree: Tree, pictures: Sequence[str], notes: list[str]) -> dict[str, str]:
    """Splits from lists such as ``ImageSets/Segmentation/train.txt``, if they name the pictures."""
    by_stem = defaultdict(list)
    for picture in pictures:
        by_stem[picture.rpartition('/')[2].rpartition('.')[0]].append(picture)
    splits: dict[str, str] = {}
    used = []
    for file in tree.files:
        stem, _, suffix = file.rpartition('/')[2].rpartition('.')
        split = split_in_name(stem)
        if suffix != 'txt' or split is None or stem.lower() == 'trainval':
            continue
        names = [line.split()[0] for line in _lines(tree.path(file)) if line.strip()]
        stems = [name.rpartition('/')[2] for name in names]
        found = [by_stem.get(stem) or by_stem.get(stem.rpartition('.')[0]) for stem in stems]
        if found and all(match and len(match) == 1 for match in found):
            splits.update({match[0]: split for match in found if match})
            used.append(file)
    if used:
        notes.append(f'splits from {", ".join(used)}')
    return splits


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text('utf-8').splitlines() if path.stat().st_size < 2**26 else []
    except (OSError, UnicodeDecodeError):
        return []
