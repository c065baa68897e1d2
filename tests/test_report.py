import base64
import csv
import hashlib
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.apis import inference_model, init_model
from mmseg.registry import MODELS
from PIL import Image
from test_extras import hide

from mmseg_volo import CamVidDataset, apis
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo.evaluation.report import read_run, summary, write_results
from mmseg_volo.evaluation.scores import Totals, areas, mean_scores

CONFIG = ROOT / 'configs/volo_tiny_toy_streets.py'
WORKERS = {'test_dataloader.num_workers': 0, 'test_dataloader.persistent_workers': False}


def random_checkpoint(path: Path, **options) -> Path:
    """A checkpoint of the tiny config with random weights that predicts several classes."""
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(options)
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 64, 96), mode='tensor')  # otherwise the model predicts a single class
    torch.save(model.state_dict(), path)
    return path


def streets_and_model(folder: Path) -> Path:
    """Put three toy streets to test, and a model, into a folder."""
    make_toy_streets(folder / 'toy', train=1, val=3, size=(96, 64))
    random_checkpoint(folder / 'model.pth')
    return folder


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    return streets_and_model(tmp_path_factory.mktemp('report'))


def run(place: Path, name: str, checkpoint: str = 'model.pth', data: str = 'toy', options: dict | None = None, **more):
    """Run ``apis.test`` with ``place / name`` as its output folder."""
    return apis.test(
        str(CONFIG),
        str(place / checkpoint),
        work_dir=str(place / 'work'),
        out_dir=str(place / name),
        cfg_options={'data_root': str(place / data), **WORKERS, **(options or {})},
        **more,
    )


@pytest.mark.parametrize('package', ['jinja2', 'matplotlib'])
def test_scores_are_written_without_the_packages_of_the_report(package, tmp_path, monkeypatch):
    hide(monkeypatch, package)
    (tmp_path / 'report.html').write_text('of an earlier test')
    (tmp_path / 'per_image.csv').write_text('image\n')
    totals = Totals.of(2)
    totals.add('x.png', np.array([[3, 1], [0, 2]]), np.ones((3, 2), np.int64))
    record = dict(**summary(totals, ['a', 'b']), images_sha256='0')
    page = write_results(tmp_path, record, totals, [(0, 0, 0), (9, 9, 9)], None)
    assert page == tmp_path / 'metrics.json' and json.loads(page.read_text())['images'] == 1
    assert {path.name for path in tmp_path.iterdir()} == {'metrics.json', 'bootstrap.npz', 'per_image.csv'}


@pytest.fixture(scope='module')
def measured(place) -> Path:
    """Results of a test."""
    run(place, 'measured')
    return place / 'measured'


@pytest.fixture(scope='module')
def record(measured) -> dict:
    return json.loads((measured / 'metrics.json').read_text())


def test_a_test_writes_scores_pictures_and_a_page(measured):
    names = {path.name for path in measured.iterdir()}
    pictures = {'confusion.png', 'per_class.png', 'reliability.png'}
    assert names == {'metrics.json', 'bootstrap.npz', 'per_image.csv', 'report.html', *pictures}
    for name in pictures:
        assert Image.open(measured / name).width > 300


def test_metrics_json_records_model_data_and_versions(place, record):
    assert set(record['metrics']) == {'mIoU', 'mAcc', 'aAcc', 'fwIoU', 'mBoundaryIoU', 'ECE'}
    for name in ('mIoU', 'aAcc'):
        low, high = record['intervals'][name]
        assert 0 <= low <= high <= 100
    classes = {row['name']: row for row in record['classes']}
    assert len(classes) == 19 and len(record['categories']) == 7
    absent = [row for row in classes.values() if row['IoU'] is None]
    assert absent and all(row['IoU_interval'] == [None, None] and row['pixels'] == 0 for row in absent)
    assert classes['road']['pixels'] > 0 and classes['road']['Acc'] == classes['road']['Recall']
    assert record['images'] == 3 and record['tta'] is False and record['device'] == 'cpu'
    assert record['config'] == str(CONFIG) and isinstance(record['seed'], int)
    assert record['checkpoint_sha256'] == hashlib.sha256((place / 'model.pth').read_bytes()).hexdigest()
    assert {'torch', 'mmengine', 'mmseg', 'mmseg_volo'} <= set(record['versions'])


def test_a_changed_option_changes_the_configs_hash(place, record):
    run(place, 'other_options', options={'model.test_cfg.mode': 'whole', 'randomness.seed': 5})
    other = json.loads((place / 'other_options/metrics.json').read_text())
    assert other['config_sha256'] != record['config_sha256'] and other['seed'] == 5
    assert other['metrics'] == record['metrics'] and other['images_sha256'] == record['images_sha256']


