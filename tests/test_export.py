"""Exported files: written, compared on the spot, and used in the place of checkpoints."""

import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from PIL import Image
from raster_files import landscape, write_raster
from test_backbones import CLIENTS
from test_extras import hide
from test_infer import small_disk
from test_new_dataset import QUICK
from torch import Tensor, nn

from mmseg_volo._files import whole_with_companions
from mmseg_volo.apis import exporting
from mmseg_volo.apis.classification import classify
from mmseg_volo.apis.exporting import export
from mmseg_volo.apis.inference import infer
from mmseg_volo.apis.push import push
from mmseg_volo.apis.testing import test as measure
from mmseg_volo.benchmark import runtimes
from mmseg_volo.config import load_config
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo.export import onnx_file, program, program_file
from mmseg_volo.export.check import difference, random_images
from mmseg_volo.export.description import KEY
from mmseg_volo.export.program import record
from mmseg_volo.export.runtime import Runtime
from mmseg_volo.models.named_classifiers import FAMILIES
from mmseg_volo_cli import main

onnx = pytest.importorskip('onnx', reason="pip install 'mmseg-volo[export]'")
pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')

ARCH = dict(layers=(1, 1, 1, 1), embed_dims=(32, 48), num_heads=(1, 3), mlp_ratio=2, stem_channels=8)
NECK = dict(in_channels=[32, 48, 48, 48], out_channels=16)
HEAD = dict(in_channels=[16] * 4, channels=16)
SCENE = (96, 64)  # width and height
SLIDE = {'model.test_cfg': dict(mode='slide', crop_size=(48, 64), stride=(32, 48), weighting='hann')}
TOLERANCE = 1e-4


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """``path``, made by the first worker of xdist that needs it."""
    with FileLock(f'{path}.lock'):
        if not path.exists():
            make(path)
    return path


@pytest.fixture(scope='session')
def place(tmp_path_factory) -> Path:
    """Toy streets, and a config and a checkpoint of a thin model for each head."""
    init_default_scope('mmseg')
    base = tmp_path_factory.getbasetemp()
    return once((base.parent if base.name.startswith('popen-') else base) / 'export', make_place)


def make_place(folder: Path) -> None:
    make_toy_streets(folder / 'toy', train=3, val=2, size=SCENE)
    cfg = load_config('volo_tiny_toy_streets', dict(data_root=str(folder / 'toy')))
    cfg.model.backbone.update(arch=ARCH, img_size=(64, 64))
    cfg.model.neck.update(NECK)
    cfg.model.decode_head.update(HEAD)
    cfg.test_dataloader.dataset.pipeline[1].scale = SCENE
    for name in ('upernet', 'segformer'):
        if name == 'segformer':
            cfg.model.decode_head.pop('pool_scales')
            cfg.model.decode_head.type = 'mmseg_volo.SegformerHead'
        cfg.dump(folder / f'{name}.py')
        torch.manual_seed(0)
        torch.save(saved(build(folder / f'{name}.py')), folder / f'{name}.pth')


def build(config: Path) -> Any:
    """A segmentor that predicts several classes."""
    init_default_scope('mmseg')
    model = MODELS.build(load_config(str(config), {}).model).eval()
    nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    return model


def saved(model: nn.Module) -> dict:
    return dict(state_dict=model.state_dict(), meta=dict(dataset_meta=DATASETS.get('CityscapesDataset').METAINFO))


def exported(path: Path) -> None:
    export(str(path.with_suffix('.py')), str(path.with_suffix('.pth')), str(path))


@pytest.fixture(scope='session')
def upernet(place) -> str:
    return str(once(place / 'upernet.onnx', exported))


def scenes(place: Path) -> list[str]:
    return sorted(str(path) for path in (place / 'toy/leftImg8bit/val').rglob('*.png'))


