"""CoAtNet as a segmentation backbone.

Paper: https://arxiv.org/abs/2106.04803. The parameters have the names of timm's, which released the only weights, so
that its files load without a converter. Here h and w are the rows and columns of a map or of its tokens.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from timm.layers import ConvMlp, DropPath, LayerNorm2d, LayerScale2d, SqueezeExcite
from torch import Tensor, nn

from ..errors import UserError
from ..ops.biased_attention import biased_attention
from ..ops.recompute import norm_linear, norm_mlp
from ..ops.relative_table import resize_bilinear, resize_geometric, table_grid
from .backbone import Backbone, add, are_positive, ceil_div, channels_told_by, drop_path_rates, sides
from .pretrained import PretrainedFormat
from .relative_position import RelativeMLP, RelativeTable

# What an arch dict may set beside the sizes, and the values in timm's coatnet_0 to coatnet_5.
FORM: dict[str, Any] = dict(
    head_width=32,  # the paper's CoAtNet-5: 64
    conv_act='gelu',  # or 'silu'
    se_act='silu',  # of squeeze and excitation; or 'relu'
    se_early=False,  # squeeze and excitation before the second norm
    expand_output=True,  # an MBConv widens to four times its output's channels, else its input's
    conv_bias=True,  # of an MBConv's last convolution and shortcut
    pre_norm_act=False,
    conv_stride='dw',  # which convolution of an MBConv has stride 2; or '1x1' (paper), or 'pool' before them
    pool='avg2',  # or 'max2' (paper), or 'max' of 3x3
    expand_first=True,  # attention at the output's width, else at the input's
    shortcut_bias=True,
    layer_scale=0.0,
    rel_pos='bias',  # a table; or 'mlp', which computes the table (timm's rmlp)
    rel_pos_width=512,
)
_RW = dict(conv_act='silu', expand_output=False, expand_first=False)  # timm's own models
_TINY = dict(_RW, head_width=16, rel_pos='mlp', rel_pos_width=64)
_NANO = dict(_RW, depths=(3, 4, 6, 3), widths=(64, 128, 256, 512), stem_widths=(32, 64))
_COAT = dict(_RW, depths=(2, 6, 14, 2), se_act='relu', conv_bias=False, pre_norm_act=True)
_1_RW = dict(_COAT, widths=(96, 192, 384, 768), stem_widths=(32, 64))
_2_RW = dict(_COAT, widths=(128, 256, 512, 1024), stem_widths=(64, 128), se_act='silu')
_1_EARLY = dict(_1_RW, se_early=True, shortcut_bias=False)
_SIZES: dict[str, dict[str, Any]] = {
    'tiny': dict(_TINY, depths=(1, 2, 4, 2), widths=(24, 48, 96, 160), stem_widths=(16, 24)),
    '0': dict(depths=(2, 3, 5, 2), widths=(96, 192, 384, 768), stem_widths=(64, 64)),
    '1': dict(depths=(2, 6, 14, 2), widths=(96, 192, 384, 768), stem_widths=(64, 64)),
    '2': dict(depths=(2, 6, 14, 2), widths=(128, 256, 512, 1024), stem_widths=(128, 128)),
    '3': dict(depths=(2, 6, 14, 2), widths=(192, 384, 768, 1536), stem_widths=(192, 192)),
    '4': dict(depths=(2, 12, 28, 2), widths=(192, 384, 768, 1536), stem_widths=(192, 192)),
    '5': dict(depths=(2, 12, 28, 2), widths=(256, 512, 1280, 2048), stem_widths=(192, 192)),
    'nano_rw': dict(_NANO, conv_stride='pool'),
    'rmlp_nano_rw': dict(_NANO, rel_pos='mlp', rel_pos_width=384),
    '0_rw': dict(_1_EARLY, depths=(2, 3, 7, 2), conv_stride='pool'),
    '1_rw': _1_EARLY,
    'rmlp_1_rw': dict(_1_EARLY, conv_stride='pool', pool='max', rel_pos='mlp', rel_pos_width=384),
    'rmlp_1_rw2': dict(_1_RW, rel_pos='mlp'),
    '2_rw': _2_RW,
    'rmlp_2_rw': dict(_2_RW, layer_scale=1e-6, rel_pos='mlp'),
    '3_rw': dict(_2_RW, widths=(192, 384, 768, 1536), stem_widths=(96, 192), layer_scale=1e-6),
}
# depths and widths are the blocks and channels of the four stages. '0' to '5' follow the paper with timm's form, those
# with rw are timm's; tiny is ours.
COATNET_ARCHITECTURES: dict[str, dict[str, Any]] = {name: FORM | sizes for name, sizes in _SIZES.items()}
STRIDES = (4, 8, 16, 32)
RESIZE = dict(geometric=resize_geometric, bilinear=resize_bilinear)
_ACTIVATIONS: dict[str, type[nn.Module]] = dict(gelu=nn.GELU, silu=nn.SiLU, relu=nn.ReLU)
_POOLS: dict[str, Callable[[], nn.Module]] = dict(
    avg2=partial(nn.AvgPool2d, 2), max2=partial(nn.MaxPool2d, 2), max=partial(nn.MaxPool2d, 3, 2, 1)
)
_RelPos = Callable[[int], nn.Module]  # from the number of heads
_Arch = Mapping[str, Any]  # a value of COATNET_ARCHITECTURES
_CHOICES = dict(
    conv_act=('gelu', 'silu'),
    se_act=('relu', 'silu'),
    conv_stride=('dw', '1x1', 'pool'),
    pool=tuple(_POOLS),
    rel_pos=('bias', 'mlp'),
)


class Stem(nn.Module):
    """Two 3x3 convolutions, the first with stride 2; the block after them begins with a norm."""

    def __init__(self, in_channels: int, arch: _Arch):
        super().__init__()
        first, last = arch['stem_widths']
        self.conv1 = nn.Conv2d(in_channels, first, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.act = _ACTIVATIONS[arch['conv_act']]()
        self.conv2 = nn.Conv2d(first, last, 3, 1, 1, bias=False)
        self.apply(_init_conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_channels, H, W]`` to ``[B, C, H / 2, W / 2]``."""
        return self.conv2(self.act(self.norm1(self.conv1(x))))


