"""HVT, a vision transformer that pools its tokens on the way, as a segmentation backbone.

Paper: https://arxiv.org/abs/2103.10619. Code and weights of the authors (Apache-2.0): https://github.com/ziplab/HVT.
The parameters have the authors' names, so that their checkpoints load.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from timm.layers import PatchEmbed, trunc_normal_
from torch import Tensor, nn

from ..errors import UserError
from .backbone import (
    Backbone,
    ResizedPerGrid,
    are_positive,
    ceil_div,
    channels_told_by,
    drop_path_rates,
    init_linear,
    sides,
)
from .pretrained import PretrainedFormat, grid_of_map
from .volo import Transformer, resize_pos_embed

# Architecture settings. Each stage gives one map; strides count patches, and tokens are pooled where strides double.
# Blocks and poolings of ti1 and s0 to s4 are the authors' (s4 is also their Scale HVT-Ti-4); stages that end without a
# pooling are ours, and so is tiny.
HVT_ARCHITECTURES: dict[str, dict[str, Any]] = {
    'tiny': dict(layers=(2, 2, 2, 2), strides=(1, 2, 2, 2), embed_dim=96, num_heads=3),
    'ti1': dict(layers=(1, 3, 4, 4), strides=(1, 2, 2, 2), embed_dim=192, num_heads=3),
    's0': dict(layers=(3, 3, 3, 3), strides=(1, 1, 1, 1), embed_dim=384, num_heads=6),
    's1': dict(layers=(1, 3, 4, 4), strides=(1, 2, 2, 2), embed_dim=384, num_heads=6),
    's2': dict(layers=(1, 3, 3, 5), strides=(1, 2, 2, 4), embed_dim=384, num_heads=6),
    's3': dict(layers=(1, 4, 4, 3), strides=(1, 2, 4, 8), embed_dim=384, num_heads=6),
    's4': dict(layers=(1, 3, 3, 3, 2), strides=(1, 2, 4, 8, 16), embed_dim=384, num_heads=6),
}
PATCH_SIZES = {'1d': 16, '2d': 8}  # defaults by pooling


@MODELS.register_module()
class HVT(Backbone):
    """Hierarchical Visual Transformer backbone: one map per stage, for images of any size.

    ``out_channels`` and ``out_strides`` describe the returned maps. Paper: https://arxiv.org/abs/2103.10619.

    Args:
        arch: a key of ``HVT_ARCHITECTURES``, or a dict with the same keys as its values.
        img_size: side or (height, width) of the images for which the position embeddings are stored, best the training
            crop. For other sizes they are interpolated bicubically at run time.
        pooling: '2d' (ours) halves rows and columns of the grid of tokens. '1d' (the authors', for their weights)
            halves the row-major sequence of tokens; maps then repeat pooled tokens, so that every stride is 16. With
            several poolings it takes 224 x 224 images only, because the sequence is no grid after the second.
        patch_size: side of a patch, 4, 8 or 16 pixels; None means 8, or 16 with '1d', which has no other.
        in_channels: image channels; weights for RGB are adapted when they are loaded.
        out_indices: stages whose output is returned, None for all; later stages are not built.
        drop_path_rate: stochastic depth of the last block; earlier blocks get a linear share.
        attn_drop_rate: dropout of the attention's weights.
        frozen_stages: -1 freezes nothing, 0 the stem, n also stages 1 to n. Frozen parts are in eval mode. The output
            norms are always trained.
        with_cp: recompute the stem and each block in the backward pass instead of storing their activations.
        recompute_activations: recompute the outputs of LayerNorm and GELU in the backward pass, as in ``VOLO``.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``, see ``docs/weights.md``, or another of mmengine's.

    Raises:
        UserError: an argument, or the size of an image, is invalid; the message names what is valid.
    """

    def __init__(
        self,
        arch: str | Mapping = 's1',
        img_size: int | Sequence[int] = 224,
        pooling: str = '2d',
        patch_size: int | None = None,
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        recompute_activations: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ):
        settings = architecture_settings(arch)
        layers, strides, dim = settings['layers'], settings['strides'], settings['embed_dim']
        if pooling not in PATCH_SIZES:
            raise UserError(f'pooling must be one of {sorted(PATCH_SIZES)}, got {pooling!r}')
        patch = PATCH_SIZES[pooling] if patch_size is None else patch_size
        if patch not in (4, 8, 16):
            raise UserError(f'patch_size must be 4, 8, 16 or None, got {patch_size!r}')
        if pooling == '1d' and (patch, sides(img_size)) != (16, (224, 224)):
            raise UserError(f"pooling='1d' needs patch_size=16 and img_size=224, got {patch} and {img_size}")
        super().__init__(
            _pretrained_format(layers, strides, pooling),
            arch=arch,
            channels=[dim] * len(layers),
            strides=[patch * stride if pooling == '2d' else patch for stride in strides],
            out_indices=range(len(layers)) if out_indices is None else out_indices,
            rates=dict(drop_path_rate=drop_path_rate, attn_drop_rate=attn_drop_rate),
            frozen_stages=frozen_stages,
            norm_eval=False,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.pooling, self.strides = pooling, strides[: self.out_indices[-1] + 1]
        self.bounds = list(pairwise([0, *accumulate(layers)]))[: len(self.strides)]  # first and next block of a stage
        self.grid = tuple(ceil_div(side, patch) for side in sides(img_size))
        self.unit = 2 * patch if pooling == '1d' else patch  # it halves an even number of columns; 2 rows leave a token
        self.patch_embed = PatchEmbed(None, patch, in_channels, dim, output_fmt='NHWC')
        self.blocks = nn.ModuleList()
        for rate in drop_path_rates(drop_path_rate, sum(layers))[: self.bounds[-1][1]]:
            block = Transformer(dim, settings['num_heads'], 4, attn_drop_rate, rate, qkv_bias=True, norm_eps=1e-6)
            block.recompute = recompute_activations
            self.blocks.append(block)
        for name, stride in _embeddings(layers, self.strides).items():
            owner: Any = self.get_submodule(name.rpartition('.')[0])
            shape = tuple(ceil_div(side, stride) for side in self.grid) if pooling == '2d' else (197 // stride - 1,)
            owner.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, *shape, dim), std=0.02))
            owner.resized = ResizedPerGrid(resize_pos_embed if pooling == '2d' else _resize_sequence)
        for stage in self.out_indices:
            self.add_module(f'norm{stage}', nn.LayerNorm(dim, eps=1e-6))
        self.apply(init_linear)
        self.freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images ``[B, in_channels, H, W]`` to maps ``[B, C, ceil(H / s), ceil(W / s)]``, one per stride s."""
        H, W = x.shape[-2:]
        if self.pooling == '1d' and self.strides[-1] > 2 and (H, W) != (224, 224):
            raise UserError(f"with pooling='1d', arch={self.arch!r} takes 224 x 224 images only, got {H} x {W}")
        if torch.compiler.is_compiling() or H % self.unit or W % self.unit:  # no branch on a symbolic size
            x = F.pad(x, (0, ceil_div(W, self.unit) * self.unit - W, 0, ceil_div(H, self.unit) * self.unit - H))
        x = self.maybe_checkpointed(self.patch_embed, x.contiguous(memory_format=torch.channels_last))
        grid = h, w = x.shape[1], x.shape[2]
        if self.pooling == '1d':
            x = x.flatten(1, 2)[:, None]  # B, 1, h * w, C: the sequence as a grid of one row
        x = x + self._pos_embed(self, grid, grid)
        outputs = []
        for stage, (start, end) in enumerate(self.bounds):
            for block in self.blocks[start:end]:
                x = self.maybe_checkpointed(block, x)
            if stage in self.out_indices:
                y = getattr(self, f'norm{stage}')(x)
                if self.pooling == '1d':  # each patch gets the last token whose window begins at or before it
                    token = torch.arange(h * w, device=y.device) // self.strides[stage]
                    y = y[:, 0, token.clamp(max=y.shape[2] - 1)].unflatten(1, grid)
                    y = y[:, : ceil_div(H, 16), : ceil_div(W, 16)]
                outputs.append(y.permute(0, 3, 1, 2))
            if hasattr(block, 'pos_embed'):
                window = (3, 2, 1) if self.pooling == '2d' else ((1, 3), (1, 2))
                x = F.max_pool2d(x.permute(0, 3, 1, 2), *window).permute(0, 2, 3, 1)
                x = x + self._pos_embed(block, grid, (x.shape[1], x.shape[2]))
        return tuple(outputs)

    @classmethod
    def told_by(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """``arch``, ``pooling``, ``patch_size``, ``img_size`` and ``in_channels`` of a checkpoint."""
        form = _pretrained_format((), (), '2d')
        arch, _, pooling = (form.recognise(state) or '').partition(', pooling=')
        patches, grid = state.get(form.stem), grid_of_map(state['pos_embed']) if arch else None
        told: dict[str, Any] = dict(arch=arch or None, **channels_told_by(patches))
        if pooling:
            return told | dict(pooling=pooling)
        if grid is not None and told.get('in_channels') and patches is not None:
            patch = patches.shape[-1]
            told |= dict(patch_size=patch, img_size=(patch * grid[0], patch * grid[1]))
        return told

    def parts_of_stage(self, n: int) -> list[nn.Module | nn.Parameter]:
        """Parts that ``frozen_stages`` freezes: the layers of the stage; the stem is stage 0."""
        bounds = [(-1, 0), *self.bounds][n : n + 1]
        return [part for start, end in bounds for layer in self.layers()[start + 1 : end + 1] for part in layer]

    def layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """The stem, then the blocks, which contain the embedding after their pooling; ``pos_embed`` is in the first."""
        return [[self.patch_embed], [self.pos_embed, self.blocks[0]], *([block] for block in self.blocks[1:])]

    def _pos_embed(self, module: Any, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """The embedding of ``module`` for an image of ``grid`` patches and, with '2d', ``size`` tokens."""
        if grid == self.grid:
            return module.pos_embed
        return module.resized(module.pos_embed, size if self.pooling == '2d' else grid)


def _resize_sequence(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize ``[1, 196 or 97, C]``, an embedding of 14 x 14 patches, to an image of ``grid`` patches."""
    lost = pos_embed.shape[1] % 2  # pooling loses the last token
    size = grid[0], grid[1] // (1 + lost)
    whole = torch.cat([pos_embed, pos_embed[:, -1:]], 1) if lost else pos_embed
    return resize_pos_embed(whole.unflatten(1, (14, -1)), size).flatten(1, 2)[:, : size[0] * size[1] - lost]


def _embeddings(layers: Sequence[int], strides: Sequence[int]) -> dict[str, int]:
    """Names of the position embeddings, with the distances of their tokens in patches."""
    steps = zip(accumulate(layers), pairwise(strides), strict=False)
    return {'pos_embed': 1} | {f'blocks.{end - 1}.pos_embed': after for end, (before, after) in steps if after > before}


def _pretrained_format(layers: Sequence[int], strides: Sequence[int], pooling: str) -> PretrainedFormat:
    """Description of the checkpoints of one architecture."""

    def is_unbuilt(key: str, last_stage: int) -> bool:
        end = sum(layers[: last_stage + 1])
        block = re.match(r'blocks\.(\d+)\.', key)
        later = block is not None and end <= int(block[1]) < sum(layers)
        return later or (end < sum(layers) and key == f'blocks.{end - 1}.pos_embed')

    def recognise(state: Mapping[str, Tensor]) -> str | None:
        found = {key: state[key].shape[-1:] for key in state if key.endswith(('pos_embed', 'cls_token'))}
        for name, other in HVT_ARCHITECTURES.items():
            if found == dict.fromkeys(_embeddings(other['layers'], other['strides']), (other['embed_dim'],)):
                form = '1d' if state['pos_embed'].dim() == 3 else '2d'
                return name if form == pooling else f'{name}, pooling={form}'
        return None

    return PretrainedFormat(
        name='HVT',
        classifier=re.compile(r'(head|norm)\..+'),
        stem='patch_embed.proj.weight',
        new=re.compile(r'norm\d\..+'),
        unbuilt=is_unbuilt,
        recognise=recognise,
        resize={'pos_embed': resize_pos_embed},
    )


def architecture_settings(arch: str | Mapping) -> Mapping:
    """Return the settings of ``arch``; raises ``UserError`` if they are unknown or inconsistent."""
    if isinstance(arch, str) and arch in HVT_ARCHITECTURES:
        return HVT_ARCHITECTURES[arch]
    names, keys = sorted(HVT_ARCHITECTURES), sorted(HVT_ARCHITECTURES['s1'])
    if not isinstance(arch, Mapping) or set(arch) != set(keys):
        raise UserError(f'arch must be one of {names} or a dict with the keys {keys}, got {arch!r}')
    layers, strides, dim, heads = (arch[key] for key in ('layers', 'strides', 'embed_dim', 'num_heads'))
    stages = len(layers) if isinstance(layers, Sequence) else 0
    if not stages or not are_positive((*layers, dim, heads), stages + 2) or dim % heads:
        raise UserError(f'an arch dict needs layers, and an embed_dim that num_heads divides, got {dict(arch)}')
    if not are_positive(strides, stages) or any(b not in (a, 2 * a) or b > 16 for a, b in pairwise((0.5, *strides))):
        raise UserError(f'strides must be one per stage, start at 1, and stay or double up to 16, got {strides!r}')
    return arch
