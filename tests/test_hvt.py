import pytest
import timm.models.vision_transformer as vit
import torch
import torch.nn.functional as F
from parity import assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmseg_volo import HVT, HVT_ARCHITECTURES
from mmseg_volo.benchmark.memory import LiveMemory
from mmseg_volo.errors import UserError
from mmseg_volo.models.classifiers import HVTClassifier

# Blocks between poolings (None: no pooling), parameters in millions and multiply-adds in billions with the classifier:
# https://github.com/ziplab/HVT/blob/9eff1f948a7982498d096d93dfe02113ec735b79/README.md and config/.
PUBLISHED = {
    'ti1': (12, '5.74', '0.64'),
    's0': (None, '22.05', '4.57'),
    's1': (12, '22.09', '2.40'),
    's2': (6, '22.11', '1.94'),
    's3': (4, '22.11', '1.62'),
    's4': (3, '22.12', '1.39'),
}
SMALL = dict(layers=(1, 1, 1, 1), strides=(1, 2, 2, 4), embed_dim=16, num_heads=2)
ONE_POOLING = {**SMALL, 'strides': (1, 2, 2, 2)}


def narrow(arch: str) -> dict:
    """The settings of ``arch`` with few channels."""
    return {**HVT_ARCHITECTURES[arch], 'embed_dim': 16, 'num_heads': 2}


