"""The contract of every backbone. A new backbone adds one line to ``CLIENTS``."""

import copy
import inspect
import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from parity import assert_close, error
from timm.layers import Mlp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_volo import HVT, VOLO, CoAtNet
from mmseg_volo.benchmark.memory import LiveMemory
from mmseg_volo.errors import UserError
from mmseg_volo.models.backbone import Backbone
from mmseg_volo.ops import recompute

CLIENTS: dict[str, Callable[..., Backbone]] = {
    'VOLO': partial(
        VOLO,
        dict(layers=(1, 1, 1, 1), embed_dims=(32, 48), num_heads=(1, 3), mlp_ratio=2, stem_channels=8),
        img_size=64,
    ),
    'CoAtNet': partial(
        CoAtNet,
        dict(depths=(1, 1, 2, 1), widths=(8, 16, 32, 48), stem_widths=(8, 8), head_width=16),
        img_size=64,
    ),
    'HVT': partial(HVT, dict(layers=(1, 1, 1, 1), strides=(1, 2, 2, 4), embed_dim=32, num_heads=2), img_size=64),
}
OUTPUT_NORMS = tuple(f'norm{i}.' for i in range(4))


@pytest.fixture(params=CLIENTS)
def make(request) -> Callable[..., Backbone]:
    """A function that builds a small backbone, the same for the same arguments."""

    def build(**kwargs) -> Backbone:
        torch.manual_seed(0)
        client = CLIENTS[request.param]
        if 'norm_eval' not in inspect.signature(client).parameters:  # it has no BatchNorm
            kwargs.pop('norm_eval', None)
        return client(**kwargs)

    return build


def stages(make) -> int:
    return len(make().out_indices)


def backward(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs)
    loss.backward()
    return loss.detach()


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def with_lively_statistics(model: Backbone) -> Backbone:
    for norm in batch_norms(model):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


# Maps


@pytest.mark.parametrize('size', [(1, 1), (16, 16), (17, 33), (67, 71), (100, 250)], ids=str)
def test_any_size_gives_maps_rounded_up(make, size):
    model = make().eval()
    with torch.inference_mode():
        outputs = model(torch.randn(1, 3, *size))
    for y, channels, stride in zip(outputs, model.out_channels, model.out_strides, strict=True):
        assert tuple(y.shape) == (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert torch.isfinite(y).all()


def test_other_sizes_are_padded_with_zeros_to_the_largest_stride(make):
    model = make().eval()
    multiple = max(model.out_strides)
    image = torch.randn(1, 3, 2 * multiple - 4, 3 * multiple - 7)
    padded = nn.functional.pad(image, (0, 7, 0, 4))
    with torch.inference_mode():
        for cropped, whole in zip(model(image), model(padded), strict=True):
            assert torch.equal(cropped, whole[..., : cropped.shape[-2], : cropped.shape[-1]])


def test_out_indices_choose_maps_and_describe_them(make):
    whole, x = make().eval(), torch.randn(1, 3, 64, 96)
    expected = whole(x)
    n = len(whole.out_indices)
    for out_indices in ((0,), (1,), (0, n - 1), tuple(range(n))):
        part = make(out_indices=out_indices).eval()
        part.load_state_dict({key: value for key, value in whole.state_dict().items() if key in part.state_dict()})
        outputs = part(x)
        assert len(outputs) == len(part.out_channels) == len(part.out_strides) == len(out_indices)
        for y, i, channels, stride in zip(outputs, out_indices, part.out_channels, part.out_strides, strict=True):
            assert torch.equal(y, expected[i])
            assert y.shape[1:] == (channels, 64 // stride, 96 // stride)
        backward(outputs)
        assert [name for name, p in part.named_parameters() if p.grad is None] == []


def test_every_output_is_layer_normalised(make):
    for y in make().eval()(torch.randn(2, 3, 64, 64) * 50):
        assert torch.allclose(y.mean(1), torch.zeros(()), atol=1e-5)
        assert torch.allclose(y.var(1, unbiased=False), torch.ones(()), atol=2e-2)


@pytest.mark.parametrize('in_channels', [1, 4])
def test_images_may_have_other_channels(make, in_channels):
    model = make(in_channels=in_channels)
    assert len(model(torch.randn(2, in_channels, 32, 32))) == stages(make)


def test_it_is_registered_in_mmseg(make):
    init_default_scope('mmseg')
    name = type(make()).__name__
    model = MODELS.build(dict(type=name, arch='tiny', out_indices=[0, 1]))
    assert type(model).__name__ == name and model.out_indices == (0, 1)


# Gradients and training


@pytest.mark.parametrize('size', [(64, 64), (48, 80)], ids=str)
def test_gradients_reach_every_parameter(make, size):
    model = make().train()
    backward(model(torch.randn(2, 3, *size)))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def inputs_of_norms(model: Backbone, x: torch.Tensor) -> list[torch.Tensor]:
    """Maps of the stages before their output norms."""
    found: list[torch.Tensor] = []
    norms = [getattr(model, f'norm{i}') for i in model.out_indices]
    handles = [norm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach())) for norm in norms]
    model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3, 4])
