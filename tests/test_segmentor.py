import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_volo.benchmark.memory import LiveMemory
from mmseg_volo.errors import UserError
from mmseg_volo.models.segmentor import SlidingSegmentor

SLIDE = dict(mode='slide', crop_size=(32, 48), stride=(20, 30))
SIZES = [(70, 100), (32, 48), (20, 30), (95, 49)]


def build(kind: str = 'SlidingSegmentor', head: dict | None = None, **test_cfg) -> nn.Module:
    """A segmentor of one class; all classes get equal weights."""
    init_default_scope('mmseg')
    cfg = Config.fromfile(ROOT / 'configs/volo_tiny_toy_streets.py').model
    cfg.type, cfg.test_cfg = kind, test_cfg
    cfg.decode_head.update(head or {})
    torch.manual_seed(0)
    return MODELS.build(cfg).eval()


def picture(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(height), dtype=torch.uint8)


def sample(image: Tensor, size: tuple[int, int], **meta) -> SegDataSample:
    return SegDataSample(metainfo=dict(ori_shape=size, img_shape=image.shape[1:], img_path='x.png', **meta))


def mmsegs(model: nn.Module, image: Tensor, size: tuple[int, int], **meta) -> SegDataSample:
    with torch.no_grad():
        return model.test_step(dict(inputs=[image], data_samples=[sample(image, size, **meta)]))[0]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('batch_size', [1, 4])
def test_windows_are_averaged_as_in_mmseg(size, batch_size):
    image = picture(*size)
    ours, theirs = build(**SLIDE, batch_size=batch_size), build('EncoderDecoder', **SLIDE)
    exact = mmsegs(theirs, image, size)
    logits = ours.segment(image, size, logits=True)
    torch.testing.assert_close(logits, exact.seg_logits.data, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.segment(image, size), logits.argmax(0).byte())


@pytest.mark.parametrize('mode', [SLIDE, dict(mode='whole')], ids=['slide', 'whole'])
@pytest.mark.parametrize('size', [(140, 201), (35, 47), (1, 1)])
@pytest.mark.parametrize('align_corners', [False, True])
def test_logits_are_resized_as_in_mmseg(mode, size, align_corners):
    image, head = picture(70, 100), dict(align_corners=align_corners)
    ours, theirs = build(head=head, **mode), build('EncoderDecoder', head=head, **mode)
    exact = mmsegs(theirs, image, size)
    torch.testing.assert_close(ours.segment(image, size, logits=True), exact.seg_logits.data, rtol=0, atol=1e-5)
    same = ours.segment(image, size) == exact.pred_sem_seg.data[0]
    assert same.float().mean() > 0.999  # rounding may decide between equal scores


@pytest.mark.parametrize('direction', ['horizontal', 'vertical'])
@pytest.mark.parametrize('logits', [False, True])
def test_flipped_images_are_flipped_back(direction, logits):
    image, meta = picture(70, 100), dict(flip=True, flip_direction=direction)
    ours, theirs = build(**SLIDE, logits=logits), build('EncoderDecoder', **SLIDE)
    exact, found = (mmsegs(model, image, (70, 100), **meta) for model in (theirs, ours))
    assert torch.equal(found.pred_sem_seg.data, exact.pred_sem_seg.data.byte())
    assert ('seg_logits' in found) == logits


@pytest.mark.parametrize('weighting', ['uniform', 'hann'])
def test_what_every_window_agrees_on_is_what_comes_out(weighting, monkeypatch):
    model = build(**SLIDE, weighting=weighting)
    monkeypatch.setattr(model, 'encode_decode', lambda inputs, metas: inputs.repeat(1, 3, 1, 1))
    image = picture(95, 111)
    exact = model.data_preprocessor(dict(inputs=[image]))['inputs'][0].repeat(3, 1, 1)
    torch.testing.assert_close(model.segment(image, (95, 111), logits=True), exact, rtol=0, atol=1e-5)


