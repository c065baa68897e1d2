"""Data parallel training on CPUs, and sharded training of models that do not fit on one GPU."""

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast, get_world_size, is_main_process
from mmengine.hooks import EMAHook
from mmengine.model import MMDistributedDataParallel, convert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..errors import UserError
from ..models.backbone import Backbone


class CPUSyncBatchNorm(_BatchNorm):
    """``torch.nn.SyncBatchNorm`` for CPU tensors, which PyTorch's refuses: statistics come from all processes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C, ...]``; batch and image sizes may differ between processes."""
        if not self.training:
            return super().forward(x)
        per_channel = [0, *range(2, x.ndim)]
        channels = (1, -1, *[1] * (x.ndim - 2))
        count = all_reduce(x.new_tensor(x.numel() / x.shape[1]))
        mean = all_reduce(x.sum(per_channel)) / count
        centred = x - mean.view(channels)
        # A second exchange, because the mean square minus the squared mean would lose digits in float32.
        variance = all_reduce(centred.square().sum(per_channel)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(channels) + self.bias.view(channels)

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept any number of dimensions, as ``torch.nn.SyncBatchNorm`` does."""


@MODEL_WRAPPERS.register_module()
class CPUDataParallel(MMDistributedDataParallel):
    """mmengine's DDP wrapper for CPUs: replaces every ``torch.nn.SyncBatchNorm`` by a ``CPUSyncBatchNorm``."""

    def __init__(self, module: nn.Module, **kwargs):
        _synchronise_on_cpu(module)
        super().__init__(module, **kwargs)


@RUNNERS.register_module()
class ShardedRunner(Runner):
    """mmengine's Runner with PyTorch's FSDP2: gradients, moments and, between steps, weights are sharded.

    Checkpoints are those of an ordinary run: all commands read them, and either runner resumes from them.
    """

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Initialise the model, then shard it: each block of the backbone, then the rest.

        Raises:
            UserError: there is only one process.
        """
        if not self.distributed:
            raise UserError(
                'runner_type=ShardedRunner requires several processes; start them with torchrun and --launcher pytorch'
            )
        model.to(get_device())
        model.init_weights()  # before sharding: a shard would draw other random numbers than the whole tensor
        for tensor in model.state_dict().values():
            broadcast(tensor)
        if self.cfg.get('sync_bn'):
            model = convert_sync_batchnorm(model, self.cfg.sync_bn)
        if get_device() == 'cpu':
            _synchronise_on_cpu(model)
        mesh = init_device_mesh(get_device(), (get_world_size(),))
        backbones = [module for module in model.modules() if isinstance(module, Backbone)]
        blocks = [layer[-1] for backbone in backbones for layer in backbone.layers()[1:]]
        for module in (*blocks, model):
            # Weights stay whole during a step: larger images are validated in more passes than smaller ones, and a
            # process that gathers weights once more than the others would wait forever.
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(model, 'val_step')  # it does not call forward()
        model.register_load_state_dict_pre_hook(_shard_weights)
        return model

    def train(self) -> nn.Module:
        """Train as mmengine does.

        Raises:
            UserError: a hook averages the weights.
        """
        if any(isinstance(hook, EMAHook) for hook in self.hooks):
            raise UserError('ShardedRunner cannot average weights, because FSDP2 copies no model; leave out EMAHook')
        return super().train()

    def build_optim_wrapper(self, optim_wrapper: dict | OptimWrapper) -> OptimWrapper:
        """Build as mmengine does; moments are sharded when a checkpoint is loaded."""
        wrapper = super().build_optim_wrapper(optim_wrapper)
        wrapper.optimizer.register_load_state_dict_pre_hook(_shard_moments)
        return wrapper

    def save_checkpoint(self, *args, save_optimizer: bool = True, **kwargs) -> None:
        """Gather the shards in all processes; the first process writes the file."""
        self.whole = dict(state_dict=_gather(self.model.state_dict()))
        if save_optimizer:
            self.whole['optimizer'] = _gather(self.optim_wrapper.state_dict())
        super().save_checkpoint(*args, save_optimizer=save_optimizer, **kwargs)
        del self.whole

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call the hooks; those that inspect a checkpoint see whole tensors."""
        if fn_name == 'before_save_checkpoint':
            kwargs['checkpoint'].update(self.whole)
        super().call_hook(fn_name, **kwargs)

    def _init_model_weights(self) -> None:
        """Nothing: ``wrap_model`` has initialised them."""


def _gather(state: dict) -> dict:
    def whole(shard: DTensor) -> Tensor | None:
        tensor = shard.full_tensor()
        return tensor.cpu() if is_main_process() else None

    return apply_to(state, lambda value: isinstance(value, DTensor), whole)


def _shard_of(whole: Tensor, like: DTensor) -> DTensor:
    """The shard of this process; nothing is sent, because every process has read the same file."""
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _shard_weights(model: nn.Module, state: dict, *_: object) -> None:
    for name, parameter in model.named_parameters():
        if name in state:
            state[name] = _shard_of(state[name], parameter)


def _shard_moments(optimizer: Optimizer, state: dict) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    for index, moments in state['state'].items():
        for name, moment in moments.items():
            if moment.ndim:  # scalars count steps and are not sharded
                moments[name] = _shard_of(moment, parameters[index])


def _synchronise_on_cpu(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.SyncBatchNorm):
                setattr(parent, name, _on_cpu(norm))


def _on_cpu(norm: nn.SyncBatchNorm) -> CPUSyncBatchNorm:
    own = CPUSyncBatchNorm(norm.num_features, norm.eps, norm.momentum, dtype=norm.weight.dtype).train(norm.training)
    own.load_state_dict(norm.state_dict())
    own.weight, own.bias = norm.weight, norm.bias  # the same objects: some are frozen
    return own
