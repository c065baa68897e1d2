"""Cross-entropy in strips: value, gradient and accuracy of resizing and torch's cross-entropy."""

import re

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead as MmsegFCNHead
from mmseg.structures import SegDataSample
from parity import error

from mmseg_volo import FCNHead
from mmseg_volo.ops.strip_loss import cpu, explain, resized_cross_entropy, torch_form

SIZES = [((7, 9), (28, 36)), ((1, 1), (9, 9)), ((13, 11), (50, 41)), ((20, 20), (10, 10)), ((6, 5), (6, 5))]


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('low', 'high'), SIZES, ids=str)
def test_equals_torch_in_float64(low, high, align_corners, weighted, monkeypatch):
    monkeypatch.setitem(torch_form.STRIP, 'cpu', 3000)  # several strips
    torch.manual_seed(0)
    scores = torch.randn(2, 5, *low, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (2, *high))
    labels[:, :3] = 255
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    total, correct = resized_cross_entropy(scores, labels, weight, 255, align_corners)
    resized = F.interpolate(scores, high, mode='bilinear', align_corners=align_corners)
    exact = F.cross_entropy(resized, labels, weight, reduction='sum', ignore_index=255)
    assert error(total.detach(), exact.detach()) < 1e-12
    assert correct == (resized.argmax(1) == labels).sum()
    gradients = [torch.autograd.grad(3 * y, scores)[0] for y in (total, exact)]
    assert error(*gradients) < 1e-12


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('low', 'high'), [*SIZES, ((16, 16), (64, 64))], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('form', [cpu, torch_form], ids=lambda form: form.__name__.rpartition('.')[2])
def test_lower_precision_errs_no_more_than_torch(form, dtype, low, high, align_corners, weighted):
    torch.manual_seed(0)
    scores = torch.randn(2, 19, *low).to(dtype).requires_grad_()
    labels = torch.randint(19, (2, *high))
    labels[0, :1] = 255
    weight = torch.rand(19) if weighted else None
    if form.why_not(scores):
        pytest.skip(form.why_not(scores))
    exact_scores = scores.detach().double().requires_grad_()
    found = []
    for x in (scores, exact_scores):
        resized = F.interpolate(x, high, mode='bilinear', align_corners=align_corners)
        factors = None if weight is None else weight.to(x.dtype)
        total = F.cross_entropy(resized, labels, factors, reduction='sum', ignore_index=255)
        found.append((total.detach(), torch.autograd.grad(total, x)[0]))
    total, correct, gradient = form.compute(scores.detach(), labels, weight, 255, align_corners, True)
    for ours, theirs, exact in zip((total, gradient), *found, strict=True):
        assert error(ours, exact) <= max(2 * error(theirs, exact), 1e-6)
    rank = F.interpolate(scores.detach().float(), high, mode='bilinear', align_corners=align_corners).argmax(1)
    assert abs(correct - (rank == labels).sum()) <= 1  # scores may be almost equal
    assert form.compute(scores.detach(), labels, weight, 255, align_corners, False)[2] is None


def test_any_number_of_threads_gives_the_same_bits():
    torch.manual_seed(0)
    scores, labels = torch.randn(3, 19, 9, 11), torch.randint(19, (3, 40, 37))
    if cpu.why_not(scores):
        pytest.skip(cpu.why_not(scores))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.compute(scores, labels, None, 255, False, True))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], result, strict=True))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('label', [19, -1])
def test_a_label_that_is_no_class_is_an_error(label, dtype):
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, 3, 4] = label
    with pytest.raises((IndexError, RuntimeError), match='out of bounds'):
        resized_cross_entropy(torch.randn(1, 19, 4, 4, dtype=dtype), labels, None, 255, False)


def test_explain_names_the_form_of_each_dtype():
    table = explain()
    assert re.search(r'cpu\s+\| float64\s+\| torch\s+\| it sums in float32', table)
    assert re.search(r'cpu\s+\| bfloat16\s+\| (cpu|torch .*compiler)', table)


def test_a_score_that_is_not_finite_makes_the_loss_not_finite():
    scores = torch.randn(1, 5, 4, 4)
    scores[0, 2, 1, 1] = float('nan')
    total, _ = resized_cross_entropy(scores, torch.zeros(1, 16, 16, dtype=torch.int64), None, 255, False)
    assert not torch.isfinite(total)


def test_only_a_small_gradient_is_stored():
    scores = torch.randn(1, 4, 8, 8, requires_grad=True)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.shape) or x, lambda x: x):
        resized_cross_entropy(scores, torch.zeros(1, 32, 32, dtype=torch.int64), None, 255, False)
    assert stored == [scores.shape]
    with torch.no_grad():
        resized_cross_entropy(scores, torch.zeros(1, 32, 32, dtype=torch.int64), None, 255, False)


def heads(**settings) -> tuple[FCNHead, MmsegFCNHead]:
    init_default_scope('mmseg')
    settings = dict(in_channels=8, channels=8, num_classes=5, num_convs=0, concat_input=False, **settings)
    torch.manual_seed(0)
    ours, theirs = (cls(**settings).double().train() for cls in (FCNHead, MmsegFCNHead))
    theirs.conv_seg.weight.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    'losses',
    [
        dict(type='CrossEntropyLoss'),
        dict(type='CrossEntropyLoss', class_weight=[1, 2, 0.5, 0, 3], loss_weight=0.4),
        dict(type='CrossEntropyLoss', avg_non_ignore=True),
        [dict(type='CrossEntropyLoss'), dict(type='CrossEntropyLoss', class_weight=[2, 1, 1, 1, 1])],  # one name
        [dict(type='CrossEntropyLoss'), dict(type='DiceLoss')],  # as in mmseg
        dict(type='CrossEntropyLoss', use_sigmoid=True),  # as in mmseg
    ],
    ids=str,
)
@pytest.mark.parametrize('dropout', [0.0, 0.5])
def test_a_head_gives_mmsegs_losses_and_gradients(losses, dropout):
    labels = torch.randint(5, (2, 1, 24, 32))
    labels[:, :, :5] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=one)) for one in labels]
    found = []
    for head in heads(loss_decode=losses, dropout_ratio=dropout):
        x = torch.randn(2, 8, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        loss = head.loss([x], samples, None)
        sum(value for key, value in loss.items() if 'loss' in key).backward()
        after = torch.rand(1)
        gradients = {name: p.grad for name, p in head.named_parameters()}
        found.append({**{key: value.detach() for key, value in loss.items()}, 'x': x.grad, 'rng': after, **gradients})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert error(ours[name], expected) < 1e-10, name


def test_a_batch_of_void_has_no_loss():
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.full((1, 8, 8), 255)))]
    ours, theirs = (head.loss_by_feat(torch.randn(1, 5, 2, 2).double(), samples) for head in heads(dropout_ratio=0))
    assert ours['loss_ce'] == theirs['loss_ce'] == 0 and ours['acc_seg'] == theirs['acc_seg']