def test_hann_weights_leave_no_seams(monkeypatch):
    def bias_by_window(inputs, metas):
        bias_by_window.number += 1.0
        return torch.full((1, 9, *inputs.shape[2:]), bias_by_window.number)

    steps = {}
    for weighting in ('uniform', 'hann'):
        model = build(mode='slide', crop_size=(32, 48), stride=(32, 24), weighting=weighting)
        bias_by_window.number = 0.0
        monkeypatch.setattr(model, 'encode_decode', bias_by_window)
        steps[weighting] = model.segment(picture(32, 120), (32, 120), logits=True)[0, 16].diff().abs().max()
    assert steps['uniform'] == 1.0 and steps['hann'] < 0.1


def test_half_of_the_windows_are_tried_when_memory_runs_out(monkeypatch):
    model, sizes = build(**SLIDE, batch_size=8), []
    exact, encode_decode = build(**SLIDE).segment(picture(70, 100), (70, 100)), model.encode_decode

    def small_device(inputs, metas):
        sizes.append(len(inputs))
        if len(inputs) > 3:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return encode_decode(inputs, metas)

    monkeypatch.setattr(model, 'encode_decode', small_device)
    assert torch.equal(model.segment(picture(70, 100), (70, 100)), exact)
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    model.segment(picture(70, 100), (70, 100))
    assert sizes[7:] == [2, 2, 2, 2, 1]  # the batch size is remembered
    monkeypatch.setattr(model, 'encode_decode', lambda inputs, metas: small_device(inputs.repeat(4, 1, 1, 1), metas))
    with pytest.raises(torch.OutOfMemoryError):
        model.segment(picture(70, 100), (70, 100))


class PeakMemory(LiveMemory):
    peak = 0

    def __torch_dispatch__(self, *args, **kwargs):
        result = super().__torch_dispatch__(*args, **kwargs)
        self.peak = max(self.peak, self.live())
        return result


def test_memory_does_not_grow_with_the_height_of_an_image(monkeypatch):
    peaks = []
    for height in (512, 2048):
        model = build(mode='slide', crop_size=(64, 64), stride=(48, 48))
        monkeypatch.setattr(model, 'encode_decode', lambda inputs, metas: F.pad(inputs, (0, 0, 0, 0, 0, 6)))
        with PeakMemory() as memory:
            labels = model.segment(picture(height, 256), (height, 256))
        peaks.append(memory.peak - labels.nbytes - 3 * labels.nbytes)  # picture() makes the image inside
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)


def test_scales_and_flips_are_averaged_as_in_mmseg():
    def merged(kind: str, tta: str) -> Tensor:
        module = build(kind, **SLIDE)
        model = MODELS.build(dict(type=tta, module=module))
        images = [picture(70, 100), picture(50, 80), picture(70, 100)]
        metas = [{}, {}, dict(flip=True, flip_direction='horizontal')]
        samples = [[sample(image, (70, 100), **meta)] for image, meta in zip(images, metas, strict=True)]
        with torch.no_grad():
            return model.test_step(dict(inputs=[[image] for image in images], data_samples=samples))[
                0
            ].pred_sem_seg.data

    ours, theirs = merged('SlidingSegmentor', 'SlidingTTAModel'), merged('EncoderDecoder', 'SegTTAModel')
    assert (ours == theirs).float().mean() > 0.999


@pytest.mark.parametrize(
    ('test_cfg', 'message'),
    [
        (dict(**SLIDE, weighting='gauss'), "'uniform' or 'hann', got 'gauss'"),
        (
            dict(mode='slide', crop_size=(32, 32), stride=(40, 32)),
            r'and crop_size \(32, 32\), got \(40, 32\)',
        ),
        (dict(mode='slide', crop_size=(32, 32), stride=(32, 0)), r'got \(32, 0\)'),
    ],
)
def test_settings_that_cannot_work_are_refused(test_cfg, message):
    with pytest.raises(UserError, match=message):
        build(**test_cfg)


def test_padding_before_the_backbone_is_refused():
    init_default_scope('mmseg')
    cfg = Config.fromfile(ROOT / 'configs/volo_tiny_toy_streets.py').model
    cfg.type = SlidingSegmentor
    cfg.data_preprocessor.test_cfg = dict(size_divisor=32)
    with pytest.raises(UserError, match=r'data_preprocessor\.test_cfg'):
        MODELS.build(cfg)
