"""Pre-training with token labels: files, transforms, targets, losses, the teacher, and the chain of commands."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from PIL import Image
from test_extras import hide
from torch import Tensor, nn
from torchvision.ops import roi_align

from mmseg_volo import VOLO
from mmseg_volo.checkpoints.reading import read_checkpoint
from mmseg_volo.errors import UserError
from mmseg_volo.models.classifiers import VOLOClassifier
from mmseg_volo.pretraining.label_maps import read_label_map, write_label_map
from mmseg_volo.pretraining.targets import add_ground_truth, crop_targets, mix_targets, random_box, swap_tokens
from mmseg_volo.pretraining.teacher import _logits_by_place, make_token_labels
from mmseg_volo_cli import main

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
# Without workers: errors would leave some behind in the process of the tests.
IN_THIS_PROCESS = [
    f'{split}_dataloader.{setting}'
    for split in ('train', 'val')
    for setting in ('num_workers=0', 'persistent_workers=False')
]
QUICK = [
    'train_cfg.max_iters=6',
    'train_cfg.val_interval=6',
    'default_hooks.checkpoint.interval=6',
    'default_hooks.logger.interval=2',
    'train_dataloader.batch_size=4',
    *IN_THIS_PROCESS,
]


def random_label_maps(B: int, k: int, h: int, w: int, num_classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, num_classes, h, w, generator=generator) * 4
    values, classes = logits.topk(k, dim=1)
    return torch.stack([values, classes.float()], 1)


def dense(label_maps: Tensor, num_classes: int) -> Tensor:
    """Logits ``[B, K, H, W]`` of label maps, by loops."""
    B, _, k, H, W = label_maps.shape
    logits = torch.zeros(B, num_classes, H, W)
    for b, i, y, x in np.ndindex(B, k, H, W):
        logits[b, int(label_maps[b, 1, i, y, x]), y, x] = label_maps[b, 0, i, y, x]
    return logits


# Files


def test_a_label_map_keeps_its_classes_and_half_precision_of_its_logits(tmp_path):
    (label_map,) = random_label_maps(1, 5, 4, 7, 30000)
    write_label_map(tmp_path / 'a.safetensors', label_map)
    read = read_label_map(tmp_path / 'a.safetensors')
    assert torch.equal(read[1], label_map[1]) and torch.equal(read[0], label_map[0].half().float())
    assert os.listdir(tmp_path) == ['a.safetensors'] and read.dtype == torch.float32


def test_published_files_are_read(tmp_path):
    (label_map,) = random_label_maps(1, 5, 18, 18, 1000)
    torch.save(label_map.half(), tmp_path / 'a.pt')
    assert torch.equal(read_label_map(tmp_path / 'a.pt'), label_map.half().float())


@pytest.mark.parametrize(
    ('contents', 'sentence'),
    [
        (None, 'no token labels .*a.pt; mmseg-volo make-token-labels writes them'),
        (torch.ones(5, 4, 4), 'a.pt contains no token labels'),
        (torch.full((2, 5, 4, 4), math.nan), 'a.pt contains no token labels'),
        (-torch.ones(2, 5, 4, 4), 'a.pt contains no token labels'),
        (torch.ones(2, 5, 0, 4), 'a.pt contains no token labels'),
        (dict(logits=torch.ones(5, 4, 4), classes=torch.ones(5, 4, 5)), 'a.pt contains no token labels'),
        (dict(a=1), 'a.pt contains no token labels'),
        (Path('x'), 'a.pt is refused'),
        (b'PK and no archive', 'a.pt is not a checkpoint or is damaged'),
    ],
    ids=['missing', 'shape', 'nan', 'negative', 'empty', 'sizes', 'dict', 'object', 'damaged'],
)
def test_a_file_without_token_labels_is_named(tmp_path, contents, sentence):
    path = tmp_path / 'a.pt'
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents is not None:
        torch.save(contents, path)
    with pytest.raises(UserError, match=sentence):
        read_label_map(path)


# Targets


def test_targets_equal_the_published_roi_align_of_logits():
    label_maps = random_label_maps(3, 5, 18, 18, 50)
    crops = torch.tensor([[0.1, 0.3, 0.9, 0.7], [0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.75, 0.9]])
    classes, tokens = crop_targets(label_maps, crops, (14, 14), 50, smoothing=0.0)
    # Published: aligned=False with boxes shifted by half a cell.
    boxes = torch.cat([torch.arange(3.0)[:, None], crops * 18 - 0.5], 1)
    logits = dense(label_maps, 50)
    torch.testing.assert_close(tokens, roi_align(logits, boxes, (14, 14)).flatten(2).softmax(1).transpose(1, 2))
    torch.testing.assert_close(classes, roi_align(logits, boxes, (1, 1)).flatten(1).softmax(1))


def test_tokens_of_the_size_of_a_cell_get_the_logits_of_their_cell():
    label_maps = random_label_maps(2, 3, 4, 6, 9)
    logits = dense(label_maps, 9)
    _, tokens = crop_targets(label_maps, WHOLE.expand(2, 4), (4, 6), 9, smoothing=0.0)
    torch.testing.assert_close(tokens, logits.flatten(2).softmax(1).transpose(1, 2))
    right_column_of_the_last_two_rows = torch.tensor([[5 / 6, 0.5, 1.0, 1.0]])
    _, tokens = crop_targets(label_maps[:1], right_column_of_the_last_two_rows, (2, 1), 9, smoothing=0.0)
    torch.testing.assert_close(tokens, logits[:1, :, 2:, 5].softmax(1).transpose(1, 2))


def test_half_of_a_crop_gives_the_class_token_the_average_of_logits():
    label_map = torch.zeros(1, 2, 1, 1, 2)
    label_map[0, 0, 0, 0] = torch.tensor([2.0, 6.0])
    label_map[0, 1, 0, 0] = torch.tensor([0.0, 1.0])
    classes, _ = crop_targets(label_map, WHOLE, (1, 2), 3, smoothing=0.0)
    torch.testing.assert_close(classes, torch.tensor([[1.0, 3.0, 0.0]]).softmax(1))


def test_smoothed_targets_sum_to_one_and_spread_their_share():
    label_maps = random_label_maps(2, 5, 6, 6, 10)
    for hard, smooth in zip(
        crop_targets(label_maps, WHOLE.expand(2, 4), (3, 3), 10, smoothing=0.0),
        crop_targets(label_maps, WHOLE.expand(2, 4), (3, 3), 10, smoothing=0.1),
        strict=True,
    ):
        torch.testing.assert_close(smooth, hard * 0.9 + 0.01)
        torch.testing.assert_close(smooth.sum(-1), torch.ones(smooth.shape[:-1]))


def test_ground_truth_halves_an_agreeing_teacher_and_hardly_changes_another_as_published():
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
    mixed = add_ground_truth(teacher, torch.tensor([0, 1]), smoothing=0.3)
    truth = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    torch.testing.assert_close(mixed[0], 0.5 * teacher[0] + 0.5 * truth[0])
    torch.testing.assert_close(mixed[1], 0.9 * teacher[1] + 0.1 * truth[1])


# MixToken


def test_boxes_lie_on_the_grid_and_cover_a_uniform_share_before_they_are_cut():
    np.random.seed(0)
    boxes = np.array([random_box(60, 90) for _ in range(4000)])
    top, left, bottom, right = boxes.T
    assert (0 <= top).all() and (top <= bottom).all() and (bottom <= 60).all()
    assert (0 <= left).all() and (left <= right).all() and (right <= 90).all()
    inside = (top > 0) & (left > 0) & (bottom < 60) & (right < 90)
    heights, widths = (bottom - top)[inside], (right - left)[inside]
    assert inside.sum() > 500 and np.abs(heights / 60 - widths / 90).max() < 0.06  # sides of the grid's proportions
    again = np.random.RandomState(0)
    share = 1 - again.beta(1.0, 1.0)
    rows, columns = int(60 * share**0.5) // 2, int(90 * share**0.5) // 2
    y, x = again.randint(60), again.randint(90)
    assert tuple(boxes[0]) == (max(y - rows, 0), max(x - columns, 0), min(y + rows, 60), min(x + columns, 90))


def test_tokens_in_the_box_come_from_the_flipped_batch():
    tokens = torch.randn(3, 8, 12, 2)
    mixed = swap_tokens(tokens, (1, 2, 3, 5), scale=2)
    expected = tokens.clone()
    for b, y, x in np.ndindex(3, 8, 12):
        if 2 <= y < 6 and 4 <= x < 10:
            expected[b, y, x] = tokens[2 - b, y, x]
    assert torch.equal(mixed, expected)
    assert torch.equal(swap_tokens(tokens, (3, 3, 3, 3)), tokens)


def test_targets_are_mixed_by_area_and_move_with_their_tokens():
    classes, tokens = torch.rand(2, 5), torch.rand(2, 4 * 6, 5)
    mixed_classes, mixed_tokens = mix_targets(classes, tokens, (1, 2, 3, 5), (4, 6))
    torch.testing.assert_close(mixed_classes, classes * 18 / 24 + classes.flip(0) * 6 / 24)
    assert torch.equal(mixed_tokens, swap_tokens(tokens.view(2, 4, 6, 5), (1, 2, 3, 5)).view(2, 24, 5))


# The teacher


@pytest.mark.parametrize(
    'name', ['test_resnet', 'test_efficientnet', 'test_convnext', 'test_mambaout', 'test_vit', 'test_vit_relpos']
)
def test_a_place_gets_the_logits_of_an_image_that_looks_alike_everywhere(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        logits = _logits_by_place(model, images)
        features = model.forward_features(images)
        h, w = logits.shape[1:3]
        alike = features.clone()
        if features.dim() == 3:
            alike[:] = features[:, features.shape[1] - h * w + w + 2, None]
        elif getattr(model, 'output_fmt', 'NCHW') == 'NHWC':
            alike[:] = features[:, 1:2, 2:3]
        else:
            alike[:] = features[:, :, 1:2, 2:3]
        torch.testing.assert_close(logits[:, 1, 2], model.forward_head(alike), atol=1e-5, rtol=1e-5)
    assert logits.shape[3] == 7 and h == w > 1


def test_volo_labels_places_with_its_layer_for_tokens():
    model = timm.create_model('volo_d1_224', num_classes=3, img_size=32).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        tokens = model.forward_features(images)[:, 1:]
        torch.testing.assert_close(_logits_by_place(model, images), model.aux_head(tokens).view(1, 2, 2, 3))


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A folder with images of three classes, and the weights of a teacher for them."""
    folder = tmp_path_factory.mktemp('place')
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 2)):
        for name in 'abc':
            (folder / 'data' / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (70 + 4 * i, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / 'data' / split / name / f'{i}.png')
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), folder / 'teacher.pth')
    return folder


