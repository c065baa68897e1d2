import re

import pytest
import timm
import torch
from parity import assert_close, error
from torch import nn

from mmseg_volo import ARCHITECTURES, VOLO
from mmseg_volo.benchmark.memory import LiveMemory
from mmseg_volo.errors import UserError
from mmseg_volo.models.volo import PRETRAINED, resize_pos_embed

PUBLISHED = ['d1', 'd2', 'd3', 'd4', 'd5']
SMALL = dict(layers=(1, 1, 1, 1), embed_dims=(32, 48), num_heads=(1, 3), mlp_ratio=2, stem_channels=8)
# Computed from the published architecture, without classifier and output norms, in millions.
PARAMETERS = {'d1': 22.90, 'd2': 52.40, 'd3': 80.05, 'd4': 179.61, 'd5': 279.74}


def without_output_norms(model: VOLO) -> VOLO:
    for stage in model.out_indices:
        setattr(model, f'norm{stage}', nn.Identity())
    return model


def timm_twin(arch: str, size: tuple[int, int], **kwargs) -> tuple[nn.Module, dict]:
    """timm's model in float64 with a random position embedding, and its backbone's tensors."""
    model = timm.create_model(f'volo_{arch}_224', img_size=size, **kwargs).double().eval()
    nn.init.normal_(model.pos_embed)
    return model, {key: value for key, value in model.state_dict().items() if not PRETRAINED.classifier.fullmatch(key)}


@pytest.mark.parametrize('arch', PUBLISHED)
def test_every_stage_equals_timms_at_native_size(arch):
    torch.manual_seed(0)
    theirs, state = timm_twin(arch, (224, 224))
    ours = without_output_norms(VOLO(arch)).double().eval()
    ours.load_state_dict(state)
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.inference_mode():
        expected = theirs.forward_intermediates(x, intermediates_only=True)
        actual = ours(x)
    assert len(actual) == len(expected) == 4
    for stage, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, what=f'stage {stage}')


@pytest.mark.parametrize('size', [(96, 160), (256, 512), (32, 32)], ids=str)
def test_every_stage_equals_timms_at_other_sizes_with_the_same_resized_position_embedding(size):
    torch.manual_seed(0)
    _, state = timm_twin('d1', (224, 224))
    theirs, _ = timm_twin('d1', size)
    ours = without_output_norms(VOLO('d1')).double().eval()
    ours.load_state_dict(state)
    resized = resize_pos_embed(state['pos_embed'], (size[0] // 16, size[1] // 16))
    theirs.load_state_dict({**state, 'pos_embed': resized}, strict=False)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        for stage, (a, e) in enumerate(
            zip(ours(x), theirs.forward_intermediates(x, intermediates_only=True), strict=True)
        ):
            assert_close(a, e, what=f'stage {stage}')


def test_every_gradient_equals_timms():
    torch.manual_seed(0)
    theirs, state = timm_twin('d1', (64, 96))
    ours = without_output_norms(VOLO('d1', img_size=(64, 96))).double()
    ours.load_state_dict(state)
    theirs.train(), ours.train()  # batch statistics in the stem
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for model, outputs in ((ours, ours(x)), (theirs, theirs.forward_intermediates(x, intermediates_only=True))):
        sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs).backward()
        del model
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name].grad, what=name)


@pytest.mark.parametrize('arch', PUBLISHED)
def test_parameter_counts_are_the_published_ones(arch):
    with torch.device('meta'):
        model = without_output_norms(VOLO(arch))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[arch], abs=0.006)


def test_tiny_has_about_a_million_parameters():
    assert 0.8e6 < sum(p.numel() for p in VOLO('tiny').parameters()) < 1.2e6


def test_arch_may_be_a_dict_of_numbers():
    model = VOLO(SMALL)
    assert model.out_channels == [32, 48, 48, 48]
    assert model(torch.randn(1, 3, 32, 32))[3].shape == (1, 48, 2, 2)


# Position embedding


def test_position_embedding_is_resized_once_per_grid():
    model = VOLO('tiny', img_size=64).eval()
    with torch.no_grad():
        first = model._pos_embed_for(3, 5)
        assert model._pos_embed_for(3, 5) is first
        assert model._pos_embed_for(4, 4) is model.pos_embed
        for rows in range(1, 30):
            model._pos_embed_for(rows, 40)
    assert len(model._resized_pos_embed) <= 8


def test_position_embedding_learns_at_other_sizes_too():
    model = VOLO('tiny', img_size=64)
    model.eval()(torch.randn(2, 3, 48, 80))  # must not fill a cache that training reads
    model.train()
    sum(y.sum() for y in model(torch.randn(2, 3, 48, 80))).backward()
    assert model.pos_embed.grad.abs().sum() > 0


