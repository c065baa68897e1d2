"""Classify pictures, and measure classifiers on ImageNet."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import timm
import torch
from PIL import Image, ImageOps
from prettytable import PrettyTable
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .._device import mixed_precision
from .._files import IMAGE_SUFFIXES, file_sha256, find_files, whole
from .._version import __version__
from ..checkpoints.download import local_file
from ..config import output_path
from ..errors import UserError
from ..evaluation.imagenet import CLASSES, IMAGES, PROMISED, Hits, LabelledImages, labelled_images
from ..export.loading import device_for, exported_classifier
from ..export.runtime import is_exported
from ..models.named_classifiers import NamedClassifier, named_classifier

TOP = 5
MOST_WORKERS = 4  # by default; they decode faster than a CPU classifies
SLIM = 1000  # aspect ratio above which the resized picture would fill the memory


def classify(
    model: str,
    checkpoint: str,
    images: Sequence[str] = (),
    imagenet: str | None = None,
    labels: str = 'val',
    out: str | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = 'auto',
    amp: bool = False,
    openvino: bool = False,
) -> dict[str, Any]:
    """Print the five most probable classes of each picture, or the accuracy on ImageNet.

    Args:
        model: name of the classifier, see ``named_classifier``; it decides how pictures are resized and normalised.
        checkpoint: path, URL or ``timm://name`` of its weights, which must fit exactly, or an exported file.
        images: files, folders with their subfolders, and glob patterns.
        imagenet: instead of ``images``, a folder of ImageNet's validation images, see ``labelled_images``.
        labels: ``'val'``, ``'real'`` or ``'v2'``: the labels for ``imagenet``.
        out: JSON file for the results.
        batch_size: pictures per forward pass.
        workers: processes that decode pictures; 0 decodes in this process; by default up to 4, one per core.
        device: ``'auto'`` uses a GPU if one is available.
        amp: mixed precision: autocast to bfloat16, or to float16 on a GPU without bfloat16.
        openvino: run an exported file with OpenVINO.

    Returns:
        What is written to ``out``. ``skipped`` lists the pictures that could not be decoded; each was reported by a
        warning.

    Raises:
        UserError: model, checkpoint, input or device is unusable; the only picture, or one of ImageNet's, cannot be
            decoded.
    """
    if bool(images) == bool(imagenet):
        raise UserError('classify takes either pictures or --imagenet DIR')
    if batch_size < 1:
        raise UserError(f'--batch-size must be at least 1, got {batch_size}')
    if workers is not None and workers < 0:
        raise UserError(f'--workers must be at least 0, got {workers}')
    path = None if out is None else output_path(out, '.json')
    device = device_for(checkpoint, device, openvino=openvino)
    network: Callable[[Tensor], Tensor] | None = None
    if is_exported(checkpoint):
        network, named = exported_classifier(checkpoint, model, openvino, amp)
        amp = False
    else:
        named = named_classifier(model, checkpoint)
    labelled = labelled_images(imagenet, labels) if imagenet else None
    files = labelled.files if labelled else find_files(images, {'image': IMAGE_SUFFIXES})
    network = network or named.load(checkpoint).to(device)
    classifier = _Classifier(named, network, device, amp, batch_size, workers)
    result: dict[str, Any] = dict(
        model=named.name,
        weights=named.weights,
        checkpoint=str(checkpoint),
        checkpoint_sha256=file_sha256(local_file(str(checkpoint))),
        preprocessing=named.data,
        device=classifier.device,
        amp=amp,
        versions=dict(mmseg_volo=__version__, torch=torch.__version__, timm=timm.__version__),
    )
    if labelled:
        result['imagenet'] = _measure(classifier, labelled, labels, named)
    else:
        result['pictures'], result['skipped'] = _name_classes(classifier, files)
    if path:
        with whole(path) as partial:
            partial.write_text(json.dumps(result, indent=2))
    return result


class _Pictures(Dataset):
    """Pictures ready for a classifier, or the reasons why they are not."""

    def __init__(self, files: Sequence[str], transform: Callable, upright: bool):
        self.files, self.transform, self.upright = files, transform, upright

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        picture = _decode(self.files[index], self.upright)
        return index, picture if isinstance(picture, str) else self.transform(picture)


def _decode(path: str, upright: bool) -> Image.Image | str:
    """The picture as RGB, or the reason why not; ``upright`` turns it as its EXIF orientation says."""
    try:
        with Image.open(path) as file:
            deep = file.mode in ('I', 'F') or file.mode.startswith('I;')
            picture = (ImageOps.exif_transpose(file) if upright else file).convert('RGB')
    except Exception:  # decoders raise various types
        return f'{path} cannot be decoded as an image'
    if deep:
        return f'{path} cannot be decoded as an image: it holds more than 8 bits per pixel and channel'
    if max(picture.size) > SLIM * min(picture.size):
        return f'{path} is {picture.width} x {picture.height}, too narrow for a square crop'
    return picture


def _collate(items: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | None, list[tuple[int, str]]]:
    """Indices and batch of the pictures that are ready, and indices and reasons of the others."""
    ready = [(index, item) for index, item in items if isinstance(item, Tensor)]
    batch = torch.stack([item for _, item in ready]) if ready else None
    return [index for index, _ in ready], batch, [(index, item) for index, item in items if isinstance(item, str)]


class _Classifier:
    """A model that classifies files in batches."""

    def __init__(
        self,
        named: NamedClassifier,
        model: Callable[[Tensor], Tensor],
        device: str,
        amp: bool,
        batch_size: int,
        workers: int | None,
    ):
        self.model = model
        self.transform = create_transform(**named.data, is_training=False)
        self.device, self.amp, self.batch_size = device, amp, batch_size
        self.workers = min(MOST_WORKERS, os.cpu_count() or 1) if workers is None else workers

    def __call__(
        self, files: Sequence[str], upright: bool
    ) -> Iterator[tuple[list[int], Tensor, list[tuple[int, str]]]]:
        """Yield per batch: indices of files, their logits ``[B, classes]``, and indices of others with the reason."""
        loader = DataLoader(
            _Pictures(files, self.transform, upright),
            self.batch_size,
            num_workers=min(self.workers, -(-len(files) // self.batch_size)),
            collate_fn=_collate,
            pin_memory=self.device.startswith('cuda'),
        )
        with (
            torch.inference_mode(),
            mixed_precision(self.device, self.amp),
            tqdm(total=len(files), desc='pictures', unit='picture', disable=None) as progress,
        ):
            for indices, batch, problems in loader:
                logits = torch.empty(0, 0) if batch is None else self.model(batch.to(self.device, non_blocking=True))
                yield indices, logits.float().cpu(), problems
                progress.update(len(indices) + len(problems))


def _name_classes(classifier: _Classifier, files: Sequence[str]) -> tuple[list[dict], list[str]]:
    """Print and return the most probable classes of each picture; return also the files that were skipped."""
    pictures, skipped, start = [], [], time.perf_counter()
    for indices, logits, problems in classifier(files, upright=True):
        for index, reason in problems:
            if len(files) == 1:
                raise UserError(reason)
            tqdm.write(f'warning: {reason}; skipped')
            skipped.append(files[index])
        if not indices:
            continue
        names = class_names(logits.shape[1])
        top = logits.softmax(1).topk(min(TOP, logits.shape[1]))
        for index, probabilities, classes in zip(indices, top.values.tolist(), top.indices.tolist(), strict=True):
            rows = [dict(probability=p, index=c, **names[c]) for p, c in zip(probabilities, classes, strict=True)]
            tqdm.write(f'{files[index]}\n' + '\n'.join(f'{row["probability"]:9.2%}  {row["name"]}' for row in rows))
            pictures.append(dict(file=files[index], classes=rows))
    print(
        f'{len(pictures)} of {len(files)} images classified on {classifier.device} '
        f'in {time.perf_counter() - start:.1f} s' + (f'; {len(skipped)} skipped' if skipped else '')
    )
    return pictures, skipped


@cache
def class_names(num_classes: int) -> list[dict[str, str]]:
    """Per class its name and, if it is one of ImageNet's, its wnid."""
    subset = infer_imagenet_subset(dict(num_classes=num_classes))
    if subset is None:
        return [dict(name=f'class {index}') for index in range(num_classes)]
    info = ImageNetInfo(subset)
    return [dict(wnid=wnid, name=info.label_name_to_description(wnid)) for wnid in info.label_names()]