def label(place: Path, out: Path, **more) -> None:
    arguments = dict(model='test_resnet', checkpoint=str(place / 'teacher.pth'), workers=0) | more
    make_token_labels(str(place / 'data/train'), str(out), **arguments)


def test_labels_are_the_most_likely_classes_of_the_whole_image(place, tmp_path):
    label(place, tmp_path / 'out', batch_size=5)
    names = sorted(str(path.relative_to(tmp_path / 'out')) for path in (tmp_path / 'out').rglob('*.*'))
    assert names == [f'{name}/{i}.safetensors' for name in 'abc' for i in range(4)]
    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(place / 'teacher.pth')).eval()
    image = Image.open(place / 'data/train/b/3.png').resize((160, 160), Image.Resampling.BILINEAR)
    mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    with torch.inference_mode():
        logits = model(((pixels - mean) / std)[None])[0]
    label_map = read_label_map(tmp_path / 'out/b/3.safetensors')
    assert label_map.shape == (2, 3, 5, 5) and (label_map[0].diff(dim=0) <= 0).all()
    average = dense(label_map[None], 3).mean((0, 2, 3))  # of all places, as the model's pooling takes it
    torch.testing.assert_close(average, logits, atol=2e-3, rtol=0)


def test_existing_labels_are_kept_only_when_asked_and_whole(place, tmp_path, capsys):
    label(place, tmp_path)
    with pytest.raises(UserError, match='a/0.safetensors exists; choose another folder, or continue with --resume'):
        label(place, tmp_path)
    removed, damaged, kept = (tmp_path / 'a' / f'{i}.safetensors' for i in range(3))
    contents = damaged.read_bytes()
    removed.unlink()
    damaged.write_bytes(contents[:100])
    os.utime(kept, (1, 1))
    label(place, tmp_path, resume=True)
    assert '2 token labels of 3 x 5 x 5 written' in capsys.readouterr().out
    assert removed.is_file() and damaged.read_bytes() == contents and kept.stat().st_mtime == 1


