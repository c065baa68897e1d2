"""From a folder of annotated pictures to a config that trains on it."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from prettytable import PrettyTable

from .._files import file_sha256, whole
from ..checkpoints.wording import first_sentence
from ..config import SPLITS, make_writable
from ..datasets.annotations import VOID, Annotations, Classes, Sample, open_annotations
from ..datasets.annotations.base import RegionAnnotations
from ..datasets.annotations.tables import classes_from, find_table
from ..datasets.checks import LabelError, in_threads
from ..datasets.folder import write_list
from ..datasets.splitting import divide
from ..errors import UserError
from ..visualization import label_png, save_whole
from .dataset_config import Base, choose_base, choose_iterations, choose_sizes, class_weights, config_text

RECORD = 'new_dataset.json'  # marks a folder as written by this command
LIMITS = {True: 320, False: 512}  # longest side of crops, for small backbones and others
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
VOID_COLOUR = [224, 224, 192]  # PASCAL VOC's
OUTSIDE = 1.0  # pixels by which a polygon may leave its picture without a word


class Look(NamedTuple):
    """What one picture and its annotation have."""

    size: tuple[int, int]
    digest: str
    pixels: Mapping[Hashable, int]
    clipped: int
    problem: tuple[str, str] | None


@dataclass
class Plan:
    """A data set as it will be written."""

    annotations: Annotations
    looks: dict[str, Look]
    classes: Classes
    splits: dict[str, list[Sample]]

    def pixels(self, split: str) -> np.ndarray:
        """Pixels of each id in a split."""
        total = np.zeros(256, np.int64)
        for sample in self.splits[split]:
            total += self.ids(sample)
        return total

    def ids(self, sample: Sample) -> np.ndarray:
        """Pixels of each id in the label map of a picture."""
        counts = np.zeros(256, np.int64)
        for value, count in self.looks[sample.image].pixels.items():
            counts[self.classes.ids[value]] += count
        return counts


def new_dataset(
    folder: str,
    out: str | None = None,
    arch: str | None = None,
    classes: Sequence[str] = (),
    void: Sequence[str] = (),
    rest: str | None = None,
    form: str | None = None,
    masks: str | None = None,
    val_share: float = 0.2,
    test_share: float = 0.0,
    seed: int = 0,
    group: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a config for pictures of one's own, with label maps and lists of the splits beside it.

    Nothing in ``folder`` is changed. Masks that are label maps already are used where they are.

    Args:
        folder: pictures with masks, or with annotations of COCO, Labelme, CVAT for images or Label Studio.
        out: the config, ``<folder's name>.py`` by default; ``<its stem>_data`` beside it gets the rest.
        arch: backbone, such as ``'d1'`` or ``'coatnet_nano_rw'``; by default d1 with a GPU, tiny without.
        classes: a file with a class per line, or their names, in the order of their ids.
        void: classes that shall not count, as pixels of 255.
        rest: ``'background'`` or ``'void'``: what pixels in no region are; by default chosen by their number.
        form: format of the annotations; by default found.
        masks: pattern of the masks, relative to ``folder``.
        val_share: share of the pictures for validation, if ``folder`` has no splits.
        test_share: likewise for testing.
        seed: of the division into splits.
        group: regular expression that names the group of a picture; groups are not divided.
        overwrite: replace what this command wrote before.

    Returns:
        Path of the config.

    Raises:
        UserError: the annotations cannot be used, or there is no place to write to.
    """
    base = choose_base(arch)
    annotations = open_annotations(folder, form, masks)
    config = _config_path(folder, out)
    data = config.with_name(f'{config.stem}_data')
    _check_place(Path(folder), config, data, overwrite)
    samples, looks = _look_at_all(annotations)
    total: Counter[Hashable] = Counter()
    for look in looks.values():
        total.update(look.pixels)
    by_colour = any(getattr(value, 'colour', None) for value in total)
    table = classes_from(classes) if classes else find_table(Path(folder), annotations.tree.files, by_colour)
    chosen = annotations.classes(total, table, rest, void)
    if len(chosen.names) < 2:
        raise UserError(f'{folder} has the class {", ".join(chosen.names) or "of no pixel"} alone; two are needed')
    samples = _without_bare(annotations, samples, chosen)
    splits, rule = _split(annotations, samples, looks, val_share, test_share, seed, group)
    plan = Plan(annotations, looks, chosen, splits)
    _describe(folder, plan, rule)
    _write(plan, data, overwrite)
    _write_config(plan, base, Path(folder), config, data)
    return config