def labels(config: Path | str, checkpoint: Path | str, images: list[str], out: Path, **kwargs) -> list[np.ndarray]:
    infer(str(config), str(checkpoint), images, str(out), save=['labels'], **kwargs)
    return [np.asarray(Image.open(out / 'pred' / f'{Path(image).stem}.png')) for image in images]


def changed(source: str, target: Path, text: str | None) -> str:
    """A copy of an ONNX file with another description."""
    model = onnx.load(source)
    del model.metadata_props[:]
    if text is not None:
        model.metadata_props.add(key=KEY, value=text)
    onnx.save(model, target)
    return str(target)


# The file


def test_logits_equal_the_checkpoints_at_sizes_and_batches_that_were_not_recorded(place, upernet):
    model = build(place / 'upernet.py')
    model.load_state_dict(torch.load(place / 'upernet.pth')['state_dict'])
    network, runtime = program.Network(model), Runtime(upernet)
    sizes = [(2, 3, 100, 90), (3, 3, 33, 47), (1, 3, 64, 64), (1, 3, 160, 32)]  # odd ones, and img_size
    for images in random_images(sizes):
        found = difference(network, runtime, images, TOLERANCE)
        assert not found.exceeds(TOLERANCE) and found.scale > 1, found


def test_the_file_says_what_a_picture_needs(place, upernet):
    model = onnx.load(upernet)
    onnx.checker.check_model(model, full_check=True)
    (entry,), (result,) = model.graph.input, model.graph.output
    axes = [
        [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim] for value in (entry, result)
    ]
    assert axes == [['batch', 3, 'height', 'width'], ['batch', 19, 'height', 'width']]
    assert (entry.name, result.name, model.opset_import[0].version) == ('images', 'logits', 18)
    about = json.loads({entry.key: entry.value for entry in model.metadata_props}[KEY])
    assert about['classes'][:2] == ['road', 'sidewalk'] and about['palette'][0] == [128, 64, 128]
    assert (about['task'], about['model'], about['channels']) == ('segmentation', 'upernet', 'RGB')
    assert about['mean'] == pytest.approx([123.675, 116.28, 103.53]) and about['std'][2] == pytest.approx(57.375)
    assert about['resize'] == [dict(type='Resize', scale=list(SCENE), keep_ratio=True)]
    assert (about['windows'], about['size_divisor'], about['align_corners']) == (None, 1, False)
    assert (about['threshold'], about['precision'], about['version']) == (None, 'float32', 1)


def test_the_file_keeps_no_line_or_folder_of_the_source(upernet):
    contents = Path(upernet).read_bytes()
    assert not any(word.encode() in contents for word in ('.py', str(ROOT), str(Path.home()), 'stack_trace'))


def test_windows_and_a_binary_threshold_are_described(place):
    options = SLIDE | {'model.decode_head.out_channels': 1, 'model.decode_head.threshold': 0.4}
    options |= {'model.decode_head.num_classes': 2, 'model.decode_head.loss_decode.use_sigmoid': True}
    cfg = load_config(str(place / 'upernet.py'), options)
    meta = dict(classes=('a', 'b'), palette=[[0, 0, 0], [255, 0, 0]])
    about = exporting.describe_segmentor(cfg, MODELS.build(cfg.model), meta, 'x')
    assert about['threshold'] == 0.4
    assert about['windows'] == dict(crop_size=[48, 64], stride=[32, 48], weighting='hann')


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'model.onnx'
    path.write_text('old')
    with pytest.raises(OSError), whole_with_companions(path) as file:
        file.write_text('half')
        raise OSError
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    with whole_with_companions(path) as file:
        file.write_text('new')
        file.with_name('model.onnx.data').write_text('weights')
    assert sorted(file.name for file in tmp_path.iterdir()) == ['model.onnx', 'model.onnx.data']
    assert path.read_text() == 'new'


def test_nothing_appears_on_a_full_disk(place, upernet, tmp_path):
    with small_disk(2**16), pytest.raises(OSError):
        export(str(place / 'upernet.py'), upernet, str(tmp_path / 'h.onnx'), precision='float16')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('foreign', [None, 'OtherHead'])