class Downsample(nn.Module):
    """Pooling with stride 2, then a 1x1 convolution where the channels change."""

    def __init__(self, in_dim: int, dim: int, pool: str, bias: bool = True):
        super().__init__()
        self.pool = _POOLS[pool]()
        self.expand = nn.Conv2d(in_dim, dim, 1, bias=bias) if dim != in_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_dim, h, w]`` to ``[B, dim, h / 2, w / 2]``."""
        return self.expand(self.pool(x))


class MBConv(nn.Module):
    """Pre-norm block of stages 1 and 2: 1x1 expansion, depthwise 3x3, squeeze and excitation, 1x1 projection."""

    def __init__(self, in_dim: int, dim: int, stride: int, arch: _Arch, drop_path: float):
        super().__init__()
        inner = 4 * (dim if arch['expand_output'] else in_dim)
        at = arch['conv_stride'] if stride == 2 else None
        reduced = (dim if arch['expand_output'] else inner) // 4
        squeeze = SqueezeExcite(inner, rd_channels=reduced, act_layer=_ACTIVATIONS[arch['se_act']])
        self.pre_norm_act, self.act = arch['pre_norm_act'], _ACTIVATIONS[arch['conv_act']]()
        self.shortcut = Downsample(in_dim, dim, arch['pool'], arch['conv_bias']) if stride == 2 else nn.Identity()
        self.pre_norm = nn.BatchNorm2d(in_dim)
        self.down = nn.AvgPool2d(2) if at == 'pool' else nn.Identity()
        self.conv1_1x1 = nn.Conv2d(in_dim, inner, 1, 2 if at == '1x1' else 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2_kxk = nn.Conv2d(inner, inner, 3, 2 if at == 'dw' else 1, 1, groups=inner, bias=False)
        self.se_early = squeeze if arch['se_early'] else nn.Identity()
        self.norm2 = nn.BatchNorm2d(inner)
        self.se = nn.Identity() if arch['se_early'] else squeeze
        self.conv3_1x1 = nn.Conv2d(inner, dim, 1, bias=arch['conv_bias'])
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.apply(_init_conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_dim, h, w]`` to ``[B, dim, h / stride, w / stride]``."""
        shortcut = self.shortcut(x)
        x = self.pre_norm(x)
        x = self.down(self.act(x) if self.pre_norm_act else x)
        x = self.act(self.norm1(self.conv1_1x1(x)))
        x = self.act(self.norm2(self.se_early(self.conv2_kxk(x))))
        return add(shortcut, self.drop_path(self.conv3_1x1(self.se(x))))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, with a bias that depends on the offset between query and key."""

    def __init__(self, in_dim: int, dim: int, arch: _Arch, rel_pos: _RelPos, attn_drop: float):
        super().__init__()
        inner = dim if arch['expand_first'] else in_dim
        self.num_heads, self.attn_drop = inner // arch['head_width'], attn_drop
        self.qkv = nn.Conv2d(in_dim, 3 * inner, 1)
        self.rel_pos = rel_pos(self.num_heads)
        self.proj = nn.Conv2d(inner, dim, 1)

    def forward(self, x: Tensor, norm: nn.Module, recompute: bool = False) -> Tensor:
        """Normalise ``[B, in_dim, h, w]`` with ``norm``, which may pool, and map it to ``[B, dim, h, w]``."""
        qkv = norm_linear(x, norm, self.qkv) if recompute else self.qkv(norm(x))
        B, _, h, w = qkv.shape
        qkv = qkv.permute(0, 2, 3, 1).reshape(B, h * w, self.num_heads, 3, -1)
        qkv = qkv.permute(3, 0, 2, 1, 4)  # 3, B, heads, h * w, d
        table = self.rel_pos((h, w)).permute(2, 0, 1)
        x = biased_attention(qkv, table, grid=(h, w), dropout=self.attn_drop if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, h, w, -1).permute(0, 3, 1, 2))


class Transformer(nn.Module):
    """Pre-norm block of stages 3 and 4: attention over all tokens, then an MLP."""

    def __init__(
        self, in_dim: int, dim: int, stride: int, arch: _Arch, rel_pos: _RelPos, attn_drop: float, drop_path: float
    ):
        super().__init__()
        norm1 = LayerNorm2d(in_dim)
        self.shortcut: nn.Module = nn.Identity()
        self.norm1: nn.Module = norm1
        if stride == 2:
            self.shortcut = Downsample(in_dim, dim, arch['pool'], arch['shortcut_bias'])
            self.norm1 = nn.Sequential(OrderedDict(norm=norm1, down=_POOLS[arch['pool']]()))
        self.attn = Attention(in_dim, dim, arch, rel_pos, attn_drop)
        scale = arch['layer_scale']
        self.ls1 = LayerScale2d(dim, scale) if scale else nn.Identity()
        self.norm2 = LayerNorm2d(dim)
        self.mlp = ConvMlp(dim, 4 * dim, act_layer=nn.GELU)
        self.ls2 = LayerScale2d(dim, scale) if scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.recompute = False
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_dim, h, w]`` to ``[B, dim, h / stride, w / stride]``."""
        recompute = self.recompute and not torch.compiler.is_compiling()  # Inductor decides what to store
        x = add(self.shortcut(x), self.drop_path(self.ls1(self.attn(x, self.norm1, recompute))))
        branch = norm_mlp(x, self.norm2, self.mlp) if recompute else self.mlp(self.norm2(x))
        return add(x, self.drop_path(self.ls2(branch)))