def _config_path(folder: str, out: str | None) -> Path:
    if out is None:
        stem = re.sub(r'\W+', '_', Path(folder).resolve().name).strip('_') or 'dataset'
        return Path(f'_{stem}.py' if stem[0].isdigit() else f'{stem}.py')
    path = Path(out)
    if path.suffix != '.py' or path.is_dir() or '.' in path.stem:
        raise UserError(f'--out must be a .py file without other dots, got {out}')
    return path


def _check_place(folder: Path, config: Path, data: Path, overwrite: bool) -> None:
    """Raise ``UserError`` unless the command may write there."""
    source = folder.resolve()
    for path in (config, data):
        if path.resolve().is_relative_to(source):
            raise UserError(f'{path} would be in {folder}, where nothing is written; choose another place with --out')
    for path in (config, data):
        if path.exists() and not overwrite:
            raise UserError(f'{path} exists; --overwrite replaces it, and --out chooses another name')
    if config.exists() and not config.is_file():
        raise UserError(f'{config} is no file')
    if data.exists() and not (data / RECORD).is_file():
        raise UserError(f'{data} was not written by this command; choose another name with --out')
    if _partial(data).exists():
        raise UserError(f'{_partial(data)} was left by a killed run, or another run is writing it; delete it first')
    make_writable(config.parent)


def _partial(data: Path) -> Path:
    return data.with_name(f'{data.name}.partial')


def _look_at_all(annotations: Annotations) -> tuple[list[Sample], dict[str, Look]]:
    """Look at every picture and annotation; raises ``UserError`` for the first kind of problem."""
    samples = annotations.samples
    with closing(in_threads(lambda sample: _look(annotations, sample), samples, annotations.kind)) as found:
        looks = {sample.image: look for sample, look in zip(samples, found, strict=True)}
    problems: dict[str, list[str]] = {}
    for look in looks.values():
        if look.problem:
            problems.setdefault(look.problem[0], []).append(look.problem[1])
    for what, files in problems.items():
        more = f' and {len(files) - 1} more' if len(files) > 1 else ''
        raise UserError(f'{what}: {files[0]}{more}')
    clipped = sum(look.clipped for look in looks.values())
    if clipped:
        files = [sample.source for sample in samples if looks[sample.image].clipped]
        annotations.notes.append(f'{clipped} polygons reach outside their pictures and are cut, such as in {files[0]}')
    return samples, looks


def _look(annotations: Annotations, sample: Sample) -> Look:
    path = annotations.tree.path(sample.image)
    size, digest = (0, 0), ''
    try:
        size, digest = _size(path), file_sha256(path)
        clipped = _check_regions(annotations, sample, size)
        return Look(size, digest, annotations.look(sample, size), clipped, None)
    except LabelError as wrong:
        return Look(size, digest, {}, 0, (wrong.args[0], wrong.args[1]))


