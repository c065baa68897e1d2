import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from parity import assert_close
from safetensors.torch import save_file
from timm.layers import LayerNorm2d, resize_rel_pos_bias_table
from torch import nn

from mmseg_volo import COATNET_ARCHITECTURES, CoAtNet
from mmseg_volo.benchmark.memory import LiveMemory
from mmseg_volo.errors import UserError
from mmseg_volo.models.coatnet import FORM
from mmseg_volo.ops.relative_table import resize_bilinear, resize_geometric, table_grid

PUBLISHED = sorted(set(COATNET_ARCHITECTURES) - {'tiny'})
# Millions with the classifier: of the paper's models as printed in the paper, of the others in timm's tables.
PARAMETERS = {'0': 25, '1': 42, '2': 75, '3': 168, '4': 275, '5': 688}
PARAMETERS |= {'nano_rw': 15.1, 'rmlp_nano_rw': 15.2, '0_rw': 27.4, '1_rw': 41.7, 'rmlp_1_rw2': 41.7, '2_rw': 73.9}
# Archs that differ in more than their sizes; 0 stands for 0 to 5.
FORMS = [arch for arch in PUBLISHED if arch not in ('1', '2', '3', '4', '5')]
# Each with fewer and narrower blocks, in our words and in timm's.
THIN = dict(depths=(1, 2, 2, 2), widths=(32, 32, 64, 96), stem_widths=(8, 16))
TIMM_THIN = dict(depths=(1, 2, 2, 2), embed_dim=(32, 32, 64, 96), stem_width=(8, 16))
PAPER = dict(conv_stride='1x1', pool='max2')
TIMM_PAPER = dict(conv_stride_mode='1x1', conv_pool_type='max2', transformer_pool_type='max2')


