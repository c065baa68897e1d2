"""A classifier that is trained with token labels. Needs mmpretrain."""

from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.models import BaseClassifier
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ..errors import UserError
from . import targets

STRIDE, STEM_STRIDE = 16, 8  # pixels per token at the end, and after the stem


@MODELS.register_module()
class TokenLabelClassifier(BaseClassifier):
    """Train a ``VOLOClassifier`` with token labels and MixToken; predict classes as mmpretrain's classifiers do.

    Papers: https://arxiv.org/abs/2104.10858 and https://arxiv.org/abs/2106.13112. Segmentors load the checkpoints of
    this model by ``init_cfg`` like any other.

    Args:
        backbone: config of a ``VOLOClassifier``.
        token_weight: weight of the tokens' loss beside that of the class token.
        smoothing: share of each target that is spread evenly over all classes.
        mix_tokens: MixToken: swap a random box of tokens, and their targets, with the flipped batch.
        ground_truth: also use the true classes in the class token's target, see ``targets.add_ground_truth``.
        data_preprocessor: mmpretrain's.
        init_cfg: of mmengine; for a checkpoint, use that of ``backbone``.
    """

    def __init__(
        self,
        backbone: dict,
        token_weight: float = 0.5,
        smoothing: float = 0.1,
        mix_tokens: bool = True,
        ground_truth: bool = False,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg, data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.token_weight, self.smoothing = token_weight, smoothing
        self.mix_tokens, self.ground_truth = mix_tokens, ground_truth
        self.box: targets.Box | None = None  # of the last forward pass; recomputation in the backward pass needs it
        self.backbone.patch_embed.register_forward_hook(self._mix)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor'):
        """Logits ``[B, K]`` of images ``[B, 3, H, W]``, their losses, or samples with predictions."""
        self.box = None
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        logits = self.backbone(inputs)
        if mode == 'tensor':
            return logits
        samples = data_samples or [DataSample() for _ in inputs]
        return [
            sample.set_pred_score(scores).set_pred_label(scores.argmax())
            for sample, scores in zip(samples, logits.softmax(1), strict=True)
        ]

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Losses of the class token and of the other tokens.

        Args:
            inputs: ``[B, 3, H, W]``.
            data_samples: each with ``token_labels`` ``[2, k, h, w]``, ``crop`` ``[4]``, and, for the option
                ``ground_truth``, ``gt_label``.

        Raises:
            UserError: a token label is no class of this model; the message names the image.
        """
        h, w = (-(-side // STRIDE) for side in inputs.shape[2:])
        num_classes = self.backbone.head.out_features
        for sample in data_samples:
            last = int(sample.token_labels[1].max())
            if last >= num_classes:
                raise UserError(
                    f'the token labels of {sample.img_path} contain class {last}, but '
                    f'model.backbone.num_classes is {num_classes}; it must be that of the teacher'
                )
        label_maps = torch.stack([sample.token_labels for sample in data_samples]).to(inputs.device)
        crops = torch.stack([sample.crop for sample in data_samples]).to(inputs.device)
        classes, tokens = targets.crop_targets(label_maps, crops, (h, w), num_classes, self.smoothing)
        if self.ground_truth:
            labels = torch.cat([sample.gt_label for sample in data_samples]).to(inputs.device)
            classes = targets.add_ground_truth(classes, labels, self.smoothing)
        if self.mix_tokens:
            self.box = targets.random_box(h, w)
            classes, tokens = targets.mix_targets(classes, tokens, self.box, (h, w))
        logits, token_logits = self.backbone.forward_tokens(inputs)
        loss_tokens = F.cross_entropy(token_logits.flatten(0, 1), tokens.flatten(0, 1))
        return dict(loss_class=F.cross_entropy(logits, classes), loss_tokens=self.token_weight * loss_tokens)

    def _mix(self, stem: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
        return tokens if self.box is None else targets.swap_tokens(tokens, self.box, STRIDE // STEM_STRIDE)