def _size(path: Path) -> tuple[int, int]:
    """Width and height of a picture, turned as its EXIF data say, without decoding it."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            return (height, width) if picture.getexif().get(0x0112) in TURNED else (width, height)
    except Exception as error:  # whatever the decoder raises
        raise LabelError('picture cannot be read', f'{path} ({first_sentence(error)})') from None


def _check_regions(annotations: Annotations, sample: Sample, size: tuple[int, int]) -> int:
    """Number of polygons that reach outside the picture; raises ``LabelError`` for one that is wholly outside."""
    if not isinstance(annotations, RegionAnnotations):
        return 0
    where = f'{annotations.tree.path(sample.source)}, {sample.image}'
    if sample.size not in (None, size):
        made_for = '{} x {}'.format(*sample.size or ())
        raise LabelError('annotation is for another size', f'{where} ({made_for}, not {size[0]} x {size[1]})')
    clipped = 0
    for region in sample.content:
        for ring in region.rings:
            low, high = ring.min(axis=0), ring.max(axis=0)
            if (high < 0).any() or (low > size).any():
                raise LabelError('polygon is outside its picture', f'{where} ({region.label})')
            clipped += bool((low < -OUTSIDE).any() or (high > np.add(size, OUTSIDE)).any())
    return clipped


def _without_bare(annotations: Annotations, samples: list[Sample], classes: Classes) -> list[Sample]:
    """Pictures without a region are left out, unless what is in no region is a class."""
    if not isinstance(annotations, RegionAnnotations):
        return samples
    bare = [sample for sample in samples if not sample.content]
    if not bare:
        return samples
    if classes.ids.get('', VOID) != VOID:
        annotations.notes.append(f'{len(bare)} pictures have no {annotations.form}: all of each is background')
        return samples
    annotations.notes.append(f'left out: {len(bare)} pictures without {annotations.form}, such as {bare[0].image}')
    return [sample for sample in samples if sample.content]


def _split(
    annotations: Annotations,
    samples: list[Sample],
    looks: Mapping[str, Look],
    val_share: float,
    test_share: float,
    seed: int,
    group: str | None,
) -> tuple[dict[str, list[Sample]], str]:
    """Samples by split, and the rule in words: what the folder says, and shares of its training pictures."""
    given: dict[str, list[Sample]] = {}
    for sample in samples:
        given.setdefault(sample.split or 'train', []).append(sample)
    if 'train' not in given:
        raise UserError(f'{annotations.tree.folder} has pictures for {" and ".join(given)}, but none for train')
    shares = {'test': test_share, 'val': val_share} if len(given) == 1 else {'val': val_share}
    shares = {split: share for split, share in shares.items() if share and split not in given}
    if 'val' not in given and not val_share:
        raise UserError('--val-share must be above 0: training selects its best checkpoint on val')
    if not shares:
        return {split: given[split] for split in SPLITS if split in given}, 'as in the folder'
    named = {sample.image: sample for sample in given['train']}
    digests = {name: looks[name].digest for name in named}
    division = divide(list(named), shares, seed, group, digests)
    splits = {**given, **{split: [named[name] for name in names] for split, names in division.splits.items()}}
    return {split: splits[split] for split in SPLITS if split in splits}, f'seed {seed}; {division.rule}'


def _describe(folder: str, plan: Plan, rule: str) -> None:
    """Print what was found, and what it becomes."""
    samples = [sample for split in plan.splits.values() for sample in split]
    sizes = Counter(plan.looks[sample.image].size for sample in samples)
    texts = [f'{width} x {height}' for width, height in sorted(sizes)]
    of = f'{texts[0]}' if len(texts) == 1 else f'{texts[0]} to {texts[-1]}'
    print(f'{folder}: {len(samples)} pictures of {of} pixels with {plan.annotations.kind}')
    for note in plan.annotations.notes + plan.classes.notes:
        print(f'  {note}')
    counts = ', '.join(f'{len(found)} {split}' for split, found in plan.splits.items())
    print(f'split: {counts} ({rule})')
    print(_table(plan))
    absent = [
        name
        for i, name in enumerate(plan.classes.names)
        if not plan.pixels('train')[i] and any(plan.pixels(s)[i] for s in plan.splits)
    ]
    if absent:
        print(f'warning: no training picture has {", ".join(absent)}')


def _table(plan: Plan) -> PrettyTable:
    """Share of pixels and number of pictures for each class and split."""
    table = PrettyTable(['id', 'class', *(f'{split} {what}' for split in plan.splits for what in ('pixels', 'images'))])
    table.align = 'r'
    table.align['class'] = 'l'
    counts = {split: np.stack([plan.ids(sample) for sample in found]) for split, found in plan.splits.items()}
    for i, name in [*enumerate(plan.classes.names), (VOID, 'void')]:
        cells = [(f'{of[:, i].sum() / of.sum():.3%}', np.count_nonzero(of[:, i])) for of in counts.values()]
        table.add_row([i, name, *(cell for pair in cells for cell in pair)])
    return table


def _write(plan: Plan, data: Path, overwrite: bool) -> None:
    """Write label maps and lists into a new folder, whole or not at all."""
    partial = _partial(data)
    names = _label_names(plan)
    try:
        partial.mkdir(parents=True)
        try:
            drawn = _write_labels(plan, partial, names)
            for split, samples in plan.splits.items():
                write_list(partial / f'{split}.txt', [(sample.image, names[sample.image]) for sample in samples])
            record = dict(source=str(plan.annotations.tree.folder), classes=plan.classes.names)
            (partial / RECORD).write_text(json.dumps(record, indent=1) + '\n')
            if overwrite and data.exists():
                shutil.rmtree(data)
            partial.replace(data)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # also on Ctrl-C
    except OSError as error:
        raise UserError(f'cannot write to {data}: {error.strerror or error}') from None
    what = f'{drawn} label maps, ' if drawn else 'the masks are used where they are; '
    print(f'{data}: {what}{", ".join(f"{split}.txt" for split in plan.splits)}')


def _label_names(plan: Plan) -> dict[str, str]:
    """The label map of each picture: its mask where it is, or a file below ``labels``."""
    samples = [sample for split in plan.splits.values() for sample in split]
    in_place = {sample.image: plan.annotations.mask_in_place(sample, plan.classes.ids) for sample in samples}
    masks = {image: mask for image, mask in in_place.items() if mask is not None}
    if len(masks) == len(samples):
        return masks
    names = {sample.image: f'{sample.image.rpartition(".")[0]}.png' for sample in samples}
    owner: dict[str, str] = {}
    for image, name in names.items():
        twin = owner.setdefault(name.lower(), image)
        if twin != image:
            raise UserError(f'{twin} and {image} would have one label map, {name}; rename one')
    return names


def _write_labels(plan: Plan, folder: Path, names: Mapping[str, str]) -> int:
    """Draw and write the label maps; returns their number, 0 where the masks are used as they are."""
    samples = [sample for split in plan.splits.values() for sample in split]
    if not _are_drawn(plan, names):
        return 0

    # All 256 colours: with fewer, a PNG file has fewer bits per pixel, which cannot hold 255.
    colours = [*plan.classes.palette, *[[0, 0, 0]] * (VOID - len(plan.classes.palette)), VOID_COLOUR]

    def write(sample: Sample) -> None:
        label = plan.annotations.draw(sample, plan.looks[sample.image].size, plan.classes.ids)
        save_whole(label_png(label, colours), folder / 'labels' / names[sample.image])

    with closing(in_threads(write, samples, 'label maps')) as written:
        return sum(1 for _ in written)


def _are_drawn(plan: Plan, names: Mapping[str, str]) -> bool:
    return any(names[sample.image] != sample.content for split in plan.splits.values() for sample in split)


def _write_config(plan: Plan, base: Base, folder: Path, config: Path, data: Path) -> None:
    train = plan.splits['train']
    sizes = choose_sizes([plan.looks[sample.image].size for sample in train], LIMITS[base.small])
    weights = class_weights(plan.pixels('train')[: len(plan.classes.names)].tolist())
    iterations = choose_iterations(len(train), base.batch_size, base.small)
    labels = data / 'labels' if (data / 'labels').is_dir() else folder
    text = config_text(
        base,
        folder.resolve().name,
        plan.classes.names,
        plan.classes.palette,
        weights,
        sizes,
        iterations,
        (str(folder), str(labels)),
        {split: str(data / f'{split}.txt') for split in plan.splits},
    )
    with whole(config) as partial:
        partial.write_text(text, 'utf-8')
    height, width = sizes.crop
    print(
        f'{config}: {base.title} from {base.start}, {iterations} iterations of {base.batch_size} images, '
        f'crops of {width} x {height}' + ('' if weights is None else ', rare classes weighted')
    )
    if base.small:
        print('  for a CPU; --arch d1 starts from ImageNet weights and wants a GPU')
    print(f'next: mmseg-volo check-data {config}, mmseg-volo train {config}')
