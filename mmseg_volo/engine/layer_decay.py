"""Layer-wise learning-rate decay for the backbones of this package."""

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from prettytable import PrettyTable
from torch import nn

from ..errors import UserError
from ..models.backbone import Backbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(name=['BackboneLayerDecayConstructor', 'VOLOLayerDecayConstructor'])
class BackboneLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Optimizer constructor with learning rates that shrink by ``decay_rate`` per block from the head to the stem.

    BEiT's rule (https://arxiv.org/abs/2106.08254) for blocks, counted through all stages: layer 0 is the stem, layer i
    is the i-th block, and the last layer comprises neck, heads and output norms. VOLO's position embedding and
    downsampling belong to the block that follows them. Norms, biases, position embeddings and what computes a
    relative bias have no weight decay. Configs may also call it ``VOLOLayerDecayConstructor``, its first name.

    Args:
        paramwise_cfg: ``dict(decay_rate=...)``, between 0 and 1.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer; raises ``UserError`` for settings that mmengine would silently ignore."""
        rate = self.paramwise_cfg.get('decay_rate')
        if set(self.paramwise_cfg) != {'decay_rate'} or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise UserError(
                'BackboneLayerDecayConstructor requires paramwise_cfg=dict(decay_rate=...) with a rate above 0 and at '
                f'most 1, got {self.paramwise_cfg}'
            )
        if self.base_lr is None or self.base_wd is None:
            raise UserError(
                f'BackboneLayerDecayConstructor needs lr and weight_decay, got optimizer={self.optimizer_cfg}'
            )
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Append one group per layer, with and without weight decay, to ``params``, and log a table of them."""
        backbone = getattr(module, 'backbone', None)
        if not isinstance(backbone, Backbone):
            found = type(module if backbone is None else backbone).__name__
            raise UserError(f'BackboneLayerDecayConstructor needs a backbone of mmseg_volo, got {found}')
        rate = self.paramwise_cfg['decay_rate']
        layers = backbone.layers()
        last = len(layers)
        layer_of = {id(p): i for i, parts in enumerate(layers) for part in parts for p in _parameters(part)}
        undecayed = {id(p) for name, p in backbone.named_parameters() if backbone.undecayed.fullmatch(name)}
        groups: dict[tuple[int, bool], dict] = {}
        for parameter in module.parameters():
            if not parameter.requires_grad:
                continue
            layer = layer_of.get(id(parameter), last)
            decayed = parameter.ndim > 1 and id(parameter) not in undecayed
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


VOLOLayerDecayConstructor = BackboneLayerDecayConstructor


def _parameters(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return list(part.parameters()) if isinstance(part, nn.Module) else [part]
