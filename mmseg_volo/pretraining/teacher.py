"""Token labels from any timm classifier that looks at an image place by place."""

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .._device import resolve_device
from ..checkpoints.reading import read_checkpoint
from ..checkpoints.state_dict import backbone_tensors
from ..checkpoints.wording import first_sentence
from ..config import make_writable
from ..datasets.checks import read_image
from ..errors import UserError
from ..models.pretrained import differences
from .label_maps import MAX_CLASSES, SUFFIX, read_label_map, size_text, write_label_map

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')  # those of mmpretrain's CustomDataset
TOP = 5  # classes per place, as in the published files


def make_token_labels(
    folder: str,
    out: str,
    model: str,
    checkpoint: str | None = None,
    batch_size: int = 32,
    workers: int = 4,
    device: str = 'auto',
    resume: bool = False,
) -> None:
    """Write the five most likely classes at each place of each image, one small file per image.

    The teacher sees the whole image, resized to its own square test size, so that a cell of the map is the same part of
    the image in all of them.

    Args:
        folder: images, also in subfolders, which ``out`` repeats.
        out: folder for the token labels.
        model: timm's name of the teacher.
        checkpoint: weights of the teacher; by default timm's pretrained ones are downloaded.
        batch_size: images per forward pass.
        workers: processes that read images; 0 reads them in this process.
        device: ``'auto'`` uses a GPU if one is available.
        resume: continue an earlier run of the same teacher: keep its files that are whole.

    Raises:
        UserError: no images, one that cannot be decoded, token labels in ``out``, or a teacher that cannot be used.
    """
    if batch_size < 1:
        raise UserError(f'--batch-size must be at least 1, got {batch_size}')
    if workers < 0:
        raise UserError(f'--workers must be at least 0, got {workers}')
    targets = _targets(Path(folder), make_writable(out))
    teacher = _Teacher(model, checkpoint, resolve_device(device))
    todo = {image: path for image, path in targets.items() if not _is_whole(path, teacher.label_shape)}
    present = [path for path in targets.values() if path.exists()]
    if present and not resume:
        raise UserError(f'{present[0]} exists; choose another folder, or continue with --resume')
    loader = DataLoader(_Images(list(todo), teacher.transform), batch_size, num_workers=workers)
    names = iter(todo.values())
    with tqdm(total=len(todo), desc='token labels', unit='image', disable=None) as bar:
        for images in loader:
            for label_map in teacher.label_maps(images).cpu():
                write_label_map(next(names), label_map)
            bar.update(len(images))
    print(f'{len(todo)} token labels of {size_text(teacher.label_shape[1:])} written to {out}')


class _Teacher:
    """A timm classifier with its preprocessing; ``label_maps`` applies its classifier at each place."""

    def __init__(self, name: str, checkpoint: str | None, device: str):
        self.name, self.device = name, device
        self.model = _load_model(name, checkpoint).eval().to(device)
        data = resolve_model_data_config(self.model, use_test_size=True)
        self.transform = create_transform(**{**data, 'crop_pct': 1.0, 'crop_mode': 'squash'})
        classes = self.model.num_classes
        if not 1 < classes <= MAX_CLASSES:
            raise UserError(f'the teacher {name} has {classes} classes; token labels take 2 to {MAX_CLASSES}')
        self.label_shape = self.label_maps(torch.zeros(1, *data['input_size'])).shape[1:]

    @torch.inference_mode()
    def label_maps(self, images: Tensor) -> Tensor:
        """Logits and class numbers ``[B, 2, k, h, w]`` of preprocessed images ``[B, 3, H, W]``."""
        try:
            logits = _logits_by_place(self.model, images.to(self.device))
        except Exception as error:  # timm's models differ in what their methods take
            raise UserError(
                f'{self.name} cannot make token labels: its classifier must take the features of one place '
                f'({first_sentence(error)}); ResNet, EfficientNet, ConvNeXt, NFNet, Swin, ViT and VOLO do'
            ) from None
        values, classes = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
        return torch.stack([values, classes.to(values.dtype)], 1).permute(0, 1, 4, 2, 3)


def _logits_by_place(model: Any, images: Tensor) -> Tensor:
    """Logits ``[B, h, w, K]``: the classifier is applied to each place as if it were a whole image of that place."""
    features = model.forward_features(images)
    if features.dim() == 3:  # B, P + N, C, where the first P are class tokens and the like
        B, count, C = features.shape
        prefix = getattr(model, 'num_prefix_tokens', count - math.isqrt(count) ** 2)
        places = features[:, prefix:]
        h = w = math.isqrt(places.shape[1])
        # Class tokens are replaced too, because some heads take the first token, and others the average of the rest.
        alone = places.reshape(B * h * w, 1, C).expand(-1, prefix + 1, -1)
    else:
        if getattr(model, 'output_fmt', 'NCHW') == 'NHWC':
            features = features.permute(0, 3, 1, 2)
        B, C, h, w = features.shape
        alone = features.permute(0, 2, 3, 1).reshape(B * h * w, C, 1, 1)
        if getattr(model, 'output_fmt', 'NCHW') == 'NHWC':
            alone = alone.permute(0, 2, 3, 1)
    if h * w == 1:
        raise ValueError('it has a single place')
    aux_head: nn.Module | None = getattr(model, 'aux_head', None)  # VOLO's classifier of places
    logits = model.forward_head(alone) if aux_head is None else aux_head(alone[:, -1])
    return logits.float().view(B, h, w, model.num_classes)


def _load_model(name: str, checkpoint: str | None) -> Any:
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f'timm has no model named {name!r}' + (f'; did you mean {", ".join(near)}?' if near else ''))
    if checkpoint is None:
        try:
            return timm.create_model(name, pretrained=True)
        except Exception as error:  # offline, proxy, hub down: huggingface_hub raises many kinds
            raise UserError(
                f"cannot download timm's weights of {name} ({first_sentence(error)}); "
                'download them elsewhere and give --checkpoint FILE'
            ) from None
    state = backbone_tensors(read_checkpoint(checkpoint), checkpoint)
    classifier: Any = timm.get_pretrained_cfg_value(name, 'classifier') or ''
    key = f'{classifier if isinstance(classifier, str) else classifier[0]}.weight'
    if key not in state:
        raise UserError(f'{checkpoint} is no classifier of the kind {name}: it has no {key}')
    model = timm.create_model(name, num_classes=len(state[key]))
    problems = differences(model.state_dict(), state)
    if problems:
        raise UserError(f'{checkpoint} does not fit {name}: ' + '; '.join(problems))
    model.load_state_dict(state)
    return model


class _Images(Dataset):
    def __init__(self, paths: Sequence[Path], transform: Any):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.transform(read_image(str(self.paths[index])).convert('RGB'))
        except Exception as error:  # whatever the decoder raises
            raise UserError(f'{self.paths[index]} cannot be decoded ({first_sentence(error)})') from None


def _targets(folder: Path, out: Path) -> dict[Path, Path]:
    """Images below ``folder`` and the files for their token labels."""
    found: dict[Path, Path] = {}
    for image in _images(folder):
        path = (out / image.relative_to(folder)).with_suffix(SUFFIX)
        if path in found:
            raise UserError(f'{image} and {found[path]} differ in the suffix alone; rename one of them')
        found[path] = image
    if not found:
        raise UserError(f'no images ({", ".join(IMAGE_SUFFIXES)}) in {folder}')
    return {image: path for path, image in found.items()}


def _images(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob('*')) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _is_whole(path: Path, shape: Sequence[int]) -> bool:
    try:
        return path.exists() and read_label_map(path).shape == tuple(shape)
    except UserError:
        return False