def timm_twin(arch: str, size: tuple[int, int], **kwargs) -> nn.Module:
    """timm's model in float64 without its classifier, with lively weights and exact coordinates."""
    model = timm.create_model(f'coatnet_{arch}_224', img_size=size, **kwargs).double().eval()
    model.norm, model.head = nn.Identity(), nn.Identity()
    for name, parameter in model.named_parameters():
        if name.endswith('table'):
            nn.init.normal_(parameter)
        elif parameter.ndim == 1:
            nn.init.normal_(parameter, float(name.endswith(('weight', 'gamma'))), 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith('running_var'):
            nn.init.uniform_(buffer, 0.8, 1.2)
    for module in model.modules():
        if hasattr(module, 'rel_coords_log'):  # computed in float32
            offsets = [torch.arange(1 - n, n, dtype=torch.float64) for n in module.window_size]
            offsets = torch.stack(torch.meshgrid(*offsets, indexing='ij'), -1)
            module.rel_coords_log.copy_(offsets.sign() * torch.log(1 + offsets.abs()))
    return model


def timm_maps(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x, maps = model.stem(x), []
    for stage in model.stages:
        x = stage(x)
        maps.append(x)
    return maps


def without_output_norms(model: CoAtNet) -> CoAtNet:
    for stage in model.out_indices:
        setattr(model, f'norm{stage}', nn.Identity())
    return model


def our_twin(arch: str | dict, size: tuple[int, int], state: dict) -> CoAtNet:
    model = without_output_norms(CoAtNet(arch, img_size=size)).double().eval()
    model.load_state_dict(state)
    return model


def assert_equal(ours: CoAtNet, theirs: nn.Module, size: tuple[int, int], batch: int = 1) -> None:
    """Assert that maps and gradients are equal in float64."""
    x = torch.randn(batch, 3, *size, dtype=torch.float64)
    maps = ours(x), timm_maps(theirs, x)
    for stage, (a, e) in enumerate(zip(*maps, strict=True)):
        assert_close(a.detach(), e.detach(), what=f'stage {stage}')
    for outputs in maps:
        sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == {name for name, _ in ours.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        e = expected[name].view(parameter.shape)
        # Some are rounding errors: softmax and batch statistics cancel constants.
        assert (parameter.grad - e).abs().max() <= 1e-10 * max(e.abs().max(), 1e-4 * largest), name


@pytest.mark.parametrize('size', [(224, 224), (96, 160), (64, 96)], ids=str)
@pytest.mark.parametrize('arch', FORMS)
def test_maps_and_gradients_equal_timms(arch, size):
    torch.manual_seed(0)
    theirs = timm_twin(arch, size, **TIMM_THIN)
    assert_equal(our_twin(COATNET_ARCHITECTURES[arch] | THIN, size, theirs.state_dict()), theirs, size)


@pytest.mark.parametrize('head_width', [32, 64])
def test_the_papers_form_equals_timms_with_its_options(head_width):
    torch.manual_seed(0)
    widths = dict(widths=(32, 64, 64, 128)), dict(embed_dim=(32, 64, 64, 128))
    theirs = timm_twin('0', (64, 96), **TIMM_THIN | TIMM_PAPER | widths[1] | dict(transformer_dim_head=head_width))
    arch = COATNET_ARCHITECTURES['0'] | THIN | PAPER | widths[0] | dict(head_width=head_width)
    assert_equal(our_twin(arch, (64, 96), theirs.state_dict()), theirs, (64, 96))


@pytest.mark.parametrize('arch', ['0', '0_rw', 'nano_rw'])
def test_batch_statistics_equal_timms(arch):
    torch.manual_seed(0)
    theirs = timm_twin(arch, (64, 96), **TIMM_THIN).train()
    ours = our_twin(COATNET_ARCHITECTURES[arch] | THIN, (64, 96), theirs.state_dict()).train()
    assert_equal(ours, theirs, (64, 96), batch=2)
    statistics = theirs.state_dict()
    for name, buffer in ours.named_buffers():
        assert torch.allclose(buffer, statistics[name], rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize('arch', PUBLISHED)
def test_names_shapes_and_counts_are_the_published_ones(arch):
    with torch.device('meta'):
        ours, theirs = CoAtNet(arch), timm.create_model(f'coatnet_{arch}_224')
    backbone = {key: value for key, value in theirs.state_dict().items() if not key.startswith(('head.', 'norm.'))}
    own = {key: value for key, value in ours.state_dict().items() if not re.match(r'norm\d\.', key)}
    assert own.keys() == backbone.keys()
    for key, value in own.items():
        table = key.endswith('relative_position_bias_table')
        assert (value.flatten(0, 1) if table else value).shape == backbone[key].shape, key
    classifier = sum(p.numel() for n, p in theirs.named_parameters() if n.startswith(('head.', 'norm.')))
    millions = (classifier + sum(p.numel() for n, p in ours.named_parameters() if not re.match(r'norm\d', n))) / 1e6
    assert millions == pytest.approx(PARAMETERS.get(arch, millions), rel=0.007)


def test_tiny_has_about_a_million_parameters():
    assert 0.8e6 < sum(p.numel() for p in CoAtNet('tiny').parameters()) < 1.2e6


def test_drop_path_ramps_over_all_blocks_as_timms():
    theirs = timm.create_model('coatnet_0_224', drop_path_rate=0.22, **TIMM_THIN)
    ours = CoAtNet(COATNET_ARCHITECTURES['0'] | THIN, drop_path_rate=0.22)
    for stage, other in zip(ours.stages, theirs.stages, strict=True):
        for block, twin in zip(stage['blocks'], other.blocks, strict=True):
            path = getattr(twin, 'drop_path', None) or twin.drop_path1
            assert getattr(block.drop_path, 'drop_prob', 0) == pytest.approx(getattr(path, 'drop_prob', 0))


# Relative bias


@pytest.mark.parametrize('old', [(14, 14), (7, 7), (12, 12), (2, 2)], ids=str)
@pytest.mark.parametrize('new', [(24, 24), (32, 64), (20, 15), (10, 12), (4, 5), (1, 3)], ids=str)
def test_resized_tables_equal_timms(old, new):
    torch.manual_seed(0)
    positions = (2 * old[0] - 1) * (2 * old[1] - 1), (2 * new[0] - 1) * (2 * new[1] - 1)
    table = torch.randn(positions[0], 3)
    expected = resize_rel_pos_bias_table(table, new_window_size=new, new_bias_shape=(positions[1], 3))
    actual = resize_geometric(table, new)
    assert actual.shape == (2 * new[0] - 1, 2 * new[1] - 1, 3)
    assert (actual.flatten(0, 1) - expected).abs().max() < 1e-5


def test_tables_of_other_grids_than_squares_are_resized():
    table = torch.randn(2 * 4 - 1, 2 * 6 - 1, 2, dtype=torch.float64)
    whole = resize_geometric(table, (9, 5))
    assert whole.shape == (17, 9, 2) and torch.equal(resize_geometric(table, (4, 6)), table)
    assert torch.allclose(resize_geometric(table.transpose(0, 1), (5, 9)).transpose(0, 1), whole)


@pytest.mark.parametrize('resize', [resize_geometric, resize_bilinear])
def test_resizing_keeps_the_middle_a_constant_and_the_dtype(resize):
    table = torch.randn(27, 27, 2)
    assert torch.allclose(resize(table, (32, 20))[31, 19], table[13, 13], atol=1e-6)
    assert torch.allclose(resize(torch.full((27, 27, 2), 3.0), (32, 20)), torch.tensor(3.0))
    assert resize(table.half(), (32, 20)).dtype == torch.float16


def test_geometric_resizing_keeps_the_next_token_and_bilinear_stretches():
    table = torch.zeros(27, 27, 1)
    table[13, 14] = 1  # the bias of the next token in a row
    geometric, bilinear = (resize(table, (32, 32))[31, 31:, 0] for resize in (resize_geometric, resize_bilinear))
    assert geometric[1] == 1 and geometric.argmax() == 1
    assert bilinear.argmax() == 2  # one token of 14 becomes 2.3 of 32


def test_the_grid_of_a_table_is_told_by_its_shape():
    assert table_grid(torch.zeros(63, 127, 4)) == (32, 64)
    assert table_grid(torch.zeros(27 * 27, 4)) == (14, 14)
    for shape in ((63 * 127, 4), (16, 4), (4,), (0, 3, 4)):
        assert table_grid(torch.zeros(shape)) is None


@pytest.mark.parametrize('arch', ['0', 'rmlp_2_rw'])
def test_at_another_size_the_bias_is_timms_for_that_size(arch):
    torch.manual_seed(0)
    stored = timm_twin(arch, (224, 224), **TIMM_THIN)
    state = stored.state_dict()
    ours = our_twin(COATNET_ARCHITECTURES[arch] | THIN, (224, 224), state)
    for size in ((96, 160), (256, 224)):
        theirs = timm_twin(arch, size, **TIMM_THIN)
        for key in [key for key in state if key.endswith('table')]:
            grid = tuple(side // (16 if 'stages.2' in key else 32) for side in size)
            state[key] = resize_geometric(stored.state_dict()[key], grid).flatten(0, 1)
        theirs.load_state_dict(state)
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            for a, e in zip(ours(x), timm_maps(theirs, x), strict=True):
                assert_close(a, e)


def test_a_table_is_resized_once_per_grid_unless_it_is_trained():
    model = CoAtNet(COATNET_ARCHITECTURES['0'] | THIN, img_size=64).eval()
    rel_pos = model.stages[2]['blocks'][0].attn.rel_pos
    with torch.no_grad():
        assert rel_pos((3, 5)).data_ptr() == rel_pos((3, 5)).data_ptr()
        for rows in range(1, 30):
            rel_pos((rows, 6))
    assert len(rel_pos._resized) == 8
    model.train()(torch.randn(2, 3, 96, 160))[3].square().sum().backward()
    assert rel_pos.relative_position_bias_table.grad.abs().sum() > 0


def test_the_way_of_resizing_is_an_argument():
    torch.manual_seed(0)
    arch = COATNET_ARCHITECTURES['0'] | THIN
    geometric, bilinear = (CoAtNet(arch, img_size=64, table_resize=how).eval() for how in ('geometric', 'bilinear'))
    bilinear.load_state_dict(geometric.state_dict())
    with torch.no_grad():
        for size, same in ((64, True), (128, False)):
            x = torch.randn(1, 3, size, size)
            assert torch.equal(geometric(x)[3], bilinear(x)[3]) == same
    with pytest.raises(UserError, match=r"table_resize must be one of \['bilinear', 'geometric'\], got 'bicubic'"):
        CoAtNet(arch, table_resize='bicubic')


def test_checkpointing_draws_the_dropout_of_a_computed_bias_again():
    found = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = CoAtNet(COATNET_ARCHITECTURES['rmlp_2_rw'] | THIN, img_size=64, with_cp=with_cp).train()
        model(torch.randn(2, 3, 64, 96))[3].square().sum().backward()
        found.append([p.grad for name, p in model.named_parameters() if not name.startswith('norm')])
    assert all(torch.equal(a, e) for a, e in zip(*found, strict=True) if e is not None)


@pytest.mark.parametrize('arch', ['0', 'rmlp_2_rw'])
def test_recomputing_changes_memory_not_numbers(arch):
    torch.manual_seed(0)
    arch = COATNET_ARCHITECTURES[arch] | THIN
    plain, lean = (CoAtNet(arch, img_size=64, recompute_activations=on).double().eval() for on in (False, True))
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 64, 4, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    kept, results = [], []
    for model in (plain, lean):
        block = model.stages[2]['blocks'][1]
        with LiveMemory() as memory:
            y = block(x)
            kept.append(memory.live())
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in block.parameters())])
    assert kept[1] < 0.85 * kept[0]
    for a, e in zip(*results, strict=True):
        assert (a - e).abs().max() <= 1e-10 * max(e.abs().max().item(), 1.0)


def changed(block: nn.Module, change: str) -> nn.Module:
    """``block`` of 64 channels with one kind of module replaced or changed."""
    torch.manual_seed(1)
    if change == 'groups':
        block.attn.qkv, block.mlp.fc1 = nn.Conv2d(64, 192, 1, groups=2), nn.Conv2d(64, 256, 1, groups=2)
    elif change == 'kernel':
        block.attn.qkv, block.mlp.fc2 = nn.Conv2d(64, 192, 3, padding=1), nn.Conv2d(256, 64, 3, padding=1)
    elif change == 'no bias':
        block.attn.qkv.register_parameter('bias', None)
        block.mlp.fc1.register_parameter('bias', None)
    elif change == 'no affine norm':
        block.norm1, block.norm2 = LayerNorm2d(64, affine=False), LayerNorm2d(64, affine=False)
    elif change == 'activation':
        block.mlp.act = nn.GELU(approximate='tanh')
    elif change == 'parametrization':
        torch.nn.utils.parametrizations.weight_norm(block.attn.qkv)
        torch.nn.utils.parametrizations.weight_norm(block.mlp.fc1)
    elif change == 'forward':
        block.mlp.fc1.forward = lambda x, forward=block.mlp.fc1.forward: 2 * forward(x)
    return block.double().train()


@pytest.mark.parametrize(
    'change', ['groups', 'kernel', 'no bias', 'no affine norm', 'activation', 'parametrization', 'forward']
)
def test_changed_modules_train_alike_under_recomputing(change):
    torch.manual_seed(0)
    arch = COATNET_ARCHITECTURES['0'] | THIN
    plain, lean = (
        changed(CoAtNet(arch, img_size=64, recompute_activations=on).stages[2]['blocks'][1], change)
        for on in (False, True)
    )
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 64, 4, 6, dtype=torch.float64)
    for block in (plain, lean):
        block(x).square().sum().backward()
    for (name, a), e in zip(lean.named_parameters(), plain.parameters(), strict=True):
        assert e.grad.abs().sum() > 0, name
        assert_close(a.grad, e.grad, what=name)


STEP = """
import torch
from mmseg_volo import COATNET_ARCHITECTURES, CoAtNet
from mmseg_volo.benchmark.memory import peak_bytes

arch = COATNET_ARCHITECTURES['0'] | dict(depths=(1, 1, 2, 1))
block = CoAtNet(arch, img_size=1024, out_indices=(2,)).stages[2]['blocks'][1].train()
x = torch.randn(1, 384, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
grad, kept = torch.randn_like(x), []

def step():
    kept.append(block(x))
    kept[0].backward(grad)

peak = peak_bytes(step, 'cpu')
print(peak - sum(y.nbytes for y in (kept[0], x.grad, *(p.grad for p in block.parameters()))))
"""


def test_memory_of_a_block_at_4096_tokens():
    environment = {name: value for name, value in os.environ.items() if not name.startswith('MALLOC_')}
    found = subprocess.run([sys.executable, '-c', STEP], env=environment, capture_output=True, text=True, check=True)
    peak = int(found.stdout.split()[-1])
    assert 48 * 2**20 < peak < 128 * 2**20  # the bias of all pairs of tokens has 768 MiB


# Weights


def loaded(checkpoint, *args, **kwargs) -> CoAtNet:
    model = CoAtNet(*args, **kwargs, init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint)))
    model.init_weights()
    return model


