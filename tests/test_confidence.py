"""The probability of each label: its picture, void labels, and predictions for Label Studio."""

import json
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import DATASETS, MODELS
from PIL import Image
from test_infer import BINARY, CONFIG, HEIGHT, SLIDE, WIDTH, labels, saved, scenes
from test_segmentor import SLIDE as SMALL_WINDOWS
from test_segmentor import PeakMemory, build, picture, sample

from mmseg_volo.apis.inference import infer
from mmseg_volo.apis.label_studio import brush_rle
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo.models.confidence import CERTAIN
from mmseg_volo_cli import main

CLASSES = list(DATASETS.get('CityscapesDataset').METAINFO['classes'])
PLAIN = {'model.type': 'EncoderDecoder'}
STEP = 1 / CERTAIN


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('confidence')
    make_toy_streets(folder / 'toy', train=1, val=2, size=(WIDTH, HEIGHT))
    return folder


@pytest.fixture(scope='module')
def checkpoint(place) -> str:
    return saved(place / 'random.pth', {})


def probability_of_labels(logits: torch.Tensor, label: torch.Tensor) -> np.ndarray:
    """The reference, in float64."""
    scores = logits.double()
    prob = scores.softmax(0) if len(scores) > 1 else torch.cat([1 - scores.sigmoid(), scores.sigmoid()])
    return prob.gather(0, label[None].long())[0].numpy()


BINARY_HEAD = dict(num_classes=2, out_channels=1)
WHOLE = dict(mode='whole')


@pytest.mark.parametrize(
    ('head', 'mode', 'size'),
    [({}, SMALL_WINDOWS, (50, 60)), ({}, WHOLE, (100, 121)), (BINARY_HEAD, WHOLE, (50, 60))],
    ids=['slide', 'resized', 'binary'],
)
def test_confidence_is_the_probability_of_the_label(head, mode, size):
    model, image = build(head=head, **mode), picture(50, 60)
    [(label, confidence)] = model.segment_all([image], size, confidence=True)
    assert confidence.dtype == torch.uint16 and torch.equal(label, model.segment(image, size))
    exact = probability_of_labels(model.segment(image, size, logits=True), label)
    assert np.abs(confidence.numpy() * STEP - exact).max() < 0.51 * STEP + 1e-6


def test_confidence_needs_a_few_rows_of_probabilities_only(monkeypatch):
    model, shape = build(mode='slide', crop_size=(64, 64), stride=(48, 48)), (1024, 256)
    monkeypatch.setattr(model, 'encode_decode', lambda inputs, metas: F.pad(inputs, (0, 0, 0, 0, 0, 16)))
    image, peaks = picture(*shape), []
    for confidence in (False, True):
        with PeakMemory() as memory:
            list(model.segment_all([image], shape, confidence=confidence))
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < 2 * shape[0] * shape[1] + 3 * 4 * 19 * 64 * 256  # the map, and 64 rows of scores


@pytest.mark.parametrize('head', [{}, BINARY_HEAD], ids=['19 classes', 'binary'])
def test_the_average_over_scales_and_flips_has_its_own_confidence(head):
    module = build(head=head, **WHOLE)
    images, meta = [picture(70, 100), picture(50, 80), picture(70, 100)], dict(flip=True, flip_direction='horizontal')
    logits = [module.segment(image, (70, 100), logits=True) for image in images]
    logits[2] = logits[2].flip(-1)
    samples = [[sample(image, (70, 100), **(meta if i == 2 else {}))] for i, image in enumerate(images)]
    model = MODELS.build(dict(type='SlidingTTAModel', module=module))
    found = model.test_step(dict(inputs=[[image] for image in images], data_samples=samples))[0]
    label = found.pred_sem_seg.data[0]
    exact = np.mean([probability_of_labels(scores, label) for scores in logits], axis=0)
    assert np.abs(found.confidence.data[0].numpy() * STEP - exact).max() < 0.51 * STEP + 1e-6
    assert 'seg_logits' not in found


def test_a_flipped_sample_is_flipped_back_with_its_confidence():
    image, meta = picture(70, 100), dict(flip=True, flip_direction='horizontal')
    for logits in (False, True):
        model = build(**WHOLE, confidence=True, logits=logits)
        [(label, confidence)] = model.segment_all([image], (70, 100), confidence=True)
        [found] = model.test_step(dict(inputs=[image], data_samples=[sample(image, (70, 100), **meta)]))
        assert np.array_equal(found.pred_sem_seg.data[0], label.flip(-1))
        steps = found.confidence.data[0].numpy().astype(int) - confidence.numpy()[:, ::-1]
        assert np.abs(steps).max() <= 1  # sums of logits that lie elsewhere round differently


