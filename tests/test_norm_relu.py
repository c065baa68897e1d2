"""BatchNorm and ReLU that are computed again in the backward pass."""

import copy

import pytest
import torch
from parity import error
from torch import nn

from mmseg_volo.benchmark.memory import LiveMemory
from mmseg_volo.ops.norm_relu import norm_relu, recipe_of, recomputed


def chain() -> nn.ModuleDict:
    torch.manual_seed(0)
    parts = dict(first=nn.Conv2d(4, 8, 3), norm=nn.BatchNorm2d(8), relu=nn.ReLU(inplace=True), last=nn.Conv2d(8, 4, 3))
    model = nn.ModuleDict(parts).double()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model.to(memory_format=torch.channels_last)


def ours(model: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    y = norm_relu(model.first(x), model.norm, model.relu)
    with recomputed([y]):
        return model.last(y)


def theirs(model: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    return model.last(model.relu(model.norm(model.first(x))))


def image() -> torch.Tensor:
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize('training', [True, False])
def test_equals_the_modules_in_value_gradient_and_statistics(training):
    found = []
    model = chain().train(training)
    for function in (ours, theirs):
        mine, x = copy.deepcopy(model), image()
        for _ in range(2):
            y = function(mine, x)
            y.square().sum().backward()
        gradients = {name: p.grad for name, p in mine.named_parameters()}
        found.append({'y': y.detach(), 'x': x.grad, **gradients, **dict(mine.named_buffers())})
    for name, expected in found[1].items():
        assert error(found[0][name].double(), expected.double()) < 1e-10, name


def test_the_result_is_not_stored():
    kept = []
    for function in (ours, theirs):
        model, x = chain(), image()
        with LiveMemory() as memory:
            y = function(model, x)
            kept.append(memory.live())
        del y
    assert kept[1] - kept[0] == 8 * (2 * 8 * 7 * 9 - 2 * 8)  # one map in float64, less two numbers per channel


@pytest.mark.parametrize(
    'change',
    [
        dict(norm=nn.GroupNorm(2, 8)),
        dict(relu=nn.GELU()),
        dict(norm=nn.BatchNorm2d(8, momentum=None)),
        dict(norm=nn.BatchNorm2d(8, affine=False)),
    ],
    ids=str,
)
def test_other_layers_run_as_usual(change):
    model = chain()
    model.update(nn.ModuleDict(change).double())
    y = norm_relu(model.first(image()), model.norm, model.relu)
    assert recipe_of(y) is None
    assert error(ours(copy.deepcopy(model), image()).detach(), theirs(model, image()).detach()) < 1e-12


def test_hooks_fire():
    model, calls = chain(), []
    model.norm.register_forward_hook(lambda *_: calls.append(1))
    ours(model, image()).sum().backward()
    assert calls == [1]


def test_nothing_is_kept_after_the_backward_pass():
    import gc
    import weakref

    model = chain()
    hidden = model.first(image())
    seen = weakref.ref(hidden)
    y = norm_relu(hidden, model.norm, model.relu)
    with recomputed([y]):
        out = model.last(y)
    del hidden, y
    out.sum().backward()
    del out
    gc.collect()
    assert seen() is None