# On a CPU, torch 2.11's Inductor fails on this model with a symbolic image size, so only aot_eager gets several sizes.
@pytest.mark.parametrize(
    ('options', 'sizes'),
    [(dict(backend='aot_eager'), [(64, 64), (48, 80), (50, 33)]), (dict(dynamic=False), [(50, 33)])],
    ids=['aot_eager', 'inductor'],
)
def test_compiled_with_symbolic_sizes_or_inductor_equals_eager(options, sizes):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = VOLO(SMALL, img_size=64, norm_eval=True).train()
    compiled = torch.compile(model, fullgraph=True, **options)
    for size in sizes:
        x = torch.randn(2, 3, *size)
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            outputs = run(x)
            sum(y.square().sum() for y in outputs).backward()
            gradients.append((outputs, [p.grad.clone() for p in model.parameters()]))
        for actual, expected in zip(*gradients, strict=True):
            for a, e in zip(actual, expected, strict=True):
                assert torch.allclose(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


# Options


def test_drop_path_ramps_over_all_blocks_but_skips_stage_one():
    model = VOLO('d1', drop_path_rate=0.17)
    rates = [[getattr(b.drop_path, 'drop_prob', 0.0) for b in model.network[i]] for i in (0, 2, 3, 4)]
    assert rates[0] == [0.0] * 4
    assert rates[1] + rates[2] + rates[3] == pytest.approx([0.01 * i for i in range(4, 18)])


def kept_bytes(model: nn.Module, x: torch.Tensor) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Bytes that a forward pass keeps for the backward pass, and its feature maps."""
    with LiveMemory() as memory:
        outputs = model(x)
        return memory.live(), outputs


def gradients(model: nn.Module, outputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_recomputing_changes_memory_not_numbers():
    torch.manual_seed(0)
    plain = VOLO('tiny', recompute_activations=False).double().train()
    lean = VOLO('tiny', recompute_activations=True).double().train()
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    (stored, expected), (kept, outputs) = kept_bytes(plain, x), kept_bytes(lean, x)
    assert kept < 0.8 * stored
    for a, e in zip(outputs, expected, strict=True):
        assert_close(a.detach(), e.detach())
    expected, actual = gradients(plain, expected), gradients(lean, outputs)
    for name in expected:
        assert_close(actual[name], expected[name], what=name)
    for (name, a), (_, e) in zip(lean.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(a, e), name  # the running statistics were updated once


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_recomputing_under_autocast_errs_no_more_than_twice_plain_modules(dtype):
    torch.manual_seed(0)
    exact = VOLO('tiny', img_size=64, recompute_activations=False).double().eval()
    x = torch.randn(2, 3, 64, 96)
    wanted = gradients(exact, exact(x.double()))
    errors = {}
    for recompute in (False, True):
        model = VOLO('tiny', img_size=64, recompute_activations=recompute).eval()
        model.load_state_dict(exact.state_dict())
        with torch.autocast('cpu', dtype):
            outputs = model(x)
        found = gradients(model, [y.float() for y in outputs])
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        errors[recompute] = {name: error(found[name], wanted[name]) for name in wanted}
    for name in wanted:
        assert errors[True][name] <= max(2 * errors[False][name], 4e-3), name


def children_of_blocks(model: VOLO) -> dict[str, nn.Module]:
    """Modules inside the blocks; DropPath is an Identity at rate 0."""
    return {name: module for name, module in model.network.named_modules() if re.match(r'[0234]\.\d+\.', name)}


@pytest.mark.parametrize(
    'register', ['forward_pre_hook', 'forward_hook', 'full_backward_pre_hook', 'full_backward_hook']
)
def test_hooks_fire_on_every_module_of_a_block_under_recomputing(register):
    model = VOLO(SMALL, recompute_activations=True).train()
    fired = set()
    modules = children_of_blocks(model)
    for name, module in modules.items():
        getattr(module, f'register_{register}')(lambda *args, name=name: fired.add(name))
    gradients(model, model(torch.randn(2, 3, 32, 48)))
    assert fired == set(modules)


def test_hooks_of_all_modules_fire_under_recomputing():
    model = VOLO(SMALL, recompute_activations=True).train()
    called = set()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *args: called.add(module))
    try:
        model(torch.randn(2, 3, 32, 48))
    finally:
        handle.remove()
    assert called >= set(children_of_blocks(model).values())


class LoRA(nn.Module):
    """A frozen linear layer plus the trained product of two narrow ones."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def adapted(model: VOLO, change: str) -> VOLO:
    """``model`` with one kind of module replaced or changed in every block."""
    torch.manual_seed(1)
    for block in [block for i in (0, 2, 3, 4) for block in model.network[i]]:
        dim = block.norm1.normalized_shape[0]
        if change == 'LoRA':
            first = 'v' if hasattr(block.attn, 'v') else 'qkv'
            setattr(block.attn, first, LoRA(getattr(block.attn, first)))
            block.mlp.fc1, block.mlp.fc2 = LoRA(block.mlp.fc1), LoRA(block.mlp.fc2)
        elif change == 'parametrization':
            torch.nn.utils.parametrizations.weight_norm(block.mlp.fc1)
            torch.nn.utils.parametrizations.weight_norm(getattr(block.attn, 'v', block.attn.proj))
        elif change == 'activation':
            block.mlp.act = nn.GELU(approximate='tanh')
        elif change == 'bias':
            for name in ('v', 'qkv'):
                if hasattr(block.attn, name):
                    setattr(block.attn, name, nn.Linear(dim, getattr(block.attn, name).out_features))
            block.mlp.fc1.register_parameter('bias', None)
        elif change == 'norm':
            block.norm1, block.norm2 = nn.LayerNorm(dim, bias=False), nn.RMSNorm(dim)
        elif change == 'mlp norm':
            block.mlp.norm = nn.LayerNorm(block.mlp.fc1.out_features)
        elif change == 'forward':
            block.mlp.fc1.forward = lambda x, forward=block.mlp.fc1.forward: 2 * forward(x)
    return model.double().train()


@pytest.mark.parametrize('change', ['LoRA', 'parametrization', 'activation', 'bias', 'norm', 'mlp norm', 'forward'])
def test_changed_modules_train_alike_under_recomputing(change):
    plain, lean = (adapted(VOLO(SMALL, recompute_activations=recompute), change) for recompute in (False, True))
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    expected, actual = (gradients(model, model(x)) for model in (plain, lean))
    for name in expected:
        if expected[name] is None:
            assert actual[name] is None, name
        else:
            assert expected[name].abs().sum() > 0, name
            assert_close(actual[name], expected[name], what=name)


def test_dropout_set_later_acts_under_recomputing():
    model = VOLO(SMALL, recompute_activations=True, norm_eval=True).train()
    x = torch.randn(2, 3, 32, 48)
    assert torch.equal(model(x)[3], model(x)[3])
    model.network[0][0].mlp.drop1.p = 0.5
    assert not torch.equal(model(x)[3], model(x)[3])


def test_recomputing_resumes_when_hooks_are_removed():
    model = VOLO('tiny', recompute_activations=True).train()
    x = torch.randn(2, 3, 64, 96)
    before = kept_bytes(model, x)[0]
    handles = [module.register_forward_hook(lambda *args: None) for module in children_of_blocks(model).values()]
    assert kept_bytes(model, x)[0] > 1.2 * before
    for handle in handles:
        handle.remove()
    assert kept_bytes(model, x)[0] == before


def test_frozen_blocks_under_recomputing_get_no_gradients_and_the_rest_do():
    model = VOLO(SMALL, frozen_stages=2).train()
    found = gradients(model, model(torch.randn(2, 3, 32, 48)))
    assert {name for name, gradient in found.items() if gradient is None} == {
        name for name, parameter in model.named_parameters() if not parameter.requires_grad
    }


@pytest.mark.parametrize('stem_channels', [16, 24, 64])
def test_stem_in_bfloat16_errs_by_rounding_only(stem_channels):
    torch.manual_seed(0)
    stem = VOLO({**SMALL, 'stem_channels': stem_channels}, out_indices=(0,)).patch_embed.eval()
    x = torch.randn(2, 3, 64, 96)
    results = []
    for amp in (False, True):
        stem.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            y = stem(x)
        (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([y.detach().float(), *[p.grad.clone() for p in stem.proj.parameters()]])
    for exact, found in zip(*results, strict=True):
        assert error(found, exact.double()) < 0.06  # the convolution on a processor with AMX: above 1


@pytest.mark.parametrize(('in_fp32', 'dtype'), [(True, torch.float32), (False, torch.bfloat16)])
def test_residual_stream_of_later_stages_under_autocast(in_fp32, dtype):
    torch.manual_seed(0)
    model = VOLO(SMALL, img_size=64, residual_in_fp32=in_fp32).eval()
    x = torch.randn(1, 3, 48, 80)
    exact = model(x)
    seen = []
    model.network[3][-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        mixed = model(x)
    assert seen == [dtype]
    for a, e in zip(mixed, exact, strict=True):
        assert (a.float() - e).abs().max() < 0.15


@pytest.mark.parametrize('size', [(64, 96), (33, 50), (16, 16)], ids=str)
def test_every_block_sees_contiguous_tokens(size):
    model = VOLO(SMALL, img_size=64).train()
    seen = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    for stage in (0, 2, 3, 4):
        for block in model.network[stage]:
            block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    outputs = model(torch.randn(2, 3, *size))
    assert all(seen) and len(seen) == 4 * 3 + 4  # four blocks with two norms each, four output norms
    assert [y.shape[1] for y in outputs] == model.out_channels


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(arch='d9'), r"arch must be one of \['d1', .*'tiny'\] or a dict, got 'd9'"),
        (dict(arch=dict(layers=(1, 1, 1, 1))), 'must have exactly the keys'),
        (dict(arch={**ARCHITECTURES['tiny'], 'layers': (1, 2)}), 'needs 4 layers'),
        (dict(arch={**ARCHITECTURES['tiny'], 'num_heads': (3, 4)}), 'multiples of num_heads'),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        VOLO(**arguments)
    assert '\n' not in str(caught.value)
