"""Layer-wise learning-rate decay for VOLO."""

import re

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from prettytable import PrettyTable
from torch import nn

from ..errors import UserError
from ..models.volo import DOWNSAMPLE, VOLO


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VOLOLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Optimizer constructor with learning rates that shrink by ``decay_rate`` per block from the head to the stem.

    BEiT's rule (https://arxiv.org/abs/2106.08254) for VOLO's blocks, counted through all four stages: layer 0 is the
    stem, layer i is the i-th block, and the last layer comprises neck, heads and output norms. The position embedding
    and the downsampling belong to the block that follows them. Norms, biases and ``pos_embed`` have no weight decay.

    Args:
        paramwise_cfg: ``dict(decay_rate=...)``, between 0 and 1.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer; raises ``UserError`` for settings that mmengine would silently ignore."""
        rate = self.paramwise_cfg.get('decay_rate')
        if set(self.paramwise_cfg) != {'decay_rate'} or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise UserError(
                'VOLOLayerDecayConstructor requires paramwise_cfg=dict(decay_rate=...) with a rate above 0 and at most '
                f'1, got {self.paramwise_cfg}'
            )
        if self.base_lr is None or self.base_wd is None:
            raise UserError(f'VOLOLayerDecayConstructor needs lr and weight_decay, got optimizer={self.optimizer_cfg}')
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Append one group per layer, with and without weight decay, to ``params``, and log a table of them."""
        backbone = getattr(module, 'backbone', None)
        if not isinstance(backbone, VOLO):
            raise UserError(f'VOLOLayerDecayConstructor needs a VOLO backbone, got {type(module).__name__}')
        rate = self.paramwise_cfg['decay_rate']
        blocks = [len(list(stage.children())) for i, stage in enumerate(backbone.network) if i != DOWNSAMPLE]
        last = sum(blocks) + 1
        groups: dict[tuple[int, bool], dict] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = layer_of(name, blocks)
            decayed = parameter.ndim > 1 and not name.endswith('pos_embed')
            scale = rate ** (last - layer)
            group = groups.setdefault(
                (layer, decayed),
                dict(params=[], lr=self.base_lr * scale, lr_scale=scale, weight_decay=self.base_wd if decayed else 0.0),
            )
            group['params'].append(parameter)
        params.extend(groups[key] for key in sorted(groups))

        if is_main_process():
            table = PrettyTable(['layer', 'lr_scale', 'decayed', 'not decayed'])
            for layer in sorted({key[0] for key in groups}):
                kinds = [groups.get((layer, decayed)) for decayed in (True, False)]
                scale = next(kind['lr_scale'] for kind in kinds if kind)
                table.add_row([layer, f'{scale:.4f}', *[len(kind['params']) if kind else 0 for kind in kinds]])
            print_log(f'layer-wise learning-rate decay {rate}; tensors per layer:\n{table}', 'current')


def layer_of(name: str, blocks: list[int]) -> int:
    """Layer number of a segmentor's parameter, where stage i has ``blocks[i]`` blocks."""
    if name.startswith('backbone.patch_embed.'):
        return 0
    if name == 'backbone.pos_embed' or name.startswith(f'backbone.network.{DOWNSAMPLE}.'):
        return blocks[0] + 1
    block = re.match(r'backbone\.network\.(\d+)\.(\d+)\.', name)
    if block:
        stage = max(int(block[1]) - 1, 0)
        return sum(blocks[:stage]) + int(block[2]) + 1
    return sum(blocks) + 1