def test_a_file_with_other_logits_is_refused(foreign, place, upernet, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, '_recorded', lambda model: None)
    monkeypatch.setattr(onnx_file, 'write', lambda program, path, opset, text: shutil.copy(upernet, path))
    torch.save(saved(build(place / 'upernet.py')), tmp_path / 'other.pth')
    whole = exporting._segmentor
    monkeypatch.setattr(exporting, '_segmentor', lambda *args: replace(whole(*args), foreign=foreign))
    with pytest.raises(
        UserError if foreign else RuntimeError, match='was not written, because ONNX Runtime gives other'
    ):
        export(str(place / 'upernet.py'), str(tmp_path / 'other.pth'), str(tmp_path / 'new.onnx'))
    assert [file.name for file in tmp_path.iterdir()] == ['other.pth']


# Traps of torch.export


class OneMap(nn.Module):
    """A backbone, and the sum of its maps at the resolution of the last."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone, self.convs = backbone, nn.ModuleList(nn.Conv2d(c, 4, 1) for c in backbone.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = [conv(y) for conv, y in zip(self.convs, self.backbone(x), strict=True)]
        return sum(y.mean((2, 3), keepdim=True) for y in maps[:-1]) + maps[-1]


@pytest.mark.parametrize('name', CLIENTS)
def test_a_backbone_recorded_at_img_size_serves_every_size(name, monkeypatch):
    torch.manual_seed(0)
    network = OneMap(CLIENTS[name]()).eval()
    monkeypatch.setattr(program, 'EXAMPLE', (64, 64))
    run = record(network, None).module(check_guards=False)
    for images in random_images([(1, 3, 64, 64), (3, 3, 100, 90), (2, 3, 160, 224)]):
        found = difference(network, run, images, TOLERANCE)
        assert not found.exceeds(TOLERANCE), found


def test_adaptive_pooling_of_other_heads_serves_every_size():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((2, 3))).eval()
    run = record(network, None).module(check_guards=False)
    for images in random_images([(1, 3, 21, 17), (2, 3, 64, 40)]):
        assert torch.allclose(run(images), network(images), atol=1e-6)


def test_a_layer_that_cannot_be_recorded_is_named(place, tmp_path, monkeypatch):
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images + int(images.sum())

    model = exporting._Model(Fixed(), {}, foreign='OtherHead')
    with pytest.raises(UserError, match='torch.export cannot record OtherHead: '):
        exporting._recorded(model)
    model.foreign = None
    with pytest.raises(Exception, match='data-dependent'):
        exporting._recorded(model)


# In the place of a checkpoint


@pytest.mark.parametrize('options', [{}, SLIDE], ids=['whole', 'slide'])
def test_labels_of_infer_equal_those_of_the_checkpoint(options, place, upernet, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (131, 101, 3), np.uint8)).save(tmp_path / 'odd.png')
    images = [*scenes(place), str(tmp_path / 'odd.png')]
    exact, found = (
        labels(place / 'upernet.py', source, images, tmp_path / 'out', cfg_options=options)
        for source in (place / 'upernet.pth', upernet)
    )
    assert len(np.unique(exact[0])) > 1 and all(map(np.array_equal, found, exact))


def test_labels_of_a_raster_are_known_to_be_those_of_an_exported_file(place, upernet, tmp_path, capsys):
    pytest.importorskip('rasterio')
    raster = write_raster(tmp_path / 'a.tif', landscape(80, 100))
    for checkpoint, resumed, finished in ((upernet, False, False), (upernet, True, True), ('upernet.pth', True, False)):
        source, out = str(place / checkpoint), tmp_path / 'out'
        infer(str(place / 'upernet.py'), source, [str(raster)], str(out), resume=resumed, cfg_options=SLIDE)
        assert ('finished before' in capsys.readouterr().out) == finished
    assert (out / 'pred/a.tif').is_file()


def test_labels_with_tta_equal_those_of_the_checkpoint(place, upernet, tmp_path):
    exact = labels(place / 'upernet.py', place / 'upernet.pth', scenes(place)[:1], tmp_path / 'a', tta=True)
    found = labels(place / 'upernet.py', upernet, scenes(place)[:1], tmp_path / 'b', tta=True)
    assert np.array_equal(found, exact)


def test_openvino_gives_the_same_labels_and_with_amp_nearly_all(place, upernet, tmp_path):
    pytest.importorskip('openvino')
    config, images = place / 'upernet.py', scenes(place)
    exact = labels(config, place / 'upernet.pth', images, tmp_path / 'a')
    assert np.array_equal(labels(config, upernet, images, tmp_path / 'b', openvino=True), exact)
    rough = labels(config, upernet, images, tmp_path / 'c', openvino=True, amp=True)
    assert (np.array(rough) == np.array(exact)).mean() > 0.9


def test_signals_are_handled_after_two_files_ran_in_openvino(upernet):
    pytest.importorskip('openvino')
    program = f"""