@pytest.mark.parametrize(
    ('options', 'tta'),
    [({}, False), (SLIDE, False), (PLAIN, False), (BINARY, False), ({**BINARY, **PLAIN}, False), ({}, True)],
    ids=['whole', 'slide', 'plain', 'binary', 'plain binary', 'tta'],
)
def test_the_grey_picture_shows_the_probability(place, checkpoint, tmp_path, options, tta):
    if 'model.decode_head.out_channels' in options:
        checkpoint = saved(tmp_path / 'binary.pth', {**BINARY})
    path = scenes(place)[0]
    kinds = ['labels', 'confidence', *([] if tta else ['prob'])]
    infer(CONFIG, checkpoint, [str(path)], str(tmp_path), save=kinds, tta=tta, cfg_options=options)
    grey, [label] = Image.open(tmp_path / f'confidence/{path.stem}.png'), labels(tmp_path, [path.stem])
    assert grey.mode == 'L' and grey.size == (WIDTH, HEIGHT)
    confidence = np.asarray(grey) / 255
    assert confidence.std() > 0.005
    if not tta:
        prob = np.load(tmp_path / f'prob/{path.stem}.npy').astype(np.float64)
        prob = prob if len(prob) > 1 else np.concatenate([1 - prob, prob])
        of_label = np.take_along_axis(prob, label[None].astype(int), 0)[0]
        assert np.abs(confidence - of_label).max() < 0.51 / 255 + 1e-3  # float16
    infer(CONFIG, checkpoint, [str(path)], str(tmp_path / 'b'), save=['labels'], tta=tta, cfg_options=options)
    assert np.array_equal(labels(tmp_path / 'b', [path.stem])[0], label)


def test_labels_below_the_bound_are_void_in_every_result(place, checkpoint, tmp_path):
    path, bound = scenes(place)[0], 0.8
    kinds = ['labels', 'confidence', 'overlay', 'label-studio']
    for name, below in (('all', 0), ('some', bound)):
        infer(CONFIG, checkpoint, [str(path)], str(tmp_path / name), save=kinds, void_below=below, opacity=1)
    (label,), (some,) = (labels(tmp_path / name, [path.stem]) for name in ('all', 'some'))
    confidence = np.asarray(Image.open(tmp_path / f'some/confidence/{path.stem}.png')) / 255
    void = some == 255
    assert 0.01 < void.mean() < 0.99 and np.array_equal(some[~void], label[~void])
    assert confidence[void].max() < bound + 1 / 255 and confidence[~void].min() > bound - 1 / 255
    shown = np.asarray(Image.open(tmp_path / f'some/vis/{path.stem}.png'))[:, :WIDTH]
    assert np.array_equal(shown[void], np.asarray(Image.open(path).convert('RGB'))[void])  # bare
    assert np.array_equal(masks(json.loads((tmp_path / 'some/label-studio/tasks.json').read_text())[0]), some)


@pytest.mark.parametrize('bound', [-0.1, 1.5, float('nan')])
def test_a_bound_is_a_probability(bound, tmp_path):
    with pytest.raises(UserError, match=f'--void-below must be between 0 and 1, got {bound}'):
        infer(CONFIG, 'never_read.pth', [CONFIG], str(tmp_path / 'out'), void_below=bound)


def test_mmsegs_own_average_keeps_no_probability(place, checkpoint, tmp_path):
    options = {'tta_model.type': 'SegTTAModel'}
    with pytest.raises(UserError, match=r'with --tta needs tta_model\.type=SlidingTTAModel'):
        infer(CONFIG, checkpoint, [str(scenes(place)[0])], str(tmp_path), tta=True, void_below=0.5, cfg_options=options)


# Label Studio


class Bits:
    """Reads numbers of any width from the numbers of a brush's ``rle``."""

    def __init__(self, rle: list[int]):
        self.text = ''.join(f'{byte:08b}' for byte in rle)
        self.place = 0

    def read(self, width: int) -> int:
        self.place += width
        return int(self.text[self.place - width : self.place], 2)


