"""The files of a folder, and the interface that all formats of annotations share."""

import json
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np

from ..._files import IMAGE_SUFFIXES, files_below
from ...checkpoints.wording import first_sentence, printable
from ...errors import UserError
from .drawing import UNCOVERED, draw
from .tables import ClassTable
from .words import place_of

VOID = 255
MAX_CLASSES = 255
MAX_DOCUMENT = 2 * 2**30  # bytes of a JSON or XML file
VOID_NAMES = ('void', 'unlabeled', 'unlabelled', 'ignore', 'ignored', '__ignore__')
BACKGROUND = 'background'
BACKGROUND_NAMES = (BACKGROUND, '_background_', '__background__')
COVERED = 0.95  # share of pixels in polygons from which the rest are gaps and no class
Size = tuple[int, int]  # width and height


@dataclass(frozen=True)
class Sample:
    """An annotated picture.

    Args:
        image: its path relative to the folder.
        split: ``'train'``, ``'val'`` or ``'test'``, or None where nothing says.
        source: the file that has its annotation, for messages.
        content: what the format needs to draw it.
        size: the size for which it was annotated, where the file says.
    """

    image: str
    split: str | None
    source: str
    content: Any
    size: Size | None = None


@dataclass
class Classes:
    """The classes of a data set, and the id of each value that occurs in its annotations; 255 is void."""

    names: list[str]
    palette: list[list[int]]
    ids: dict[Hashable, int]
    notes: list[str] = field(default_factory=list)


class Tree:
    """The files below a folder, by their paths relative to it, without hidden ones."""

    def __init__(self, folder: Path):
        self.folder, self.files = folder, files_below(folder)
        self.images = [file for file in self.files if file.lower().endswith(IMAGE_SUFFIXES)]
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for file in self.images:
            self._by_name[file.rpartition('/')[2]].append(file)
            self._by_stem[file.rpartition('.')[0]].append(file)

    def path(self, file: str) -> Path:
        """Path of one of the files."""
        return self.folder / file

    def beside(self, file: str) -> str | None:
        """The picture whose name differs from that of ``file`` in the suffix alone, or None."""
        found = self._by_stem.get(file.rpartition('.')[0], [])
        return found[0] if len(found) == 1 else None

    def find(self, name: str, source: str, split: str | None) -> str | None:
        """The picture that an annotation means by ``name``, which may have other folders, or None.

        Raises:
            UserError: several pictures have this name.
        """
        plain = name.replace('\\', '/')
        for parts in (PurePosixPath(plain).parts, PurePosixPath(unquote(plain)).parts):
            found = self._by_name.get(parts[-1] if parts else '')
            if found:
                break
        else:
            return None

        def fit(file: str) -> tuple[int, bool, int]:
            own = PurePosixPath(file).parts
            alike = _common(reversed(own), reversed(parts))
            return alike, place_of(own[:-1]).split == split, _common(own, PurePosixPath(source).parts)

        ranked = sorted(found, key=fit, reverse=True)
        if len(ranked) > 1 and fit(ranked[0]) == fit(ranked[1]):
            raise UserError(f'{source} names {printable(name)}, which may be {ranked[0]} or {ranked[1]}; rename one')
        return ranked[0]