@pytest.mark.parametrize('arch', ['nano_rw', 'rmlp_nano_rw'])
def test_timms_classifier_gives_timms_maps_at_another_size(arch, tmp_path):
    torch.manual_seed(0)
    classifier = timm.create_model(f'coatnet_{arch}_224')
    for name, parameter in classifier.named_parameters():
        if name.endswith('table'):
            nn.init.normal_(parameter)
    save_file(classifier.state_dict(), tmp_path / 'model.safetensors')
    ours = without_output_norms(loaded(tmp_path / 'model.safetensors', arch, img_size=(64, 96))).eval()
    theirs = timm.create_model(f'coatnet_{arch}_224', img_size=(64, 96)).eval()
    state = classifier.state_dict()
    for key, value in theirs.state_dict().items():
        if key.endswith('table'):
            grid = (4, 6) if 'stages.2' in key else (2, 3)
            state[key] = resize_rel_pos_bias_table(state[key], grid, value.shape)
    theirs.load_state_dict(state)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, e in zip(ours(x), timm_maps(theirs, x), strict=True):
            assert (a - e).abs().max() < 1e-4 * e.abs().max()


def test_a_checkpoint_of_another_grid_than_a_square_is_resized(tmp_path):
    torch.manual_seed(0)
    arch = COATNET_ARCHITECTURES['0'] | THIN
    wide = CoAtNet(arch, img_size=(64, 160))
    torch.save(wide.state_dict(), tmp_path / 'f.pth')
    square = loaded(tmp_path / 'f.pth', arch, img_size=128)
    name = 'stages.2.blocks.1.attn.rel_pos.relative_position_bias_table'
    expected = resize_geometric(wide.state_dict()[name], (8, 8))
    assert expected.shape[:2] == (15, 15) and torch.equal(square.state_dict()[name], expected)


