"""Every tool, run as a user runs it, and its answers to bad input."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from mmseg_volo_cli import main

CONFIG = ROOT / 'configs/volo_tiny_toy_streets.py'
QUICK = [
    'train_cfg.max_iters=4',
    'train_cfg.val_interval=4',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.checkpoint.max_keep_ckpts=2',
    'default_hooks.logger.interval=2',
    'train_dataloader.batch_size=2',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
]


def run(*command, cwd: Path, status: int = 0) -> str:
    """Output of a tool, which must exit with ``status`` and without a traceback."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    assert 'Traceback' not in output, output
    return output


def fails(tool: Path, *arguments, cwd: Path) -> str:
    """The sentence that a tool writes to stderr. It runs in this process to save start-up time."""
    printed, before = io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as end:
            main(tool.stem.replace('_', '-'), [str(argument) for argument in arguments])
    finally:
        os.chdir(before)
    assert end.value.code == 2
    lines = [line for line in printed.getvalue().splitlines() if line.startswith('error: ')]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A folder with toy streets and a checkpoint trained on them for 4 iterations."""
    folder = tmp_path_factory.mktemp('place')
    run(ROOT / 'tools/toy_streets.py', 'toy', '--train', 6, '--val', 3, '--size', '96x64', cwd=folder)
    output = run(ROOT / 'tools/train.py', CONFIG, '--work-dir', 'work', '--seed', 0, *options(), cwd=folder)
    (folder / 'train.txt').write_text(output)
    return folder


def options(*more: str, data: str = 'toy') -> list[str]:
    return ['--cfg-options', *QUICK, f'data_root={data}', *more]


@pytest.fixture(scope='module')
def checkpoint(place) -> Path:
    return place / 'work/iter_4.pth'


def scene(place: Path) -> Path:
    return sorted((place / 'toy/leftImg8bit/val').rglob('*.png'))[0]


def test_help_answers(capsys, monkeypatch):
    tools = sorted((ROOT / 'tools').glob('*.py'))
    assert len(tools) > 10
    for tool in tools:
        monkeypatch.setattr(sys, 'argv', [str(tool), '--help'])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(tool), run_name='__main__')
        assert end.value.code == 0 and f'usage: {tool.name}' in capsys.readouterr().out


def test_train_leaves_checkpoints_the_best_by_miou_and_a_log(place):
    names = {path.name for path in (place / 'work').iterdir()}
    assert {'iter_4.pth', 'best_mIoU_iter_4.pth', 'volo_tiny_toy_streets.py'} <= names
    assert 'mIoU' in next((place / 'work').rglob('*.log')).read_text()


def test_train_says_what_it_checked_and_shows_eta_and_memory(place):
    output = (place / 'train.txt').read_text()
    assert 'train: 6 images, 6 labels checked' in output
    line = next(line for line in output.splitlines() if 'Iter(train) [2/4]' in line)
    assert 'eta: 0:00:' in line and 'memory: ' in line
    assert 'best checkpoint: ' in output


@pytest.mark.parametrize('resume', [['--resume'], ['--resume', 'work/iter_2.pth']], ids=['newest', 'path'])
def test_train_resumes_from_the_newest_checkpoint_or_a_path(place, checkpoint, resume):
    folder = place / f'resumed{len(resume)}'
    folder.mkdir()
    if len(resume) == 1:
        shutil.copy(place / 'work/iter_2.pth', folder)
        (folder / 'last_checkpoint').write_text(str(folder / 'iter_2.pth'))
    output = run(ROOT / 'tools/train.py', CONFIG, '--work-dir', folder, *resume, *options(), cwd=place)
    assert re.search(r'resuming from .*iter_2\.pth', output)
    assert (folder / 'iter_4.pth').is_file()


def test_same_seed_gives_the_same_weights(place, checkpoint):
    run(ROOT / 'tools/train.py', CONFIG, '--work-dir', 'again', '--seed', 0, *options(), cwd=place)
    first, second = (torch.load(p, weights_only=False)['state_dict'] for p in (checkpoint, place / 'again/iter_4.pth'))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_auto_scale_lr_scales_with_the_batch_and_the_work_dir_is_the_configs_stem(place):
    scale = options('auto_scale_lr.base_batch_size=8', 'auto_scale_lr.enable=False')
    output = run(ROOT / 'tools/train.py', CONFIG, '--auto-scale-lr', '--verbose', *scale, cwd=place)
    assert 'Scaling the original LR by 0.25' in output
    assert (place / 'work_dirs/volo_tiny_toy_streets/iter_4.pth').is_file()
    assert 'requires auto_scale_lr=' in fails(ROOT / 'tools/train.py', CONFIG, '--auto-scale-lr', *options(), cwd=place)


def test_test_prints_and_saves_the_metrics(place, checkpoint):
    output = run(
        *(ROOT / 'tools/test.py', CONFIG, checkpoint, '--out-dir', 'measured', '--show-dir', 'shown_pairs', *options()),
        cwd=place,
    )
    report = json.loads((place / 'measured/metrics.json').read_text())
    for name in ('mIoU', 'mAcc', 'aAcc'):
        assert f'{name}: {report["metrics"][name]:.4f}' in output
    assert 'traffic sign' in output and report['images'] == 3 and report['tta'] is False
    pictures = sorted((place / 'shown_pairs').iterdir())
    assert len(pictures) == 3
    assert Image.open(pictures[0]).width > 3 * 96  # image, ground truth, prediction and legend


def test_tta_averages_more_views(place, checkpoint):
    run(ROOT / 'tools/test.py', CONFIG, checkpoint, '--tta', '--out-dir', 'tta', *options(), cwd=place)
    report = json.loads((place / 'tta/metrics.json').read_text())
    assert report['tta'] is True and 0 < report['metrics']['aAcc'] <= 100


def test_infer_writes_an_overlay_and_an_indexed_label_map_per_image(place, checkpoint):
    folder = scene(place).parent
    output = run(ROOT / 'tools/infer.py', CONFIG, checkpoint, folder, '--out-dir', 'seen', cwd=place)
    assert '3 of 3 images segmented on cpu' in output
    for source in folder.iterdir():
        label = Image.open(place / 'seen/pred' / source.name)
        assert label.mode == 'P' and label.size == (96, 64)
        assert np.asarray(label).max() < 19
        assert label.getpalette()[:3] == [128, 64, 128]  # Cityscapes' road
        assert Image.open(place / 'seen/vis' / source.name).width > 96


def test_infer_takes_patterns_and_keeps_equal_names_apart(place, checkpoint):
    for folder in ('left', 'right'):
        (place / 'twins' / folder).mkdir(parents=True)
        Image.open(scene(place)).save(place / f'twins/{folder}/a.png')
    output = run(ROOT / 'tools/infer.py', CONFIG, checkpoint, 'twins/*/*.png', '--out-dir', 'twins_out', cwd=place)
    assert '2 of 2 images' in output
    assert (place / 'twins_out/pred/left/a.png').is_file() and (place / 'twins_out/pred/right/a.png').is_file()


def test_infer_skips_what_it_cannot_decode_in_a_folder_and_says_so(place, checkpoint):
    folder = place / 'mixed'
    folder.mkdir()
    Image.open(scene(place)).save(folder / 'good.png')
    (folder / 'bad.png').write_bytes(b'not a picture')
    output = run(ROOT / 'tools/infer.py', CONFIG, checkpoint, folder, '--out-dir', 'mixed_out', cwd=place, status=1)
    assert 'warning: ' in output and 'bad.png cannot be decoded' in output and '1 skipped' in output
    assert [path.name for path in (place / 'mixed_out/pred').iterdir()] == ['good.png']


# Bad input gives one sentence with the value and the remedy, status 2, no traceback, and no incomplete files.


def test_missing_config(tmp_path):
    for tool in (['train.py'], ['test.py', 'x.pth'], ['infer.py', 'x.pth', ROOT / 'README.md']):
        sentence = fails(ROOT / 'tools' / tool[0], 'nowhere.py', *tool[1:], cwd=tmp_path)
        assert 'config not found: nowhere.py' in sentence
    assert list(tmp_path.iterdir()) == []


def test_config_that_does_not_load(tmp_path):
    (tmp_path / 'broken.py').write_text('model = dict(')
    assert 'config broken.py does not load: ' in fails(ROOT / 'tools/train.py', 'broken.py', cwd=tmp_path)


def test_option_without_value(tmp_path):
    assert "takes KEY=VALUE, got 'seed'" in fails(
        ROOT / 'tools/train.py', CONFIG, '--cfg-options', 'seed', cwd=tmp_path
    )


def test_unknown_arch(place):
    sentence = fails(ROOT / 'tools/train.py', CONFIG, *options('model.backbone.arch=d9'), '--work-dir', 'w', cwd=place)
    assert "got 'd9'" in sentence and "'d5'" in sentence


def test_missing_data_root(place, checkpoint):
    for tool in (['train.py', CONFIG], ['test.py', CONFIG, checkpoint]):
        sentence = fails(ROOT / 'tools' / tool[0], *tool[1:], *options(data='elsewhere'), cwd=place)
        assert 'elsewhere/leftImg8bit' in sentence and 'docs/data.md' in sentence


def spoiled(place: Path, name: str) -> Path:
    """A copy of the toy streets; returns the path of its first training label, which a test may damage."""
    copy = place / name
    subprocess.run(['cp', '-r', place / 'toy', copy], check=True)
    return sorted((copy / 'gtFine/train').rglob('*labelTrainIds.png'))[0]


def test_label_ids_outside_the_classes_before_the_first_iteration(place):
    label = spoiled(place, 'ids')
    pixels = np.array(Image.open(label))
    pixels[0, 0] = 33
    Image.fromarray(pixels).save(label)
    sentence = fails(ROOT / 'tools/train.py', CONFIG, '--work-dir', 'w', *options(data='ids'), cwd=place)
    assert label.name in sentence and 'id 33' in sentence and '19 classes' in sentence


def test_missing_label(place):
    label = spoiled(place, 'unlabelled')
    label.unlink()
    sentence = fails(ROOT / 'tools/train.py', CONFIG, '--work-dir', 'w', *options(data='unlabelled'), cwd=place)
    assert label.name in sentence and 'has no label' in sentence


def test_colour_coded_label(place):
    label = spoiled(place, 'colours')
    Image.open(label).convert('RGB').save(label)
    sentence = fails(ROOT / 'tools/train.py', CONFIG, '--work-dir', 'w', *options(data='colours'), cwd=place)
    assert label.name in sentence and 'not colours' in sentence


def test_classes_that_do_not_fit_the_head(place):
    sentence = fails(
        ROOT / 'tools/train.py', CONFIG, '--work-dir', 'w', *options('model.decode_head.num_classes=5'), cwd=place
    )
    assert '19 classes' in sentence and 'num_classes is 5' in sentence


def test_batch_of_one_with_batch_norm_in_the_pyramid_pooling(place):
    sentence = fails(
        ROOT / 'tools/train.py', CONFIG, '--work-dir', 'w', *options('train_dataloader.batch_size=1'), cwd=place
    )
    assert 'batch_size=1 cannot train UPerHead' in sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is there')
def test_cuda_without_a_gpu(place, checkpoint):
    sentence = fails(ROOT / 'tools/infer.py', CONFIG, checkpoint, scene(place), '--device', 'cuda', cwd=place)
    assert '--device cuda cannot be used' in sentence and '--device auto' in sentence
    assert '--amp requires a GPU' in fails(ROOT / 'tools/train.py', CONFIG, '--amp', *options(), cwd=place)


def test_checkpoint_missing_truncated_foreign_or_unsafe(place, checkpoint, tmp_path):
    truncated = tmp_path / 'truncated.pth'
    truncated.write_bytes(checkpoint.read_bytes()[:10000])
    foreign = tmp_path / 'foreign.pth'
    torch.save(dict(state_dict={'backbone.conv1.weight': torch.zeros(1)}), foreign)
    unsafe = tmp_path / 'unsafe.pth'
    torch.save(dict(state_dict=Hostile(tmp_path / 'ran')), unsafe)
    test, infer = ('test.py', *options()), ('infer.py', scene(place), '--out-dir', 'nothing')
    cases = [
        (infer, tmp_path / 'nowhere.pth', 'checkpoint not found'),
        (test, truncated, 'is damaged'),
        (infer, foreign, 'does not fit the model of this config'),
        (test, unsafe, 'is refused'),
        (infer, unsafe, 'is refused'),
    ]
    for (tool, *more), path, message in cases:
        assert message in fails(ROOT / 'tools' / tool, CONFIG, path, *more, cwd=place)
    for resume in (['--resume', unsafe], [f'load_from={unsafe}']):
        command = [*options(), *resume] if len(resume) == 1 else [*resume, *options()]
        assert 'is refused' in fails(ROOT / 'tools/train.py', CONFIG, '--work-dir', 'w', *command, cwd=place)
    assert not (tmp_path / 'ran').exists() and not (place / 'nothing').exists()


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def test_checkpoint_with_another_head(place, checkpoint):
    sentence = fails(
        *(ROOT / 'tools/infer.py', CONFIG, checkpoint, scene(place)),
        *('--cfg-options', 'model.decode_head.num_classes=5'),
        cwd=place,
    )
    assert 'decode_head.conv_seg.weight is [19, 48, 1, 1] instead of [5, 48, 1, 1]' in sentence


def test_nothing_to_infer(place, checkpoint, tmp_path):
    assert 'has no images' in fails(ROOT / 'tools/infer.py', CONFIG, checkpoint, tmp_path, cwd=place)
    assert 'matches no.jpg' in fails(ROOT / 'tools/infer.py', CONFIG, checkpoint, 'no.jpg', cwd=place)
    bad = tmp_path / 'bad.jpg'
    bad.write_bytes(b'')
    assert 'bad.jpg cannot be decoded' in fails(ROOT / 'tools/infer.py', CONFIG, checkpoint, bad, cwd=place)


def test_output_folder_not_writable(place, checkpoint, tmp_path):
    blocked = tmp_path / 'file'
    blocked.write_text('')  # a file in place of a folder, which fails for root, too
    out = blocked / 'out'
    assert f'cannot write to {out}' in fails(
        ROOT / 'tools/infer.py', CONFIG, checkpoint, scene(place), '--out-dir', out, cwd=place
    )
    for tool in (['train.py', CONFIG, '--work-dir', out], ['test.py', CONFIG, checkpoint, '--out-dir', out]):
        assert f'cannot write to {out}' in fails(ROOT / 'tools' / tool[0], *tool[1:], *options(), cwd=place)


# mmseg's own tools


def mim(tool: str) -> Path:
    import mmseg

    return Path(mmseg.__file__).parent / '.mim/tools' / f'{tool}.py'


def own_root(*more: str) -> list[str]:
    roots = [f'{split}_dataloader.dataset.data_root=toy' for split in ('train', 'val', 'test')]
    return ['--cfg-options', *QUICK, *roots, *more]


def test_mmsegs_own_train_and_test_take_our_leaves(place):
    run(mim('train'), CONFIG, '--work-dir', 'own', *own_root(), cwd=place)
    output = run(mim('test'), CONFIG, 'own/iter_4.pth', '--work-dir', 'own_test', *own_root(), cwd=place)
    assert 'mIoU: ' in output


CLASSIC = """
custom_imports = dict(imports=['mmseg_volo'])
_base_ = ['{schedule}']
norm_cfg = dict(type='BN')
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 96), pad_val=0, seg_pad_val=255,
                           mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(type='VOLO', arch='tiny'),
    decode_head=dict(type='SegformerHead', in_channels=[64, 128, 128, 128], in_index=[0, 1, 2, 3], channels=32,
                     num_classes=19, norm_cfg=norm_cfg,
                     loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False)),
    test_cfg=dict(mode='whole'))
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
dataset = dict(type='CityscapesDataset', data_root='toy', pipeline=pipeline,
               data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'))
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dataset, sampler=dict(type='InfiniteSampler'))
val_dataloader = dict(batch_size=1, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg, test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4))
"""


def test_a_classic_text_config_needs_two_lines(place):
    runtime = mim('train').parents[1] / 'configs/_base_/default_runtime.py'
    (place / 'classic.py').write_text(CLASSIC.format(schedule=runtime))
    output = run(mim('train'), 'classic.py', '--work-dir', 'classic', cwd=place)
    assert 'mIoU: ' in output


def test_mmseg_inferencer_and_inference_model_agree_with_infer(place, checkpoint):
    script = f"""
import numpy as np, sys
from PIL import Image
from mmseg.apis import MMSegInferencer, inference_model, init_model
image = {str(scene(place))!r}
model = init_model({str(CONFIG)!r}, {str(checkpoint)!r}, device='cpu')
first = inference_model(model, image).pred_sem_seg.data[0].numpy()
second = MMSegInferencer({str(CONFIG)!r}, {str(checkpoint)!r}, device='cpu')(image)['predictions']
third = np.asarray(Image.open(sys.argv[1]))
assert np.array_equal(first, second) and np.array_equal(first, third)
print('all agree')
"""
    run(ROOT / 'tools/infer.py', CONFIG, checkpoint, scene(place), '--out-dir', 'agree', cwd=place)
    assert 'all agree' in run('-c', script, f'agree/pred/{scene(place).name}', cwd=place)
