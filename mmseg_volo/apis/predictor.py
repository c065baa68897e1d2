"""Labels and probabilities of decoded pictures."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmseg.apis import init_model
from mmseg.registry import MODELS, TRANSFORMS
from torch import Tensor

from .._device import mixed_precision
from ..config import LABEL_LOADERS, first_test_set, type_name, without_steps
from ..errors import UserError
from ..export.description import classes_of
from ..export.loading import load_weights
from ..export.runtime import is_exported
from ..models.confidence import CERTAIN
from ..models.segmentor import compile_backbone, label_map

# Steps that read files, of which infer does its own.
LOADERS = ('LoadImageFromFile', 'LoadRasterFromFile', *LABEL_LOADERS)
ROWS = 256  # of probabilities, computed at a time
VOID = 255  # label of pixels below --void-below
SMALL, SLIM = 32, 16  # shortest side in pixels and aspect ratio at which the neck's coarsest level may be empty


class Undecodable(UserError):
    """A file that cannot be decoded or segmented; it is skipped, and the other files continue."""


@dataclass
class Picture:
    """A picture or a frame on its way from the file to the results.

    ``image`` is uint8 BGR ``[H, W, 3]``, ``label`` uint8 ``[H, W]``, ``prob`` float16 ``[classes, H, W]``, one class
    for a binary head, ``confidence`` the probability of each label in 1/65535, uint16 ``[H, W]``, ``task`` the
    JSON for Label Studio. ``problem`` says why they are missing.
    """

    path: str
    name: str
    image: Any = None
    label: Any = None
    prob: Any = None
    confidence: Any = None
    task: str = ''
    problem: Undecodable | None = None

    def forget(self) -> None:
        """Free the arrays."""
        self.image = self.label = self.prob = self.confidence = None


class Predictor:
    """A model with its data pipeline.

    Args:
        cfg: a whole config.
        checkpoint: the segmentor's weights, or an exported file.
        device: where the model runs.
        tta: average over the scales and flips of ``cfg.tta_pipeline``.
        amp: autocast to bfloat16, or to float16 on a GPU without bfloat16.
        compiled: run the backbone under ``torch.compile``.
        openvino: run an exported file with OpenVINO.
        void_below: labels with a lower probability become 255.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str,
        device: str,
        tta: bool,
        amp: bool,
        compiled: bool = False,
        openvino: bool = False,
        void_below: float = 0,
    ):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # without a checkpoint mmseg guesses the classes; they are set below
            self.model = init_model(cfg, checkpoint=None, device='cpu')
        dataset = first_test_set(cfg)
        meta = load_weights(self.model, checkpoint, cfg, openvino, amp).get('dataset_meta') or classes_of(dataset)
        if not meta:
            raise UserError(
                'the checkpoint does not name its classes, and neither does test_dataloader.dataset: '
                f'its type is {dataset.get("type")!r}'
            )
        self.classes, self.palette = meta['classes'], meta['palette']
        self.model.to(device)
        if compiled:
            compile_backbone(self.model)
        self.checkpoint, self.device, self.amp = checkpoint, device, amp and not is_exported(checkpoint)
        self.compiled, self.void_below = compiled, void_below
        self.tester = MODELS.build(dict(cfg.tta_model, module=self.model)) if tta else self.model
        self.segments = hasattr(self.tester, 'segment')  # SlidingSegmentor does, and needs no packing
        self.steps = cfg.tta_pipeline if tta else dataset.pipeline
        self.raster_loader = raster_loader(self.steps)
        left_out = (*LOADERS, *(['PackSegInputs'] if self.segments else []))
        self.pipeline = Compose([dict(type='LoadImageFromNDArray'), *without_steps(self.steps, left_out)])

    def batch_size(self, height: int = 1, width: int = 1) -> int:
        """Number of pictures of this size to compute at a time."""
        return self.model.images_per_batch(height, width) if self.segments else 1

    def predict(
        self, pictures: Iterable[Picture], probabilities: bool = False, confidence: bool = False
    ) -> Iterator[Picture]:
        """Set ``label`` and, if wanted, ``prob`` and ``confidence`` of each picture, in order.

        Pictures with a problem pass unchanged. Those that follow each other and have one size are computed in batches.
        """
        for batch in self._batches(pictures):
            results = self._results(batch, probabilities, confidence or self.void_below > 0)
            for picture in batch:
                if picture.image is not None:
                    try:
                        picture.label, picture.prob, picture.confidence = next(results)
                        if self.void_below > 0:
                            picture.label[picture.confidence < math.ceil(self.void_below * CERTAIN)] = VOID
                    except (RuntimeError, cv2.error):
                        height, width = picture.image.shape[:2]
                        if not is_odd(height, width):
                            raise
                        picture.problem = too_small(picture.path, height, width)
                yield picture

    def _batches(self, pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
        """Yield pictures of one size together, and one that may be refused alone."""
        batch: list[Picture] = []
        for picture in pictures:
            alone = picture.image is None or is_odd(*picture.image.shape[:2])
            if batch and (alone or picture.image.shape != batch[0].image.shape):
                yield batch
                batch = []
            batch.append(picture)
            if alone or len(batch) >= self.batch_size(*picture.image.shape[:2]):
                yield batch
                batch = []
        if batch:
            yield batch

    @torch.no_grad()
    def _results(
        self, batch: list[Picture], probabilities: bool, confidence: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]:
        """Yield labels, probabilities and confidences of pictures of one size."""
        images = [picture.image for picture in batch]
        outputs: Iterator[Any]
        if self.segments:
            outputs = self._segmented(images, probabilities, confidence)
        else:
            outputs = (self._tested(image, probabilities, confidence) for image in images)
        for image in images:
            with mixed_precision(self.device, self.amp):
                output = next(outputs)
            prob = None
            if isinstance(output, Tensor) and output.dim() == 3:  # logits
                prob = self._probabilities(output).numpy() if probabilities else None
                output = label_map(self.model, output.split(ROWS, 1), image.shape[:2], confidence)
            labels, *sure = output if confidence else (output,)
            yield labels.numpy(), prob, sure[0].numpy() if sure else None

    def _segmented(self, images: list[np.ndarray], logits: bool, confidence: bool) -> Iterator[Any]:
        resized = [torch.from_numpy(self.pipeline(dict(img=image))['img']).permute(2, 0, 1) for image in images]
        yield from self.model.segment_all(resized, images[0].shape[:2], logits, confidence)

    def _tested(self, image: np.ndarray, logits: bool, confidence: bool) -> Any:
        """The same from a model of mmseg's, or from the average over scales and flips."""
        sample = self.tester.test_step(pseudo_collate([self.pipeline(dict(img=image))]))[0]
        if 'confidence' in sample and confidence:
            return sample.pred_sem_seg.data[0].byte().cpu(), sample.confidence.data[0].cpu()
        if logits or confidence:
            scores = sample.seg_logits.data.float().cpu()
            return scores if self.model.out_channels > 1 else scores.double().logit()  # mmseg has applied the sigmoid
        return sample.pred_sem_seg.data.reshape(image.shape[:2]).byte().cpu()

    def _probabilities(self, logits: Tensor) -> Tensor:
        prob = torch.empty(logits.shape, dtype=torch.half)
        for to, rows in zip(prob.split(ROWS, 1), logits.split(ROWS, 1), strict=True):  # never all rows in float32
            to.copy_(rows.sigmoid() if self.model.out_channels == 1 else rows.softmax(0))
        return prob


def is_odd(height: int, width: int) -> bool:
    """Whether a model may refuse an image for its size."""
    return min(height, width) < SMALL or max(height, width) >= SLIM * min(height, width)


def too_small(path: str, height: int, width: int) -> Undecodable:
    """The problem of an odd image that the model refused."""
    return Undecodable(f'{path} is {width} x {height}, too small or too narrow for this model')


def raster_loader(steps: Sequence[dict]) -> Any:
    """The step that loads rasters in place of pictures, or None."""
    named = [step for step in steps if type_name(step) == 'LoadRasterFromFile']
    return TRANSFORMS.build(named[0]) if named else None
