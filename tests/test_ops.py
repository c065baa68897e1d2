import pytest
import torch
from parity import assert_close
from timm.models.volo import OutlookAttention as TimmOutlookAttention

from mmseg_volo.models.volo import OutlookAttention
from mmseg_volo.ops import outlook_attention

SHAPES = [
    # B, H, W, heads, d, k, stride
    (2, 8, 8, 2, 4, 3, 2),  # even sides
    (1, 7, 9, 3, 5, 3, 2),  # odd sides, head width no power of two
    (1, 1, 12, 2, 4, 3, 2),  # one row
    (3, 1, 1, 2, 4, 3, 2),  # one token
    (1, 6, 5, 1, 4, 3, 1),  # stride 1
    (1, 9, 8, 2, 3, 5, 2),  # larger window
    (1, 7, 7, 2, 4, 3, 3),  # windows that do not overlap
]


def inputs(shape, seed=0):
    B, H, W, N, d, k, stride = shape
    generator = torch.Generator().manual_seed(seed)
    h, w = -(-H // stride), -(-W // stride)
    logits = torch.randn(B, h, w, N, k * k, k * k, dtype=torch.float64, generator=generator)
    value = torch.randn(B, H, W, N * d, dtype=torch.float64, generator=generator)
    return logits, value, dict(kernel_size=k, stride=stride, scale=d**-0.5)


def by_definition(logits, value, *, kernel_size, stride, scale):
    """Section 3.1 of the paper in loops: every window position receives its own mixture of the window's values."""
    B, H, W, C = value.shape
    _, h, w, N, K, _ = logits.shape
    d, r = C // N, kernel_size // 2
    out = torch.zeros_like(value)
    for b in range(B):
        for i in range(h):
            for j in range(w):
                for n in range(N):
                    weights = (logits[b, i, j, n] * scale).softmax(-1)
                    places = [
                        (i * stride + p - r, j * stride + q - r) for p in range(kernel_size) for q in range(kernel_size)
                    ]
                    inside = [0 <= y < H and 0 <= x < W for y, x in places]
                    for to, (y, x) in enumerate(places):
                        if inside[to]:
                            for source, (v, u) in enumerate(places):
                                if inside[source]:
                                    part = slice(n * d, (n + 1) * d)
                                    out[b, y, x, part] += weights[to, source] * value[b, v, u, part]
    return out


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_outlook_attention_equals_its_definition(shape):
    logits, value, geometry = inputs(shape)
    assert_close(outlook_attention(logits, value, **geometry), by_definition(logits, value, **geometry))


@pytest.mark.parametrize('shape', SHAPES[:3], ids=str)
def test_outlook_attention_has_right_gradients(shape):
    logits, value, geometry = inputs(shape)
    torch.autograd.gradcheck(
        lambda a, b: outlook_attention(a, b, **geometry),
        (logits.requires_grad_(), value.requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize('size', [(8, 8), (7, 9), (1, 5)], ids=str)
def test_module_equals_timms_in_value_and_every_gradient(size):
    torch.manual_seed(0)
    ours, theirs = OutlookAttention(12, 3).double(), TimmOutlookAttention(12, 3, stride=2).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    cotangent = torch.randn(2, *size, 12, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(cotangent)
        results.append({'output': y, 'x': leaf.grad, **{name: p.grad for name, p in module.named_parameters()}})
    for name in results[1]:
        assert_close(results[0][name].detach(), results[1][name].detach(), what=name)


def test_noncontiguous_inputs_give_the_same():
    logits, value, geometry = inputs(SHAPES[1])
    expected = outlook_attention(logits, value, **geometry)
    strided = value.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert not strided.is_contiguous()
    assert_close(outlook_attention(logits, strided, **geometry), expected)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(kernel_size=2), 'kernel_size must be odd'),
        (dict(stride=4), 'stride must lie between'),
        (dict(stride=1), 'do not fit'),
        (dict(kernel_size=5), 'do not fit'),
    ],
)
def test_wrong_geometry_is_an_error_with_the_values(change, message):
    logits, value, geometry = inputs(SHAPES[0])
    with pytest.raises(ValueError, match=message):
        outlook_attention(logits, value, **{**geometry, **change})


def test_wrong_shapes_are_errors_with_the_values():
    logits, value, geometry = inputs(SHAPES[0])
    with pytest.raises(ValueError, match=r'value must be \[B, H, W, C\]'):
        outlook_attention(logits, value[0], **geometry)
    with pytest.raises(ValueError, match='multiple of N=2'):
        outlook_attention(logits, value[..., :7], **geometry)
