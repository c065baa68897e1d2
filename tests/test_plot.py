"""Monitoring of training: event files, validation pictures and curves."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.axes import Axes
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator
from test_tools import CONFIG, options, run

from mmseg_volo import CamVidDataset, ValidationPicturesHook
from mmseg_volo.apis.plotting import plot
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo_cli import main


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """Work dir of 4 iterations on toy streets, with validation after iterations 2 and 4."""
    folder = tmp_path_factory.mktemp('trained')
    make_toy_streets(folder / 'toy', train=4, val=9, size=(96, 64))
    often = options('train_cfg.val_interval=2', 'default_hooks.logger.interval=1')
    run(ROOT / 'tools/train.py', CONFIG, '--work-dir', 'work', '--seed', 0, *often, cwd=folder)
    return folder / 'work'


def test_scalars_and_a_few_validation_pictures_are_in_the_event_file(trained):
    events = EventAccumulator(str(next(trained.glob('*/vis_data'))), size_guidance={SCALARS: 0, IMAGES: 0})
    events.Reload()
    for name, steps in dict(loss=[1, 2, 3, 4], lr=[1, 2, 3, 4], mIoU=[2, 4]).items():
        assert [event.step for event in events.Scalars(name)] == steps
    assert len(events.Tags()['images']) == 3  # of 9, at most 4, evenly spread
    for name in events.Tags()['images']:
        assert [event.step for event in events.Images(name)] == [2, 4]
        assert events.Images(name)[0].width > 3 * 96 and events.Images(name)[0].height == 64
    assert len(list(trained.glob('*/vis_data/vis_image/val_toytown_*.png'))) == 6


def test_a_test_draws_nothing():
    assert ValidationPicturesHook().get_triggered_stages() == ['after_val_iter']


@pytest.mark.parametrize(('batches', 'drawn'), [(500, [0, 125, 250, 375]), (5, [0, 2, 4]), (2, [0, 1])])
def test_the_same_few_images_are_drawn_whatever_the_size_of_the_data(tmp_path, batches, drawn):
    hook, shown = ValidationPicturesHook(), []
    Image.new('RGB', (1200, 1000), 'white').save(tmp_path / 'a.png')
    sample = SegDataSample(metainfo=dict(img_path=str(tmp_path / 'a.png')))
    label = torch.full((1, 1000, 1200), 10)
    sample.set_data(dict(gt_sem_seg=PixelData(data=label), pred_sem_seg=PixelData(data=label - 10)))

    class Loader(list):
        dataset = SimpleNamespace(metainfo=CamVidDataset.METAINFO)

    runner = SimpleNamespace(val_dataloader=Loader(range(batches)), iter=7)
    for batch in range(batches):
        name = f'add_image of batch {batch}'
        runner.visualizer = SimpleNamespace(add_image=lambda *call, name=name: shown.append((name, *call)))
        hook.after_val_iter(runner, batch, {}, [sample])
    assert [call[0] for call in shown] == [f'add_image of batch {batch}' for batch in drawn]
    _, name, page, step = shown[0]
    assert (name, step) == ('val_a', 7)
    image, truth, prediction = (page[256, 614 * n + 300].tolist() for n in range(3))
    assert page.shape[0] == 512 and image == [255, 255, 255]
    for colour, i in ((truth, 10), (prediction, 0)):
        mixed = 0.45 * 255 + 0.55 * np.array(CamVidDataset.METAINFO['palette'][i])
        np.testing.assert_allclose(colour, mixed, atol=1)


# tools/plot.py


def log(work_dir: Path, start: str, steps: range, value: float, resume: bool | None = None, val: bool = False) -> Path:
    """Write a run's log files as mmengine does, with ``value`` for each scalar."""
    folder = work_dir / start / 'vis_data'
    folder.mkdir(parents=True)
    records = [dict(lr=value, loss=value, time=0.1, iter=step, step=step) for step in steps]
    records += [dict(mIoU=value, aAcc=99.0, step=step) for step in steps if val]
    (folder / 'scalars.json').write_text(''.join(json.dumps(record) + '\n' for record in records))
    if resume is not None:
        (folder / 'config.py').write_text(f'param_scheduler = []\nresume = {resume}\n')
    return work_dir