def test_a_step_of_training_leaves_frozen_stages_alone(make, frozen_stages):
    if frozen_stages > stages(make):
        pytest.skip('fewer stages')
    model = make(frozen_stages=frozen_stages).train()
    x = torch.randn(2, 3, 64, 64)
    before = inputs_of_norms(model, x)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    backward(model(x))
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for stage, (b, a) in enumerate(zip(before, inputs_of_norms(model, x), strict=True), start=1):
        assert torch.equal(a, b) == (stage <= frozen_stages), stage
    frozen = [p for n in range(frozen_stages + 1) for part in model.parts_of_stage(n) for p in _tensors(part)]
    assert {id(p) for p in model.parameters() if not p.requires_grad} == {id(p) for p in frozen}
    stem = [p for part in model.parts_of_stage(0) for p in _tensors(part)]
    assert stem and all(p.requires_grad == (frozen_stages < 0) for p in stem)
    modules = [part for n in range(frozen_stages + 1) for part in model.parts_of_stage(n)]
    for module in (part for part in modules if isinstance(part, nn.Module)):
        assert not any(child.training for child in module.modules())
    for name, norm in model.named_modules():
        if isinstance(norm, _BatchNorm):
            kept = torch.equal(norm.running_mean, buffers[f'{name}.running_mean'])
            assert kept == (not norm.training), name


def _tensors(part) -> list[torch.Tensor]:
    return list(part.parameters()) if isinstance(part, nn.Module) else [part]


@pytest.mark.parametrize('norm_eval', [False, True])
def test_norm_eval_keeps_all_running_statistics(make, norm_eval):
    model = make(norm_eval=norm_eval).train()
    if not batch_norms(model):
        pytest.skip('no BatchNorm')
    before = copy.deepcopy(dict(model.named_buffers()))
    model(torch.randn(2, 3, 64, 64))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == norm_eval, name


def test_every_rate_acts_in_training_only(make):
    knobs = [name for name in inspect.signature(type(make()).__init__).parameters if name.endswith('_rate')]
    assert 'drop_path_rate' in knobs
    x = torch.randn(4, 3, 64, 64)
    for knob in knobs:
        model = make(norm_eval=True, **{knob: 0.5}).train()
        assert not torch.equal(model(x)[-1], model(x)[-1]), knob
        model.eval()
        assert torch.equal(model(x)[-1], model(x)[-1]), knob
        with pytest.raises(UserError, match=f'{knob} must be a number from 0 to 1, got 1.5'):
            make(**{knob: 1.5})


