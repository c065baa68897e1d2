"""Image classifiers, and the command that classifies pictures and measures on ImageNet."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from parity import assert_close
from PIL import Image
from test_hvt import PUBLISHED as HVT_PUBLISHED
from test_hvt import Reference
from timm.data import ImageNetInfo, RealLabelsImagenet, create_transform
from torch import Tensor, nn

from mmseg_volo.apis.classification import classify
from mmseg_volo.errors import UserError
from mmseg_volo.evaluation.imagenet import IMAGES, PROMISED, Hits
from mmseg_volo.models.classifiers import CoAtNetClassifier, HVTClassifier, VOLOClassifier
from mmseg_volo.models.named_classifiers import classifier_names, named_classifier
from mmseg_volo.models.volo import VOLO, resize_pos_embed
from mmseg_volo_cli import main

PUBLISHED = ['d1', 'd2', 'd3', 'd4', 'd5']
WNIDS, NUMBERS = ImageNetInfo().label_names(), [str(i) for i in range(1000)]  # names of class folders


def randomise(model: nn.Module) -> nn.Module:
    """``model`` in float64 with random tensors, to which two pictures do not look alike."""
    for name, tensor in model.double().eval().state_dict().items():
        if name.endswith('running_var') or (tensor.dim() == 1 and name.endswith('weight')):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.uniform_(-0.1, 0.1) if tensor.dim() > 1 else tensor.uniform_(-1, 1)
        else:
            tensor.zero_()
    return model


def random_twins(theirs: Callable[[], nn.Module], ours: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """timm's VOLO and ours on the same random tensors, of which two copies of the largest would fill the memory."""
    with torch.device('meta'):
        theirs, ours = theirs(), ours().double().eval()
    theirs = randomise(theirs.to_empty(device='cpu'))
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


@pytest.mark.parametrize('arch', ['0_rw', 'nano_rw'])
def test_logits_of_coatnet_equal_timms_with_timms_tensors_loaded_strictly(arch):
    torch.manual_seed(0)
    theirs = randomise(timm.create_model(f'coatnet_{arch}_224', img_size=64, num_classes=7))
    ours = CoAtNetClassifier(arch, img_size=64, num_classes=7).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = theirs(x)
        assert (expected[0] - expected[1]).abs().max() > 1e-3
        assert_close(ours(x), expected)


@pytest.mark.parametrize('arch', HVT_PUBLISHED)
def test_logits_of_hvt_equal_the_authors_form(arch):
    torch.manual_seed(0)
    width, parameters, _ = HVT_PUBLISHED[arch]
    ours = HVTClassifier(arch).double().eval()
    assert f'{sum(p.numel() for p in ours.parameters()) / 1e6:.2f}' == parameters
    reference = Reference(ours.out_channels[0], 3 if arch == 'ti1' else 6, width).double().eval()
    ours.load_state_dict(reference.state_dict())  # strict
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.inference_mode():
        assert_close(ours(x), reference(x)[1])
    with pytest.raises(UserError, match='takes 224 x 224 images only, got 224 x 256'):
        ours(torch.zeros(1, 3, 224, 256))


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


