"""Distributed runs on a CPU: results match a single process, and errors keep their cause."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from mmengine.config import Config
from mmengine.model import convert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS, init_default_scope
from mmseg.datasets import CityscapesDataset
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmseg_volo import NonFiniteLossHook
from mmseg_volo.config import load_config
from mmseg_volo.engine.distributed import join_processes
from mmseg_volo.engine.parallel import CPUDataParallel, ShardedRunner
from mmseg_volo.error_messages import one_sentence_errors
from mmseg_volo.errors import UserError
from mmseg_volo.models.finetuning import SegmentorWeights
from mmseg_volo.ops import outlook_attention

SHARES = 3, 1  # number of images per process
HEADS, WIDTH, SIZE = 2, 4, (6, 5)
CLASSES = CityscapesDataset.METAINFO['classes']


class Outlook(nn.Module):
    """Outlook attention between two BatchNorms, in float64, so that the order of summation does not matter."""

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
    """Run the backward pass of a loss that sums over images; DDP averages over processes."""
    y = model.train()(x)
    weights = torch.linspace(0, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])
    (processes * (y * weights).sin()).sum().backward()


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients, running statistics, and the output in evaluation mode."""
    gradients = {f'd {name}': parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        output = model.eval()(x)
    return {**gradients, **dict(model.named_buffers()), 'output': output}


def one_of_two(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ['RANK'])
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = CPUDataParallel(convert_sync_batchnorm(Outlook()), broadcast_buffers=False)
    x = images().split(SHARES)[rank].requires_grad_()
    step(model, x, processes=2)
    torch.save({**results(model.module, x.detach()), 'd input': x.grad / 2}, folder / f'{rank}.pth')


def run_two(function: Callable[[Path], None], folder: Path) -> list[tuple[int, str]]:
    """Exit status and stderr of two new processes. A fork could deadlock on locks that pytest's threads hold."""
    call = f'import test_distributed as t; from pathlib import Path; t.{function.__name__}(Path({str(folder)!r}))'
    call += '; t.dist.barrier(); t.os._exit(0)'  # gloo sometimes aborts while its threads shut down
    paths = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
    processes = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', call],
            env={**os.environ, 'PYTHONPATH': paths, 'RANK': str(rank), 'OMP_NUM_THREADS': '1'},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope='module')
def two(tmp_path_factory) -> list[dict[str, Tensor]]:
    """Results of two processes after a step with different numbers of images."""
    folder = tmp_path_factory.mktemp('two')
    for status, said in run_two(one_of_two, folder):
        assert status == 0, said
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


def skip_bad_batch(folder: Path) -> None:
    """Take two steps; in the second step, one process has an image of NaN."""
    rank = int(os.environ['RANK'])
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = CPUDataParallel(convert_sync_batchnorm(Outlook()), broadcast_buffers=False)
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=0.01))
    logger = SimpleNamespace(warning=lambda text: print(text, file=sys.stderr))
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper, logger=logger, rank=rank, work_dir=folder)
    hook = NonFiniteLossHook(skip=1)
    hook.before_train(runner)
    for runner.iter in range(2):
        batch = dict(inputs=[], data_samples=[])
        hook.before_train_iter(runner, runner.iter)
        x = images().split(SHARES)[rank]
        loss = model(x * float('nan') if (runner.iter, rank) == (1, 1) else x).square().sum()
        wrapper.update_params(loss)
        hook.after_train_iter(runner, runner.iter, batch, dict(loss=loss))
        torch.save(model.state_dict(), folder / f'{runner.iter}_{rank}.pth')


def test_a_bad_batch_of_one_process_is_skipped_by_both(tmp_path):
    for status, said in run_two(skip_bad_batch, tmp_path):
        assert status == 0 and said.count('not finite at iteration 2') == 1, said
    states = [torch.load(tmp_path / f'{iteration}_{rank}.pth') for iteration in range(2) for rank in range(2)]
    for key, value in states[0].items():
        assert torch.isfinite(value).all() and all(torch.equal(value, state[key]) for state in states[1:]), key


def skip_bad_share(folder: Path) -> None:
    """Take a step of a sharded model with clipping, where one gradient in one shard is infinite."""
    rank = int(os.environ['RANK'])
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh('cpu', (2,)))
    before = model.weight.to_local().clone()
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=0.01), clip_grad=dict(max_norm=1.0))
    hook = NonFiniteLossHook()
    hook.before_train(SimpleNamespace(optim_wrapper=wrapper))
    model(torch.ones(2, 4)).sum().backward()
    if rank == 1:
        model.weight.grad.to_local()[0, 0] = float('inf')
    wrapper.step()
    assert not hook.gradients_are_finite and torch.equal(model.weight.to_local(), before)