def decoded(rle: list[int]) -> np.ndarray:
    """All RGBA values, as rle-pack's description says how to read them."""
    bits = Bits(rle)
    count, word = bits.read(32), bits.read(5) + 1
    sizes = [bits.read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        repeated = bits.read(1)
        length = bits.read(sizes[bits.read(2)]) + 1
        values += [bits.read(word)] * length if repeated else [bits.read(word) for _ in range(length)]
    assert len(values) == count and len(bits.text) - bits.place < 8
    return np.array(values)


def masks(task: dict) -> np.ndarray:
    """The label map of a task's masks; 255 where there is none."""
    results = task['predictions'][0]['result']
    label = np.full((results[0]['original_height'], results[0]['original_width']), 255, np.uint8)
    for result in results:
        pixels = decoded(result['value']['rle']).reshape(*label.shape, 4)
        assert set(np.unique(pixels)) <= {0, 255} and (pixels == pixels[..., :1]).all()
        inside = pixels[..., 3] > 0
        assert inside.any() and (label[inside] == 255).all()
        label[inside] = CLASSES.index(result['value']['brushlabels'][0])
    return label


def made_up_masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        'noise': rng.random((37, 41)) < 0.5,
        'empty': np.zeros((300, 200), bool),  # a run that takes several sizes
        'full': np.ones((300, 200), bool),
        'stripes': np.repeat(rng.random(600) < 0.5, rng.integers(1, 70, 600))[: 97 * 100].reshape(97, 100),
        'lengths': np.repeat([True, False, True, False, True], [2, 4, 64, 2**14, 2**14 + 1])[None],  # ends of the sizes
        'pixel': np.ones((1, 1), bool),
    }


@pytest.mark.parametrize('name', made_up_masks())
def test_masks_survive_encoding(name, monkeypatch):
    mask = made_up_masks()[name]
    encoded = brush_rle(mask)
    assert np.array_equal(decoded(list(encoded)).reshape(*mask.shape, 4), np.repeat(mask[..., None] * 255, 4, 2))
    monkeypatch.setattr('mmseg_volo.apis.label_studio.RUNS', 7)
    assert brush_rle(mask) == encoded


def test_masks_are_encoded_as_by_label_studios_sdk():
    mask = np.zeros((3, 20), np.uint8)
    mask[0, 2] = mask[1, 3:9] = mask[2] = 255
    # printed by version 2.1.2
    printed = [0, 0, 0, 240, 57, 27, 252, 224, 17, 255, 228, 240, 12, 47, 255, 138, 192, 50, 127, 248]
    assert list(brush_rle(mask > 0)) == printed
    brush = pytest.importorskip('label_studio_sdk.converter.brush', reason='the SDK needs another OpenCV')
    for mask in made_up_masks().values():
        assert np.array_equal(brush.decode_rle(list(brush_rle(mask))), np.repeat(mask.ravel() * 255, 4))


def test_tasks_hold_the_labels_bit_for_bit(place, checkpoint, tmp_path, capsys):
    folder = tmp_path / 'my photos'
    (folder / 'left').mkdir(parents=True)
    for name, size in (('a+b.png', (96, 64)), ('left/ü.png', (70, 90)), ('z.png', (96, 64))):
        Image.open(scenes(place)[0]).resize(size).save(folder / name)
    (folder / 'broken.png').write_bytes(b'no picture')
    arguments = [CONFIG, checkpoint, str(folder), '--out-dir', str(tmp_path / 'out'), '--device', 'cpu']
    assert main('infer', [*arguments, '--save', 'label-studio', 'labels', 'confidence']) == 1
    assert f'LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={tmp_path}\n' in capsys.readouterr().out
    tasks = json.loads((tmp_path / 'out/label-studio/tasks.json').read_text())
    references = [unquote(task['data']['image']) for task in tasks]
    assert references == [f'/data/local-files/?d=my photos/{name}' for name in ('a+b.png', 'left/ü.png', 'z.png')]
    assert '%2B' in tasks[0]['data']['image']  # a plus would become a space
    config = ElementTree.parse(tmp_path / 'out/label-studio/config.xml')
    assert [label.get('value') for label in config.iter('Label')] == CLASSES
    assert config.find('.//Label').get('background') == '#804080'  # road
    image, brush = config.find('Image').attrib, config.find('BrushLabels').attrib
    for task, name in zip(tasks, ('a+b', 'ü', 'z'), strict=True):
        [prediction] = task['predictions']
        [label] = labels(tmp_path / 'out', [name])
        assert np.array_equal(masks(task), label)
        assert len(prediction['result']) == len(np.unique(label)) > 3  # none for absent classes
        assert len({result['id'] for result in prediction['result']}) == len(prediction['result'])
        for result in prediction['result']:
            assert (result['from_name'], result['to_name']) == (brush['name'], image['name'])
            assert (result['original_height'], result['original_width']) == label.shape
        confidence = np.asarray(Image.open(tmp_path / f'out/confidence/{name}.png')) / 255
        assert prediction['score'] == pytest.approx(confidence.mean(), abs=1e-3)
        assert prediction['model_version'].startswith('random ')
    assert image['value'] == '$image' and brush['toName'] == image['name']


def test_a_run_that_fails_leaves_no_tasks(place, checkpoint, tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    with pytest.raises(UserError, match='cannot be decoded'):
        infer(CONFIG, checkpoint, [str(tmp_path / 'broken.png')], str(tmp_path / 'out'), save=['label-studio'])
    assert list((tmp_path / 'out/label-studio').iterdir()) == []