def _common(first: Iterable[str], second: Iterable[str]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


class Annotations(ABC):
    """Annotated pictures in one format.

    ``samples`` lists them, ``notes`` says what was left out.
    """

    kind: ClassVar[str]  # as the format is called in sentences

    def __init__(self, tree: Tree):
        self.tree = tree
        self.samples: list[Sample] = []
        self.notes: list[str] = []
        self.skipped: Counter[str] = Counter()

    @abstractmethod
    def look(self, sample: Sample, size: Size) -> dict[Hashable, int]:
        """Number of pixels of each value that occurs in one annotation; raises ``LabelError`` for a mistake."""

    @abstractmethod
    def classes(
        self, pixels: Mapping[Hashable, int], table: ClassTable | None, rest: str | None, void: Sequence[str]
    ) -> Classes:
        """Choose the classes.

        Args:
            pixels: number of pixels of each value in all annotations.
            table: names in the order wanted, and their colours.
            rest: what pixels in no region are: ``'background'``, ``'void'``, or None to choose.
            void: names that are no classes.
        """

    @abstractmethod
    def draw(self, sample: Sample, size: Size, ids: Mapping[Hashable, int]) -> np.ndarray:
        """Label map ``[H, W]``, uint8."""

    def mask_in_place(self, sample: Sample, ids: Mapping[Hashable, int]) -> str | None:
        """The file that already is the label map which ``draw`` would return, or None."""
        return None


class RegionAnnotations(Annotations):
    """Annotations that consist of labelled regions; ``Sample.content`` is a list of them, in the order of drawing."""

    form: ClassVar[str]
    suffix: ClassVar[str] = '.json'

    def __init__(self, tree: Tree):
        super().__init__(tree)
        self.lists: dict[str, list[str]] = {}  # classes that a file lists, in its order
        self.colours: dict[str, list[int]] = {}
        self.lost: list[str] = []  # names of pictures that are not there

    @staticmethod
    @abstractmethod
    def recognises(document: Any) -> bool:
        """Whether the contents of a file are in this format."""

    @abstractmethod
    def add(self, file: str, document: Any) -> None:
        """Add the pictures of a file.

        Raises:
            UserError: the file is not as the format requires.
        """

    def finish(self) -> None:
        """Check the files together.

        Raises:
            UserError: pictures are missing or annotated twice, or files disagree about the classes.
        """
        if self.lost:
            raise UserError(
                f'{self.tree.folder} lacks {len(self.lost)} of the pictures that its annotations name, such as '
                f'{printable(self.lost[0])}; copy or link them into it'
            )
        twice = [image for image, count in Counter(sample.image for sample in self.samples).items() if count > 1]
        if twice:
            files = [sample.source for sample in self.samples if sample.image == twice[0]]
            raise UserError(f'{twice[0]} is annotated in {files[0]} and again in {files[1]}; remove one')
        self._check_lists()
        for what, count in self.skipped.items():
            self.notes.append(f'left out: {count} {what}')
        bare = len(set(self.tree.images) - {sample.image for sample in self.samples})
        if bare and self.samples:
            self.notes.append(f'left out: {bare} pictures without {self.kind}')

    def _check_lists(self) -> None:
        (first, names), *others = self.lists.items() if self.lists else [('', [])]
        for other, its_names in others:
            for file, own, against, theirs in ((first, names, other, its_names), (other, its_names, first, names)):
                only = [name for name in own if name not in theirs]
                if only:
                    raise UserError(f'{file} lists the class {only[0]!r}, but {against} does not; make them agree')
        labels = {region.label for sample in self.samples for region in sample.content}
        by_spelling = defaultdict(set)
        for label in labels:
            by_spelling[label.casefold().replace('_', ' ').replace('-', ' ').strip()].add(label)
        for alike in by_spelling.values():
            if len(alike) > 1:
                one, two = sorted(alike)[:2]
                where = [
                    next(s.source for s in self.samples if any(r.label == label for r in s.content))
                    for label in (one, two)
                ]
                raise UserError(f'two spellings of one class: {one!r} in {where[0]} and {two!r} in {where[1]}')

    def look(self, sample: Sample, size: Size) -> dict[Hashable, int]:
        """Number of pixels of each label."""
        labels = [UNCOVERED, *dict.fromkeys(region.label for region in sample.content)]
        drawn = draw(sample.content, size, {label: i for i, label in enumerate(labels)})
        counts = np.bincount(drawn.ravel(), minlength=len(labels))
        return dict(zip(labels, counts.tolist(), strict=True))

    def classes(
        self, pixels: Mapping[Hashable, int], table: ClassTable | None, rest: str | None, void: Sequence[str]
    ) -> Classes:
        """Labels in the order of the table, of the export, or of the alphabet, after the background."""
        seen = [str(label) for label, count in pixels.items() if count and label != UNCOVERED]
        declared = (
            table.names if table else list(dict.fromkeys(name for names in self.lists.values() for name in names))
        )
        labels = [name for name in declared if name in seen or table] + sorted(set(seen) - set(declared))
        if table and set(seen) - set(declared):
            raise UserError(
                f'{table.source} lacks the class {sorted(set(seen) - set(declared))[0]!r} of the annotations'
            )
        notes = []
        unused = [name for name in declared if name not in labels]
        if unused:
            notes.append(f'left out: classes that never occur: {", ".join(unused[:8])}' + ' ...' * (len(unused) > 8))
        if rest is None:
            rest = self._rest(pixels, notes)
        background = next((name for name in labels if name.lower() in BACKGROUND_NAMES), None)
        if rest == BACKGROUND and background is None:
            background = BACKGROUND
            labels.insert(0, BACKGROUND)
        check_void(void, labels)
        names = [label for label in labels if label.lower() not in VOID_NAMES and label not in void]
        ids: dict[Hashable, int] = {label: names.index(label) if label in names else VOID for label in labels}
        ids[UNCOVERED] = ids[background] if rest == BACKGROUND and background in ids else VOID
        ids.update({label: VOID for label in pixels if label not in ids})
        names = [BACKGROUND if name in BACKGROUND_NAMES else name for name in names]
        colours = {**self.colours, **(table.colours if table else {})}
        return Classes(names, palette_for(names, colours), ids, notes)

    def _rest(self, pixels: Mapping[Hashable, int], notes: list[str]) -> str:
        share = pixels.get(UNCOVERED, 0) / max(1, sum(pixels.values()))
        if not share:
            return 'void'
        rest = 'void' if share < 1 - COVERED else BACKGROUND
        other = BACKGROUND if rest == 'void' else 'void'
        means = 'void' if rest == 'void' else f'the class {BACKGROUND}'
        notes.append(f'{share:.1%} of the pixels are in no {self.form}: they are {means} (--rest {other} changes that)')
        return rest

    def draw(self, sample: Sample, size: Size, ids: Mapping[Hashable, int]) -> np.ndarray:
        """Regions one over the other."""
        return draw(sample.content, size, {str(label): value for label, value in ids.items()}).astype(np.uint8)

    def picture(self, name: str, source: str, split: str | None) -> str | None:
        """The picture that an annotation names; one that is not there is remembered."""
        if '\0' in name:
            raise UserError(f'{source} names a picture that cannot exist: {printable(name)!r}')
        found = self.tree.find(name, source, split)
        if found is None:
            self.lost.append(name)
        return found

    def wrong(self, file: str, what: str) -> UserError:
        """The error for a file that is not as the format requires."""
        return UserError(f'{self.tree.path(file)} is no valid file of {self.kind}: {what}')

    def corners(self, file: str, points: Any, least: int = 3) -> np.ndarray:
        """Corners ``[n, 2]`` from a list of numbers or of pairs of numbers; raises ``UserError`` if it is neither."""
        try:
            corners = np.array(points, dtype=np.float64).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError):
            raise self.wrong(file, f'points must be pairs of numbers, got {printable(repr(points), 60)}') from None
        if len(corners) < least or not (np.abs(corners) < FARTHEST).all():
            raise self.wrong(
                file, f'{least} or more points with finite numbers are needed, got {printable(repr(points), 60)}'
            )
        return corners

    def label(self, file: str, name: Any) -> str:
        """A label, without spaces around it."""
        if not isinstance(name, str) or not name.strip():
            raise self.wrong(file, f'a label must be a word, got {printable(repr(name), 60)}')
        return name.strip()

    def size(self, file: str, width: Any, height: Any) -> Size:
        """Width and height as whole numbers."""
        try:
            return int(width), int(height)
        except (TypeError, ValueError, OverflowError):
            raise self.wrong(file, f'width and height must be numbers, got {width!r} and {height!r}') from None