import os, signal
from mmseg_volo.export.runtime import Runtime
signal.signal(signal.SIGUSR1, lambda *_: print('handled'))
first, second = (Runtime({upernet!r}, openvino=True) for _ in range(2))
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'handled\n'), done.stderr


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (dict(amp=True), '--amp does not go with .*upernet.onnx: an exported file has its precision'),
        (dict(compile=True), '--compile does not go with .*: an exported file has no Python code to compile'),
        (dict(device='cuda'), '--device cuda does not go with .*: exported files run on the CPU'),
        (dict(cfg_options={'model.type': 'EncoderDecoder'}), 'model.type SlidingSegmentor, .* has EncoderDecoder'),
        (dict(cfg_options={'model.data_preprocessor.bgr_to_rgb': False}), 'channels RGB, but the config has BGR'),
        (dict(cfg_options={'model.data_preprocessor.mean': [0, 0, 0]}), r'mean \[123.* but the config has \[0.0, 0'),
        (dict(cfg_options={'model.decode_head.num_classes': 5}), 'number of logits 19, but the config has 5'),
        (dict(cfg_options={'test_dataloader.dataset.type': 'ADE20KDataset'}), r"classes \['road', .* has \['wall', "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_does_not_go_with_a_file_is_one_sentence(options, sentence, place, upernet, tmp_path):
    with pytest.raises(UserError, match=sentence) as caught:
        labels(place / 'upernet.py', upernet, scenes(place)[:1], tmp_path, **options)
    assert '\n' not in str(caught.value)


def test_unusable_files_are_one_sentence(place, upernet, tmp_path):
    (tmp_path / 'text.onnx').write_text('no model')
    (tmp_path / 'text.pt2').write_text('no model')
    (tmp_path / 'half.onnx').write_bytes(Path(upernet).read_bytes()[: -(10**5)])
    about = json.loads(Runtime(upernet).text)
    wrong = {
        'none.onnx': 'exported model not found: ',
        'text.onnx': 'is not an ONNX model or is damaged',
        'half.onnx': 'is not an ONNX model or is damaged',
        'text.pt2': 'is not a program of torch.export or is damaged',
        changed(
            upernet, tmp_path / 'bare.onnx', None
        ): "does not say how to prepare .* its metadata has no 'mmseg_volo'",
        changed(upernet, tmp_path / 'odd.onnx', 'x'): "the metadata 'mmseg_volo' of .* is no description",
        changed(upernet, tmp_path / 'new.onnx', json.dumps(about | dict(version=2))): 'has a description of version 2',
        changed(upernet, tmp_path / 'c.onnx', json.dumps(about | dict(task='classification'))): 'is for classification',
    }
    for name, sentence in wrong.items():
        with pytest.raises(UserError, match=sentence) as caught:
            labels(place / 'upernet.py', tmp_path / name, scenes(place)[:1], tmp_path / 'out')
        assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match='--openvino runs .onnx files, not '):
        labels(place / 'upernet.py', place / 'upernet.pth', scenes(place)[:1], tmp_path / 'out', openvino=True)
    with pytest.raises(UserError, match='--launcher pytorch does not go with .*: an exported file runs in one process'):
        measure(str(place / 'upernet.py'), upernet, launcher='pytorch')