def test_the_page_needs_no_other_files(measured, record):
    html = (measured / 'report.html').read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    pictures = [base64.b64decode(re.fullmatch(r'data:image/(?:png|jpeg);base64,(.*)', source)[1]) for source in sources]
    assert (
        len(pictures) == 2 + 2 * 3 * 4
    )  # confusion matrix, reliability; three worst and three best images with four pictures each
    assert all(Image.open(io.BytesIO(picture)).width <= 640 for picture in pictures[2:])
    assert 'http' not in html and '@import' not in html
    assert f'ECE ({record["metrics"]["ECE"]:.2f})' in html
    for name in ('mIoU', 'aAcc'):
        assert f'{record["metrics"][name]:.2f}' in html
        assert '{:.2f} to {:.2f}'.format(*record['intervals'][name]) in html
    assert all(row['name'] in html for row in record['classes'])


def test_calibration_is_that_of_mmsegs_probabilities(place, record):
    cfg = Config.fromfile(CONFIG)
    cfg.model.type = 'EncoderDecoder'
    model = init_model(cfg, device='cpu')
    model.load_state_dict(torch.load(place / 'model.pth'))
    confidence, correct = [], []
    for path in sorted((place / 'toy/leftImg8bit/val').rglob('*.png')):
        prob, label = inference_model(model, str(path)).seg_logits.data.double().softmax(0).max(0)
        truth = str(path).replace('leftImg8bit', 'gtFine').removesuffix('.png') + '_labelTrainIds.png'
        truth = np.array(Image.open(truth))
        confidence.append(prob.numpy()[truth != 255])
        correct.append((label.numpy() == truth)[truth != 255])
    confidence, correct = np.concatenate(confidence), np.concatenate(correct)
    bins = np.digitize(confidence, np.arange(1, 15) / 15, right=True)
    expected = [np.sum(bins == i) for i in range(15)]
    assert np.abs(np.subtract([row['pixels'] for row in record['reliability']], expected)).max() <= 3  # rounding
    error = sum(abs(confidence[bins == i].sum() - correct[bins == i].sum()) for i in range(15)) / len(bins)
    assert record['metrics']['ECE'] == pytest.approx(100 * error, abs=0.02) and 100 * error > 1


def test_a_model_without_probabilities_has_no_calibration(place):
    run(place, 'plain', options={'model.type': 'EncoderDecoder'})
    plain = json.loads((place / 'plain/metrics.json').read_text())
    assert 'ECE' not in plain['metrics'] and 'reliability' not in plain
    assert (
        not (place / 'plain/reliability.png').exists()
        and 'Calibration' not in (place / 'plain/report.html').read_text()
    )


def test_several_processes_give_the_same_scores(place, measured, record):
    # Forked, with gloo: mmengine's launchers do not support CPUs.
    torch.multiprocessing.start_processes(_one_of_two, (place,), nprocs=2, start_method='fork')
    two = json.loads((place / 'two/metrics.json').read_text())
    for key in ('images', 'metrics', 'intervals', 'classes', 'reliability', 'images_sha256'):  # 3 images: 2 and 1
        assert two[key] == record[key], key
    assert {path.name for path in (place / 'two').iterdir()} == {path.name for path in measured.iterdir()}
    assert (place / 'two/per_image.csv').read_text() == (measured / 'per_image.csv').read_text()


def _one_of_two(rank: int, place: Path) -> None:
    torch.distributed.init_process_group('gloo', init_method=f'file://{place}/store', rank=rank, world_size=2)
    run(place, 'two')
    torch.distributed.destroy_process_group()


# Comparison


def test_a_run_does_not_differ_from_itself(place, measured, record, capfd):
    run(place, 'again', compare=str(measured / 'metrics.json'))
    printed = capfd.readouterr()
    assert f'ECE {record["metrics"]["ECE"]:.2f}' in printed.out + printed.err
    table = [line for line in (printed.out + printed.err).splitlines() if line.startswith('| mIoU ')]
    assert len(table) == 1 and '0.00 to 0.00 | not significant' in table[0]
    html = (place / 'again/report.html').read_text()
    assert 'Compared with volo_tiny_toy_streets' in html and str(measured / 'metrics.json') in html