def fails(capsys, command: str, *arguments: object) -> str:
    """The one sentence with which a command exits."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(command, [str(argument) for argument in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert end.value.code == 2 and len(lines) == 1
    return lines[0]


def test_what_no_teacher_can_label_is_one_sentence(place, tmp_path, capsys):
    teacher = '--checkpoint', place / 'teacher.pth'
    images, out = place / 'data/train', tmp_path / 'out'
    error = fails(capsys, 'make-token-labels', images, out, '--model', 'test_resnte', *teacher)
    assert "timm has no model named 'test_resnte'; did you mean test_resnet" in error
    for flag, least in (('--batch-size', 1), ('--workers', 0)):
        error = fails(capsys, 'make-token-labels', images, out, '--model', 'test_resnet', flag, least - 1)
        assert f'{flag} must be at least {least}, got {least - 1}' in error
    error = fails(capsys, 'make-token-labels', tmp_path, out, '--model', 'test_resnet', *teacher)
    assert f'no images (.jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif) in {tmp_path}' in error
    error = fails(capsys, 'make-token-labels', images, out, '--model', 'test_vit', *teacher)
    assert 'teacher.pth is no classifier of the kind test_vit: it has no head.weight' in error
    state = read_checkpoint(str(place / 'teacher.pth'))
    state.pop('fc.bias')
    torch.save(state, tmp_path / 'other.pth')
    error = fails(
        capsys, 'make-token-labels', images, out, '--model', 'test_resnet', '--checkpoint', tmp_path / 'other.pth'
    )
    assert 'other.pth does not fit test_resnet: 1 missing (fc.bias)' in error
    torch.save(timm.create_model('pit_ti_224', num_classes=2).state_dict(), tmp_path / 'pit.pth')
    error = fails(
        capsys, 'make-token-labels', images, out, '--model', 'pit_ti_224', '--checkpoint', tmp_path / 'pit.pth'
    )
    assert 'pit_ti_224 cannot make token labels: its classifier must take the features of one place' in error


def test_an_image_that_cannot_be_labelled_is_named(place, tmp_path, capsys):
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x/broken.png').write_bytes(b'no image')
    words = '--model', 'test_resnet', '--checkpoint', place / 'teacher.pth', '--workers', 0
    error = fails(capsys, 'make-token-labels', tmp_path / 'x', tmp_path / 'out', *words)
    assert error.startswith(f'error: {tmp_path}/x/broken.png cannot be decoded')
    for suffix in ('jpg', 'png'):
        (tmp_path / f'x/same.{suffix}').touch()
    error = fails(capsys, 'make-token-labels', tmp_path / 'x', tmp_path / 'out', *words)
    assert 'same.png and ' in error and 'same.jpg differ in the suffix alone; rename one of them' in error


# mmpretrain's part

pytest.importorskip('mmpretrain', reason='the extra pretrain is not installed')
from mmpretrain.registry import TRANSFORMS  # noqa: E402
from mmpretrain.structures import DataSample  # noqa: E402

from mmseg_volo.pretraining.data import CropWithLabels, FlipWithLabels, RandAugmentWithLabels  # noqa: E402
from mmseg_volo.pretraining.model import TokenLabelClassifier  # noqa: E402


@pytest.fixture(autouse=True)
def scope():
    """mmpretrain's registries during a test, and afterwards those of before."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


