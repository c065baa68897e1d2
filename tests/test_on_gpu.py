"""The same numbers on a GPU as on a CPU; the Triton kernels have tests of their own."""

import cv2
import numpy as np
import pytest
import torch
from parity import error

from mmseg_volo.apis.inference import infer
from mmseg_volo.benchmark.segmentor import build_segmentor, random_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]

CONFIGS = ['volo_tiny_camvid', 'volo_tiny_toy_streets', 'hvt_s1_camvid', 'coatnet_nano_rw_camvid', 'swin_t_camvid']


def training_step(config: str, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Losses, their gradients and running statistics; nothing is random but the weights and the images."""
    torch.manual_seed(0)
    options = {'crop_size': (60, 100), 'model.backbone.drop_path_rate': 0.0}
    cfg, model = build_segmentor(config, 'cpu', options)
    for head in (model.decode_head, model.auxiliary_head if model.with_auxiliary_head else None):
        if head is not None and head.dropout is not None:
            head.dropout.p = 0.0
    images, samples = random_batch(cfg, model, 2, 'cpu')
    model = model.to(device, dtype)
    losses = model(images.to(device, dtype), [sample.to(device) for sample in samples], mode='loss')
    sum(value for key, value in losses.items() if 'loss' in key).backward()
    found = {key: value.detach() for key, value in losses.items() if 'loss' in key}
    found |= {f'd {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: value for name, value in model.named_buffers() if value.is_floating_point()}
    return {name: value.cpu() for name, value in found.items()}


@pytest.fixture(scope='module', params=CONFIGS)
def exact(request):
    return request.param, training_step(request.param, 'cpu', torch.float64)


def test_a_training_step_in_float64_has_the_same_losses_and_gradients(exact):
    config, expected = exact
    worst, found = worst_error(training_step(config, 'cuda', torch.float64), expected)
    assert found <= 1e-9, f'{worst}: {found:.1e}'


def test_a_training_step_in_float32_errs_as_on_a_cpu(exact, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    config, expected = exact
    _, on_a_cpu = worst_error(training_step(config, 'cpu', torch.float32), expected)
    worst, found = worst_error(training_step(config, 'cuda', torch.float32), expected)
    assert found <= max(4 * on_a_cpu, 2e-3), f'{worst}: {found:.1e}, on a CPU {on_a_cpu:.1e}'


def worst_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[str, float]:
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for name, value in expected.items() if name.startswith('d '))
    errors = {
        name: error(found[name], value)
        for name, value in expected.items()
        # The exact gradient of a bias before a BatchNorm, and some means, are zero: they have no relative error.
        if value.abs().max() > 1e-6 * (largest if name.startswith('d ') else 1)
    }
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_pictures_in_batches_get_the_labels_of_a_cpu(mode, tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / 'pictures').mkdir()
    for number in range(6):
        small = generator.integers(0, 256, (12, 16, 3), np.uint8)
        size = (480, 360) if number < 5 else (333, 287)
        cv2.imwrite(str(tmp_path / f'pictures/{number}.png'), cv2.resize(small, size, interpolation=cv2.INTER_CUBIC))
    options = {'model.test_cfg': dict(mode='slide', crop_size=(240, 320), stride=(160, 240))} if mode == 'slide' else {}
    for device in ('cpu', 'cuda'):
        pictures, out = [str(tmp_path / 'pictures')], str(tmp_path / device)
        infer('volo_tiny_camvid', None, pictures, out, device, ['labels'], cfg_options=options)
    for number in range(6):
        cpu, cuda = (
            cv2.imread(str(next((tmp_path / device).rglob(f'{number}.png'))), cv2.IMREAD_UNCHANGED)
            for device in ('cpu', 'cuda')
        )
        assert cpu.shape == cuda.shape and np.unique(cpu).size > 1
        assert (cpu == cuda).mean() >= 0.999
