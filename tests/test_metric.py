import csv
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.multiprocessing
from mmengine.dataset import DefaultSampler
from mmengine.logging import MMLogger
from mmseg.datasets import CityscapesDataset
from mmseg.evaluation import IoUMetric
from PIL import Image
from scipy.ndimage import binary_erosion
from sklearn.metrics import confusion_matrix

from mmseg_volo import CamVidDataset, SegmentationMetric
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo.evaluation.scores import Totals, areas, category_iou, class_scores, interval, iou, mean_scores

NAMES = 'sky', 'road', 'car', 'unicorn'
META = dict(classes=NAMES, palette=[[70, 130, 180], [128, 64, 128], [0, 0, 142], [255, 0, 255]])


class Pair(NamedTuple):
    """An image with its label and a prediction."""

    image: str
    label: str
    truth: np.ndarray
    prediction: np.ndarray


def samples(pairs: Iterable[Pair]) -> Iterable[list[dict]]:
    """Batches of one, as mmengine's evaluator passes them."""
    for pair in pairs:
        maps = [torch.from_numpy(label.copy())[None] for label in (pair.truth.astype(np.int64), pair.prediction)]
        sure = np.random.default_rng(int(pair.truth.sum())).integers(0, 65536, pair.truth.shape, np.uint16)
        yield [
            dict(
                img_path=pair.image,
                seg_map_path=pair.label,
                gt_sem_seg=dict(data=maps[0]),
                pred_sem_seg=dict(data=maps[1]),
                confidence=dict(data=torch.from_numpy(sure)[None]),
            )
        ]


def measure(folder: Path, pairs: Sequence[Pair], meta: dict = META, **settings) -> tuple[dict, SegmentationMetric]:
    """The mean scores, and the metric with its totals."""
    metric = SegmentationMetric(str(folder), **{'root': str(Path(pairs[0].image).parent), **settings})
    metric.dataset_meta = meta
    for batch in samples(pairs):
        metric.process({}, batch)
    return metric.evaluate(len(pairs)), metric


def corrupted(truth: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """A prediction: the shifted ground truth, with blocks of other classes and void filled in."""
    rng = np.random.default_rng(seed)
    prediction = np.roll(truth, rng.integers(-4, 5, 2), axis=(0, 1))
    for _ in range(4):
        y, x = (rng.integers(0, side) for side in truth.shape)
        prediction[y : y + 12, x : x + 20] = rng.integers(classes)
    prediction[prediction == 255] = rng.integers(classes)
    return prediction


@pytest.fixture(scope='module')
def toy(tmp_path_factory) -> list[Pair]:
    root = tmp_path_factory.mktemp('metric') / 'toy'
    make_toy_streets(root, train=1, val=7, size=(96, 64))
    pairs = []
    for seed, image in enumerate(sorted((root / 'leftImg8bit/val').rglob('*.png'))):
        label = str(image).replace('leftImg8bit', 'gtFine').removesuffix('.png') + '_labelTrainIds.png'
        truth = np.array(Image.open(label))
        pairs.append(Pair(str(image), label, truth, corrupted(truth, 19, seed)))
    return pairs


@pytest.fixture(scope='module')
def camvid_pairs(camvid) -> list[Pair]:
    pairs = []
    for seed, label in enumerate(sorted((camvid / 'annotations/test').glob('*.png'))[:8]):
        truth = np.array(Image.open(label))
        image = camvid / f'images/test/{label.stem}.jpg'
        pairs.append(Pair(str(image), str(label), truth, corrupted(truth, 11, seed)))
    return pairs


@pytest.fixture(params=['toy', 'camvid_pairs'])
def data(request) -> tuple[list[Pair], dict]:
    """Labels with void pixels, and predictions that include absent classes."""
    meta = CityscapesDataset.METAINFO if request.param == 'toy' else CamVidDataset.METAINFO
    return request.getfixturevalue(request.param), meta


# Comparison with other implementations


def test_iou_equals_scikit_learn(data, tmp_path):
    pairs, meta = data
    scores, metric = measure(tmp_path, pairs, meta)
    truth, prediction = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (2, 3))
    assert (truth == 255).any()
    labelled = truth != 255
    theirs = confusion_matrix(truth[labelled], prediction[labelled], labels=range(len(meta['classes'])))
    assert np.array_equal(metric.totals.confusion, theirs)
    with np.errstate(invalid='ignore'):
        per_class = np.diag(theirs) / (theirs.sum(0) + theirs.sum(1) - np.diag(theirs))
    assert scores['mIoU'] / 100 == pytest.approx(np.nanmean(per_class), abs=1e-9)