def test_a_bad_gradient_in_one_share_stops_the_step_of_all(tmp_path):
    for status, said in run_two(skip_bad_share, tmp_path):
        assert status == 0, said


def segmentor(seed: int) -> nn.Module:
    init_default_scope('mmseg')
    torch.manual_seed(seed)
    model = MODELS.build(load_config(str(ROOT / 'configs/volo_tiny_toy_streets.py'), {}).model)
    model.init_weights()
    return model


def load_shares(folder: Path) -> None:
    """Load a checkpoint with other classes into a sharded model, and save the whole tensors."""
    rank = int(os.environ['RANK'])
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = ShardedRunner.wrap_model(SimpleNamespace(distributed=True, cfg={}), None, segmentor(seed=rank))
    SegmentorWeights(str(folder / 'x.pth')).load_into(model, CLASSES[::-1])
    state = model.state_dict()
    assert sum(isinstance(value, DTensor) for value in state.values()) > 100
    torch.save({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}, folder / f'{rank}.pth')


def test_other_classes_are_loaded_into_shares_as_into_a_whole_model(tmp_path):
    names = [*CLASSES[:-1], 'other']
    torch.save(dict(state_dict=segmentor(2).state_dict(), meta=dict(CLASSES=names)), tmp_path / 'x.pth')
    for status, said in run_two(load_shares, tmp_path):
        assert status == 0, said
    whole = segmentor(seed=0)
    SegmentorWeights(str(tmp_path / 'x.pth')).load_into(whole, CLASSES[::-1])
    for rank in range(2):
        state = torch.load(tmp_path / f'{rank}.pth')
        assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())


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
    assert 'mmseg_volo_cli/__init__.py", line' not in done.stderr


# Messages of PyTorch 2.11 after a process was killed or stopped responding; NCCL's is from its source code.
@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        (RuntimeError, '[gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:59054: Connection reset by peer'),
        (RuntimeError, '[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:16800'),
        (RuntimeError, '[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation'),
        (dist.DistStoreError, 'wait timeout after 2000ms, keys: /x'),
        (dist.DistNetworkError, 'Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server ...'),
        (
            dist.DistBackendError,
            'NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version 2.26.2\n'
            'ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.',
        ),
    ],
)
def test_a_lost_peer_is_one_sentence_that_quotes_the_first_line(kind, message, capsys, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    with pytest.raises(SystemExit) as end, one_sentence_errors():
        raise kind(message)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith('error: another process of this run ended or stopped answering')
    assert said.endswith(f'({message.splitlines()[0]})\n')


@pytest.mark.parametrize(
    ('kind', 'message', 'reason'),
    [
        (
            dist.DistBackendError,
            'NCCL error in: ProcessGroupNCCL.cpp:3356, invalid usage (run with NCCL_DEBUG=WARN for details)\n'
            'ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n'
            'Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000\n'
            'Exception raised from create at NCCLUtils.hpp:268 (most recent call first):\nframe #0: c10::Error',
            'Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000 (MMSEG_VOLO_TRACEBACK=1',
        ),
        (
            dist.DistNetworkError,
            'The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, '
            'code: -98, name: EADDRINUSE, message: address already in use',
            'address already in use',
        ),
        (
            dist.DistStoreError,
            'Timed out after 3 seconds waiting for clients. 1/2 clients joined.',
            '1/2 clients joined',
        ),
    ],
)
def test_any_other_failure_of_torch_distributed_keeps_its_reason(kind, message, reason, capsys):
    with pytest.raises(SystemExit) as end, one_sentence_errors():
        raise kind(message)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f'error: torch.distributed failed: {kind.__name__}: ')
    assert reason in said and said.count('\n') == 1 and 'frame #0' not in said


def test_a_defect_that_gloo_meets_keeps_its_traceback():
    with pytest.raises(RuntimeError, match='op.preamble.length'), one_sentence_errors():
        raise RuntimeError('[gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 40 vs 4')


def leave_one(folder: Path) -> None:
    """Run as one of two processes; the other process exits before the second all-reduce."""
    rank = int(os.environ['RANK'])
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with one_sentence_errors():
        dist.all_reduce(torch.ones(10**6))


def test_a_process_whose_peer_is_killed_says_so(tmp_path):
    status, said = run_two(leave_one, tmp_path)[0]
    assert status == 2 and said.count('error: another process of this run ended') == 1, said
    assert 'by peer' in said and 'Traceback' not in said