def test_init_cfg_loads_the_whole_classifier_for_another_image_size(tmp_path):
    torch.manual_seed(0)
    saved = VOLOClassifier('tiny', img_size=64, num_classes=5)
    torch.save(saved.state_dict(), tmp_path / 'tiny.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'tiny.pth'))
    model = VOLOClassifier('tiny', img_size=96, num_classes=5, init_cfg=init_cfg)
    model.init_weights()
    expected = saved.state_dict() | dict(pos_embed=resize_pos_embed(saved.pos_embed, (6, 6)))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    torch.save(VOLO('tiny', img_size=64).state_dict(), tmp_path / 'tiny.pth')
    with pytest.raises(UserError, match=r'31 missing \(cls_token, .*unexpected \(norm0'):
        model.init_weights()


# How pictures are prepared


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    """Coarse random colours, enlarged, so that every picture looks different to a model."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def prepared(image: Image.Image, side: int, crop_pct: float) -> Tensor:
    """Shorter side to side / crop_pct, square from the middle, black where the picture is smaller, normalised."""
    short = math.floor(side / crop_pct)
    scale = short / min(image.size)
    size = [short if length == min(image.size) else int(scale * length) for length in image.size]
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (-((side - length) // 2) if length < side else round((length - side) / 2) for length in size)
    square = resized.crop((left, top, left + side, top + side))  # Pillow fills with black
    x = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.mark.parametrize(
    ('name', 'side', 'crop_pct'), [('volo_d1_224', 224, 0.96), ('volo_d3_448', 448, 1.0), ('volo_d5_512', 512, 1.15)]
)
@pytest.mark.parametrize('size', [(600, 480), (300, 640)], ids=str)
def test_pictures_are_prepared_as_the_weights_were_measured(name, side, crop_pct, size):
    named = named_classifier(name)
    assert named.data['crop_pct'] == crop_pct and named.weights == f'{name}.sail_in1k'
    actual = create_transform(**named.data, is_training=False)(picture(0, size))
    torch.testing.assert_close(actual, prepared(picture(0, size), side, crop_pct))
    is_padded = bool((actual[:, 0, 0] < -1.7).all())  # black
    assert is_padded == (crop_pct > 1)


def test_every_classifier_of_timms_has_its_crop_and_promised_figures():
    names = classifier_names()
    assert 'volo_tiny_224' in names and {f'volo_{arch}_224' for arch in PUBLISHED} < set(names)
    weights = {named_classifier(name).weights for name in names} - {'volo_tiny_224'}
    have_none = {f'coatnet_{size}_224' for size in range(6)} | {'coatnet_3_rw_224'}  # for ImageNet-1K
    assert weights - have_none - {'coatnet_3_rw_224.sw_in12k'} <= set(PROMISED)
    assert all(named_classifier(name.partition('.')[0], f'timm://{name}').weights == name for name in PROMISED)
    for name in filter(lambda name: name.startswith('volo_'), names):
        side = int(name.rpartition('_')[2])
        large = 1.15 if name.startswith(('volo_d4', 'volo_d5')) else 1.0
        data = named_classifier(name).data
        assert (data['input_size'], data['interpolation']) == ((3, side, side), 'bicubic')
        assert data['crop_pct'] == (0.96 if side == 224 else large)


# The command


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A folder with six pictures, a classifier to which they look different, and one of three classes."""
    folder = tmp_path_factory.mktemp('place')
    torch.manual_seed(0)
    model = VOLOClassifier('tiny')
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            tensor.normal_(std=1 / math.sqrt(tensor[0].numel()) if name != 'head.weight' else 1)
    torch.save(model.state_dict(), folder / 'tiny.pth')
    torch.save(VOLOClassifier('tiny', num_classes=3).state_dict(), folder / 'three.pth')
    (folder / 'pictures').mkdir()
    for seed in range(6):
        picture(seed).save(folder / f'pictures/{seed}.png')
    return folder


@pytest.fixture(scope='module')
def logits(place) -> Tensor:
    """Logits of the six pictures, computed without the command."""
    model = VOLOClassifier('tiny').eval()
    model.load_state_dict(torch.load(place / 'tiny.pth'))
    with torch.inference_mode():
        found = model(torch.stack([prepared(picture(seed), 224, 0.96) for seed in range(6)]))
    assert len(set(found.argmax(1).tolist())) > 3
    return found


def run(place: Path, *images: object, **options) -> dict:
    return classify('volo_tiny_224', str(place / 'tiny.pth'), [str(image) for image in images], **options)


def test_the_five_most_probable_classes_are_printed_with_names_and_written(place, logits, capsys):
    out = place / 'classes.json'
    words = ['--out', str(out), '--batch-size', '4', str(place / 'pictures')]
    assert main('classify', ['volo_tiny_224', str(place / 'tiny.pth'), *words]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert '6 of 6 images classified on cpu' in printed and result['model'] == 'volo_tiny_224'
    names = ImageNetInfo().label_descriptions()
    for found, row in zip(result['pictures'], logits, strict=True):
        expected = row.softmax(0).topk(5)
        assert [entry['index'] for entry in found['classes']] == expected.indices.tolist()
        for entry, probability in zip(found['classes'], expected.values.tolist(), strict=True):
            assert entry['probability'] == pytest.approx(probability, rel=1e-3)
            assert (entry['name'], entry['wnid']) == (names[entry['index']], WNIDS[entry['index']])
            assert f'{entry["probability"]:9.2%}  {entry["name"]}' in printed


def test_workers_and_batches_change_nothing(place):
    plain = run(place, place / 'pictures', workers=0)['pictures']
    for found, expected in zip(run(place, place / 'pictures', workers=2, batch_size=2)['pictures'], plain, strict=True):
        assert found['file'] == expected['file']
        for row, other in zip(found['classes'], expected['classes'], strict=True):
            assert row == dict(other, probability=pytest.approx(other['probability'], rel=1e-3))


def test_mixed_precision_is_close_but_not_equal(place, tmp_path):
    # Not the tiny one: oneDNN's bfloat16 convolution of 24 channels is wrong on CPUs with AMX (torch 2.11).
    torch.save(VOLOClassifier('d1', num_classes=3).state_dict(), tmp_path / 'd1.pth')
    plain, mixed = (
        classify('volo_d1_224', str(tmp_path / 'd1.pth'), [str(place / 'pictures/0.png')], amp=amp)['pictures'][0]
        for amp in (False, True)
    )
    a, b = ({row['index']: row['probability'] for row in found['classes']} for found in (plain, mixed))
    assert a != b and a == pytest.approx(b, abs=0.02)


def test_classes_without_known_names_are_numbered(place):
    (found,) = classify('volo_tiny_224', str(place / 'three.pth'), [str(place / 'pictures/0.png')])['pictures']
    assert {row['name'] for row in found['classes']} == {'class 0', 'class 1', 'class 2'}


def test_a_photograph_is_turned_upright(place):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    turned = picture(0).transpose(Image.Transpose.ROTATE_90)
    turned.save(place / 'turned.png', exif=exif)
    upright, found = run(place, place / 'pictures/0.png', place / 'turned.png')['pictures']
    assert found['classes'] == upright['classes']


def test_files_that_cannot_be_decoded_are_skipped_with_a_warning(place, capsys):
    folder = place / 'mixed'
    folder.mkdir()
    shutil.copy(place / 'pictures/0.png', folder)
    (folder / 'broken.png').write_bytes(b'not a picture')
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / 'deep.png')
    Image.new('RGB', (2001, 2)).save(folder / 'slim.png')
    assert main('classify', ['volo_tiny_224', str(place / 'tiny.pth'), str(folder)]) == 1
    printed = capsys.readouterr().out
    for name, reason in {
        'broken.png': 'cannot be decoded as an image',
        'deep.png': 'cannot be decoded as an image: it holds more than 8 bits per pixel and channel',
        'slim.png': 'is 2001 x 2, too narrow for a square crop',
    }.items():
        assert f'warning: {folder / name} {reason}; skipped' in printed
    assert '1 of 4 images classified on cpu' in printed and '3 skipped' in printed
    with pytest.raises(UserError, match='broken.png cannot be decoded'):
        run(place, folder / 'broken.png')


# ImageNet


def imagenet(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    return root


def measured(place: Path, folder: Path, labels: str, **options) -> dict:
    return run(place, imagenet=str(folder), labels=labels, batch_size=4, workers=0, **options)['imagenet']


def hits(result: dict) -> list[int]:
    return [round(result[f'top{k}']['accuracy'] / 100 * result['images']) for k in (1, 5)]


@pytest.mark.parametrize('labels', ['val', 'v2'])
def test_accuracy_counts_the_class_of_the_folder(place, logits, tmp_path, labels):
    names = WNIDS if labels == 'val' else NUMBERS
    folder = imagenet(tmp_path, [*names, '.hidden'])
    for seed, rank in enumerate([0, 0, 0, 1, 4, 5]):  # of the picture's class among the predictions
        shutil.copy(place / f'pictures/{seed}.png', folder / names[logits[seed].topk(6).indices[rank]])
    result = measured(place, folder, labels)
    assert (result['images'], hits(result)) == (6, [3, 5])
    assert measured(place, folder, labels, amp=True)['images'] == 6


def test_accuracy_with_real_labels_counts_any_of_them_and_leaves_out_images_without(place, logits, tmp_path):
    real = RealLabelsImagenet(range(50_000)).real_labels
    assert IMAGES['real'] == sum(map(bool, real.values())) == 50_000 - 3163

    def file_where(condition: Callable[[list[int]], bool]) -> Path:
        return tmp_path / next(name for name, classes in real.items() if condition(classes))

    top = [row.topk(5).indices.tolist() for row in logits]
    chosen = [
        file_where(lambda classes: top[0][0] in classes and len(classes) > 1),
        file_where(lambda classes: top[1][0] in classes[1:]),
        file_where(lambda classes: top[2][3] in classes and top[2][0] not in classes),
        file_where(lambda classes: classes and not set(classes) & set(top[3])),
        file_where(lambda classes: not classes),
    ]
    for seed, path in enumerate(chosen):
        picture(seed).save(path, 'PNG')
    result = measured(place, tmp_path, 'real')
    assert (result['images'], result['excluded'], hits(result)) == (4, 1, [2, 3])
    folder = imagenet(tmp_path / 'folders', WNIDS)
    for path in chosen:
        path.rename(folder / WNIDS[7] / path.name)  # the folders' names do not count
    assert measured(place, folder, 'real') == result


@pytest.mark.parametrize(('found', 'images'), [(8, 10), (0, 5), (42075, 50_000)])
def test_the_interval_holds_the_accuracies_under_which_the_result_is_likely(found, images):
    accuracy, low, high = (value / 100 for value in Hits(images, {1: found, 5: images}).accuracy(1))
    assert accuracy == found / images and 0 <= low <= accuracy < high
    for end in (low, high):  # Wilson: the accuracies from which the result is 1.96 standard deviations away
        deviation = math.sqrt(end * (1 - end) / images)
        assert abs(accuracy - end) == pytest.approx(1.959964 * deviation, abs=1e-6)


def test_promised_figures_stand_beside_the_measured_ones(place, tmp_path, monkeypatch, capsys):
    folder = imagenet(tmp_path, WNIDS)
    shutil.copy(place / 'pictures/0.png', folder / 'n01440764')
    monkeypatch.setitem(PROMISED, 'volo_tiny_224', dict(val=12.5))
    out = tmp_path / 'accuracy.json'
    words = ['--imagenet', str(folder), '--out', str(out), '--workers', '0']
    assert main('classify', ['volo_tiny_224', str(place / 'tiny.pth'), *words]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())['imagenet']
    assert result['top1']['promised'] == 12.5 and result['top5']['promised'] is None
    assert f'{result["top1"]["accuracy"] - 12.5:+.2f}' in printed
    assert 'on 1 images, labels val, in %; the promised figures are for 50,000' in printed


# Bad input


@pytest.mark.parametrize(
    ('names', 'labels', 'message'),
    [
        ([], 'val', r'takes a folder of 1,000 class folders; .* has none'),
        (['train', 'val'], 'val', r'; .* has 2 \(train, val\)'),
        (WNIDS[:998], 'val', r'has 998 \(n01440764, n01443537, .* and 993 more\)'),
        (WNIDS[:3], 'real', r'has 3 \('),
        (NUMBERS, 'val', r'named by wnid; 1000 in .* are not \(0, 1, 10, 100, .*--labels v2\?'),
        (WNIDS, 'v2', r'named 0 to 999; 1000 in .* are not \(n01440764, .*--labels val\?'),
        ([*WNIDS[1:], 'goldfish'], 'val', r'named by wnid; 1 in .* are not \(goldfish\)'),
        (WNIDS, 'val', r'has no images \(\.jpg, '),
    ],
)
def test_other_folders_than_imagenets_are_described(place, tmp_path, names, labels, message):
    with pytest.raises(UserError, match=message):
        measured(place, imagenet(tmp_path, names), labels)


def test_impossible_images_of_imagenet(place, tmp_path):
    folder = imagenet(tmp_path / 'real', [])
    folder.mkdir()
    picture(0).save(folder / 'cat.png')
    with pytest.raises(UserError, match=r'ILSVRC2012_val_00000001.JPEG to 00050000; 1 of 1 files have others \(cat'):
        measured(place, folder, 'real')
    with pytest.raises(UserError, match='nowhere is no folder'):
        measured(place, tmp_path / 'nowhere', 'val')
    folder = imagenet(tmp_path / 'val', WNIDS)
    (folder / 'n01440764/a.JPEG').write_bytes(b'not a picture')
    with pytest.raises(UserError, match=r'a\.JPEG cannot be decoded'):
        measured(place, folder, 'val')
    picture(0).save(folder / 'n01440764/a.JPEG')
    with pytest.raises(UserError, match='takes a classifier of 1,000 classes; this one has 3'):
        classify('volo_tiny_224', str(place / 'three.pth'), imagenet=str(folder), workers=0)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(model='volo_d6_224'), r"no classifier named 'volo_d6_224': did you mean volo_d5_224"),
        (dict(model='hvt_s1_224.other'), r"no classifier named 'hvt_s1_224.other': did you mean hvt_s1_224"),
        (dict(model='resnet50'), r"no classifier named 'resnet50': choose from .*volo_d1_224"),
        (dict(model='volo_d1_224.other'), r'timm has no weights volo_d1_224\.other, only volo_d1_224\.sail_in1k'),
        (dict(checkpoint='timm://volo_d1_384.sail_in1k'), 'does not fit volo_d1_224, it is volo_d1_384'),
        (dict(images=[]), 'takes either pictures or --imagenet DIR'),
        (dict(imagenet='data'), 'takes either pictures or --imagenet DIR'),
        (dict(batch_size=0), '--batch-size must be at least 1, got 0'),
        (dict(workers=-1), '--workers must be at least 0, got -1'),
        (dict(out='classes.txt'), r'--out must be a \.json file, got classes\.txt'),
        (dict(images=['nowhere.png']), 'no image, folder or pattern matches nowhere.png'),
        (dict(), 'checkpoint not found: never_read.pth'),
    ],
    ids=str,
)
def test_impossible_arguments(arguments, message):
    defaults = dict(model='volo_d1_224', checkpoint='never_read.pth', images=[__file__])
    with pytest.raises(UserError, match=message):
        classify(**{**defaults, **arguments})