def test_scores_equal_mmseg(data, tmp_path):
    pairs, meta = data
    MMLogger.get_instance('test_metric')
    theirs = IoUMetric(iou_metrics=['mIoU', 'mFscore'])
    theirs.dataset_meta = meta
    for batch in samples(pairs):
        theirs.process({}, batch)
    expected = theirs.evaluate(len(pairs))
    scores, _ = measure(tmp_path, pairs, meta)
    for name in ('mIoU', 'mAcc', 'aAcc'):
        assert scores[name] == pytest.approx(expected[name], abs=0.006)  # mmseg rounds to two digits


def test_class_and_category_iou_equal_cityscapesscripts(toy, tmp_path):
    labels = pytest.importorskip('cityscapesscripts.helpers.labels', reason='no cityscapesscripts')
    import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as official

    ids = np.zeros(256, np.uint8)
    for label in labels.labels:
        if 0 <= label.trainId < 255:
            ids[label.trainId] = label.id
    predictions = []
    for pair in toy:
        predictions.append(str(tmp_path / Path(pair.image).name))
        Image.fromarray(ids[pair.prediction]).save(predictions[-1])
    official.args.evalInstLevelScore, official.args.JSONOutput, official.args.quiet = False, False, True
    truths = [pair.label.replace('labelTrainIds', 'labelIds') for pair in toy]
    theirs = official.evaluateImgLists(predictions, truths, official.args)

    meta = CityscapesDataset.METAINFO
    scores, metric = measure(tmp_path, toy, meta)
    assert scores['mIoU'] / 100 == pytest.approx(theirs['averageScoreClasses'], abs=1e-9)
    for name, value in zip(meta['classes'], iou(areas(metric.totals.confusion)), strict=True):
        assert value / 100 == pytest.approx(theirs['classScores'][name], abs=1e-9, nan_ok=True)
    categories = category_iou(metric.totals.confusion, meta['classes'])
    assert set(categories) == set(theirs['categoryScores']) - {'void'}
    for name, value in categories.items():
        assert value / 100 == pytest.approx(theirs['categoryScores'][name], abs=1e-9, nan_ok=True)


def boundary(mask: np.ndarray) -> np.ndarray:
    """Boundary pixels of one mask as defined in arXiv 2103.16562."""
    reach = max(1, round(0.02 * float(np.hypot(*mask.shape))))
    return mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=reach, border_value=0)


def test_boundary_iou_follows_the_paper_on_labelled_pixels(data, tmp_path):
    pairs, meta = data
    scores, metric = measure(tmp_path, pairs, meta)
    both, either = np.zeros((2, len(meta['classes'])))
    for pair in pairs:
        labelled = pair.truth != 255
        for i in range(len(both)):
            truth, prediction = (boundary((label == i) & labelled) for label in (pair.truth, pair.prediction))
            both[i] += (truth & prediction).sum()
            either[i] += (truth | prediction).sum()
    with np.errstate(invalid='ignore'):
        expected = 100 * both / either
    ours = class_scores(areas(metric.totals.confusion), metric.totals.edges)['BoundaryIoU']
    assert ours == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert scores['mBoundaryIoU'] == pytest.approx(np.nanmean(expected), abs=1e-9)
    assert scores['mBoundaryIoU'] < scores['mIoU']


# Computed by hand