FARTHEST = 1e7  # pixels


def read_json(path: Path) -> Any:
    """Contents of a JSON file; raises ``UserError`` if it is damaged or huge."""
    check_length(path)
    try:
        return json.loads(path.read_bytes().decode('utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is no readable JSON ({first_sentence(error)})') from None


def check_length(path: Path) -> None:
    """Raise ``UserError`` for a file that is too large to read at once."""
    if path.stat().st_size > MAX_DOCUMENT:
        raise UserError(f'{path} has more than {MAX_DOCUMENT // 2**30} GiB; split it into several files')


def check_void(void: Sequence[str], names: Sequence[str]) -> None:
    """Raise ``UserError`` for a name that no class has."""
    unknown = [name for name in void if name not in names]
    if unknown:
        raise UserError(f'--void names {unknown[0]!r}, but the classes are {", ".join(names)}')


def palette_for(names: Sequence[str], colours: Mapping[str, Sequence[int]]) -> list[list[int]]:
    """The given colours of classes, and PASCAL VOC's for the others, where black is the background alone."""
    taken = {tuple(colour) for colour in colours.values()}
    spare = (colour for i in range(1, 256) if tuple(colour := voc_colour(i)) not in taken)
    return [
        list(colours[name]) if name in colours else [0, 0, 0] if name == BACKGROUND else next(spare) for name in names
    ]


def voc_colour(index: int) -> list[int]:
    """Colour of a class id in PASCAL VOC's colour map: the bits of the id, spread over red, green and blue."""
    return [sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
