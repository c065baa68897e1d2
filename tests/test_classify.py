"""Image classifiers, and the command that classifies pictures and measures on ImageNet."""

from collections.abc import Callable

import pytest
import timm
import torch
from parity import assert_close
from torch import Tensor, nn

from mmseg_volo.models.classifiers import VOLOClassifier

PUBLISHED = ['d1', 'd2', 'd3', 'd4', 'd5']


def random_twins(theirs: Callable[[], nn.Module], ours: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours in float64 on the same random tensors, which the largest models could not hold twice."""
    with torch.device('meta'):
        theirs, ours = theirs().double().eval(), ours().double().eval()
    theirs.to_empty(device='cpu')
    for name, tensor in theirs.state_dict().items():
        if name.endswith('running_var') or (tensor.dim() == 1 and name.endswith('weight')):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.uniform_(-0.1, 0.1) if tensor.dim() > 1 else tensor.uniform_(-1, 1)
        else:
            tensor.zero_()
    ours.load_state_dict(theirs.state_dict(), assign=True)  # strict
    return theirs, ours


@pytest.mark.parametrize('arch', PUBLISHED)
def test_logits_equal_timms_with_timms_tensors_loaded_strictly(arch):
    torch.manual_seed(0)
    theirs, ours = random_twins(
        lambda: timm.create_model(f'volo_{arch}_224', img_size=64), lambda: VOLOClassifier(arch, img_size=64)
    )
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = theirs(x)
        assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().max() > 1e-3
        assert_close(ours(x), expected)


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((logits * weights).sum(), parameters), strict=True))


def test_every_gradient_equals_timms():
    torch.manual_seed(0)
    size = (64, 96)
    theirs, ours = random_twins(
        lambda: timm.create_model('volo_d1_224', img_size=size, num_classes=7),
        lambda: VOLOClassifier('d1', img_size=size, num_classes=7),
    )
    theirs.train(), ours.train()  # batch statistics in the stem
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = gradients(theirs, theirs(x))
    for name, gradient in gradients(ours, ours(x)).items():
        assert_close(gradient, expected[name], what=name)


@pytest.mark.parametrize('size', [(64, 64), (33, 47)], ids=str)
def test_tokens_have_logits_of_their_own(size):
    torch.manual_seed(0)
    model = VOLOClassifier('tiny', img_size=64, num_classes=5).eval()
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        logits, token_logits = model.forward_tokens(x)
        assert logits.shape == (2, 5)
        assert token_logits.shape == (2, -(-size[0] // 16) * -(-size[1] // 16), 5)
        torch.testing.assert_close(model(x), logits + 0.5 * token_logits.max(1).values)