def test_a_list_of_positions_that_no_square_gives_is_refused(tmp_path):
    arch = COATNET_ARCHITECTURES['0'] | THIN
    state = CoAtNet(arch, img_size=(64, 160)).state_dict()
    name = 'stages.2.blocks.1.attn.rel_pos.relative_position_bias_table'
    state[name] = state[name].flatten(0, 1)
    torch.save(state, tmp_path / 'f.pth')
    with pytest.raises(UserError, match=rf'{name} is \[133, 2\] instead of \[15, 15, 2\]'):
        loaded(tmp_path / 'f.pth', arch, img_size=128)


@pytest.mark.parametrize('other', sorted(set(COATNET_ARCHITECTURES) - {'0'}))
def test_another_architectures_file_says_whose_it_is(monkeypatch, other):
    with torch.device('meta'):
        model = CoAtNet('0', init_cfg=dict(type='Pretrained', checkpoint='f.pth'))
        state = CoAtNet(other, img_size=384).state_dict()
    state = {key: torch.zeros(()).expand(value.shape) for key, value in state.items() if not re.match(r'norm\d', key)}
    monkeypatch.setattr('mmseg_volo.models.pretrained.read_checkpoint', lambda source: state)
    with pytest.raises(UserError, match=f"does not fit CoAtNet arch='0', it is CoAtNet arch='{other}': ") as error:
        model.init_weights()
    assert '\n' not in str(error.value)