def test_a_size_that_a_file_does_not_take_is_one_sentence(place, upernet, tmp_path):
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = helper.make_tensor('weight', kind, [19, 3, 1, 1], [0.0] * 57)
    sides = [helper.make_tensor_value_info(name, kind, [1, c, 8, 8]) for name, c in (('images', 3), ('logits', 19))]
    node = helper.make_node('Conv', ['images', 'weight'], ['logits'])
    graph = helper.make_graph([node], 'fixed', sides[:1], sides[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10), tmp_path / 'a.onnx')
    file = changed(str(tmp_path / 'a.onnx'), tmp_path / 'fixed.onnx', Runtime(upernet).text)
    with pytest.raises(UserError, match='cannot run .*fixed.onnx on images of 1 x 3 x 64 x 96 ') as caught:
        labels(place / 'upernet.py', file, scenes(place)[:1], tmp_path / 'out')
    assert '\n' not in str(caught.value)


def test_an_exported_file_is_not_pushed(upernet, place, tmp_path):
    with pytest.raises(UserError, match='upernet.onnx is an exported file, from which nobody can train'):
        push(str(place / 'upernet.py'), upernet, str(tmp_path / 'new'))


# Classifiers


@pytest.fixture(scope='session')
def classifier(place) -> tuple[Path, str]:
    """A checkpoint and a program."""
    torch.manual_seed(0)
    model = FAMILIES['volo'].build('tiny', 224, 5)
    nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), place / 'classifier.pth')
    file = export('volo_tiny_224', str(place / 'classifier.pth'), str(place / 'classifier.pt2'))
    return place / 'classifier.pth', str(file)


def test_classes_of_a_file_equal_those_of_the_checkpoint(classifier, place):
    exact, found = (classify('volo_tiny_224', str(source), scenes(place), workers=0) for source in classifier)
    assert found['preprocessing']['crop_pct'] == exact['preprocessing']['crop_pct'] == 0.96
    for a, e in zip(found['pictures'], exact['pictures'], strict=True):
        assert [row['name'] for row in a['classes']] == [row['name'] for row in e['classes']]
        for found_row, exact_row in zip(a['classes'], e['classes'], strict=True):
            assert found_row['probability'] == pytest.approx(exact_row['probability'], abs=1e-5)


def test_a_classifier_of_another_name_is_refused(classifier, upernet, place):
    with pytest.raises(UserError, match='does not fit volo_d1_224, it is volo_tiny_224'):
        classify('volo_d1_224', classifier[1], scenes(place))
    with pytest.raises(UserError, match='is for segmentation, not for classification'):
        classify('volo_tiny_224', upernet, scenes(place))
    with pytest.raises(UserError, match='is for classification, not for segmentation'):
        labels(place / 'upernet.py', classifier[1], scenes(place), place / 'out')
    with pytest.raises(UserError, match='--int8 needs the training images of a config; volo_tiny_224 is a classifier'):
        export('volo_tiny_224', str(classifier[0]), str(place / 'x.onnx'), precision='int8')


# Smaller numbers


def test_float16_halves_the_file_and_changes_few_labels(place, upernet, tmp_path):
    file = export(str(place / 'upernet.py'), upernet, str(tmp_path / 'h.onnx'), precision='float16')
    assert file.stat().st_size < 0.65 * Path(upernet).stat().st_size
    assert json.loads(Runtime(str(file)).text)['precision'] == 'float16'
    exact, found = (np.array(labels(place / 'upernet.py', f, scenes(place), tmp_path / 'o')) for f in (upernet, file))
    assert 0.99 < (exact == found).mean()
    with pytest.raises(UserError, match='h.onnx has numbers in float16 already: give a float32 file or a checkpoint'):
        export(str(place / 'upernet.py'), str(file), str(tmp_path / 'q.onnx'), precision='int8')


