"""VOLO as a segmentation backbone.

Paper: https://arxiv.org/abs/2106.13112. The parameters have the names of the authors' state dict, so that their
checkpoints load without a converter. Shape letters: ``ops/outlook/README.md``; here h and w are the rows and columns
of tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..errors import UserError
from ..ops import outlook_attention
from ..ops.plain import is_plain
from ..ops.products import call_linear
from ..ops.recompute import norm_linear, norm_linear_pool, norm_mlp
from .backbone import (
    Backbone,
    ResizedPerGrid,
    add,
    are_positive,
    ceil_div,
    channels_told_by,
    drop_path_rates,
    init_linear,
    sides,
)
from .pretrained import PretrainedFormat, grid_of_map

# Architecture settings; embed_dims and num_heads are (stage 1, stages 2 to 4). d1 to d5 follow the authors' repository,
# sail-sg/volo; tiny is ours.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    'tiny': dict(layers=(2, 2, 2, 1), embed_dims=(64, 128), num_heads=(2, 4), mlp_ratio=3, stem_channels=24),
    'd1': dict(layers=(4, 4, 8, 2), embed_dims=(192, 384), num_heads=(6, 12), mlp_ratio=3, stem_channels=64),
    'd2': dict(layers=(6, 4, 10, 4), embed_dims=(256, 512), num_heads=(8, 16), mlp_ratio=3, stem_channels=64),
    'd3': dict(layers=(8, 8, 16, 4), embed_dims=(256, 512), num_heads=(8, 16), mlp_ratio=3, stem_channels=64),
    'd4': dict(layers=(8, 8, 16, 4), embed_dims=(384, 768), num_heads=(12, 16), mlp_ratio=3, stem_channels=64),
    'd5': dict(layers=(12, 12, 20, 4), embed_dims=(384, 768), num_heads=(12, 16), mlp_ratio=4, stem_channels=128),
}
STRIDES = (8, 16, 16, 16)
DOWNSAMPLE = 1  # index in ``network``; the four stages have the indices 0, 2, 3 and 4


class OutlookAttention(nn.Module):
    """Attention over 3x3 neighbourhoods, predicted from the token at the centre of each (paper, section 3.1)."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 3, stride: int = 2):
        super().__init__()
        self.num_heads, self.kernel_size, self.stride = num_heads, kernel_size, stride
        self.scale = (dim // num_heads) ** -0.5
        self.v = nn.Linear(dim, dim, bias=False)
        self.attn = nn.Linear(dim, num_heads * kernel_size**4)
        self.proj = nn.Linear(dim, dim)
        # Windows at the border average fewer tokens: one window per stride, rounded up.
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True)

    def forward(self, x: Tensor, norm: nn.Module, recompute: bool = False) -> Tensor:
        """Normalise tokens ``[B, H, W, C]`` with ``norm``, mix them and return the same shape."""
        K = self.kernel_size**2
        if recompute:
            value, centres = norm_linear_pool(x, norm, self.v, self.pool)
        else:
            x = norm(x)
            value = call_linear(self.v, x)
            centres = self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        logits = call_linear(self.attn, centres).unflatten(-1, (self.num_heads, K, K))
        x = outlook_attention(logits, value, kernel_size=self.kernel_size, stride=self.stride, scale=self.scale)
        return call_linear(self.proj, x)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, qkv_bias: bool = False):
        super().__init__()
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, norm: nn.Module, recompute: bool = False) -> Tensor:
        """Normalise tokens ``[B, h, w, C]`` with ``norm``, mix them and return the same shape."""
        B, h, w, C = x.shape
        qkv = norm_linear(x, norm, self.qkv) if recompute else call_linear(self.qkv, norm(x))
        qkv = qkv.view(B, h * w, 3, self.num_heads, C // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        if qkv.device.type == 'cpu':
            qkv = qkv.contiguous()  # the flash kernel reads each key many times; saves 5 to 9 % of its time
        q, k, v = qkv.unbind(0)  # B, N, h * w, d
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return call_linear(self.proj, x.transpose(1, 2).reshape(B, h, w, C))


class _Block(nn.Module):
    """Pre-norm residual block: ``attn`` mixes tokens, and an MLP mixes channels."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float = 0.0, norm_eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[B, h, w, C]`` to the same shape."""
        recompute = self.recompute and not torch.compiler.is_compiling()  # Inductor decides what to store
        x = add(x, self.drop_path(self.attn(x, self.norm1, recompute)))
        if recompute:
            return add(x, self.drop_path(norm_mlp(x, self.norm2, self.mlp)))
        return add(x, self.drop_path(self.mlp(self.norm2(x))))


class Outlooker(_Block):
    """Block of stage 1, without stochastic depth, although the ramp counts it: as in the authors' code and in timm."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__(dim, OutlookAttention(dim, num_heads), mlp_ratio)


class Transformer(_Block):
    """Block of stages 2 to 4, and of HVT."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        attn_drop: float,
        drop_path: float,
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__(dim, Attention(dim, num_heads, attn_drop, qkv_bias), mlp_ratio, drop_path, norm_eps)


class PatchEmbed(nn.Module):
    """Stem: three convolutions, the first with stride 2, then 4x4 patches; the total stride is 8."""

    def __init__(self, in_channels: int, hidden: int, dim: int):
        super().__init__()
        layers: list[nn.Module] = []
        for channels, kernel, stride in ((in_channels, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            layers += [nn.Conv2d(channels, hidden, kernel, stride, kernel // 2, bias=False)]
            layers += [nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, dim, kernel_size=4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_channels, H, W]`` to tokens ``[B, H / 8, W / 8, C]``."""
        # With channels_last the blocks get contiguous [B, h, w, C], which LayerNorm need not copy.
        x = x.contiguous(memory_format=torch.channels_last)
        layers: list[Any] = list(self.conv)
        if torch.is_grad_enabled() or any(norm.training for norm in layers[1::3]):
            x = self.conv(x)
        else:  # inference: fold each BatchNorm into the convolution before it
            for conv, norm in zip(layers[::3], layers[1::3], strict=True):
                weight, bias = fuse_conv_bn_weights(
                    conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
                x = F.conv2d(x, weight, bias, conv.stride, conv.padding).relu_()
        if x.device.type == 'cpu' and x.dtype == torch.bfloat16 and is_plain(self.proj, nn.Conv2d):
            return self._project_patches(x)
        return self.proj(x).permute(0, 2, 3, 1)

    def _project_patches(self, x: Tensor) -> Tensor:
        """``proj`` as a matrix product: oneDNN's convolution is wrong for 16 or 24 channels on processors with AMX.

        Seen in torch 2.11: a 4x4 convolution with stride 4 differs by more than its largest value.
        """
        k = self.proj.kernel_size[0]
        patches = x.unflatten(2, (-1, k)).unflatten(4, (-1, k)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Downsample(nn.Module):
    """Convolution of 2x2 patches between stages 1 and 2."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, out_dim, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[B, h, w, in_dim]`` to ``[B, h / 2, w / 2, out_dim]``."""
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@MODELS.register_module()
class VOLO(Backbone):
    """Vision Outlooker backbone: one map per stage, for images of any size.

    Paper: https://arxiv.org/abs/2106.13112. ``out_channels`` and ``out_strides`` describe the returned maps.

    Args:
        arch: a key of ``ARCHITECTURES``, or a dict with the same keys as its values.
        img_size: side or (height, width) of the images for which the position embedding is stored, best the training
            crop. For other sizes it is interpolated bicubically at run time, which costs little.
        in_channels: image channels; weights for RGB are adapted when they are loaded.
        out_indices: stages (0 to 3) whose output is returned; later stages are not built.
        drop_path_rate: stochastic depth of the last block; earlier blocks get a linear share, stage 1 none.
        drop_rate: dropout after the position embedding is added.
        attn_drop_rate: dropout of the global attention's weights. Outlook attention has no dropout, because one
            operator computes its softmax and weighting.
        frozen_stages: -1 freezes nothing, 0 the stem, n also stages 1 to n. Frozen parts are in eval mode. The output
            norms are always trained, because no ImageNet checkpoint has them.
        norm_eval: keep the stem's BatchNorms in eval mode during training.
        with_cp: recompute the stem and each block in the backward pass instead of storing their activations.
        recompute_activations: recompute the outputs of LayerNorm and GELU in the backward pass instead of storing
            them, at no measurable cost in time; see ``docs/performance.md``. Modules with hooks or parametrizations
            and replaced modules (adapters) are called as usual.
        residual_in_fp32: under autocast, add residuals in float32 from stage 2 on, as timm does, instead of in
            autocast's dtype.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``, see ``docs/weights.md``, or another of mmengine's.

    Raises:
        UserError: an argument has an invalid value; the message names the valid ones.
    """

    def __init__(
        self,
        arch: str | Mapping = 'd1',
        img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        recompute_activations: bool = True,
        residual_in_fp32: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ):
        settings = architecture_settings(arch)
        layers, heads, mlp_ratio = settings['layers'], settings['num_heads'], settings['mlp_ratio']
        widths = (settings['embed_dims'][0], *(settings['embed_dims'][1],) * 3)
        height, width = sides(img_size)
        super().__init__(
            PRETRAINED,
            arch=arch,
            channels=widths,
            strides=STRIDES,
            out_indices=out_indices,
            rates=dict(drop_path_rate=drop_path_rate, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate),
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.residual_in_fp32 = residual_in_fp32

        self.patch_embed = PatchEmbed(in_channels, settings['stem_channels'], widths[0])
        self.network = nn.ModuleList(
            [nn.Sequential(*[Outlooker(widths[0], heads[0], mlp_ratio) for _ in range(layers[0])])]
        )
        ramp = drop_path_rates(drop_path_rate, sum(layers))
        if out_indices[-1] > 0:
            self.pos_embed = nn.Parameter(torch.zeros(1, ceil_div(height, 16), ceil_div(width, 16), widths[1]))
            self.pos_drop = nn.Dropout(drop_rate)
            self.network.append(Downsample(widths[0], widths[1]))
        for stage in range(1, out_indices[-1] + 1):
            start = sum(layers[:stage])
            blocks = [
                Transformer(widths[1], heads[1], mlp_ratio, attn_drop_rate, ramp[i])
                for i in range(start, start + layers[stage])
            ]
            self.network.append(nn.Sequential(*blocks))
        for block in self.network.modules():
            if isinstance(block, _Block):
                block.recompute = recompute_activations
        for i in out_indices:  # pre-norm blocks do not normalise the residual stream
            self.add_module(f'norm{i}', nn.LayerNorm(widths[i]))

        self._resized_pos_embed = ResizedPerGrid(resize_pos_embed)
        self.apply(init_linear)
        if out_indices[-1] > 0:
            trunc_normal_(self.pos_embed, std=0.02)
        self.freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images ``[B, in_channels, H, W]`` to maps ``[B, C, ceil(H / s), ceil(W / s)]``, one per stride s."""
        H, W = x.shape[-2:]
        if torch.compiler.is_compiling() or H % 16 or W % 16:  # no branch on a symbolic size
            # Outlook pooling rounds up and convolutions round down, so that only multiples of 16 suit both.
            x = F.pad(x, (0, ceil_div(W, 16) * 16 - W, 0, ceil_div(H, 16) * 16 - H))
        x = self.maybe_checkpointed(self.patch_embed, x)
        outputs = []
        for i, module in enumerate(self.network):
            if i == DOWNSAMPLE:
                x = module(x)
                pos_embed = self._pos_embed_for(x.shape[1], x.shape[2])
                x = self.pos_drop(x + (pos_embed if self.residual_in_fp32 else pos_embed.to(x.dtype)))
                continue
            for block in module.children():
                x = self.maybe_checkpointed(block, x)
            stage = max(i - 1, 0)
            if stage in self.out_indices:
                y = getattr(self, f'norm{stage}')(x)[:, : ceil_div(H, STRIDES[stage]), : ceil_div(W, STRIDES[stage])]
                outputs.append(y.permute(0, 3, 1, 2))
        return tuple(outputs)

    @classmethod
    def told_by(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """``arch``, ``img_size`` and ``in_channels`` of a checkpoint."""
        grid = grid_of_map(state['pos_embed']) if 'pos_embed' in state else None
        size = dict(img_size=(16 * grid[0], 16 * grid[1])) if grid else {}
        return dict(arch=_recognise(state), **size, **channels_told_by(state.get(PRETRAINED.stem)))

    def parts_of_stage(self, n: int) -> list[nn.Module | nn.Parameter]:
        """Parts that ``frozen_stages`` freezes: the stem, then the stages; the position embedding is in stage 2."""
        if n == 0:
            return [self.patch_embed]
        parts: list[nn.Module | nn.Parameter] = list(self.network[n if n > 1 else 0 : n + 1])
        return parts + [self.pos_embed] if n == 2 and hasattr(self, 'pos_embed') else parts

    def layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """The stem, then the blocks; the downsampling and the position embedding belong to the block after them."""
        found: list[list[nn.Module | nn.Parameter]] = [[self.patch_embed]]
        for i, module in enumerate(self.network):
            if i != DOWNSAMPLE:
                found += [[block] for block in module.children()]
        if len(self.network) > DOWNSAMPLE:
            found[len(list(self.network[0].children())) + 1][:0] = [self.network[DOWNSAMPLE], self.pos_embed]
        return found

    def _pos_embed_for(self, h: int, w: int) -> Tensor:
        """Position embedding for h x w tokens."""
        if self.pos_embed.shape[1:3] == (h, w):
            return self.pos_embed
        return self._resized_pos_embed(self.pos_embed, (h, w))


def resize_pos_embed(pos_embed: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a position embedding ``[1, h, w, C]`` to ``size`` bicubically, as the authors do; the dtype is kept."""
    exact = pos_embed if pos_embed.dtype == torch.float64 else pos_embed.float()
    resized = F.interpolate(exact.permute(0, 3, 1, 2), size=size, mode='bicubic', align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous().to(pos_embed.dtype)


def _is_unbuilt(key: str, last_stage: int) -> bool:
    if last_stage == 0 and key == 'pos_embed':
        return True
    place = re.match(r'network\.(\d+)\.', key)
    return place is not None and (last_stage + 1 if last_stage else 0) < int(place[1]) <= 4  # every VOLO ends at 4


def _recognise(state: Mapping[str, Tensor]) -> str | None:
    """Name of the architecture whose tensors ``state`` contains, or None."""
    blocks = {match[0] for key in state if (match := re.match(r'network\.\d+\.\d+\.', key))}
    layers = tuple(sum(block.startswith(f'network.{place}.') for block in blocks) for place in (0, 2, 3, 4))
    stem = state.get('patch_embed.proj.weight')
    for name, settings in ARCHITECTURES.items():
        widths = (settings['embed_dims'][0], settings['stem_channels'])
        if stem is not None and layers == settings['layers'] and tuple(stem.shape[:2]) == widths:
            return name
    return None


PRETRAINED = PretrainedFormat(
    name='VOLO',
    classifier=re.compile(r'(head|aux_head|post_network|norm)\..+|cls_token'),
    stem='patch_embed.conv.0.weight',
    new=re.compile(r'norm\d\..+'),  # the output norms
    unbuilt=_is_unbuilt,
    recognise=_recognise,
    resize={'pos_embed': resize_pos_embed},
)


def architecture_settings(arch: str | Mapping) -> Mapping:
    """Return the settings of ``arch``; raises ``UserError`` if they are unknown or inconsistent."""
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            raise UserError(f'arch must be one of {sorted(ARCHITECTURES)} or a dict, got {arch!r}')
        return ARCHITECTURES[arch]
    keys = set(ARCHITECTURES['d1'])
    if not isinstance(arch, Mapping) or set(arch) != keys:
        raise UserError(f'an arch dict must have exactly the keys {sorted(keys)}, got {arch!r}')
    if not all(are_positive(arch[key], count) for key, count in dict(layers=4, embed_dims=2, num_heads=2).items()):
        raise UserError(f'an arch dict needs 4 layers, 2 embed_dims and 2 num_heads, each at least 1, got {dict(arch)}')
    if not isinstance(arch['mlp_ratio'], int | float) or not 0 < arch['mlp_ratio'] < float('inf'):
        raise UserError(f'mlp_ratio must be a number above 0, got {arch["mlp_ratio"]!r}')
    if any(dim % heads for dim, heads in zip(arch['embed_dims'], arch['num_heads'], strict=True)):
        raise UserError(f'embed_dims must be multiples of num_heads, got {arch["embed_dims"]} and {arch["num_heads"]}')
    return arch
