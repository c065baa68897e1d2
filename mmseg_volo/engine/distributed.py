"""Start distributed runs: how the processes find each other."""

import os

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import init_dist, is_distributed
from mmengine.utils.dl_utils import set_multi_processing
from torch.distributed import is_torchelastic_launched

from ..errors import UserError

# Environment variables with the rank and the local rank of a process, and the command that sets them.
LAUNCHERS = {
    'pytorch': ('RANK', 'LOCAL_RANK', 'torchrun'),
    'slurm': ('SLURM_PROCID', 'SLURM_LOCALID', 'srun'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'mpirun'),
}


def join_processes(cfg: Config, launcher: str) -> None:
    """Join the processes that ``launcher`` started: with NCCL on GPUs, with gloo on CPUs.

    Call it before anything that one process does for all. ``docs/distributed.md`` lists the command lines.

    Args:
        cfg: changed in place: launcher, backend and model wrapper.
        launcher: ``'none'`` or a key of ``LAUNCHERS``.

    Raises:
        UserError: the launcher did not start this process, or started more processes than this machine has GPUs.
    """
    cfg.launcher = launcher
    if launcher == 'none':
        if is_torchelastic_launched() and os.environ['WORLD_SIZE'] != '1':
            raise UserError(
                f'torchrun started {os.environ["WORLD_SIZE"]} processes, but each would run alone; '
                'add --launcher pytorch'
            )
        return
    rank, local_rank, command = LAUNCHERS[launcher]
    if rank not in os.environ:
        raise UserError(
            f'--launcher {launcher} requires {rank} in the environment; start with {command} (docs/distributed.md)'
        )
    if os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0' and os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'True':
        # Restarted processes would use the addresses of the dead ones (pytorch/pytorch#135712).
        raise UserError(
            'torchrun --max-restarts requires TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment and '
            '--standalone or --rdzv-backend c10d'
        )
    dist_cfg = cfg.setdefault('env_cfg', {}).setdefault('dist_cfg', dict(backend='nccl'))
    if get_device() == 'cpu':
        os.environ[local_rank] = '-1'  # mmengine passes it to torch.cuda.set_device, which ignores a negative one
        dist_cfg['backend'] = 'gloo'
        cfg.model_wrapper_cfg = dict(
            type='CPUDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    elif int(os.environ.get(local_rank, 0)) >= torch.cuda.device_count():
        raise UserError(
            f'{command} started more processes on this machine than it has GPUs ({torch.cuda.device_count()}); '
            'start one per GPU'
        )
    if not is_distributed():
        set_multi_processing(**cfg.env_cfg.get('mp_cfg', {}), distributed=True)
        init_dist(launcher, **dist_cfg)
