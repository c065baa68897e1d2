"""Images with token labels, which follow every crop, flip, shear, shift and rotation. Needs mmpretrain."""

import copy
from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import BaseTransform, RandomFlip
from mmcv.transforms.utils import cache_random_params
from mmpretrain.datasets import CustomDataset, RandAugment, RandomResizedCrop
from mmpretrain.datasets.transforms.auto_augment import Rotate, Shear, Translate
from mmpretrain.registry import DATASETS, TRANSFORMS
from torch import Tensor

from ..errors import UserError
from .label_maps import SUFFIX, find_label_maps, read_label_map, size_text

FLIPPED = dict(horizontal=(-1,), vertical=(-2,), diagonal=(-2, -1))
OUTSIDE = -1  # number of the cells that a transform moves into the map


@DATASETS.register_module()
class TokenLabelDataset(CustomDataset):
    """mmpretrain's ``CustomDataset`` (a folder with a subfolder per class) with a token-label file for each image.

    ``data_prefix`` has two entries: ``img_path`` and ``label_path``, the folder that ``mmseg-volo make-token-labels``
    wrote, or that of the published labels. The other arguments are those of ``CustomDataset``.

    Raises:
        UserError: a folder does not exist, or an image has no token labels; the message names the file.
    """

    def load_data_list(self) -> list[dict]:
        """Find the images and their token labels; the size of the first label map is required of all."""
        images, labels = Path(self.data_prefix['img_path']), Path(self.data_prefix['label_path'])
        for folder in (images, labels):
            if not folder.is_dir():
                raise UserError(f'no folder {folder}; docs/pretraining.md describes the layout')
        found = find_label_maps(labels)
        samples = super().load_data_list()
        missing = []
        for sample in samples:
            name = str(Path(sample['img_path']).relative_to(images).with_suffix(''))
            if name in found:
                sample['token_label_path'] = str(found[name])
            else:
                missing.append(labels / f'{name}{SUFFIX}')
        if missing:
            more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
            raise UserError(f'no token labels {missing[0]}{more}; mmseg-volo make-token-labels writes them')
        first = samples[0]['token_label_path']
        self.label_size = first, read_label_map(Path(first)).shape
        return samples

    def get_data_info(self, idx: int) -> dict:
        """Add the size that every label map must have, and the file that has it."""
        return {**super().get_data_info(idx), 'token_label_size': self.label_size}


@TRANSFORMS.register_module()
class LoadTokenLabels(BaseTransform):
    """Load ``token_labels``: float32 ``[2, k, h, w]``, logits and class numbers of the k most likely classes.

    Raises:
        UserError: the file is missing or damaged, or differs in size from the others; the message names it.
    """

    def transform(self, results: dict) -> dict:
        """Add ``token_labels`` to ``results``."""
        path = results['token_label_path']
        label_map = read_label_map(Path(path))
        other, size = results['token_label_size']
        if label_map.shape != size:
            raise UserError(
                f'the token labels {path} have the size {size_text(label_map.shape)}, but {other} has '
                f'{size_text(size)}; one teacher at one image size must make all of them'
            )
        return {**results, 'token_labels': label_map}


@TRANSFORMS.register_module()
class FlipWithLabels(RandomFlip):
    """mmcv's ``RandomFlip``, which also flips ``token_labels``."""

    def _flip(self, results: dict) -> None:
        super()._flip(results)
        results['token_labels'] = results['token_labels'].flip(FLIPPED[results['flip_direction']])


@TRANSFORMS.register_module()
class RandAugmentWithLabels(RandAugment):
    """mmpretrain's ``RandAugment``, whose shears, shifts and rotations also move ``token_labels``.

    As in the published code, the nearest cell of the label map is taken, and where there is none every class has the
    logit 0.
    """

    def transform(self, results: dict) -> dict:
        """Apply randomly chosen transforms to ``img``, and the geometric ones to ``token_labels``."""
        for index in self.random_policy_indices():
            step = self.transforms[index]
            if isinstance(step, Shear | Translate | Rotate):
                state = np.random.get_state()
                shape = results['img'].shape[:2]
                results = step(results)
                after = np.random.get_state()
                np.random.set_state(state)  # the same numbers for the labels
                results['token_labels'] = _move_cells(results['token_labels'], step, shape)
                np.random.set_state(after)
            else:
                results = step(results)
        return results


@TRANSFORMS.register_module()
class CropWithLabels(RandomResizedCrop):
    """mmpretrain's ``RandomResizedCrop``, which also records ``crop``: left, top, right, bottom as fractions.

    The crop is taken from the token labels in ``targets.crop_targets``, for a batch at once.
    """

    def transform(self, results: dict) -> dict:
        """Crop and resize ``img``."""
        height, width = results['img'].shape[:2]
        with cache_random_params(self):
            top, left, h, w = self.rand_crop_params(results['img'])
            edges = left / width, top / height, (left + w) / width, (top + h) / height
            return super().transform({**results, 'crop': torch.tensor(edges)})


def _move_cells(label_map: Tensor, step: Shear | Translate | Rotate, size: tuple[int, int]) -> Tensor:
    """Apply a geometric transform of an image of ``size`` (height, width) to its label map ``[2, k, h, w]``.

    The transform is applied to an image of that size that contains the numbers of the cells, because a rotation of the
    image is no rotation of a label map with other proportions.
    """
    h, w = label_map.shape[2:]
    rows, columns = (np.arange(side) * cells // side for side, cells in zip(size, (h, w), strict=True))
    numbers = (rows[:, None] * w + columns).astype(np.float32)
    step = copy.copy(step)
    step.interpolation, step.pad_val = 'nearest', OUTSIDE
    moved = step(dict(img=numbers))['img']
    centres = [((np.arange(cells) + 0.5) * side / cells).astype(int) for side, cells in zip(size, (h, w), strict=True)]
    cells = torch.from_numpy(moved[np.ix_(*centres)]).long()
    label_map = label_map.flatten(2)[..., cells.clamp(min=0)]
    label_map[0] *= cells != OUTSIDE
    return label_map