@pytest.fixture
def drawn(monkeypatch) -> list[tuple]:
    """Curves passed to matplotlib: name, iterations, values."""
    curves = []
    original = Axes.plot

    def spy(self, steps, values, *args, **kwargs):
        curves.append((kwargs['label'], list(steps), list(values)))
        return original(self, steps, values, *args, **kwargs)

    monkeypatch.setattr(Axes, 'plot', spy)
    return curves


def test_the_curves_of_a_real_run_become_one_picture(trained, tmp_path, capsys):
    assert main('plot', [str(trained), '--out', str(tmp_path / 'sub/curves.png')]) == 0
    with Image.open(tmp_path / 'sub/curves.png') as picture:
        assert picture.format == 'PNG' and min(picture.size) > 1000
        assert len(set(picture.convert('L').reduce(8).tobytes())) > 10
    assert [path.name for path in (tmp_path / 'sub').iterdir()] == ['curves.png']
    assert f'loss, lr, mIoU for {trained}' in capsys.readouterr().out


def test_runs_are_named_by_work_dir_and_may_lack_a_curve(tmp_path, drawn):
    dirs = [str(log(tmp_path / 'd1', '1', range(3), 1.0, val=True)), str(log(tmp_path / 'd2', '1', range(2), 2.0))]
    plot([*dirs, dirs[0]], str(tmp_path / 'plot.png'))
    assert drawn[:2] == [('d1', [0, 1, 2], [1.0] * 3), ('d2', [0, 1], [2.0] * 2)]
    assert drawn[4:] == [('d1', [0, 1, 2], [1.0] * 3), ('d2', [], [])]  # mIoU follows loss and lr


def test_equal_names_become_paths(tmp_path, drawn):
    dirs = [str(log(tmp_path / parent / 'volo', '1', range(2), 1.0)) for parent in ('left', 'right')]
    plot(dirs, str(tmp_path / 'plot.png'))
    assert [name for name, _, _ in drawn[:2]] == dirs


def test_a_resumed_run_continues_from_its_checkpoint(tmp_path, drawn):
    log(tmp_path, '20260101_000000', range(10, 60, 10), 1.0, val=True)
    log(tmp_path, '20260102_000000', range(40, 90, 10), 2.0, resume=True, val=True)
    log(tmp_path, '20260103_000000', range(0), 3.0, resume=True)
    plot([str(tmp_path)], str(tmp_path / 'plot.png'))
    for _, steps, values in drawn:
        assert steps == list(range(10, 90, 10)) and values == [1.0] * 3 + [2.0] * 5


def test_a_new_run_in_an_old_work_dir_is_plotted_alone(tmp_path, drawn):
    log(tmp_path, '20260101_000000', range(10, 60, 10), 1.0, val=True)
    log(tmp_path, '20260102_000000', range(50, 150, 50), 2.0, resume=False)
    plot([str(tmp_path)], str(tmp_path / 'plot.png'))
    assert [(steps, values) for _, steps, values in drawn] == [([50, 100], [2.0, 2.0])] * 2  # mIoU is missing


def test_a_running_or_diverged_run_is_plotted(tmp_path, drawn):
    scalars = log(tmp_path, '1', range(3), math.nan) / '1/vis_data/scalars.json'
    scalars.write_text(scalars.read_text() + '{"lr": 0.1, "lo')
    plot([str(tmp_path)], str(tmp_path / 'plot.png'))
    assert drawn[0][1] == [0, 1, 2] and all(map(math.isnan, drawn[0][2]))


def test_folders_and_names_that_cannot_be_plotted(tmp_path):
    (tmp_path / 'empty').mkdir()
    work_dir = log(tmp_path / 'work', '1', range(3), 1.0)
    broken = log(tmp_path / 'broken', '1', range(3), 1.0) / '1/vis_data/scalars.json'
    broken.write_text('{"loss": \n' + broken.read_text())
    out = str(tmp_path / 'plot.png')
    for arguments, message in (
        (([str(tmp_path / 'nowhere')], out), r'no folder .*nowhere'),
        (([str(work_dir), str(tmp_path / 'empty')], out), r'empty has no logged values'),
        (([str(tmp_path / 'broken')], out), r'scalars\.json is damaged \('),
        (([str(work_dir)], str(tmp_path / 'plot.pdf')), r'--out must be a \.png file, got .*plot\.pdf'),
        (([str(work_dir)], str(broken / 'plot.png')), 'cannot write to'),
    ):
        with pytest.raises(UserError, match=message):
            plot(*arguments)
    assert not Path(out).exists()
