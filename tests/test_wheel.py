"""The wheel: built, installed without the clone, and used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SHORT = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'train_dataloader.batch_size=2']
SHORT += [f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')]
SHORT += [f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')]


def run(*command, cwd: Path, **environment: str) -> str:
    environment = {**os.environ, 'PYTHONWARNINGS': 'ignore', **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip('build')
    pytest.importorskip('setuptools')
    folder = tmp_path_factory.mktemp('dist')
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, ROOT, cwd=folder)
    (path,) = folder.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def place(wheel, tmp_path_factory) -> Path:
    """An empty folder with the wheel installed into ``site``; other packages come from this environment."""
    folder = tmp_path_factory.mktemp('empty')
    run(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', folder / 'site', wheel, cwd=folder)
    return folder


def volo(place: Path, *arguments) -> str:
    return run(place / 'site/bin/mmseg-volo', *arguments, cwd=place, PYTHONPATH=str(place / 'site'))


def test_the_wheel_holds_every_config_and_data_file(place):
    installed = {path.relative_to(place / 'site/mmseg_volo') for path in (place / 'site/mmseg_volo').rglob('*')}
    configs = {Path('configs') / path.relative_to(ROOT / 'configs') for path in (ROOT / 'configs').rglob('*.py')}
    data = {Path('py.typed'), Path('evaluation/report.html.j2'), Path('ops/outlook/cpu.cpp')}
    assert len(configs) > 30 and configs | data <= installed
    assert {path.name for path in (place / 'site').iterdir()} >= {'mmseg_volo', 'mmseg_volo_cli'}
    assert not (place / 'site/tests').exists() and not (place / 'site/configs').exists()


def test_it_trains_and_segments_without_the_clone(place):
    volo(place, 'toy-streets', 'toy', '--train', 4, '--val', 2, '--size', '96x64')
    options = ['--cfg-options', *SHORT, 'data_root=toy']
    volo(place, 'train', 'volo_tiny_toy_streets', *options)
    best = place / 'work_dirs/volo_tiny_toy_streets/best_mIoU_iter_2.pth'
    image = next((place / 'toy/leftImg8bit/val').rglob('*.png'))
    volo(place, 'infer', 'volo_tiny_toy_streets', best, image)
    assert (place / 'out/pred' / image.name).is_file()


def test_a_config_of_ones_own_inherits_from_an_installed_one(place):
    (place / 'mine.py').write_text(
        'from mmengine.config import read_base\n\n'
        'with read_base():\n    from mmseg_volo.configs.volo_d4_cityscapes import *\n\n'
        'train_dataloader.update(batch_size=1)\n'
    )
    code = (
        'import mmseg_volo; from mmseg_volo.config import load_config; c = load_config("mine.py", {}); '
        'print(mmseg_volo.__file__, c.model.backbone.arch, c.train_dataloader.batch_size)'
    )
    printed = run(sys.executable, '-c', code, cwd=place, PYTHONPATH=str(place / 'site'))
    assert printed.split() == [str(place / 'site/mmseg_volo/__init__.py'), 'd4', '1']