def test_int8_is_calibrated_on_training_images(place, upernet, tmp_path, capsys):
    config, out = str(place / 'upernet.py'), str(tmp_path / 'q.onnx')
    assert main('export', [config, upernet, '--out', out, '--int8', '--calibration-images', '2']) == 0
    assert f'ONNX Runtime {onnxruntime.__version__} against ONNX Runtime' in capsys.readouterr().out
    assert Path(out).stat().st_size < 0.6 * Path(upernet).stat().st_size
    assert json.loads(Runtime(out).text)['precision'] == 'int8'
    model = onnx.load(out)
    inputs = {node.output[0]: node.op_type for node in model.graph.node}
    layers = [node for node in model.graph.node if node.op_type == 'Conv']
    quantised = [node for node in layers if {inputs.get(name) for name in node.input[:2]} == {'DequantizeLinear'}]
    assert len(quantised) > 5
    assert {node.domain for node in model.graph.node} == {''}
    exact, found = (np.array(labels(config, f, scenes(place), tmp_path / 'o')) for f in (upernet, out))
    assert 0.8 < (exact == found).mean() < 1


def test_training_images_are_windows_chosen_by_the_seed(place):
    def images(seed: int, options: dict) -> list[Tensor]:
        model = exporting._segmentor(str(place / 'upernet.py'), str(place / 'upernet.pth'), options)
        return list(exporting._training_images(model, seed))

    first, again, other = images(0, SLIDE), images(0, SLIDE), images(1, SLIDE)
    assert [tuple(image.shape) for image in first] == [(1, 3, 48, 64)] * 3
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))
    assert [tuple(image.shape) for image in images(0, {})] == [(1, 3, 64, 96)] * 3
    assert abs(first[0].mean()) < 2 and first[0].std() > 0.1  # normalised


# Programs of torch.export


@pytest.fixture(scope='session')
def pt2(place) -> str:
    return str(once(place / 'segformer.pt2', exported))


def test_a_program_gives_the_labels_of_its_checkpoint(place, pt2, tmp_path):
    config, images = place / 'segformer.py', scenes(place)
    exact = labels(config, place / 'segformer.pth', images, tmp_path / 'a', cfg_options=SLIDE)
    assert np.array_equal(labels(config, pt2, images, tmp_path / 'b', cfg_options=SLIDE), exact)
    with zipfile.ZipFile(pt2) as archive:
        (model,) = (name for name in archive.namelist() if name.endswith('models/model.json'))
        nodes = json.loads(archive.read(model))['graph_module']['graph']['nodes']
    assert not any('mmseg_volo' in node['target'] for node in nodes)