class Reference(nn.Module):
    """The authors' classifier in plain modules: every ``width`` blocks, ``MaxPool1d`` over the raster sequence.

    With ``two_dimensional``, ``MaxPool2d`` over the grid instead, and the embeddings have the shape of the grid.
    """

    def __init__(self, dim, heads, width, grid=(14, 14), patch=16, depth=12, two_dimensional=False):
        super().__init__()
        self.width, self.grid, self.two_dimensional = width, grid, two_dimensional
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch, patch)))
        self.pos_embed = nn.Parameter(torch.randn(1, *self.shape(*grid), dim))
        self.blocks = nn.ModuleList([vit.Block(dim, heads, qkv_bias=True) for _ in range(depth)])
        h, w = grid
        length = h * w
        for block in self.blocks[::width] if width else []:
            h, w, length = (h + 1) // 2, (w + 1) // 2, (length - 3) // 2 + 1
            shape = self.shape(h, w) if two_dimensional else (length,)
            block.pos_embed = nn.Parameter(torch.randn(1, *shape, dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1000)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6

    def shape(self, h, w):
        return (h, w) if self.two_dimensional else (h * w,)

    def forward(self, x):
        """Return the tokens after each block, ``[B, L, C]`` or ``[B, h, w, C]``, and the logits."""
        x = self.patch_embed['proj'](x).permute(0, 2, 3, 1)
        x = (x if self.two_dimensional else x.flatten(1, 2)) + self.pos_embed
        tokens = []
        for i, block in enumerate(self.blocks):
            x = block(x.flatten(1, -2)).view(x.shape)
            tokens.append(x)
            if self.width and i % self.width == 0:
                pool = nn.MaxPool2d(3, 2, 1) if self.two_dimensional else nn.MaxPool1d(3, 2)
                x = pool(x.movedim(-1, 1)).movedim(1, -1) + block.pos_embed
        return tokens, self.head(self.norm(x).flatten(1, -2).mean(1))


def on_grid(tokens: torch.Tensor, stride: int, h: int, w: int) -> torch.Tensor:
    """Put each token of a sequence, pooled to one in ``stride``, where its window begins, and repeat it."""
    y = tokens.new_empty(len(tokens), tokens.shape[-1], h, w)
    for row in range(h):
        for column in range(w):
            y[:, :, row, column] = tokens[:, min((row * w + column) // stride, tokens.shape[1] - 1)]
    return y


def expected_maps(model: HVT, layers: tuple, tokens: list[torch.Tensor], h: int, w: int) -> list[torch.Tensor]:
    """The maps that follow from the reference's tokens and the norms of ``model``."""
    maps = []
    for stage in range(len(layers)):
        y = getattr(model, f'norm{stage}')(tokens[sum(layers[: stage + 1]) - 1])
        maps.append(y.movedim(-1, 1) if model.pooling == '2d' else on_grid(y, model.strides[stage], h, w))
    return maps


def from_checkpoint(tmp_path, state: dict, arch, **kwargs) -> HVT:
    path = tmp_path / 'hvt.pth'
    torch.save(dict(model=state), path)
    model = HVT(arch, init_cfg=dict(type='Pretrained', checkpoint=str(path)), **kwargs)
    model.init_weights()
    return model


def backward(outputs) -> None:
    sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs).backward()


def assert_equal_gradients(model: HVT, reference: Reference) -> None:
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith('norm'):
            assert_close(parameter.grad, gradients[name].grad, what=name)


# The authors' form


@pytest.mark.parametrize('arch', PUBLISHED)
def test_parameters_and_multiplications_are_those_of_the_authors_table(arch):
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = HVTClassifier(arch).eval()
        model(torch.empty(1, 3, 224, 224))
    parameters = sum(p.numel() for p in model.parameters())
    assert (f'{parameters / 1e6:.2f}', f'{counter.get_total_flops() / 2e9:.2f}') == PUBLISHED[arch][1:]


@pytest.mark.parametrize('arch', PUBLISHED)
def test_authors_weights_give_the_authors_tokens_logits_and_gradients(arch, tmp_path):
    torch.manual_seed(0)
    reference = Reference(16, 2, PUBLISHED[arch][0]).double()
    nn.init.normal_(reference.norm.weight), nn.init.normal_(reference.norm.bias)
    model = from_checkpoint(tmp_path, reference.state_dict(), narrow(arch), pooling='1d').double()
    getattr(model, f'norm{model.out_indices[-1]}').load_state_dict(reference.norm.state_dict())
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    tokens, logits = reference(x)
    maps, expected = model(x), expected_maps(model, HVT_ARCHITECTURES[arch]['layers'], tokens, 14, 14)
    for actual, wanted in zip(maps, expected, strict=True):
        assert_close(actual, wanted)
    last = maps[-1].flatten(2)[:, :, :: model.strides[-1]][:, :, : tokens[-1].shape[1]]  # without repeated tokens
    assert_close(reference.head(last.mean(2)), logits)
    backward(maps), backward(expected)
    assert_equal_gradients(model, reference)


@pytest.mark.parametrize('arch', ['s0', 's1'])
@pytest.mark.parametrize('size', [(160, 192), (224, 448)], ids=str)
def test_authors_weights_at_another_size_get_resized_embeddings(arch, size, tmp_path):
    torch.manual_seed(0)
    native = Reference(16, 2, PUBLISHED[arch][0]).double().state_dict()
    model = from_checkpoint(tmp_path, native, narrow(arch), pooling='1d').double()
    h, w = size[0] // 16, size[1] // 16

    def resized(pos_embed, columns, new_columns):  # [1, 14, columns, C] to [1, h, new_columns, C]
        grid = pos_embed.view(1, 14, columns, 16).permute(0, 3, 1, 2)
        return F.interpolate(grid, (h, new_columns), mode='bicubic').permute(0, 2, 3, 1).flatten(1, 2)

    state = {**native, 'pos_embed': resized(native['pos_embed'], 14, w)}
    if 'blocks.0.pos_embed' in native:
        pooled = torch.cat([native['blocks.0.pos_embed'], native['blocks.0.pos_embed'][:, -1:]], 1)
        state['blocks.0.pos_embed'] = resized(pooled, 7, w // 2)[:, :-1]
    reference = Reference(16, 2, PUBLISHED[arch][0], (h, w)).double()
    reference.load_state_dict(state)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = expected_maps(model, HVT_ARCHITECTURES[arch]['layers'], reference(x)[0], h, w)
            for actual, wanted in zip(model(x), expected, strict=True):
                assert_close(actual.detach(), wanted.detach())


@pytest.mark.parametrize('size', [(1, 1), (16, 33), (100, 250)], ids=str)
def test_authors_form_pads_to_even_grids(size):
    model = HVT(narrow('s1'), pooling='1d').eval()
    h, w = (-(-side // 32) * 32 for side in size)
    image = torch.randn(1, 3, *size)
    with torch.inference_mode():
        for y, whole in zip(model(image), model(F.pad(image, (0, w - size[1], 0, h - size[0]))), strict=True):
            assert y.shape[-2:] == tuple(-(-side // 16) for side in size)
            assert torch.equal(y, whole[..., : y.shape[-2], : y.shape[-1]])


@pytest.mark.parametrize('arch', ['s2', 's3', 's4'])
def test_authors_form_with_several_poolings_takes_one_size(arch):
    with torch.device('meta'):
        model = HVT(arch, pooling='1d')
        with pytest.raises(UserError, match=rf"arch='{arch}' takes 224 x 224 images only, got 224 x 256"):
            model(torch.empty(1, 3, 224, 256))
        assert len(HVT(arch, pooling='1d', out_indices=(0, 1))(torch.empty(1, 3, 224, 256))) == 2


# The two-dimensional form


@pytest.mark.parametrize('size', [(64, 96), (72, 56)], ids=str)
def test_two_dimensional_form_equals_a_plain_one_in_maps_and_gradients(size):
    torch.manual_seed(0)
    arch = dict(layers=(1, 2, 2, 2, 1), strides=(1, 2, 4, 8, 16), embed_dim=16, num_heads=2)
    model = HVT(arch, img_size=size).double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=1.0 if name.endswith('pos_embed') else 0.2)
    h, w = size[0] // 8, size[1] // 8
    reference = Reference(16, 2, 2, (h, w), 8, 8, two_dimensional=True).double()
    state = {key: value for key, value in model.state_dict().items() if not key.startswith('norm')}
    missing = reference.load_state_dict(state, strict=False).missing_keys
    assert {name.split('.')[0] for name in missing} == {'norm', 'head'}
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    maps, expected = model(x), expected_maps(model, arch['layers'], reference(x)[0], h, w)
    for actual, wanted, stride in zip(maps, expected, (8, 16, 32, 64, 128), strict=True):
        assert actual.shape[-2:] == tuple(-(-side // stride) for side in size)
        assert_close(actual.detach(), wanted.detach())
    backward(maps), backward(expected)
    assert_equal_gradients(model, reference)


@pytest.mark.parametrize('size', [(1, 1), (100, 250)], ids=str)
@pytest.mark.parametrize('patch_size', [4, 8, 16])
def test_the_patch_sets_the_strides(size, patch_size):
    model = HVT('s4', img_size=64, patch_size=patch_size).eval()
    assert model.out_strides == [patch_size * 2**stage for stage in range(5)]
    with torch.inference_mode():
        outputs = model(torch.randn(1, 3, *size))
    for y, channels, stride in zip(outputs, model.out_channels, model.out_strides, strict=True):
        assert tuple(y.shape) == (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert torch.isfinite(y).all()


def test_tiny_has_about_a_million_parameters():
    assert 0.9e6 < sum(p.numel() for p in HVT('tiny').parameters()) < 1.1e6


@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2), (3,), (0, 1, 2, 3)], ids=str)
def test_out_indices_of_the_authors_form_choose_levels_and_every_parameter_learns(out_indices):
    torch.manual_seed(0)
    whole, part = (HVT(SMALL, pooling='1d', out_indices=indices) for indices in (None, out_indices))
    part.load_state_dict({key: value for key, value in whole.state_dict().items() if key in part.state_dict()})
    x = torch.randn(1, 3, 224, 224)
    outputs, expected = part(x), whole(x)
    assert len(outputs) == len(part.out_channels) == len(part.out_strides) == len(out_indices)
    for y, i, channels, stride in zip(outputs, out_indices, part.out_channels, part.out_strides, strict=True):
        assert torch.equal(y, expected[i])
        assert y.shape[1:] == (channels, 224 // stride, 224 // stride)
    backward(outputs)
    assert [name for name, p in part.named_parameters() if p.grad is None or not p.grad.any()] == []


# Position embeddings


@pytest.mark.parametrize('change', ['in place', 'through .data, as an EMA swap does', 'load_state_dict', 'dtype'])
def test_changed_embeddings_of_the_authors_form_are_resized_anew(change):
    model = HVT(ONE_POOLING, pooling='1d').eval()
    x = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        first = model(x)
        assert all(torch.equal(a, b) for a, b in zip(model(x), first, strict=True))
        for name in ('pos_embed', 'blocks.0.pos_embed'):
            new = torch.randn_like(model.get_parameter(name))
            if change == 'in place':
                model.get_parameter(name).copy_(new)
            elif change == 'load_state_dict':
                model.load_state_dict({**model.state_dict(), name: new})
            elif change == 'dtype':
                model.double().get_parameter(name).copy_(new)
                x = x.double()
            else:
                model.get_parameter(name).data.copy_(new)
                model.eval()
            fresh = HVT(ONE_POOLING, pooling='1d').to(x.dtype).eval()
            fresh.load_state_dict(model.state_dict())
            assert not torch.equal(model(x)[3].float(), first[3])
            for a, e in zip(model(x), fresh(x), strict=True):
                assert torch.equal(a, e)
    for grid in range(20):
        with torch.no_grad():
            model(x[..., : 32 + 32 * (grid % 2), : 32 + 2 * grid])
    assert len(model.resized) <= 8 and len(model.blocks[0].resized) <= 8


# Options


def test_drop_path_ramps_over_all_blocks():
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for block in HVT('s2', drop_path_rate=0.11).blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


@pytest.mark.parametrize('pooling', ['1d', '2d'])
@pytest.mark.parametrize('knob', [dict(with_cp=True), dict(recompute_activations=True)], ids=['cp', 'recompute'])
def test_recomputing_changes_memory_not_numbers(knob, pooling):
    torch.manual_seed(0)
    plain = HVT(SMALL, pooling=pooling, recompute_activations=False).train()
    lean = HVT(SMALL, pooling=pooling, **{'recompute_activations': False, **knob}).train()
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 224, 224)
    kept, results = [], []
    for model in (plain, lean):
        with LiveMemory() as memory:
            outputs = model(x)
            kept.append(memory.live())
        backward(outputs)
        results.append([*outputs, *(p.grad for p in model.parameters())])
    assert kept[1] < 0.9 * kept[0]
    for a, e in zip(*results, strict=True):
        assert (
            torch.equal(a, e)
            if 'with_cp' in knob
            else torch.allclose(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())
        )


def test_authors_form_compiles():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = HVT(dict(SMALL, layers=(1, 1), strides=(1, 2)), pooling='1d').train()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for size in ((224, 224), (96, 50)):
        x = torch.randn(2, 3, *size)
        results = []
        for run in (compiled, model):
            model.zero_grad()
            outputs = run(x)
            backward(outputs)
            results.append([*outputs, *(p.grad for p in model.parameters())])
        for a, e in zip(*results, strict=True):
            assert torch.allclose(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


def test_authors_form_exports():
    model = HVT(SMALL, pooling='1d').eval()
    x = torch.randn(1, 3, 224, 224)
    exported = torch.export.export(model, (x,)).module()
    for a, e in zip(exported(x), model(x), strict=True):
        assert torch.allclose(a, e, atol=1e-5)


@pytest.mark.parametrize('pooling', ['1d', '2d'])
def test_every_block_sees_contiguous_tokens(pooling):
    model = HVT(SMALL, pooling=pooling).train()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    model(torch.randn(2, 3, 224, 224))
    assert seen == [True] * 4


# Checkpoints and arguments


def test_states_make_a_round_trip_also_to_another_grid(tmp_path):
    torch.manual_seed(0)
    model = HVT(SMALL, img_size=64)
    x = torch.randn(1, 3, 96, 64)
    same = from_checkpoint(tmp_path, model.state_dict(), SMALL, img_size=64)
    other = from_checkpoint(tmp_path, model.state_dict(), SMALL, img_size=(96, 64))
    assert other.pos_embed.shape == (1, 12, 8, 16) and other.blocks[2].pos_embed.shape == (1, 3, 2, 16)
    for outputs in (same(x), other(x)):
        for a, e in zip(outputs, model(x), strict=True):
            assert torch.allclose(a, e, atol=1e-5)


def test_later_stages_of_a_checkpoint_are_dropped(tmp_path):
    state = Reference(16, 2, 6).state_dict()
    model = from_checkpoint(tmp_path, state, narrow('s2'), pooling='1d', out_indices=(0, 2))
    assert len(model.blocks) == 7 and not hasattr(model.blocks[6], 'pos_embed')
    new = {f'norm{stage}.{kind}' for stage in (0, 2) for kind in ('weight', 'bias')}
    assert all(name in new or torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_weights_for_rgb_are_adapted_to_other_channels(tmp_path):
    state = Reference(16, 2, 12).state_dict()
    model = from_checkpoint(tmp_path, state, narrow('s1'), pooling='1d', in_channels=4)
    assert model.patch_embed.proj.weight.shape == (16, 4, 16, 16)


@pytest.mark.parametrize(
    ('arch', 'pooling', 'named'),
    [('s3', '1d', "'s2'"), ('s2', '2d', "'s2, pooling=1d'"), ('tiny', '2d', "'s2, pooling=1d'")],
)
def test_weights_of_another_form_are_named(arch, pooling, named, tmp_path):
    state = Reference(384, 6, 6).state_dict()
    with pytest.raises(UserError, match=f"does not fit HVT arch='{arch}', it is HVT arch={named}: "):
        from_checkpoint(tmp_path, state, arch, pooling=pooling)


def test_a_deit_is_not_taken_for_an_hvt(tmp_path):
    state = vit.VisionTransformer(embed_dim=384, num_heads=6).state_dict()
    with pytest.raises(UserError, match=r"does not fit HVT arch='s0': 1 unexpected \(cls_token\)"):
        from_checkpoint(tmp_path, state, 's0', pooling='1d')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(arch='s9'), r"arch must be one of \['s0', .*'tiny'\] or a dict with the keys .*, got 's9'"),
        (dict(arch=dict(layers=(1, 1))), 'or a dict with the keys .*, got'),
        (dict(arch={**SMALL, 'layers': ()}), 'an arch dict needs layers'),
        (dict(arch=7), 'arch must be one of .* got 7'),
        (dict(arch={**SMALL, 'layers': (1, 2)}), r'strides must be one per stage, .* got \(1, 2, 2, 4\)'),
        (dict(arch={**SMALL, 'layers': 4}), 'an arch dict needs layers'),
        (dict(arch={**SMALL, 'strides': (2, 2, 2, 2)}), r'strides .* got \(2, 2, 2, 2\)'),
        (dict(arch={**SMALL, 'strides': (1, 2, 8, 8)}), r'strides .* got \(1, 2, 8, 8\)'),
        (dict(arch={**SMALL, 'num_heads': 3}), 'num_heads divides'),
        (dict(pooling='3d'), r"pooling must be one of \['1d', '2d'\], got '3d'"),
        (dict(patch_size=7), 'patch_size must be 4, 8, 16 or None, got 7'),
        (dict(pooling='1d', patch_size=8), "pooling='1d' needs patch_size=16 and img_size=224, got 8 and 224"),
        (dict(pooling='1d', img_size=(224, 256)), r'img_size=224, got 16 and \(224, 256\)'),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        HVT(**arguments)
    assert '\n' not in str(caught.value)