def write_made_up(folder: Path, errors: float, images: str = 'same', classes=CamVidDataset.METAINFO['classes']) -> dict:
    """Write results for 40 images: cars (8) are correct, and sky (0) is sometimes predicted as building (1)."""
    rng = np.random.default_rng(0)
    totals = Totals.of(len(classes))
    for i in range(40):
        confusion = np.zeros((len(classes), len(classes)), np.int64)
        confusion[8, 8] = 100
        confusion[0, 1] = 1000 * errors * rng.uniform(0.1, 1)
        confusion[0, 0] = 1000 - confusion[0, 1]
        totals.add(str(i), confusion, areas(confusion))
    record = dict(
        **summary(totals, classes), images_sha256=images, config='made_up.py', date='today', versions=dict(torch='2')
    )
    record |= dict.fromkeys(('config_sha256', 'checkpoint', 'checkpoint_sha256', 'tta', 'seed', 'device'))
    folder.mkdir()
    (folder / 'per_image.csv').write_text('image,mIoU,aAcc,mBoundaryIoU\na<b>.png,1,2,\n')
    return dict(folder=folder, record=record, totals=totals, palette=CamVidDataset.METAINFO['palette'])


def test_small_differences_in_the_same_direction_are_significant(tmp_path):
    write_results(**write_made_up(tmp_path / 'there', 0.30), other=None)
    here = write_made_up(tmp_path / 'here', 0.28)
    other = read_run(str(tmp_path / 'there/metrics.json'), CamVidDataset.METAINFO['classes'], 'same')
    low, high = here['record']['intervals']['aAcc']
    assert low < other.record['metrics']['aAcc'] < high  # the two intervals overlap
    write_results(**here, other=other)
    html = (tmp_path / 'here/report.html').read_text()
    rows = {
        row[0]: row[1:]
        for row in re.findall(r'<tr><td>(.*?)<td>(.*?)<td>(.*?)\s*<td>(.*?)<td>.*\s*<td class="(.*?)">', html)
    }
    assert rows['sky'][3] == rows['mIoU'][3] == 'better' and rows['car'] == (
        '100.00',
        '100.00',
        '0.00',
        'not significant',
    )
    gain = here['record']['classes'][0]['IoU'] - other.record['classes'][0]['IoU']
    assert rows['sky'][2] == f'{gain:.2f}'
    assert rows['fence'] == ('–', '–', '–', '')  # absent from both results
    assert 'a&lt;b&gt;.png' in html


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda folder: (folder / 'metrics.json').unlink(), 'FileNotFoundError'),
        (lambda folder: (folder / 'bootstrap.npz').unlink(), 'FileNotFoundError'),
        (lambda folder: (folder / 'bootstrap.npz').write_bytes(b'half'), 'needs a metrics.json'),
        (lambda folder: (folder / 'metrics.json').write_text('{"metrics": {}}'), "KeyError: 'classes'"),
        (lambda folder: (folder / 'metrics.json').write_text('[]'), 'needs a metrics.json'),
        (lambda folder: (folder / 'metrics.json').write_text('mIoU 43'), 'JSONDecodeError'),
    ],
    ids=['no file', 'no replicates', 'broken replicates', 'older file', 'list', 'no JSON'],
)
def test_comparing_with_damaged_results(spoil, message, tmp_path):
    write_results(**write_made_up(tmp_path / 'there', 0.3), other=None)
    spoil(tmp_path / 'there')
    with pytest.raises(UserError, match=f'--compare .*metrics.json .*{message}.*test that checkpoint again'):
        read_run(str(tmp_path / 'there/metrics.json'), CamVidDataset.METAINFO['classes'], 'same')


def test_comparing_with_other_classes_or_images(tmp_path):
    write_results(**write_made_up(tmp_path / 'there', 0.3), other=None)
    path = str(tmp_path / 'there/metrics.json')
    with pytest.raises(UserError, match='has 11 classes, this run 2: only one has bicyclist, '):
        read_run(path, ['sky', 'building'], 'same')
    with pytest.raises(UserError, match='their order differs'):
        read_run(path, CamVidDataset.METAINFO['classes'][::-1], 'same')
    with pytest.raises(UserError, match='tested on other images'):
        read_run(path, CamVidDataset.METAINFO['classes'], 'others')


def test_pictures_work_for_many_classes_and_without_scores(tmp_path):
    many = [f'class {i}' for i in range(150)]
    made_up = write_made_up(tmp_path / 'many', 0.3, classes=many)
    write_results(**{**made_up, 'palette': [[i, i, i] for i in range(150)]}, other=None)
    assert Image.open(tmp_path / 'many/confusion.png').width < 4000
    assert np.isnan(mean_scores(areas(np.zeros((3, 3))), np.zeros((3, 3)))['mIoU'])


# Formats of servers


def predictions(options: dict, checkpoint: Path, folder: Path) -> dict[str, np.ndarray]:
    """Label maps of mmseg's inference, by file name."""
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(options)
    model = init_model(cfg, device='cpu')
    model.load_state_dict(torch.load(checkpoint))
    paths = sorted((folder / 'leftImg8bit/val').rglob('*.png'))
    return {path.name: inference_model(model, str(path)).pred_sem_seg.data[0].numpy() for path in paths}