@pytest.mark.parametrize('name', ['coatnet_nano_rw_224', 'coatnet_rmlp_nano_rw_224'])
def test_timms_files_of_coatnet_load_by_name(tmp_path, name):
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / 'weights.pth')
    model = named_classifier(name).load(str(tmp_path / 'weights.pth'))
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_weights_of_another_classifier_are_named(tmp_path):
    image = [__file__]
    source = str(tmp_path / 'weights.pth')
    torch.save(timm.create_model('volo_d1_384', num_classes=9).half().state_dict(), source)
    with pytest.raises(UserError, match=r'does not fit volo_d1_224, it is volo_d1_384: 1 of another shape \(pos_embed'):
        classify('volo_d1_224', source, image)
    with pytest.raises(UserError, match=r'does not fit volo_tiny_224, it is volo_d1_384: '):
        classify('volo_tiny_224', source, image)
    torch.save(timm.create_model('coatnet_nano_rw_224', img_size=256).half().state_dict(), source)
    for name in ('volo_tiny_224', 'coatnet_nano_rw_224', 'coatnet_rmlp_nano_rw_224'):
        with pytest.raises(UserError, match=f'does not fit {name}, it is coatnet_nano_rw_256: '):
            classify(name, source, image)
    torch.save(HVTClassifier('ti1').state_dict(), source)
    with pytest.raises(UserError, match=r'does not fit hvt_s1_224, it is hvt_ti1: '):
        classify('hvt_s1_224', source, image)
    for shape in ((), (0, 128), (2**20, 1)):  # the last must not become a layer of 512 MiB
        torch.save(VOLOClassifier('tiny').state_dict() | {'head.weight': torch.zeros(shape)}, source)
        with pytest.raises(UserError, match=r'does not fit volo_tiny_224: \d of another shape \(.*head.weight is'):
            classify('volo_tiny_224', source, image)
    torch.save(VOLO('tiny').state_dict(), source)
    with pytest.raises(UserError, match=r'does not fit volo_tiny_224: 31 missing \(cls_token, '):
        classify('volo_tiny_224', source, image)
