"""What all backbones share: checks of arguments, weights, frozen stages, checkpointing, and resized parameters."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from mmengine.model import BaseModule
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..checkpoints.hub import is_model, model_config
from ..checkpoints.plain_config import backbone_arguments
from ..checkpoints.reading import read_checkpoint
from ..checkpoints.state_dict import backbone_tensors
from ..errors import UserError
from .pretrained import PretrainedFormat, fitted, load_pretrained, load_tensors, pretrained_checkpoint

MAX_CACHED_GRIDS = 8  # multi-scale testing uses 5 or 6 scales; on ADE20K, sizes of whole images rarely repeat


class Backbone(BaseModule):
    """Base of the backbones: a stem, then stages that each give one map.

    A subclass calls ``super().__init__`` first, builds its modules, defines ``parts_of_stage`` and ``layers``, and ends
    its own ``__init__`` with ``freeze``. ``out_channels`` and ``out_strides`` describe the returned maps.

    Args:
        pretrained: description of the ImageNet checkpoints of this architecture.
        arch: name of the architecture's settings, or a mapping with them.
        channels: channels of the map of each stage.
        strides: stride of the map of each stage.
        out_indices: stages whose output is returned.
        rates: rates of dropout and stochastic depth by the name of their argument.
        frozen_stages: -1 freezes nothing, 0 the stem, n also stages 1 to n. Frozen parts are in eval mode.
        norm_eval: keep all BatchNorms in eval mode during training.
        with_cp: what is run by ``maybe_checkpointed`` is recomputed in the backward pass.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` or another of mmengine's.

    Raises:
        UserError: an argument has an invalid value; the message names the valid ones.
    """

    # Names of the matrices that have no weight decay: embeddings of positions.
    undecayed = re.compile(r'(.+\.)?pos_embed')

    def __init__(
        self,
        pretrained: PretrainedFormat,
        *,
        arch: str | Mapping,
        channels: Sequence[int],
        strides: Sequence[int],
        out_indices: Sequence[int],
        rates: Mapping[str, object],
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        init_cfg: dict | list[dict] | None,
    ):
        super().__init__(init_cfg)
        stages = len(channels)
        for name, rate in rates.items():
            if not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise UserError(f'{name} must be a number from 0 to 1, got {rate!r}')
        if (
            not isinstance(out_indices, Sequence)
            or not out_indices
            or any(i not in range(stages) for i in out_indices)
            or list(out_indices) != sorted(set(out_indices))
        ):
            raise UserError(f'out_indices must be ascending numbers from 0 to {stages - 1}, got {out_indices!r}')
        if frozen_stages not in range(-1, stages + 1):
            raise UserError(f'frozen_stages must be between -1 and {stages}, got {frozen_stages}')
        self.pretrained = pretrained
        self.arch = arch if isinstance(arch, str) else 'custom'
        self.out_indices = tuple(out_indices)
        self.out_channels = [channels[i] for i in out_indices]
        self.out_strides = [strides[i] for i in out_indices]
        self.frozen_stages, self.norm_eval, self.with_cp = frozen_stages, norm_eval, with_cp

    @property
    def in_channels(self) -> int:
        """Number of image channels."""
        return self.get_parameter(self.pretrained.stem).shape[1]

    @classmethod
    def from_pretrained(cls, source: str, **arguments) -> 'Backbone':
        """Build the backbone that ``source`` contains and load its weights strictly; what was loaded is logged.

        Args:
            source: ``hf://owner/name``, which may end in ``@revision``; a folder that ``mmseg-volo push`` wrote;
                ``timm://name``; an http(s) URL; or a path.
            arguments: those of the constructor. They replace what the source tells: all arguments if it has the
                ``config.json`` of ``mmseg-volo push``, else ``arch``, ``img_size`` and ``in_channels``.

        Returns:
            The backbone in eval mode.

        Raises:
            UserError: the weights are unreadable or unsafe, do not fit, or do not tell the architecture.
        """
        content, weights = model_config(source) if is_model(source) else (None, source)
        state = backbone_tensors(read_checkpoint(weights), source)
        told = backbone_arguments(content) if content else cls.told_by(state)
        kind = told.pop('type', f'mmseg_volo.{cls.__name__}')
        if kind != f'mmseg_volo.{cls.__name__}':
            raise UserError(f'{source} does not contain a {cls.__name__}, but a {kind}')
        arguments = told | arguments
        if arguments.get('arch') is None:
            raise UserError(f'{source} does not tell its architecture; if it is a {cls.__name__}, name it with arch')
        try:
            with torch.device('meta'):  # nothing is allocated before every tensor fits
                model = cls(**arguments)
        except UserError:
            raise
        except Exception as error:  # the arguments are as good as their source
            raise UserError(f'{source} describes no {cls.__name__}: {type(error).__name__}: {error}') from None
        fitted(model, state, source, model.pretrained)
        model = cls(**arguments)
        load_tensors(model, state, source, model.pretrained)
        return model.eval()

    @classmethod
    def told_by(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments that the tensors of a checkpoint tell, such as ``arch``, which is None if it is unknown."""
        raise NotImplementedError

    def parts_of_stage(self, n: int) -> list[nn.Module | nn.Parameter]:
        """What ``frozen_stages=n`` freezes beyond ``n - 1``; stage 0 is the stem, and unbuilt stages have no parts."""
        raise NotImplementedError

    def layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """Parts that share a learning rate in layer-wise decay: the stem, then one entry per block, which is last."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Stop the training of the frozen stages' parameters."""
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def maybe_checkpointed(self, module: nn.Module, x: Tensor) -> Tensor:
        """``module(x)``; under ``with_cp`` its activations are recomputed, and its statistics updated once."""
        if not self.with_cp or not torch.is_grad_enabled():
            return module(x)
        if torch.compiler.is_compiling():
            return checkpoint(module, x, use_reentrant=False)
        contexts = nullcontext(), _RunningStatisticsKept(module)
        return checkpoint(module, x, use_reentrant=False, context_fn=lambda: contexts)

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg`` safely and strictly, or run mmengine's initialisers."""
        source = pretrained_checkpoint(self.init_cfg)
        if source is None:
            super().init_weights()
        else:
            load_pretrained(self, source, self.pretrained)
            self._is_init = True

    def train(self, mode: bool = True) -> 'Backbone':
        """Set the mode; frozen modules stay in eval mode."""
        super().train(mode)
        if mode:
            for part in self._frozen_parts():
                if isinstance(part, nn.Module):
                    part.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        return [part for n in range(self.frozen_stages + 1) for part in self.parts_of_stage(n)]


class ResizedPerGrid(nn.Module):
    """Parameter resized to the grid of tokens, once per grid unless it is trained.

    Args:
        resize: from the parameter and the grid (h, w) to the resized tensor.
    """

    def __init__(self, resize: Callable[[Tensor, tuple[int, int]], Tensor]):
        super().__init__()
        self.resize = resize
        self._cache: dict[tuple, Tensor] = {}

    def __len__(self) -> int:
        return len(self._cache)

    def forward(self, parameter: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return ``parameter`` for ``grid``."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and parameter.requires_grad):
            return self.resize(parameter, grid)
        key = (*grid, parameter._version, torch.is_inference_mode_enabled())
        if key not in self._cache:
            while len(self._cache) >= MAX_CACHED_GRIDS:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = self.resize(parameter, grid)
        return self._cache[key]

    def train(self, mode: bool = True) -> 'ResizedPerGrid':
        """Set the mode and forget."""
        # mmengine's EMA swaps weights through ``.data``, unseen by version counters, and then calls eval().
        self._cache.clear()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> 'ResizedPerGrid':
        self._cache.clear()  # device or dtype may change
        return super()._apply(fn, recurse)


def sides(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of ``img_size``, a side or both; raises ``UserError`` if it is neither."""
    both = (img_size, img_size) if isinstance(img_size, int) else img_size
    if not are_positive(both, 2):
        raise UserError(f'img_size must be a side or (height, width) in pixels, got {img_size!r}')
    return both[0], both[1]


def channels_told_by(stem: Tensor | None) -> dict[str, int]:
    """``in_channels`` by the weight of the first convolution, if it is one."""
    return dict(in_channels=stem.shape[1]) if stem is not None and stem.dim() == 4 else {}


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Rates of stochastic depth that grow linearly from 0 to ``last``."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


def are_positive(values: object, count: int) -> bool:
    """Whether ``values`` is a sequence of ``count`` integers from 1 to 65536."""
    if not isinstance(values, Sequence) or len(values) != count:
        return False
    return all(type(value) is int and 0 < value <= 2**16 for value in values)


def add(x: Tensor, branch: Tensor) -> Tensor:
    """``x + branch``; in inference, written to the branch's memory, which nothing else uses."""
    return x + branch if torch.is_grad_enabled() or branch.dtype != x.dtype else branch.add_(x)


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return (a + b - 1) // b  # -(-a // b) breaks torch.compile's symbolic shapes (torch 2.11)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as the authors of VOLO and timm do; other modules stay as they are."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class _RunningStatisticsKept(AbstractContextManager):
    """Context that keeps running statistics unchanged while a checkpointed module runs a second time."""

    def __init__(self, module: nn.Module):
        self.norms: list[Any] = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]

    def __enter__(self) -> None:
        self.before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *error) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
