"""Several processes, on a CPU: they give what one gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from mmengine.config import Config
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import RUNNERS
from torch import Tensor, nn
from torch.multiprocessing import start_processes

from mmseg_volo.engine.distributed import join_processes
from mmseg_volo.engine.parallel import CPUDataParallel
from mmseg_volo.errors import UserError
from mmseg_volo.ops import outlook_attention

SHARES = 3, 1  # images of each process
HEADS, WIDTH, SIZE = 2, 4, (6, 5)


class Outlook(nn.Module):
    """Outlook attention between two BatchNorms; in float64, where the order of summation does not show."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.BatchNorm2d(HEADS * WIDTH)
        self.logits = nn.Linear(HEADS * WIDTH, HEADS * 81)
        self.after = nn.BatchNorm2d(HEADS * WIDTH)
        for norm in (self.before, self.after):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).permute(0, 2, 3, 1).contiguous()
        logits = self.logits(x[:, ::2, ::2]).unflatten(-1, (HEADS, 9, 9))
        x = outlook_attention(logits, x, kernel_size=3, stride=2, scale=WIDTH**-0.5)
        return self.after(x.permute(0, 3, 1, 2))


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 5 + 3 * torch.randn(sum(SHARES), HEADS * WIDTH, *SIZE, dtype=torch.float64, generator=generator)


def step(model: nn.Module, x: Tensor, processes: int) -> None:
    """A training step of a loss that is a sum over images; DDP averages over processes."""
    y = model.train()(x)
    weights = torch.linspace(0, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])
    (processes * (y * weights).sin()).sum().backward()


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients, running statistics, and what evaluation then gives."""
    gradients = {f'd {name}': parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        output = model.eval()(x)
    return {**gradients, **dict(model.named_buffers()), 'output': output}


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = CPUDataParallel(convert_sync_batchnorm(Outlook()), broadcast_buffers=False)
    x = images().split(SHARES)[rank].requires_grad_()
    step(model, x, processes=2)
    torch.save({**results(model.module, x.detach()), 'd input': x.grad / 2}, folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def two(tmp_path_factory) -> list[dict[str, Tensor]]:
    """What each of two processes has after a step around the operator, with unequal shares of the batch."""
    folder = tmp_path_factory.mktemp('two')
    start_processes(one_of_two, (folder,), nprocs=2, start_method='fork')
    return [torch.load(folder / f'{rank}.pth') for rank in range(2)]


def test_two_processes_have_the_statistics_and_gradients_of_one(two):
    model, x = Outlook(), images().requires_grad_()
    step(model, x, processes=1)
    expected = results(model, x.detach())
    for key in expected.keys() - {'output'}:
        for rank in range(2):
            torch.testing.assert_close(
                two[rank][key], expected[key], rtol=0, atol=1e-12, msg=lambda m, k=key: f'{k}: {m}'
            )
    for key, value in {'output': expected['output'], 'd input': x.grad}.items():
        torch.testing.assert_close(torch.cat([part[key] for part in two]), value, rtol=0, atol=1e-12)


def test_synchronised_norms_keep_their_parameters_names_and_frozen_state():
    model = Outlook()
    model.before.requires_grad_(False)
    weight = model.before.weight
    synced = convert_sync_batchnorm(model)
    names = list(synced.state_dict())
    store = dist.HashStore()
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        wrapped = CPUDataParallel(synced).module
    finally:
        dist.destroy_process_group()
    assert list(wrapped.state_dict()) == names and wrapped.before.weight is weight
    assert [norm.weight.requires_grad for norm in (wrapped.before, wrapped.after)] == [False, True]


@pytest.mark.parametrize(
    ('launcher', 'environment', 'sentence'),
    [
        ('none', dict(TORCHELASTIC_RUN_ID='x', WORLD_SIZE='2'), 'add --launcher pytorch'),
        ('pytorch', {}, 'start with torchrun'),
        (
            'pytorch',
            dict(RANK='0', TORCHELASTIC_MAX_RESTARTS='1', TORCHELASTIC_USE_AGENT_STORE='True'),
            'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1',
        ),
        ('slurm', {}, 'start with srun'),
    ],
)
def test_a_launcher_that_cannot_work_is_a_mistake(launcher, environment, sentence, monkeypatch):
    for name in ('RANK', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        join_processes(Config(), launcher)


def test_more_processes_than_gpus_are_a_mistake(monkeypatch):
    monkeypatch.setattr('mmseg_volo.engine.distributed.get_device', lambda: 'cuda')
    monkeypatch.setattr('torch.cuda.device_count', lambda: 1)
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(UserError, match='one per GPU'):
        join_processes(Config(), 'pytorch')


def test_the_leaf_of_fsdp_names_a_runner_that_needs_several_processes():
    runner_type = RUNNERS.get(Config.fromfile(ROOT / 'configs/sharded/volo_d5_cityscapes_fsdp.py').runner_type)
    runner = runner_type.__new__(runner_type)
    runner._distributed = False
    with pytest.raises(UserError, match='several processes'):
        runner.wrap_model(None, Outlook())


def test_a_mistake_that_all_processes_make_is_said_once(tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run(
        [*command, ROOT / 'tools/train.py', 'nowhere.py', '--launcher', 'pytorch'],
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert done.stderr.count('error: config not found: nowhere.py') == 1
    assert 'mmseg_volo_cli.py", line' not in done.stderr