@MODELS.register_module()
class CoAtNet(Backbone):
    """CoAtNet backbone: two stages of convolutions and two of attention give maps with strides 4, 8, 16 and 32.

    Paper: https://arxiv.org/abs/2106.04803. Images may have any size. ``out_channels`` and ``out_strides`` describe the
    returned maps.

    Args:
        arch: a key of ``COATNET_ARCHITECTURES``, or a dict with ``depths``, ``widths``, ``stem_widths`` and any keys of
            ``FORM``; ``dict(COATNET_ARCHITECTURES['0'], conv_stride='1x1', pool='max2')`` is the paper's CoAtNet-0.
        img_size: side or (height, width) of the images for which the tables of the relative bias are stored, best the
            training crop. For other sizes they are resized at run time; archs with rmlp compute them for every size.
        in_channels: image channels; weights for RGB are adapted when they are loaded.
        out_indices: stages (0 to 3) whose output is returned; later stages are not built.
        drop_path_rate: stochastic depth of the last block; earlier blocks get a linear share.
        attn_drop_rate: dropout of the attention's weights; above 0, training stores the bias of all pairs of tokens.
        table_resize: ``geometric`` keeps the bias of nearby tokens, as in timm; ``bilinear`` stretches it, as in the
            paper.
        frozen_stages: -1 freezes nothing, 0 the stem, n also stages 1 to n. Frozen parts are in eval mode. The output
            norms are always trained, because no ImageNet checkpoint has them.
        norm_eval: keep all BatchNorms in eval mode during training.
        with_cp: recompute the stem and each block in the backward pass instead of storing their activations.
        recompute_activations: recompute the outputs of LayerNorm and GELU of attention blocks in the backward pass, as
            in ``VOLO``. The first block of a stage stores those of its first norm, which it pools.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``, see ``docs/weights.md``, or another of mmengine's.

    Raises:
        UserError: an argument has an invalid value; the message names the valid ones.
    """

    undecayed = re.compile(r'.+\.rel_pos\..+')

    def __init__(
        self,
        arch: str | Mapping = '0',
        img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        table_resize: str = 'geometric',
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        recompute_activations: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ):
        settings = architecture_settings(arch)
        depths, widths = settings['depths'], settings['widths']
        height, width = sides(img_size)
        if table_resize not in RESIZE:
            raise UserError(f'table_resize must be one of {sorted(RESIZE)}, got {table_resize!r}')
        resize = RESIZE[table_resize]
        super().__init__(
            replace(PRETRAINED, resize={'relative_position_bias_table': resize}),
            arch=arch,
            channels=widths,
            strides=STRIDES,
            out_indices=out_indices,
            rates=dict(drop_path_rate=drop_path_rate, attn_drop_rate=attn_drop_rate),
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.stem = Stem(in_channels, settings)
        self.stages = nn.ModuleList()
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        in_dim = settings['stem_widths'][1]
        for i in range(out_indices[-1] + 1):
            blocks: list[nn.Module] = []
            grid = ceil_div(height, 32) * 32 // STRIDES[i], ceil_div(width, 32) * 32 // STRIDES[i]
            for j in range(depths[i]):
                stride = 1 if j else 2
                if i < 2:
                    blocks.append(MBConv(in_dim, widths[i], stride, settings, next(rates)))
                else:
                    mlp = partial(RelativeMLP, width=settings['rel_pos_width'])
                    rel_pos = mlp if settings['rel_pos'] == 'mlp' else partial(RelativeTable, grid=grid, resize=resize)
                    args = settings, rel_pos, attn_drop_rate, next(rates)
                    block = Transformer(in_dim, widths[i], stride, *args)
                    block.recompute = recompute_activations
                    blocks.append(block)
                in_dim = widths[i]
            self.stages.append(nn.ModuleDict(dict(blocks=nn.Sequential(*blocks))))
        for i in out_indices:  # pre-norm blocks do not normalise the residual stream
            self.add_module(f'norm{i}', LayerNorm2d(widths[i]))
        self.freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images ``[B, in_channels, H, W]`` to maps ``[B, C, ceil(H / s), ceil(W / s)]``, one per stride s."""
        H, W = x.shape[-2:]
        x = F.pad(x, (0, ceil_div(W, 32) * 32 - W, 0, ceil_div(H, 32) * 32 - H))
        # With channels_last the tokens are contiguous, which LayerNorm and attention need not copy.
        x = self.maybe_checkpointed(self.stem, x.contiguous(memory_format=torch.channels_last))
        outputs = []
        for i, blocks in enumerate(self._blocks()):
            for block in blocks:
                x = self.maybe_checkpointed(block, x)
            if i in self.out_indices:
                y = getattr(self, f'norm{i}')(x)
                outputs.append(y[:, :, : ceil_div(H, STRIDES[i]), : ceil_div(W, STRIDES[i])])
        return tuple(outputs)

    @classmethod
    def told_by(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """``arch``, ``in_channels`` and, with tables of relative biases, ``img_size`` of a checkpoint."""
        state = {key: tensor for key, tensor in state.items() if not PRETRAINED.classifier.fullmatch(key)}
        tables = (tensor for key, tensor in state.items() if re.fullmatch(r'stages\.2\..+_table', key))
        grid = next(map(table_grid, tables), None)
        size = dict(img_size=(16 * grid[0], 16 * grid[1])) if grid else {}
        return dict(arch=_recognise(state), **size, **channels_told_by(state.get(PRETRAINED.stem)))

    def parts_of_stage(self, n: int) -> list[nn.Module | nn.Parameter]:
        """Parts that ``frozen_stages`` freezes: the stem, then the stages."""
        return list(self.stages[n - 1 : n]) if n else [self.stem]

    def layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """The stem, then the blocks."""
        found: list[list[nn.Module | nn.Parameter]] = [[self.stem]]
        return found + [[block] for blocks in self._blocks() for block in blocks]

    def _blocks(self) -> list[list[nn.Module]]:
        """Blocks of each stage."""
        return [list(stage.get_submodule('blocks').children()) for stage in self.stages]


def _init_conv(module: nn.Module) -> None:
    """Initialise a convolution as EfficientNet does."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1] // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _recognise(state: Mapping[str, Tensor]) -> str | None:
    """Name of the architecture whose tensors ``state`` contains, or None."""
    found = _shapes(state)
    return next((name for name in COATNET_ARCHITECTURES if _shapes_of(name) == found), None)


@cache
def _shapes_of(arch: str) -> dict[str, tuple[int, ...]]:
    with torch.device('meta'):
        return _shapes(CoAtNet(arch).state_dict())


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, except those that depend on the image's channels and size."""
    return {
        key: () if key.endswith('_table') or key == PRETRAINED.stem else tuple(tensor.shape)
        for key, tensor in state.items()
        if not PRETRAINED.new.fullmatch(key)
    }


PRETRAINED = PretrainedFormat(
    name='CoAtNet',
    classifier=re.compile(r'(head|norm)\..+'),
    stem='stem.conv1.weight',
    new=re.compile(r'norm\d\..+'),  # the output norms
    unbuilt=lambda key, last: (place := re.match(r'stages\.([0-3])\.', key)) is not None and int(place[1]) > last,
    recognise=_recognise,
    grid=table_grid,
)


def architecture_settings(arch: str | Mapping) -> Mapping[str, Any]:
    """Return the settings of ``arch``; raises ``UserError`` if they are unknown or inconsistent."""
    if isinstance(arch, str):
        if arch not in COATNET_ARCHITECTURES:
            raise UserError(f'arch must be one of {sorted(COATNET_ARCHITECTURES)} or a dict, got {arch!r}')
        return COATNET_ARCHITECTURES[arch]
    sizes = {'depths', 'widths', 'stem_widths'}
    if not isinstance(arch, Mapping) or not sizes <= set(arch) <= sizes | set(FORM):
        raise UserError(f'an arch dict needs {sorted(sizes)} and may have {sorted(FORM)}, got {arch!r}')
    if not all(are_positive(arch[key], count) for key, count in dict(depths=4, widths=4, stem_widths=2).items()):
        raise UserError(f'an arch dict needs 4 depths, 4 widths and 2 stem_widths, each at least 1, got {dict(arch)}')
    settings = FORM | dict(arch)
    for key, values in _CHOICES.items():
        if settings[key] not in values:
            raise UserError(f'{key} must be one of {list(values)}, got {settings[key]!r}')
    head, attended = settings['head_width'], settings['widths'][2 if settings['expand_first'] else 1 :]
    if not are_positive((head, settings['rel_pos_width']), 2) or any(width % head for width in attended):
        raise UserError(f'head_width must divide the widths of attention {list(attended)}, got {head!r}')
    return settings