@pytest.fixture(scope='module')
def unlabelled(place) -> Path:
    """A test set without labels."""
    shutil.copytree(place / 'toy/leftImg8bit', place / 'unlabelled/leftImg8bit')
    return place / 'unlabelled'


def test_cityscapes_server_gets_label_ids_and_needs_no_labels(place, unlabelled):
    labels = pytest.importorskip('cityscapesscripts.helpers.labels', reason='no cityscapesscripts')
    assert run(place, 'server', data='unlabelled', server_format='cityscapes') == {}
    expected = predictions({}, place / 'model.pth', unlabelled)
    written = {path.name: np.array(Image.open(path)) for path in (place / 'server/cityscapes').iterdir()}
    assert written.keys() == expected.keys() and {path.name for path in (place / 'server').iterdir()} == {'cityscapes'}
    for name, ids in written.items():
        back = np.vectorize(lambda i: labels.id2label[i].trainId)(ids)
        assert np.array_equal(back, expected[name])


ADE20K = {'model.decode_head.num_classes': 150}


def test_ade20k_server_gets_classes_from_1(place, unlabelled):
    random_checkpoint(place / 'ade20k.pth', **ADE20K)
    data = dict(type='ADE20KDataset', img_suffix='_leftImg8bit.png', reduce_zero_label=False)
    options = {**ADE20K, **{f'test_dataloader.dataset.{key}': value for key, value in data.items()}}
    run(place, 'server_ade20k', 'ade20k.pth', 'unlabelled', options, server_format='ade20k')
    expected = predictions(ADE20K, place / 'ade20k.pth', unlabelled)
    written = {path.name: np.array(Image.open(path)) for path in (place / 'server_ade20k/ade20k').iterdir()}
    assert written.keys() == expected.keys()
    for name, ids in written.items():
        assert np.array_equal(ids, expected[name] + 1) and ids.max() <= 150


def test_label_maps_for_a_server_work_with_tta(place, unlabelled):
    pytest.importorskip('cityscapesscripts', reason='no cityscapesscripts')
    run(place, 'server_tta', data='unlabelled', server_format='cityscapes', tta=True)
    assert len(list((place / 'server_tta/cityscapes').iterdir())) == 3


def test_format_refuses_other_options_and_data_sets(place, unlabelled, monkeypatch):
    with pytest.raises(UserError, match='neither measures nor reads labels.*--compare'):
        run(place, 'no', server_format='cityscapes', compare='metrics.json')
    with pytest.raises(UserError, match='requires the 150 classes .* has 19 other classes'):
        run(place, 'no', data='unlabelled', server_format='ade20k')
    assert list((place / 'no').iterdir()) == []
    (place / 'full/cityscapes').mkdir(parents=True)
    with pytest.raises(UserError, match='full/cityscapes already exists; delete it'):
        run(place, 'full', data='unlabelled', server_format='cityscapes')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mmseg-volo\[cityscapes\]'"):
        run(place, 'no', data='unlabelled', server_format='cityscapes')


# In a browser


def test_a_click_on_a_heading_sorts_the_images(browser, measured, tmp_path):
    page = browser.new_page()
    complaints = []
    page.on('console', lambda message: complaints.append(message.text))
    page.on('pageerror', lambda error: complaints.append(str(error)))
    page.goto((measured / 'report.html').as_uri())
    with (measured / 'per_image.csv').open() as file:
        scores = {row['image']: float(row['mIoU']) for row in csv.DictReader(file)}
    assert len(set(scores.values())) == 3
    names, heading = '#images tbody td:first-child', '#images th:nth-child(2) button'
    assert page.locator(names).all_inner_texts() == list(scores)
    upwards = sorted(scores, key=scores.get)
    for expected in (upwards, upwards[::-1]):
        page.locator(heading).click()
        assert page.locator(names).all_inner_texts() == expected
    page.locator('#classes th:nth-child(2) button').click()
    shown = page.locator('#classes tbody td:nth-child(2)').all_inner_texts()
    numbers = [float(text) for text in shown if text != '–']
    assert numbers == sorted(numbers) and shown[len(numbers) :] == ['–'] * (19 - len(numbers))  # missing values last
    page.screenshot(path=tmp_path / 'report.png', full_page=True)
    assert Image.open(tmp_path / 'report.png').height > 1000
    assert complaints == []


@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_page_fits_a_phone_and_follows_the_colour_scheme(browser, measured, width, scheme):
    page = browser.new_page(viewport=dict(width=width, height=844), color_scheme=scheme)
    page.goto((measured / 'report.html').as_uri())
    assert page.evaluate('document.documentElement.scrollWidth') == width  # only tables scroll horizontally
    red = int(re.search(r'\d+', page.evaluate('getComputedStyle(document.body).backgroundColor'))[0])
    assert (red < 64) == (scheme == 'dark')