def test_a_name_that_timm_has_not_is_answered_with_its_coatnets():
    with pytest.raises(UserError, match='timm has no CoAtNet weights named .*coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k'):
        loaded('timm://coatnet_9', '0')


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (dict(depths=(1, 1)), 'needs 4 depths'),
        (dict(widths=(32, 40, 64, 80)), r'head_width must divide the widths of attention \[64, 80\], got 32'),
        (dict(expand_first=False, widths=(32, 40, 64, 96)), r'attention \[40, 64, 96\]'),
        (dict(pool='avg'), r"pool must be one of \['avg2', 'max2', 'max'\], got 'avg'"),
        (dict(rel_pos='none'), 'rel_pos must be one of'),
        (dict(colour='red'), r"needs \['depths', 'stem_widths', 'widths'\] and may have \['conv_act'"),
    ],
)
def test_wrong_settings_are_one_sentence(changed, message):
    with pytest.raises(UserError, match=message) as caught:
        CoAtNet(THIN | changed)
    assert '\n' not in str(caught.value)


def test_settings_that_an_arch_dict_leaves_out_are_those_of_the_papers_models():
    assert COATNET_ARCHITECTURES['0'].items() >= FORM.items()
    with torch.device('meta'):
        assert CoAtNet(THIN).state_dict().keys() == CoAtNet(COATNET_ARCHITECTURES['0'] | THIN).state_dict().keys()