BLOCKS = torch.arange(16).view(4, 4)  # classes


def blocks(height: int, width: int, cells: tuple[int, int]) -> dict:
    """An image of 4 x 4 blocks whose grey value is ten times their class + 50, and its label map."""
    classes = BLOCKS.float()[None, None]
    image = F.interpolate(classes, (height, width))[0, 0].numpy() * 10 + 50
    label_map = torch.stack([torch.full((1, *cells), 30.0), F.interpolate(classes, cells)[0]])
    return dict(img=np.stack([image.astype(np.uint8)] * 3, -1), token_labels=label_map)


def agreement(results: dict) -> float:
    """Share of the tokens inside one block of an image of ``blocks`` that get its class."""
    crop, image = results.get('crop', WHOLE[0]), results['img'][..., 0]
    _, tokens = crop_targets(
        results['token_labels'][None], crop[None], (image.shape[0] // 16, image.shape[1] // 16), 16
    )
    patches = F.unfold(torch.from_numpy(image.astype(np.float32))[None, None], 16, stride=16)[0].T
    clear = (patches.amin(1) == patches.amax(1)) & (patches[:, 0] >= 50)
    assert clear.sum() >= 8
    return float((tokens[0].argmax(1) == (patches[:, 0] - 50) / 10)[clear].float().mean())


@pytest.mark.parametrize('direction', ['horizontal', 'vertical', 'diagonal'])
def test_labels_are_flipped_with_their_image(direction):
    flip = FlipWithLabels(prob=1.0, direction=direction)
    results = blocks(128, 128, (16, 16))
    assert agreement(results) == 1
    flipped = flip(results)
    assert agreement(flipped) == 1 and not torch.equal(flipped['token_labels'][1, 0, ::4, ::4], BLOCKS.float())


def test_labels_are_cropped_with_their_image():
    crop = CropWithLabels(scale=128, interpolation='nearest')
    for seed in range(20):
        np.random.seed(seed)
        results = crop(blocks(192, 384, (16, 32)))
        np.random.seed(seed)
        plain = TRANSFORMS.build(dict(type='RandomResizedCrop', scale=128, interpolation='nearest'))
        assert np.array_equal(plain(blocks(192, 384, (1, 1)))['img'], results['img'])
        assert agreement(results) == 1


GEOMETRIC = [
    dict(type='Rotate', magnitude_range=(0, 30)),
    dict(type='Shear', magnitude_range=(0, 0.3), direction='horizontal'),
    dict(type='Shear', magnitude_range=(0, 0.3), direction='vertical'),
    dict(type='Translate', magnitude_range=(0, 0.45), direction='horizontal'),
    dict(type='Translate', magnitude_range=(0, 0.45), direction='vertical'),
]


@pytest.mark.parametrize('policy', GEOMETRIC, ids=lambda policy: f'{policy["type"]}_{policy.get("direction", "")}')
def test_labels_move_with_the_shears_shifts_and_rotations_of_their_image(policy):
    policy = dict(policy, prob=1.0, interpolation='nearest')
    augment = RandAugmentWithLabels(
        [policy], num_policies=1, magnitude_level=9, magnitude_std=0.5, hparams=dict(pad_val=0)
    )
    moved = 0
    for seed in range(6):
        np.random.seed(seed)
        results = augment(blocks(128, 256, (128, 256)))  # a cell per pixel
        shown = results['img'][..., 0]
        inside = shown > 0
        assert np.array_equal(results['token_labels'][1, 0].numpy()[inside], (shown[inside] - 50) / 10)
        assert np.array_equal(results['token_labels'][0, 0].numpy() > 0, inside)  # elsewhere all classes are alike
        np.random.seed(seed)
        assert agreement(augment(blocks(256, 512, (32, 32)))) > 0.95
        moved += not inside.all()
    assert moved == 6


def test_other_augmentations_leave_labels_alone_and_draw_the_numbers_of_mmpretrain():
    settings = dict(policies='timm_increasing', num_policies=2, magnitude_level=9, magnitude_std=0.5)
    ours, theirs = RandAugmentWithLabels(**settings), TRANSFORMS.build(dict(type='RandAugment', **settings))
    colour_only = 0
    for seed in range(30):
        np.random.seed(seed)
        results = ours(blocks(64, 64, (4, 4)))
        after = np.random.rand()
        np.random.seed(seed)
        assert np.array_equal(theirs(blocks(64, 64, (4, 4)))['img'], results['img'])
        assert np.random.rand() == after
        colour_only += torch.equal(results['token_labels'][1, 0], BLOCKS.float())
    assert 5 < colour_only < 30


# The model


class Colours(nn.Module):
    """A backbone whose token logits are the pixels: the classes that it sees are exactly those of its tokens."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.AvgPool2d(8)
        self.head = nn.Linear(1, 4)
        self.patch_embed.register_forward_hook(lambda module, inputs, output: output.permute(0, 2, 3, 1))

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = F.avg_pool2d(self.patch_embed(x).permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
        return tokens.mean(1), tokens


def samples(B: int, num_classes: int = 4, cells: int = 4) -> list[DataSample]:
    made = []
    for i, label_map in enumerate(random_label_maps(B, 2, cells, cells, num_classes)):
        sample = DataSample(metainfo=dict(img_path=f'{i}.png')).set_gt_label(i % num_classes)
        sample.set_field(label_map, 'token_labels')
        sample.set_field(WHOLE[0], 'crop')
        made.append(sample)
    return made


def test_swapped_tokens_keep_their_targets():
    model = TokenLabelClassifier(dict(type=Colours), smoothing=0.0)
    data = samples(3)
    truth = torch.stack([dense(sample.token_labels[None], 4)[0] for sample in data])
    images = F.interpolate(truth, scale_factor=16)  # logits in place of colours
    entropy = torch.distributions.Categorical(logits=truth.movedim(1, -1)).entropy().mean()
    for seed in range(10):
        np.random.seed(seed)
        loss = model(images, data, mode='loss')['loss_tokens']
        torch.testing.assert_close(loss, 0.5 * entropy)  # the least cross entropy, reached by equal distributions
    box = model.box
    assert (box[2] - box[0]) * (box[3] - box[1]) > 0
    model.box = None
    unmixed = model.backbone.forward_tokens(images)[1]
    model.box = box
    assert not torch.equal(model.backbone.forward_tokens(images)[1], unmixed)


def tiny(**settings) -> TokenLabelClassifier:
    torch.manual_seed(0)
    backbone = dict(type=VOLOClassifier, arch='tiny', img_size=64, num_classes=4)
    return TokenLabelClassifier(backbone | settings.pop('backbone', {}), **settings)


@pytest.mark.parametrize('ground_truth', [False, True])
def test_the_loss_is_the_sum_over_class_token_and_tokens(ground_truth):
    model = tiny(token_weight=0.3, smoothing=0.2, ground_truth=ground_truth).double().eval()
    images, data = torch.randn(2, 3, 64, 48).double(), samples(2)
    for sample in data:
        sample.set_field(sample.token_labels.double(), 'token_labels')
        sample.set_field(sample.crop.double(), 'crop')
    np.random.seed(3)
    losses = model(images, data, mode='loss')
    np.random.seed(3)
    box = random_box(4, 3)
    assert box == model.box and (box[2] - box[0]) * (box[3] - box[1]) > 0

    label_maps = torch.stack([sample.token_labels for sample in data])
    classes, tokens = crop_targets(label_maps, WHOLE.double().expand(2, 4), (4, 3), 4, 0.2)
    if ground_truth:
        classes = add_ground_truth(classes, torch.tensor([0, 1]), 0.2)
    classes, tokens = mix_targets(classes, tokens, box, (4, 3))
    with torch.no_grad():
        logits, token_logits = model.backbone.forward_tokens(images)  # with the same box
    explicit = [0.0, 0.0]
    for b in range(2):
        explicit[0] -= float((classes[b] * logits[b].log_softmax(0)).sum()) / 2
        for n in range(12):
            explicit[1] -= float((tokens[b, n] * token_logits[b, n].log_softmax(0)).sum()) / 24
    assert losses['loss_class'].item() == pytest.approx(explicit[0])
    assert losses['loss_tokens'].item() == pytest.approx(0.3 * explicit[1])


def test_tokens_are_mixed_after_the_stem_in_units_of_the_last_grid():
    model = tiny().eval()
    images = torch.randn(2, 3, 64, 64)
    plain = model.backbone.patch_embed(images)
    model.box = (1, 0, 3, 2)
    mixed = model.backbone.patch_embed(images)
    assert torch.equal(mixed[:, 2:6, 0:4], plain.flip(0)[:, 2:6, 0:4])
    assert torch.equal(mixed[:, :2], plain[:, :2]) and torch.equal(mixed[:, :, 4:], plain[:, :, 4:])
    model(images)
    assert model.box is None  # predictions are never mixed


def test_without_mixing_the_loss_does_not_depend_on_random_numbers():
    model = tiny(mix_tokens=False).eval()
    images, data = torch.randn(2, 3, 64, 64), samples(2)
    first = model(images, data, mode='loss')
    assert first == model(images, data, mode='loss') and model.box is None


def test_recomputation_mixes_the_same_tokens():
    gradients = []
    for with_cp in (False, True):
        model = tiny(backbone=dict(with_cp=with_cp)).train()
        np.random.seed(3)
        sum(model(torch.ones(2, 3, 64, 64).cumsum(2) / 64, samples(2), mode='loss').values()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None or name == 'backbone.norm3.weight', name
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_predictions_have_scores_and_the_most_likely_class():
    model = tiny().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(images)
        predicted = model(images, samples(2), mode='predict')
        assert torch.equal(logits, model.backbone(images))
    for sample, row in zip(predicted, logits, strict=True):
        torch.testing.assert_close(sample.pred_score, row.softmax(0))
        assert int(sample.pred_label) == int(row.argmax()) and sample.img_path


def test_a_class_that_the_model_lacks_names_the_image():
    data = samples(2)
    data[1].token_labels[1, 0, 0, 0] = 4
    with pytest.raises(UserError, match='of 1.png contain class 4, but model.backbone.num_classes is 4'):
        tiny()(torch.zeros(2, 3, 64, 64), data, mode='loss')


# Configs and commands


def test_the_imagenet_config_is_the_published_recipe(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/pretrain/volo_d1_imagenet.py')
    runner = Runner(
        cfg.model.to_dict(), work_dir=str(tmp_path), default_scope='mmpretrain', experiment_name=f'd1_{os.getpid()}'
    )
    model = runner.model
    assert isinstance(model, TokenLabelClassifier) and model.backbone.head.out_features == 1000
    assert (model.token_weight, model.smoothing, model.mix_tokens, model.ground_truth) == (0.5, 0.1, True, False)
    reference = timm.create_model('volo_d1_224')
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    assert model.backbone.network[-1][-1].drop_path.drop_prob == 0.1
    wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    for name, parameter in model.named_parameters():
        exempt = parameter.dim() == 1 or name in ('backbone.pos_embed', 'backbone.cls_token')
        assert decay[id(parameter)] == (0 if exempt else 0.05), name
    epoch = 1281167 // 1024
    assert (cfg.optim_wrapper.optimizer.lr, cfg.train_dataloader.batch_size) == (1.6e-3, 128)
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 300 * epoch
    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 20 * epoch
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=1024)
    augment, erasing = (cfg.train_dataloader.dataset.pipeline[i] for i in (4, 6))
    assert (augment.magnitude_level, augment.magnitude_std, augment.policies) == (9, 0.5, 'timm_increasing')
    assert erasing.erase_prob == 0.25


@pytest.mark.parametrize('name', ['volo_d1_imagenet', 'volo_tiny_folder'])
def test_a_config_is_short_and_says_its_batch(name):
    text = (ROOT / f'configs/pretrain/{name}.py').read_text()
    cfg = Config.fromfile(ROOT / f'configs/pretrain/{name}.py')
    assert len(text.splitlines()) <= 40 and f' x {cfg.train_dataloader.batch_size} images' in text.splitlines()[0]


def test_each_command_names_the_other_for_a_config_that_it_cannot_train(capsys):
    assert 'not a segmentor; use mmseg-volo pretrain' in fails(capsys, 'train', 'volo_tiny_folder')
    assert 'not a classifier; use mmseg-volo train' in fails(capsys, 'pretrain', 'volo_tiny_toy_streets')


def test_without_mmpretrain_the_extra_is_named_and_the_rest_works(monkeypatch, capsys):
    code = (
        "import sys; sys.modules['mmpretrain'] = None\n"
        'import mmseg_volo.pretraining.teacher, mmseg_volo_cli\n'
        "sys.exit(mmseg_volo_cli.main('configs', ['volo_tiny']))"
    )
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and 'volo_tiny_camvid' in done.stdout and 'volo_tiny_folder' not in done.stdout
    hide(monkeypatch, 'mmpretrain')
    error = fails(capsys, 'pretrain', 'volo_tiny_folder')
    assert error == "error: mmseg-volo pretrain needs mmpretrain: pip install 'mmseg-volo[pretrain]'"


def test_the_configs_are_listed_beside_those_of_segmentors(capsys):
    assert main('configs', ['volo_tiny_folder']) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if 'volo_tiny_folder' in line)
    cells = [cell.strip() for cell in row.strip('|').split('|')]
    assert cells == ['volo_tiny_folder', 'VOLOClassifier tiny', '-', 'TokenLabel', '1.6']


def pretrain(place: Path, work: Path, *options: str) -> list[object]:
    data = f'data_root={place / "data"}', 'model.backbone.num_classes=3'
    return ['volo_tiny_folder', '--work-dir', work, '--seed', 0, '--cfg-options', *QUICK, *data, *options]


def test_labels_that_are_missing_or_of_another_size_are_named_before_and_in_the_run(place, tmp_path, capsys):
    labels = tmp_path / 'labels'
    option = f'train_dataloader.dataset.data_prefix.label_path={labels}'
    command = 'pretrain', *pretrain(place, tmp_path / 'work', option)
    assert f'no folder {labels}; docs/pretraining.md' in fails(capsys, *command)
    label(place, labels)
    error = fails(capsys, *command, 'model.token_weight=1e40')
    assert 'the loss (inf) or its gradients are not finite at iteration 1 ' in error and '/data/train/' in error
    for name in ('b/1', 'c/0'):
        (labels / f'{name}.safetensors').rename(tmp_path / name.replace('/', '_'))
    error = fails(capsys, *command)
    assert f'no token labels {labels}/b/1.safetensors and 1 more; mmseg-volo make-token-labels writes them' in error
    for path in labels.rglob('[123].safetensors'):
        write_label_map(path, torch.zeros(2, 3, 7, 7))
    for name in ('b/1', 'c/0'):
        write_label_map(labels / f'{name}.safetensors', torch.zeros(2, 3, 7, 7))
    words = [sys.executable, '-W', 'ignore', ROOT / 'tools/pretrain.py', *command[1:], 'train_dataloader.num_workers=1']
    done = subprocess.run(
        list(map(str, words)), env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True
    )
    (error,) = done.stderr.splitlines()
    assert done.returncode == 2 and error.startswith(f'error: the token labels {labels}/')
    assert 'have the size 2 x 3 x 7 x 7, but ' in error and 'a/0.safetensors has 2 x 3 x 5 x 5; one teacher' in error


def test_from_images_to_a_segmentor_that_starts_from_the_pretrained_backbone(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, teacher = place / 'data', place / 'teacher.pth'
    words = '--model', 'test_resnet', '--checkpoint', teacher, '--workers', 1
    run('make-token-labels', data / 'train', data / 'token_labels', *words)
    run('pretrain', *pretrain(place, Path('classifier')))
    log = next(Path('classifier').rglob('*.log')).read_text()
    assert 'loss_class: ' in log and 'loss_tokens: ' in log and 'accuracy/top1: ' in log
    checkpoint = tmp_path / 'classifier/iter_6.pth'
    contents = read_checkpoint(str(checkpoint))['state_dict']
    backbone = VOLO('tiny', img_size=64, init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint)))
    backbone.init_weights()
    for name, tensor in backbone.state_dict().items():
        assert name.startswith('norm') or torch.equal(tensor, contents[f'backbone.{name}']), name

    run('toy-streets', 'toy', '--train', 4, '--val', 1, '--size', '96x64')
    start = 'model.backbone.init_cfg.type=Pretrained', f'model.backbone.init_cfg.checkpoint={checkpoint}'
    few = 'train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'train_dataloader.batch_size=2', *IN_THIS_PROCESS
    words = '--work-dir', 'segmentor', '--cfg-options', 'data_root=toy', *few, *start
    run('train', 'volo_tiny_toy_streets', *words)
    log = next(Path('segmentor').rglob('*.log')).read_text()
    assert f'VOLO tiny: 104 of 112 tensors loaded from {checkpoint}; pos_embed resized from 4x4 to 6x12; ' in log
    assert '31 tensors of the classifier or of unused stages dropped; 8 tensors of the output norms are new' in log
    assert 'mIoU: ' in log


def run(command: str, *arguments: object) -> None:
    assert main(command, [str(argument) for argument in arguments]) == 0
