"""Image classifiers with the backbones of this package, for ImageNet checkpoints as they were published."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, Mlp, trunc_normal_
from torch import Tensor, nn

from ..errors import UserError
from .backbone import init_linear
from .coatnet import CoAtNet
from .hvt import HVT, HVT_ARCHITECTURES
from .pretrained import PretrainedFormat
from .volo import VOLO, architecture_settings


class ClassAttention(nn.Module):
    """Attention of the class token to all tokens (CaiT, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.kv = nn.Linear(dim, dim * 2, bias=False)
        self.q = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[B, 1 + N, C]``, the class token first, to an update of the class token ``[B, 1, C]``."""
        B, N, C = x.shape
        q = self.q(x[:, :1]).view(B, 1, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).reshape(B, 1, C))


class ClassBlock(nn.Module):
    """Pre-norm residual block that changes the class token only."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[B, 1 + N, C]``, the class token first, to the same shape."""
        token = x[:, :1] + self.attn(self.norm1(x))
        token = token + self.mlp(self.norm2(token))
        return torch.cat([token, x[:, 1:]], 1)


class VOLOClassifier(VOLO):
    """VOLO with the authors' classifier: two class-attention blocks, and one linear layer each for class and tokens.

    ``forward_tokens(images) -> (logits [B, K], token_logits [B, N, K])`` gives both for training with token labels;
    N are the ``ceil(H / 16) * ceil(W / 16)`` tokens, row by row. ``forward(images) -> logits [B, K]`` adds half of the
    largest token logit of each class, as the authors do to classify. The parameters have the authors' names: their
    checkpoints and timm's load strictly. Paper: https://arxiv.org/abs/2106.13112.

    Args:
        arch: see ``VOLO``.
        img_size: see ``VOLO``.
        num_classes: number of classes K.
        backbone: other arguments of ``VOLO`` except ``out_indices``. A checkpoint in ``init_cfg`` must contain the
            classifier.

    Raises:
        UserError: an argument of ``VOLO`` has an invalid value.
    """

    def __init__(self, arch: Any = 'd1', img_size: Any = 224, num_classes: int = 1000, **backbone):
        super().__init__(arch, img_size, out_indices=(3,), **backbone)
        self.pretrained = _with_classifier(self.pretrained)
        settings = architecture_settings(arch)
        dim, num_heads = settings['embed_dims'][1], settings['num_heads'][1]
        self.norm3 = nn.Identity()  # the classifier normalises after its own blocks
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.post_network = nn.ModuleList(ClassBlock(dim, num_heads, settings['mlp_ratio']) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.aux_head = nn.Linear(dim, num_classes)
        trunc_normal_(self.cls_token, std=0.02)
        for module in (self.post_network, self.head, self.aux_head):
            module.apply(init_linear)

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits ``[B, K]`` and token logits ``[B, N, K]`` of images ``[B, 3, H, W]``; not yet added."""
        (feature_map,) = super().forward(x)
        x = feature_map.flatten(2).transpose(1, 2)  # B, N, C
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.post_network:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0]), self.aux_head(x[:, 1:])

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Logits ``[B, K]`` of images ``[B, 3, H, W]``."""
        logits, token_logits = self.forward_tokens(x)
        return logits + 0.5 * token_logits.amax(1)


class CoAtNetClassifier(CoAtNet):
    """CoAtNet with timm's classifier: LayerNorm, the average over the last map, and a linear layer.

    The parameters have timm's names. Paper: https://arxiv.org/abs/2106.04803.

    Args:
        arch: see ``CoAtNet``.
        img_size: see ``CoAtNet``.
        num_classes: number of classes K.
        backbone: other arguments of ``CoAtNet`` except ``out_indices``. A checkpoint in ``init_cfg`` must contain the
            classifier.

    Raises:
        UserError: an argument of ``CoAtNet`` has an invalid value.
    """

    def __init__(self, arch: Any = '0', img_size: Any = 224, num_classes: int = 1000, **backbone):
        super().__init__(arch, img_size, out_indices=(3,), **backbone)
        self.pretrained = _with_classifier(self.pretrained)
        self.norm3 = nn.Identity()
        self.norm = LayerNorm2d(self.out_channels[0])
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(self.out_channels[0], num_classes)))
        self.head.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Logits ``[B, K]`` of images ``[B, 3, H, W]``."""
        (feature_map,) = super().forward(x)
        return self.head(self.norm(feature_map).mean((2, 3)))


class HVTClassifier(HVT):
    """HVT with the authors' classifier: LayerNorm, the average over the tokens, and a linear layer, for 224 x 224.

    The parameters have the authors' names. Paper: https://arxiv.org/abs/2103.10619.

    Args:
        arch: a key of ``HVT_ARCHITECTURES``.
        num_classes: number of classes K.
        backbone: other arguments of ``HVT`` except ``out_indices`` and ``pooling``, which is '1d'. A checkpoint in
            ``init_cfg`` must contain the classifier.

    Raises:
        UserError: an argument of ``HVT`` has an invalid value, or an image another size.
    """

    def __init__(self, arch: str = 's1', num_classes: int = 1000, **backbone):
        last = len(HVT_ARCHITECTURES[arch]['layers']) - 1
        super().__init__(arch, pooling='1d', out_indices=(last,), **backbone)
        self.pretrained = _with_classifier(self.pretrained)
        self.add_module(f'norm{last}', nn.Identity())
        self.norm = nn.LayerNorm(self.out_channels[0], eps=1e-6)
        self.head = nn.Linear(self.out_channels[0], num_classes)
        self.head.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Logits ``[B, K]`` of images ``[B, 3, 224, 224]``."""
        if x.shape[-2:] != (224, 224):
            raise UserError(f'the classifier of HVT takes 224 x 224 images only, got {x.shape[-2]} x {x.shape[-1]}')
        (feature_map,) = super().forward(x)
        x = feature_map.flatten(2).transpose(1, 2)[:, :: self.strides[-1]]  # the map repeats each pooled token
        length = [module.pos_embed.shape[1] for module in (self, *self.blocks) if hasattr(module, 'pos_embed')][-1]
        return self.head(self.norm(x[:, :length]).mean(1))


def _with_classifier(form: PretrainedFormat) -> PretrainedFormat:
    """Description of the same checkpoints for a model that has the classifier, too."""

    def recognise(state: Mapping[str, Tensor]) -> str | None:
        return form.recognise({key: value for key, value in state.items() if not form.classifier.fullmatch(key)})

    nothing = re.compile('(?!)')
    return replace(form, classifier=nothing, new=nothing, recognise=recognise)