def rewritten(source: str, target: Path, member: str, change: Callable[[bytes], bytes]) -> str:
    """A copy of an archive in which ``change`` was applied to the contents of one member."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
        for name in old.namelist():
            contents = old.read(name)
            written = change(contents) if name.endswith(member) else contents
            assert not name.endswith(member) or written != contents
            new.writestr(name, written)
    return str(target)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_a_program_that_could_run_code_is_refused(pt2, tmp_path):
    def pickled(contents: bytes) -> bytes:
        buffer = io.BytesIO()
        torch.save(Harmful(), buffer)
        return buffer.getvalue()

    def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
        return lambda contents: contents.replace(old, new, 1)

    model, conv, expression = 'models/model.json', b'torch.ops.aten.conv2d.default', b'"expr_str": "'
    harmful = {
        'a pickle': ('weights/model_weights_config.json', replaced(b'"use_pickle": false', b'"use_pickle": true')),
        'the function torch.hub.load': (model, replaced(conv, b'torch.hub.load')),
        'the function torch.ops.aten.from_file': (model, replaced(conv, b'torch.ops.aten.from_file.default')),
        'the expression __import__': (model, replaced(expression, expression + b"__import__('os') + ")),
        'damaged': ('sample_inputs/model.pt', pickled),
    }
    for number, (sentence, (member, change)) in enumerate(harmful.items()):
        path = rewritten(pt2, tmp_path / f'{number}.pt2', member, change)
        with pytest.raises(UserError, match=sentence):
            program_file.load(path)
    with zipfile.ZipFile(shutil.copy(pt2, tmp_path / 'more.pt2'), 'a') as archive:
        archive.writestr('x/data/weights/model.pt', b'x')
    with pytest.raises(UserError, match='contains a file x/data/weights/model.pt'):
        program_file.load(str(tmp_path / 'more.pt2'))


# Arguments


def test_wrong_arguments_are_one_sentence(place, tmp_path, capsys):
    config, checkpoint = str(place / 'upernet.py'), str(place / 'upernet.pth')
    (tmp_path / 'file').write_text('')
    wrong = {
        '--out must be a .onnx or .pt2 file, got ': ['--out', 'model.pth'],
        'cannot write to ': ['--out', str(tmp_path / 'file' / 'model.onnx')],
        '--opset must be from 18, the lowest that torch writes, to ': [
            '--out',
            str(tmp_path / 'm.onnx'),
            '--opset',
            '17',
        ],
        '--opset must be from 18': ['--out', str(tmp_path / 'm.onnx'), '--opset', '99'],
        '--opset, --fp16 and --int8 are for .onnx files': ['--out', str(tmp_path / 'm.pt2'), '--opset', '18'],
        '--calibration-images must be at least 1, got 0': [
            '--out',
            str(tmp_path / 'm.onnx'),
            '--calibration-images',
            '0',
        ],
    }
    for sentence, arguments in wrong.items():
        with pytest.raises(SystemExit) as end:
            main('export', [config, checkpoint, *arguments])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f'error: {sentence}'), line
    with pytest.raises(UserError, match='does not fit the model of this config'):
        export(str(place / 'segformer.py'), checkpoint, str(tmp_path / 'm.onnx'))
    with pytest.raises(UserError, match='--cfg-options are for configs; volo_d1_224 is a classifier'):
        export('volo_d1_224', checkpoint, str(tmp_path / 'm.onnx'), cfg_options=dict(a=1))
    assert [path.name for path in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('package', ['onnx', 'onnxscript', 'onnxruntime'])
def test_missing_packages_name_the_extra(package, place, upernet, tmp_path, monkeypatch):
    hide(monkeypatch, package)
    needs = rf"needs {package}: pip install 'mmseg-volo\[export\]'"
    with pytest.raises(UserError, match=f'writing an ONNX file {needs}'):
        export(str(place / 'upernet.py'), str(place / 'upernet.pth'), str(tmp_path / 'm.onnx'))
    if package == 'onnxruntime':
        with pytest.raises(UserError, match=f'running .*upernet.onnx {needs}'):
            Runtime(upernet)


def test_missing_openvino_names_the_extra(upernet, monkeypatch):
    hide(monkeypatch, 'openvino')
    with pytest.raises(UserError, match=r"--openvino needs openvino: pip install 'mmseg-volo\[openvino\]'"):
        Runtime(upernet, openvino=True)


# Without this package


# Refuses every package that is not Python's own, but those named in the first argument; then runs a script.
ISOLATED = """
import runpy, sys
allowed = {*sys.stdlib_module_names, *sys.argv[1].split(',')}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in allowed:
            raise ModuleNotFoundError(f'No module named {name!r}')
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def run_example(packages: str, *words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, '-c', ISOLATED, packages, ROOT / 'examples/run_onnx.py', *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_example_needs_onnx_runtime_pillow_and_numpy_only(place, upernet, tmp_path):
    exact = labels(place / 'upernet.py', upernet, scenes(place)[:1], tmp_path)
    words = upernet, scenes(place)[0], tmp_path / 'l.png'
    done = run_example('numpy,onnxruntime,PIL', *words)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'l.png')), exact[0])
    assert "No module named 'PIL'" in run_example('numpy,onnxruntime', *words).stderr  # others are refused indeed