def test_checkpointing_saves_memory_and_changes_no_bit(make):
    plain, lean = (make(with_cp=with_cp, drop_path_rate=0.3).train() for with_cp in (False, True))
    x = torch.randn(2, 3, 64, 96)
    kept, losses = [], []
    for model in (plain, lean):
        torch.manual_seed(1)
        with LiveMemory() as memory:
            outputs = model(x)
            kept.append(memory.live())
        losses.append(backward(outputs))
    assert kept[1] < 0.6 * kept[0]
    assert torch.equal(*losses)
    for (name, a), b in zip(lean.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(lean.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name  # the running statistics were updated once


# Recomputing the activations of a block


def plain_and_lean(make, **kwargs) -> tuple[Backbone, Backbone]:
    """The same backbone without and with recomputing, in float64."""
    plain, lean = (make(recompute_activations=on, **kwargs).double().train() for on in (False, True))
    return plain, lean


def assert_equal_training(plain: Backbone, lean: Backbone) -> None:
    """Assert that maps and gradients are equal, for the same random numbers."""
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    found = []
    for model in (plain, lean):
        torch.manual_seed(1)
        outputs = model(x)
        backward(outputs)
        found.append(outputs)
    for a, e in zip(found[1], found[0], strict=True):
        assert_close(a.detach(), e.detach())
    largest = max(e.grad.abs().max() for e in plain.parameters() if e.grad is not None)
    for (name, a), e in zip(lean.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (e.grad is None), name
        if e.grad is None:
            continue
        if e.grad.abs().max() < 1e-12 * largest:  # the exact gradient of a bias before a BatchNorm is zero
            assert a.grad.abs().max() < 1e-12 * largest, name
        else:
            assert_close(a.grad, e.grad, what=name)


@pytest.mark.parametrize('rows', [2048, 7])
def test_recomputing_keeps_less_and_changes_no_number(make, rows, monkeypatch):
    monkeypatch.setattr(recompute, 'ROWS', rows)
    plain, lean = plain_and_lean(make, drop_path_rate=0.3)
    assert_equal_training(plain, lean)
    kept = []
    for model in (plain, lean):
        with LiveMemory() as memory:
            outputs = model(torch.randn(2, 3, 64, 96, dtype=torch.float64))
            kept.append(memory.live())
        del outputs
    assert kept[1] < kept[0]


@pytest.mark.parametrize('kind', ['forward_pre_hook', 'forward_hook', 'full_backward_pre_hook', 'full_backward_hook'])
def test_hooks_on_inner_modules_fire_under_recomputing(make, kind):
    models = plain_and_lean(make)
    fired: list[set[str]] = [set(), set()]
    for names, model in zip(fired, models, strict=True):
        blocks = [name for name, module in model.named_modules() if hasattr(module, 'recompute')]
        for name, module in model.named_modules():
            if name.startswith(tuple(f'{block}.' for block in blocks)):  # stems have activations in place
                getattr(module, f'register_{kind}')(lambda *_, name=name, names=names: names.add(name))
    assert_equal_training(*models)
    assert fired[1] == fired[0]
    assert any(name.endswith('mlp.act') for name in fired[1]) and any(name.endswith('norm1') for name in fired[1])


class LoRA(nn.Module):
    """A frozen linear layer or 1x1 convolution plus the trained product of two narrow ones."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        out, width = layer.weight.shape[:2]
        kind, size = (nn.Linear, ()) if isinstance(layer, nn.Linear) else (nn.Conv2d, (1,))
        self.layer = layer.requires_grad_(False)
        self.down, self.up = kind(width, 2, *size, bias=False), kind(2, out, *size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


def test_adapters_in_attention_and_mlp_train_alike_under_recomputing(make):
    models = plain_and_lean(make)
    for model in models:
        torch.manual_seed(1)
        for module in list(model.modules()):
            for name in ('qkv', 'v', 'fc1', 'fc2'):
                if isinstance(getattr(module, name, None), nn.Linear | nn.Conv2d):
                    setattr(module, name, LoRA(getattr(module, name)).double())
    assert sum(isinstance(module, LoRA) for module in models[1].modules()) > 6
    assert_equal_training(*models)
    adapted = [(name, p) for name, p in models[1].named_parameters() if '.up.' in name or '.down.' in name]
    assert all(p.grad.abs().sum() > 0 for _, p in adapted)


def test_recomputing_under_autocast_errs_at_most_twice_as_much(make):
    exact = plain_and_lean(make)[0]
    x = torch.randn(2, 3, 64, 96)
    backward(exact(x.double()))
    errors = []
    for on in (False, True):
        model = make(recompute_activations=on).train()
        with torch.autocast('cpu', torch.bfloat16):
            outputs = model(x)
        backward([y.float() for y in outputs])
        gradients = zip(model.parameters(), exact.parameters(), strict=True)
        errors.append([error(p.grad, e.grad) for p, e in gradients])
    for (name, _), plain, lean in zip(exact.named_parameters(), *errors, strict=True):
        assert lean <= max(2 * plain, 4e-3), name


@pytest.mark.parametrize('shape', [(2, 3, 4, 6), (0, 3, 4, 6)], ids=['two images', 'none'])
@pytest.mark.parametrize('frozen', [[], ['x'], ['norm', 'fc1'], ['x', 'norm', 'fc2']], ids=str)
def test_an_mlp_in_parts_equals_the_whole(shape, frozen, monkeypatch):
    torch.manual_seed(0)
    modules = nn.ModuleDict(dict(norm=nn.LayerNorm(6), mlp=Mlp(6, 24, 5))).double()
    for name, parameter in modules.named_parameters():
        parameter.requires_grad_(not any(f'{part}.' in name for part in frozen))
    x = torch.randn(shape, dtype=torch.float64, requires_grad='x' not in frozen)
    trained = [p for p in (x, *modules.parameters()) if p.requires_grad]
    found = []
    for rows in (2048, 7):
        monkeypatch.setattr(recompute, 'ROWS', rows)
        y = recompute.norm_mlp(x, modules['norm'], modules['mlp'])
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), trained)])
    with torch.no_grad():
        found.append([recompute.norm_mlp(x, modules['norm'], modules['mlp'])])
    for a, e in zip(found[1], found[0], strict=True):
        assert torch.allclose(a, e, rtol=1e-10, atol=1e-12)
    assert torch.equal(found[2][0], found[1][0])


def test_a_second_backward_pass_finds_the_stored_tensors_unchanged(make):
    _, lean = plain_and_lean(make, drop_path_rate=0.3)
    loss = sum(y.square().mean() for y in lean(torch.randn(2, 3, 64, 96, dtype=torch.float64)))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in lean.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(lean.parameters(), once, strict=True))


def test_layers_hold_every_parameter_but_the_output_norms_once(make):
    model = make()
    layers = [[p for part in parts for p in _tensors(part)] for parts in model.layers()]
    assert all(layers)
    found = [id(p) for layer in layers for p in layer]
    assert len(found) == len(set(found))
    outside = {name for name, p in model.named_parameters() if id(p) not in set(found)}
    assert outside == {name for name, _ in model.named_parameters() if name.startswith(OUTPUT_NORMS)}
    assert {id(p) for p in layers[0]} == {id(p) for part in model.parts_of_stage(0) for p in _tensors(part)}


def test_learning_rates_decay_by_layer_and_what_describes_positions_has_no_weight_decay(make):
    model = nn.Module()
    model.backbone = make()
    optimizer = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
            constructor='BackboneLayerDecayConstructor',
            paramwise_cfg=dict(decay_rate=0.5),
        ),
    ).optimizer
    layers = model.backbone.layers()
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    for i, parts in enumerate(layers):
        assert {rates[id(p)] for part in parts for p in _tensors(part)} == {0.5 ** (len(layers) - i)}
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    for name, parameter in model.named_parameters():
        positions = 'pos_embed' in name or 'rel_pos' in name
        assert decay[id(parameter)] == (0.05 if parameter.ndim > 1 and not positions else 0), name


# Weights


def test_a_state_dict_gives_another_model_the_same_maps(make, tmp_path):
    model = with_lively_statistics(make()).eval()
    torch.save(model.state_dict(), tmp_path / 'f.pth')
    torch.manual_seed(1)
    other = type(model)(**arguments(make)).eval()
    x = torch.randn(1, 3, 48, 80)
    assert not torch.equal(other(x)[-1], model(x)[-1])
    other.load_state_dict(torch.load(tmp_path / 'f.pth'))
    for a, e in zip(other(x), model(x), strict=True):
        assert torch.equal(a, e)


def arguments(make) -> dict:
    """Arguments of the backbone that ``make`` builds."""
    recipe = CLIENTS[type(make()).__name__]
    return dict(arch=recipe.args[0], **recipe.keywords)


def test_a_copy_shares_nothing(make):
    model = make().eval()
    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        expected = [y.clone() for y in model(x)]
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            parameter.add_(1)
        copied.load_state_dict(copied.state_dict())
        assert all(torch.equal(a, e) for a, e in zip(model(x), expected, strict=True))
        assert not torch.equal(copied(x)[-1], expected[-1])


@pytest.fixture
def log():
    """Lines that mmengine's logger receives during a test."""
    lines = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_a_checkpoint_of_another_image_size_loads_and_one_line_says_what_was_resized(make, tmp_path, log):
    model = with_lively_statistics(make())
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(OUTPUT_NORMS)}
    torch.save({'state_dict': state | {'head.weight': torch.rand(2, 2)}}, tmp_path / 'f.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'f.pth'))
    other = make(img_size=(96, 160), init_cfg=init_cfg)
    other.init_weights()
    assert len(log) == 1
    for key, value in other.state_dict().items():
        if key in state and value.shape == state[key].shape:
            assert torch.equal(value, state[key]), key
        elif key in state:
            assert f'{key.split(".")[-1]} resized from ' in log[0]
    assert '1 tensors of the classifier' in log[0] and 'tensors of the output norms are new' in log[0]


def test_a_checkpoint_of_another_architecture_is_refused_by_name(make, tmp_path):
    tiny = type(make())('tiny', img_size=64)
    torch.save(tiny.state_dict(), tmp_path / 'f.pth')
    model = make(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'f.pth')))
    name = type(model).__name__
    with pytest.raises(UserError, match=f"does not fit {name} arch='custom', it is {name} arch='tiny': "):
        model.init_weights()


@pytest.mark.parametrize('change', ['in place', 'through .data, as an EMA swap does', 'load_state_dict', 'dtype'])
def test_changed_weights_act_at_once_at_other_sizes_too(make, change):
    model = make().eval()
    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        model(x)  # may fill caches
        new = {name: p + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
        if change == 'load_state_dict':
            model.load_state_dict({**model.state_dict(), **new})
        elif change == 'dtype':
            model.double()
            x = x.double()
        for name, parameter in model.named_parameters():
            (parameter.data if 'EMA' in change else parameter).copy_(new[name])
        model.eval()
        fresh = make().to(x.dtype).eval()
        fresh.load_state_dict(model.state_dict())
        for a, e in zip(model(x), fresh(x), strict=True):
            assert torch.equal(a, e)


def test_inference_mode_leaves_nothing_that_training_may_not_use(make):
    model = make(frozen_stages=stages(make)).eval()
    x = torch.randn(1, 3, 48, 80)
    with torch.inference_mode():
        expected = [y.clone() for y in model(x)]
    outputs = model(x)
    backward(outputs)
    for a, e in zip(outputs, expected, strict=True):
        assert error(a.detach(), e.double()) < 1e-5  # VOLO folds BatchNorm into convolutions in inference


# Other forms


def test_conversion_to_sync_batchnorm_keeps_the_maps(make):
    model = with_lively_statistics(make()).eval()
    x = torch.randn(1, 3, 48, 80)
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in batch_norms(converted))
    for a, e in zip(converted(x), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_finite_maps_and_gradients_close_to_float64(make, dtype):
    exact = make().double().eval()
    x = torch.randn(2, 3, 48, 80)
    expected = exact(x.double())
    backward(expected)
    model = make().eval()
    with torch.autocast('cpu', dtype):
        outputs = model(x)
    backward([y.float() for y in outputs])
    bound = {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    for a, e in zip(outputs, expected, strict=True):
        assert relative(a, e) < bound
    for name, a in model.named_parameters():
        assert a.grad.dtype == torch.float32 and torch.isfinite(a.grad).all(), name
    a, e = (torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (model, exact))
    assert relative(a, e) < 2 * bound


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference, relative to that of ``exact``."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def test_compiled_equals_eager_in_maps_and_gradients(make):
    torch._dynamo.reset()
    model = make(norm_eval=True).train()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager', dynamic=False)
    for size in ((64, 64), (50, 33)):
        x = torch.randn(2, 3, *size)
        found = []
        for run in (compiled, model):
            model.zero_grad()
            outputs = run(x)
            backward(outputs)
            found.append((outputs, [p.grad.clone() for p in model.parameters()]))
        for actual, expected in zip(*found, strict=True):
            for a, e in zip(actual, expected, strict=True):
                assert torch.allclose(a, e, rtol=1e-3, atol=1e-4 * max(1, e.abs().max().item()))


def test_an_exported_program_gives_the_same_maps(make):
    model = with_lively_statistics(make()).eval()
    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        for a, e in zip(program.module()(x), model(x), strict=True):
            assert error(a, e.double()) < 1e-5


# Mistakes


def test_wrong_arguments_are_one_sentence(make):
    n = stages(make)
    wrong = {
        'arch must be one of': dict(arch='d9'),
        f'out_indices must be ascending numbers from 0 to {n - 1}, got \\(0, {n}\\)': dict(out_indices=(0, n)),
        'out_indices .* got \\(\\)': dict(out_indices=()),
        'ascending': dict(out_indices=(1, 0)),
        f'frozen_stages must be between -1 and {n}, got {n + 1}': dict(frozen_stages=n + 1),
        'img_size must be a side or': dict(img_size=(64, 0)),
    }
    for message, changed in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            type(make())(**{**arguments(make), **changed})
        assert '\n' not in str(caught.value)