def _measure(classifier: _Classifier, labelled: LabelledImages, labels: str, named: NamedClassifier) -> dict:
    """Print and return the accuracy on ImageNet beside the promised one."""
    hits = Hits()
    for indices, logits, problems in classifier(labelled.files, upright=False):
        if problems:
            raise UserError(problems[0][1])
        if logits.shape[1] != CLASSES:
            raise UserError(f'--imagenet takes a classifier of {CLASSES:,} classes; this one has {logits.shape[1]:,}')
        hits.add(logits, [labelled.labels[index] for index in indices])
    result: dict[str, Any] = dict(labels=labels, images=hits.images, excluded=labelled.excluded)
    table = PrettyTable(['', 'measured', '95 % interval', 'promised', 'difference'], align='r')
    for k in hits.first:
        accuracy, low, high = hits.accuracy(k)
        promised = PROMISED.get(named.weights, {}).get(labels) if k == 1 else None
        result[f'top{k}'] = dict(accuracy=accuracy, interval=[low, high], promised=promised)
        beside = ['', ''] if promised is None else [f'{promised:.2f}', f'{accuracy - promised:+.2f}']
        table.add_row([f'top-{k}', f'{accuracy:.2f}', f'{low:.2f} to {high:.2f}', *beside])
    part = '' if hits.images == IMAGES[labels] else f'; the promised figures are for {IMAGES[labels]:,}'
    print(f'{table}\n{named.weights} on {hits.images:,} images, labels {labels}, in %{part}')
    return result