# The benchmark


def test_runtimes_are_timed_against_pytorch_after_parity(place, upernet, monkeypatch):
    model = build(place / 'upernet.py')
    model.load_state_dict(torch.load(place / 'upernet.pth')['state_dict'])
    monkeypatch.setattr(runtimes, 'build_segmentor', lambda *args: (None, model))
    monkeypatch.setattr(runtimes, 'record', lambda *args: None)
    monkeypatch.setattr(onnx_file, 'write', lambda program, path, opset, text: shutil.copy(upernet, path))
    bench = runtimes.RuntimeBench(quick=True, configs=['thin'], side=64)
    rows = bench.parity()
    assert rows[0]['what'].startswith('thin: ONNX Runtime') and all(row['met'] for row in rows)
    (row,) = bench.speed()
    assert {name.partition(' 1')[0] for name in row['seconds']} >= {'ours', 'ONNX Runtime'}
    assert sum('int8' in name for name in row) == len(rows) == (2 if find_spec('openvino') else 1)
    nn.init.normal_(model.decode_head.conv_seg.weight)
    assert not any(row['met'] for row in bench.compared('thin', runtimes.Network(model), [Runtime(upernet)]))


# From polygons to a quantised model


def test_annotated_pictures_become_a_model_that_is_exported_scored_and_quantised(tmp_path, monkeypatch):
    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, '-m', 'mmseg_volo_cli', *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    monkeypatch.chdir(tmp_path)
    run('toy-streets', 'photos', '--labelme', '--train', '30', '--val', '10', '--size', '64x48')
    run('new-dataset', 'photos', '--arch', 'tiny')
    with open('photos.py', 'a') as config:
        config.write(f'model.backbone.update(arch={ARCH})\nmodel.neck.update({NECK})\n')
        config.write(f'model.decode_head.update({HEAD})\nmodel.auxiliary_head.update(in_channels=16)\n')
    options = [f'{key}={value}' for key, value in QUICK.items() if not key.startswith('train_cfg')]
    options += ['train_cfg.max_iters=8', 'train_cfg.val_interval=8', 'default_hooks.checkpoint.interval=8']
    run('train', 'photos.py', '--seed', '0', '--cfg-options', *options)
    (checkpoint,) = Path('work_dirs/photos').glob('iter_8.pth')

    files = dict(checkpoint=str(checkpoint), float32='model.onnx', int8='model_int8.onnx')
    assert 'against PyTorch' in run('export', 'photos.py', files['checkpoint'], '--out', files['float32'])
    run('export', 'photos.py', files['float32'], '--out', files['int8'], '--int8', '--calibration-images', '8')
    scores = {}
    for name, file in files.items():
        compare = ['--compare', 'checkpoint/metrics.json'] if scores else []
        printed = run('test', 'photos.py', file, '--out-dir', name, *compare, '--cfg-options', *options)
        record = json.loads(Path(name, 'metrics.json').read_text())
        scores[name] = record['metrics']['mIoU']
        assert record['device'] == ('cpu' if name == 'checkpoint' else f'cpu, ONNX Runtime {onnxruntime.__version__}')
        assert not compare or re.search(r'\| mIoU ( +\| +-?[\d.]+){3} \| +-?[\d.]+ to -?[\d.]+ \|', printed)
    assert scores['checkpoint'] > 1
    assert scores['float32'] == pytest.approx(scores['checkpoint'], abs=0.05)
    assert scores['int8'] == pytest.approx(scores['checkpoint'], abs=3)
    assert Path(files['int8']).stat().st_size < 0.6 * Path(files['float32']).stat().st_size
