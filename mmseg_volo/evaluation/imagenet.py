"""ImageNet's validation images with three kinds of labels, and the accuracy of a classifier on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import binomtest
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor

from .._files import IMAGE_SUFFIXES
from ..checkpoints.wording import some
from ..errors import UserError

CLASSES = 1000
# Images with labels in the whole set. Val and ReaL share 50,000 images, of which ReaL gives 3,163 no label.
IMAGES = {'val': 50_000, 'real': 46_837, 'v2': 10_000}
# Top-1 accuracy in percent by timm's name of the weights, from ``SOURCES``; HVT's are in the README of
# https://github.com/ziplab/HVT. ReaL and ImageNet-V2 are in timm's results-imagenet-real.csv and
# results-imagenetv2-matched-frequency.csv, in huggingface/pytorch-image-models, results/.
PROMISED: dict[str, dict[str, float]] = {
    'volo_d1_224.sail_in1k': dict(val=84.15, real=88.90, v2=74.10),
    'volo_d1_384.sail_in1k': dict(val=85.24, real=89.70, v2=75.65),
    'volo_d2_224.sail_in1k': dict(val=85.20, real=89.34, v2=75.31),
    'volo_d2_384.sail_in1k': dict(val=86.04, real=89.79, v2=76.09),
    'volo_d3_224.sail_in1k': dict(val=85.41, real=89.55, v2=75.62),
    'volo_d3_448.sail_in1k': dict(val=86.50, real=90.17, v2=77.09),
    'volo_d4_224.sail_in1k': dict(val=85.87, real=89.81, v2=76.02),
    'volo_d4_448.sail_in1k': dict(val=86.79, real=90.51, v2=77.74),
    'volo_d5_224.sail_in1k': dict(val=86.07, real=89.88, v2=76.55),
    'volo_d5_448.sail_in1k': dict(val=86.95, real=90.58, v2=77.75),
    'volo_d5_512.sail_in1k': dict(val=87.07, real=90.63, v2=78.12),
    'coatnet_nano_rw_224.sw_in1k': dict(val=81.70, real=87.01, v2=70.74),
    'coatnet_rmlp_nano_rw_224.sw_in1k': dict(val=82.06, real=87.28),
    'coatnet_0_rw_224.sw_in1k': dict(val=82.40, real=87.15, v2=71.35),
    'coatnet_1_rw_224.sw_in1k': dict(val=83.62, real=87.95, v2=72.68),
    'coatnet_rmlp_1_rw_224.sw_in1k': dict(val=83.36, real=87.89, v2=73.04),
    'coatnet_rmlp_1_rw2_224.sw_in12k_ft_in1k': dict(val=84.94, real=88.85, v2=74.46),
    'coatnet_2_rw_224.sw_in12k_ft_in1k': dict(val=86.58, real=89.82, v2=77.10),
    'coatnet_rmlp_2_rw_224.sw_in1k': dict(val=84.61, real=88.51, v2=74.18),
    'coatnet_rmlp_2_rw_224.sw_in12k_ft_in1k': dict(val=86.50, real=89.78, v2=77.00),
    'coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k': dict(val=87.39, real=90.39, v2=78.49),
    'hvt_ti1_224': dict(val=69.64),
    'hvt_s0_224': dict(val=80.39),
    'hvt_s1_224': dict(val=78.00),
    'hvt_s2_224': dict(val=77.36),
    'hvt_s3_224': dict(val=76.32),
    'hvt_s4_224': dict(val=75.23),
}


@dataclass(frozen=True)
class Source:
    """Publisher of weights.

    Args:
        published_in: where the top-1 accuracy is published.
        licence: licence of the weights, or None where timm's configuration names it.
    """

    published_in: str
    licence: str | None = None


_TIMM = Source("timm's results-imagenet.csv")
_AUTHORS = Source("README of ziplab/HVT, for pooling='1d'", 'Apache-2.0')
SOURCES = {'volo': _TIMM, 'coatnet': _TIMM, 'hvt': _AUTHORS}


@dataclass(frozen=True)
class LabelledImages:
    """Images and their labels.

    Args:
        files: paths.
        labels: per file the classes of which each is a hit.
        excluded: number of files that were left out, because they have no label.
    """

    files: list[str]
    labels: list[set[int]]
    excluded: int = 0


@dataclass
class Hits:
    """Number of images, and of those with a label among the first k predicted classes, by k."""

    images: int = 0
    first: dict[int, int] = field(default_factory=lambda: {1: 0, 5: 0})

    def add(self, logits: Tensor, labels: Sequence[set[int]]) -> None:
        """Count a batch of logits ``[B, classes]``."""
        for predicted, hits in zip(logits.topk(max(self.first)).indices.tolist(), labels, strict=True):
            self.images += 1
            for k in self.first:
                self.first[k] += not hits.isdisjoint(predicted[:k])

    def accuracy(self, k: int) -> tuple[float, float, float]:
        """Top-k accuracy and its 95 % Wilson interval, in percent.

        Accuracy is a share of images, for which this interval needs no bootstrap and stays within 0 and 100
        (https://doi.org/10.1080/01621459.1927.10502953).
        """
        low, high = binomtest(self.first[k], self.images).proportion_ci(0.95, 'wilson')
        return 100 * self.first[k] / self.images, 100 * low, 100 * high


def labelled_images(folder: str, labels: str) -> LabelledImages:
    """Find ImageNet's validation images and their labels.

    Args:
        folder: 1,000 folders, named by class, of images. With ``'real'`` it may hold the images themselves.
        labels: ``'val'``: folders named by wnid. ``'v2'``: ImageNet-V2 (https://arxiv.org/abs/1902.10811), folders
            named 0 to 999. ``'real'``: ReaL (https://arxiv.org/abs/2006.07159), with the files' original names; images
            without any label are excluded.

    Raises:
        UserError: there are other than 1,000 class folders, or a folder or file has an unexpected name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f'--imagenet takes a folder of 1,000 class folders; {folder} is no folder')
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith('.'))
    is_flat = labels == 'real' and not classes
    if len(classes) != CLASSES and not is_flat:
        found = f'{len(classes)} ({some(classes)})' if classes else 'none'
        raise UserError(f'--imagenet takes a folder of 1,000 class folders; {folder} has {found}')
    class_of = {str(i): i for i in range(CLASSES)} if labels == 'v2' else _wnids()
    wrong = [name for name in classes if name not in class_of] if labels != 'real' else []
    if wrong:
        expected, other = ('0 to 999', 'val') if labels == 'v2' else ('by wnid', 'v2')
        raise UserError(
            f'--labels {labels} takes class folders named {expected}; {len(wrong)} in {folder} are not '
            f'({some(wrong)}); are these the images of --labels {other}?'
        )
    files = [file for name in classes or ['.'] for file in sorted((root / name).iterdir())]
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise UserError(f'--imagenet: {folder} has no images ({", ".join(IMAGE_SUFFIXES)})')
    if labels != 'real':
        return LabelledImages([str(file) for file in files], [{class_of[file.parent.name]} for file in files])
    real = RealLabelsImagenet(range(IMAGES['val'])).real_labels
    return _with_real_labels(files, {Path(name).stem: set(classes) for name, classes in real.items()})


def _with_real_labels(files: list[Path], real: dict[str, set[int]]) -> LabelledImages:
    wrong = [file.name for file in files if file.stem not in real]
    if wrong:
        raise UserError(
            f'--labels real finds labels by the original names, ILSVRC2012_val_00000001.JPEG to 00050000; '
            f'{len(wrong)} of {len(files)} files have others ({some(wrong)})'
        )
    kept = [file for file in files if real[file.stem]]
    return LabelledImages([str(file) for file in kept], [real[file.stem] for file in kept], len(files) - len(kept))


def _wnids() -> dict[str, int]:
    return {wnid: index for index, wnid in enumerate(ImageNetInfo().label_names())}
