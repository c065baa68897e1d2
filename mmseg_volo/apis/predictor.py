"""Labels and probabilities of decoded pictures."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmseg.apis import init_model
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

from .._device import mixed_precision
from ..config import data_sets, without_steps
from ..errors import UserError
from ..models.pretrained import load_segmentor
from ..models.segmentor import best_class, compile_backbone, last_head, probability_of_label

ROWS = 256  # of probabilities, computed at a time
SMALL, SLIM = 32, 16  # shortest side in pixels and aspect ratio at which the neck's coarsest level may be empty


class Undecodable(UserError):
    """A file that cannot be decoded or segmented; it is skipped, and the other files continue."""


@dataclass
class Picture:
    """A picture or a frame on its way from the file to the results.

    ``image`` is uint8 BGR ``[H, W, 3]``, ``label`` uint8 ``[H, W]``, ``prob`` float16 ``[classes, H, W]``, one class
    for a binary head, ``confidence`` the probability of the label in 255ths, uint8 ``[H, W]``. ``problem`` says why
    they are missing.
    """

    path: str
    name: str
    image: Any = None
    label: Any = None
    prob: Any = None
    confidence: Any = None
    problem: Undecodable | None = None

    def forget(self) -> None:
        """Free the arrays."""
        self.image = self.label = self.prob = self.confidence = None


class Predictor:
    """A model with its data pipeline.

    Args:
        cfg: a whole config.
        checkpoint: the segmentor's weights.
        device: where the model runs.
        tta: average over the scales and flips of ``cfg.tta_pipeline``.
        amp: autocast to bfloat16, or to float16 on a GPU without bfloat16.
        compiled: run the backbone under ``torch.compile``.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str, tta: bool, amp: bool, compiled: bool = False):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # without a checkpoint mmseg guesses the classes; they are set below
            self.model = init_model(cfg, checkpoint=None, device='cpu')
        meta = load_segmentor(self.model, checkpoint).get('dataset_meta')
        meta = meta or _classes_of(data_sets(cfg.test_dataloader.dataset)[0])
        self.classes, self.palette = meta['classes'], meta['palette']
        self.model.to(device)
        if compiled:
            compile_backbone(self.model)
        self.device, self.amp = device, amp
        self.tester = MODELS.build(dict(cfg.tta_model, module=self.model)) if tta else self.model
        self.segments = hasattr(self.tester, 'segment')  # SlidingSegmentor does, and needs no packing
        steps = cfg.tta_pipeline if tta else data_sets(cfg.test_dataloader.dataset)[0].pipeline
        # Images are already decoded and have no labels.
        left_out = ('LoadImageFromFile', 'LoadAnnotations', *(['PackSegInputs'] if self.segments else []))
        self.pipeline = Compose([dict(type='LoadImageFromNDArray'), *without_steps(steps, left_out)])

    def batch_size(self, height: int = 1, width: int = 1) -> int:
        """Number of pictures of this size to compute at a time."""
        return self.model.images_per_batch(height, width) if self.segments else 1

    def predict(
        self, pictures: Iterable[Picture], probabilities: bool = False, confidence: bool = False
    ) -> Iterator[Picture]:
        """Set ``label`` and, if wanted, ``prob`` or ``confidence`` of each picture, in order.

        Those with a problem pass unchanged. Pictures that follow each other and have one size are computed in batches.
        """
        for batch in self._batches(pictures):
            results = self._results(batch, probabilities, confidence)
            for picture in batch:
                if picture.image is not None:
                    try:
                        picture.label, picture.prob, picture.confidence = next(results)
                    except (RuntimeError, cv2.error):
                        if not _is_odd(picture.image):
                            raise
                        height, width = picture.image.shape[:2]
                        problem = f'{picture.path} is {width} x {height}, too small or too narrow for this model'
                        picture.problem = Undecodable(problem)
                yield picture

    def _batches(self, pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
        """Yield pictures of one size together, and one that may be refused alone."""
        batch: list[Picture] = []
        for picture in pictures:
            alone = picture.image is None or _is_odd(picture.image)
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
        """Yield labels, probabilities and confidence of pictures of one size."""
        images = [picture.image for picture in batch]
        wanted = dict(logits=probabilities, confidence=confidence)
        outputs: Iterator[Any] = self._segmented(images, **wanted) if self.segments else map(self._tested, images)
        for image in images:
            with mixed_precision(self.device, self.amp):
                output = next(outputs)
            if not (probabilities or confidence):
                labels = output if self.segments else output.pred_sem_seg.data.reshape(image.shape[:2]).byte().cpu()
                yield labels.numpy(), None, None
            elif self.segments and not probabilities:
                yield output[0].numpy(), None, output[1].numpy()
            else:
                logits = output if self.segments else output.seg_logits.data.float().cpu()
                sure = probability_of_label(self.model, logits).numpy() if confidence else None
                yield *self._labels_and_probabilities(logits), sure

    def _segmented(self, images: list[np.ndarray], logits: bool, confidence: bool) -> Iterator[Tensor]:
        resized = [torch.from_numpy(self.pipeline(dict(img=image))['img']).permute(2, 0, 1) for image in images]
        yield from self.model.segment_all(resized, images[0].shape[:2], logits, confidence and not logits)

    def _tested(self, image: np.ndarray) -> SegDataSample:
        return self.tester.test_step(pseudo_collate([self.pipeline(dict(img=image))]))[0]

    def _labels_and_probabilities(self, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        if self.model.out_channels == 1:
            prob = logits.sigmoid()
            return (prob[0] > last_head(self.model).threshold).byte().numpy(), prob.half().numpy()
        prob = torch.empty(logits.shape, dtype=torch.half)
        for to, rows in zip(prob.split(ROWS, 1), logits.split(ROWS, 1), strict=True):  # never all rows in float32
            to.copy_(rows.softmax(0))
        return best_class(logits).byte().numpy(), prob.numpy()


def _classes_of(dataset: dict) -> dict:
    """``METAINFO`` of a data set's config, for checkpoints that do not name their classes."""
    kind = dataset.get('type')
    found: Any = DATASETS.get(kind) if isinstance(kind, str) else kind
    if not hasattr(found, 'METAINFO'):
        raise UserError(
            f'the checkpoint does not name its classes, and neither does test_dataloader.dataset: its type is {kind!r}'
        )
    return found.METAINFO


def _is_odd(image: np.ndarray) -> bool:
    """Whether a model may refuse an image for its size."""
    height, width = image.shape[:2]
    return min(height, width) < SMALL or max(height, width) >= SLIM * min(height, width)