def test_an_absent_class_is_ignored_and_a_class_only_predicted_scores_zero():
    confusion = np.array([[6, 2, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    confusion[0, 2] = 2  # cars are predicted, but absent
    pixels = areas(confusion)
    per_class = class_scores(pixels, pixels)
    expected = dict(
        IoU=[60, 50, 0, np.nan],
        Acc=[60, 100, np.nan, np.nan],
        Precision=[100, 50, 0, np.nan],
        Recall=[60, 100, np.nan, np.nan],
        Fscore=[75, 200 / 3, 0, np.nan],
        BoundaryIoU=[60, 50, 0, np.nan],
    )
    for name, values in expected.items():
        assert per_class[name] == pytest.approx(values, nan_ok=True), name
    means = mean_scores(pixels, pixels)
    assert means == pytest.approx(
        dict(mIoU=110 / 3, mAcc=80, aAcc=200 / 3, fwIoU=(60 * 10 + 50 * 2) / 12, mBoundaryIoU=110 / 3)
    )
    assert category_iou(confusion, NAMES) == {}


def made_up(folder: Path, count: int, seed: int = 0) -> list[Pair]:
    """Random label maps, and predictions of varying accuracy."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        path = folder / f'{i:03d}.png'
        Image.fromarray(rng.integers(0, 255, (8, 12, 3), np.uint8)).save(path)
        truth = rng.integers(0, 3, (8, 12)).astype(np.uint8)
        wrong = rng.random(truth.shape) < rng.uniform(0, 0.6)
        pairs.append(Pair(str(path), f'{path}.label', truth, np.where(wrong, (truth + 1) % 3, truth)))
    return pairs


def test_intervals_agree_with_the_ordinary_bootstrap(tmp_path):
    pairs = made_up(tmp_path, 80)
    _, metric = measure(tmp_path, pairs)
    draws = metric.totals.bootstrap_scores()
    per_image = [np.mean(pair.truth == pair.prediction) * 100 for pair in pairs]
    rng = np.random.default_rng(1)
    plain = np.percentile([np.mean(rng.choice(per_image, len(pairs))) for _ in range(4000)], [2.5, 97.5])
    ours = interval(draws['aAcc'])
    assert ours == pytest.approx(plain, abs=0.1 * (plain[1] - plain[0]))
    bounds = interval(draws['IoU'])
    assert (bounds[0, :3] < bounds[1, :3]).all() and np.isnan(bounds[:, 3]).all()


def test_totals_do_not_depend_on_order_or_number_of_processes(toy, tmp_path):
    meta = CityscapesDataset.METAINFO
    folders = [tmp_path / name for name in ('one', 'backwards', 'three')]
    for folder in folders:
        folder.mkdir()
    _, one = measure(folders[0], toy, meta)
    _, backwards = measure(folders[1], toy[::-1], meta, root=str(Path(toy[0].image).parent))
    torch.multiprocessing.start_processes(_one_of_three, (folders[2], toy, meta), nprocs=3, start_method='fork')
    three = pickle.loads((folders[2] / 'totals.pkl').read_bytes())
    for totals in (backwards.totals, three):
        assert totals.images == 7
        for name in ('confusion', 'edges', 'replicates', 'calibration'):
            assert np.array_equal(getattr(totals, name), getattr(one.totals, name)), name
        assert totals.calibration[0].sum() == totals.confusion.sum()  # void pixels do not count
        for name in ('worst', 'best'):
            seen, expected = ([(e.name, e.pictures) for e in getattr(t, name)] for t in (totals, one.totals))
            assert seen == expected and len(seen) == 4
    rows = (folders[0] / 'per_image.csv').read_text()
    assert (folders[2] / 'per_image.csv').read_text() == rows
    assert sorted((folders[1] / 'per_image.csv').read_text().splitlines()) == sorted(rows.splitlines())
    assert {path.name for path in folders[2].iterdir()} == {'per_image.csv', 'totals.pkl'}  # the parts are removed


def _one_of_three(rank: int, folder: Path, pairs: list[Pair], meta: dict) -> None:
    store = f'file://{folder}.store'
    torch.distributed.init_process_group('gloo', init_method=store, rank=rank, world_size=3)
    mine = DefaultSampler(pairs, shuffle=False, round_up=False)  # 7 images: 3, 2 and 2
    metric = SegmentationMetric(str(folder), str(Path(pairs[0].image).parent))
    metric.dataset_meta = meta
    for batch in samples(pairs[i] for i in mine):
        metric.process({}, batch)
    metric.evaluate(len(pairs))
    if rank == 0:
        (folder / 'totals.pkl').write_bytes(pickle.dumps(metric.totals))
    torch.distributed.destroy_process_group()


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    pairs = made_up(tmp_path, 120)
    metric = SegmentationMetric(str(tmp_path), str(tmp_path))
    metric.dataset_meta = META
    sizes = []
    for batch in samples(pairs):
        metric.process({}, batch)
        sizes.append(len(pickle.dumps(metric.results)))
    assert sizes[-1] < 1.02 * sizes[7]  # the pictures of the worst and best images are already stored


def test_each_row_has_the_scores_of_one_image(toy, tmp_path):
    meta = CityscapesDataset.METAINFO
    measure(tmp_path, toy, meta)
    with (tmp_path / 'per_image.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['image'] for row in rows] == [Path(pair.image).name for pair in toy]
    for row, pair in zip(rows, toy, strict=True):
        (tmp_path / 'alone').mkdir(exist_ok=True)
        alone, metric = measure(tmp_path / 'alone', [pair], meta)
        assert int(row['pixels']) == (pair.truth != 255).sum()
        for name in ('mIoU', 'aAcc', 'mBoundaryIoU'):
            assert float(row[name]) == pytest.approx(alone[name], abs=1e-4)
        per_class = [float(row[f'IoU {name}'] or 'nan') for name in meta['classes']]
        assert per_class == pytest.approx(iou(areas(metric.totals.confusion)), abs=1e-4, nan_ok=True)


def test_the_worst_and_best_images_are_kept_and_drawn(tmp_path):
    pairs = made_up(tmp_path, 30)
    _, metric = measure(tmp_path, pairs)
    with (tmp_path / 'per_image.csv').open() as file:
        ranked = sorted(csv.DictReader(file), key=lambda row: float(row['mIoU']))
    assert [example.name for example in metric.totals.worst] == [row['image'] for row in ranked[:4]]
    assert [example.name for example in metric.totals.best] == [row['image'] for row in ranked[:-5:-1]]
    for example in metric.totals.worst + metric.totals.best:
        assert len(example.pictures) == 4 and all(jpeg.startswith(b'\xff\xd8') for jpeg in example.pictures)


def test_another_ignore_index(tmp_path):
    pair = made_up(tmp_path, 1)[0]
    scores, metric = measure(tmp_path, [pair], ignore_index=2)
    assert metric.totals.confusion.sum() == (pair.truth != 2).sum()
    assert scores['aAcc'] == pytest.approx(100 * (pair.truth == pair.prediction)[pair.truth != 2].mean())


def test_an_empty_total_has_no_scores():
    totals = Totals.of(3)
    assert all(np.isnan(value) for value in mean_scores(areas(totals.confusion), totals.edges).values())


# Wrong input


def test_label_of_another_size_than_the_prediction(tmp_path):
    pair = made_up(tmp_path, 1)[0]
    with pytest.raises(UserError, match=r'000.png.label is 12 x 8, but .*000.png is 11 x 8; .*check-data'):
        measure(tmp_path, [pair._replace(prediction=pair.prediction[:, 1:])])


def test_foreign_ids(tmp_path):
    pair = made_up(tmp_path, 1)[0]
    pair.truth[0, 0] = 9
    with pytest.raises(UserError, match=r'000.png.label has id 9, but there are 4 classes \(0 to 3\) and 255'):
        measure(tmp_path, [pair])


def test_a_model_that_does_not_say_how_sure_it_is_has_no_calibration_error(tmp_path):
    pairs = made_up(tmp_path, 2)
    metric = SegmentationMetric(str(tmp_path), str(tmp_path))
    metric.dataset_meta = META
    for batch in samples(pairs):
        del batch[0]['confidence']
        metric.process({}, batch)
    assert 'ECE' not in metric.evaluate(2)
    assert 'ECE' in measure(tmp_path, pairs)[0]


def test_only_void(tmp_path):
    pair = made_up(tmp_path, 1)[0]
    pair.truth[:] = 255
    with pytest.raises(UserError, match=r'every pixel of the test set is void \(255\)'):
        measure(tmp_path, [pair])


def test_a_pipeline_without_labels(tmp_path):
    metric = SegmentationMetric(str(tmp_path), str(tmp_path))
    metric.dataset_meta = META
    with pytest.raises(UserError, match='loads no labels.*--format'):
        metric.process({}, [dict(img_path='a.png')])
