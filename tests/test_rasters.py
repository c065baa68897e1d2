"""Large and many-banded rasters: windows, georeference, missing values, and runs that go on after a kill."""

import os
import re
import signal
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from PIL import Image
from raster_files import landscape, write_checkpoint, write_config, write_raster
from test_extras import hide
from test_infer import small_disk

from mmseg_volo import LoadRasterAnnotations, LoadRasterFromFile, RasterDataPreProcessor, rasters
from mmseg_volo.apis import infer, train
from mmseg_volo.apis import raster as raster_api
from mmseg_volo.apis import test as measure
from mmseg_volo.apis.raster import Grid
from mmseg_volo.config import load_config
from mmseg_volo.errors import UserError
from mmseg_volo.models.segmentor import SlidingSegmentor
from mmseg_volo.rasters import is_raster
from mmseg_volo_cli import main

rasterio = pytest.importorskip('rasterio', reason="rasterio is not installed: pip install 'mmseg-volo[geo]'")
get_gdal_config = rasterio._env.get_gdal_config

SIZE = HEIGHT, WIDTH = 90, 130


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('rasters')


@pytest.fixture(scope='module')
def config(place) -> str:
    return write_config(place / 'pictures.py')


@pytest.fixture(scope='module')
def checkpoint(place, config) -> str:
    return write_checkpoint(place / 'pictures.pth', config)


def labels_of(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def in_memory(config: str, checkpoint: str, image: np.ndarray, options: dict | None = None) -> np.ndarray:
    """Labels that the segmentor gives an image ``[C, H, W]`` in one piece."""
    init_default_scope('mmseg')
    model = MODELS.build(load_config(config, options or {}).model).eval()
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    return model.segment(torch.from_numpy(np.ascontiguousarray(image)), image.shape[1:]).numpy()


@pytest.fixture
def narrow_strips(monkeypatch):
    """Blocks and strips so small that a raster of some hundred pixels has several."""
    monkeypatch.setattr(raster_api, 'SUMS', 1)
    monkeypatch.setattr(raster_api, 'STRIDES', 1)
    monkeypatch.setattr(raster_api, 'BLOCK', 32)


# Windows


@pytest.mark.parametrize('weighting', ['uniform', 'hann'])
@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_labels_equal_those_of_the_picture_in_memory(config, checkpoint, tmp_path, weighting, kind, narrow_strips):
    options = {'model.test_cfg.weighting': weighting}
    values = landscape(*SIZE).clip(max=254)
    path = write_raster(tmp_path / 'a.tif', values if kind == np.uint8 else values.astype(np.uint16) * 257 + 100)
    assert infer(config, checkpoint, [str(path)], str(tmp_path), 'cpu', ['labels'], cfg_options=options) == []
    found, exact = labels_of(tmp_path / 'pred/a.tif'), in_memory(config, checkpoint, values[::-1], options)
    assert len(np.unique(exact)) == 3 and np.array_equal(found, exact)
    Image.fromarray(values.transpose(1, 2, 0)).save(tmp_path / 'b.png')
    infer(config, checkpoint, [str(tmp_path / 'b.png')], str(tmp_path), 'cpu', ['labels'], cfg_options=options)
    assert np.array_equal(found, np.asarray(Image.open(tmp_path / 'pred/b.png')))


@pytest.mark.parametrize('size', [(32, 48), (20, 300), (300, 40), (33, 49)])
def test_any_size_gives_the_labels_of_the_picture_in_memory(config, checkpoint, tmp_path, size, narrow_strips):
    values = landscape(*size)
    infer(config, checkpoint, [str(write_raster(tmp_path / 'a.tif', values))], str(tmp_path), 'cpu')
    assert np.array_equal(labels_of(tmp_path / 'pred/a.tif'), in_memory(config, checkpoint, values[::-1]))
    assert Image.open(tmp_path / 'vis/a.png').size[1] >= size[0]


def test_strips_cover_everything_and_their_width_is_bounded():
    for width in (100, 3000, 30_000, 300_000):
        grid = Grid.of((1000, width), (512, 512), (341, 341), classes=19)
        assert max(right - left for left, right in grid.strips) <= 8 * 341 + 512
        assert [left for left, _ in grid.strips][1:] == [right for _, right in grid.strips][:-1]
        assert (grid.strips[0][0], grid.strips[-1][1]) == (0, width)
        assert sum(height * wide for _, _, height, wide in grid.blocks()) == 1000 * width


def test_a_raster_is_never_read_as_a_whole(config, checkpoint, tmp_path, narrow_strips, monkeypatch):
    sizes, read = [], raster_api.Raster.read
    monkeypatch.setattr(raster_api.Raster, 'read', lambda *args: sizes.append(args[3] * args[4]) or read(*args))
    path = write_raster(tmp_path / 'a.tif', landscape(300, 200))
    infer(config, checkpoint, [str(path)], str(tmp_path), 'cpu')
    assert max(sizes) <= 32 * (32 + 2 * 48) and sum(sizes) < 4 * 300 * 200


def test_gdal_keeps_32_mib_of_decoded_blocks(tmp_path):
    with rasters.Raster(str(write_raster(tmp_path / 'a.tif', landscape(*SIZE)))) as raster, closing(raster.source):
        raster.source = SimpleNamespace(
            read=lambda *args, **kwargs: get_gdal_config('GDAL_CACHEMAX'), close=lambda: None
        )
        assert raster.read_stored(0, 0, 9, 9) == 2**25


@pytest.mark.parametrize('profile', [dict(blockysize=7), dict(tiled=True, blockxsize=64, blockysize=32)])
@pytest.mark.parametrize(('width', 'height'), [(41, 30), (500, 333), (1, 1)])
def test_reduced_rasters_have_the_nearest_pixels_and_decode_blocks_once(tmp_path, monkeypatch, profile, width, height):
    monkeypatch.setattr(rasters, 'PART', 64)
    sizes, values = [], landscape(300, 200)
    path = write_raster(tmp_path / 'a.tif', values, compress='deflate', **profile)
    with rasters.Raster(str(path)) as raster:
        read = raster.read_stored
        raster.read_stored = lambda *args: sizes.append(args[2] * args[3]) or read(*args)
        found = raster.reduced(width, height, [2, 1])
    rows, columns = ((np.arange(few) + 0.5) * many // few for few, many in ((height, 300), (width, 200)))
    assert np.array_equal(found, values[[1, 0]][:, rows.astype(int)[:, None], columns.astype(int)])
    assert sum(sizes) <= 300 * 200


def test_batches_of_windows_give_nearly_the_same_labels(config, checkpoint, tmp_path):
    path = write_raster(tmp_path / 'a.tif', landscape(*SIZE))
    for batch in (1, 3):
        options = {'model.test_cfg.batch_size': batch}
        infer(config, checkpoint, [str(path)], str(tmp_path / str(batch)), 'cpu', cfg_options=options)
    one, three = (labels_of(tmp_path / str(batch) / 'pred/a.tif') for batch in (1, 3))
    assert np.mean(one != three) < 1e-3


def test_whole_mode_and_resize_do_not_apply_to_rasters(place, config, checkpoint, tmp_path, capsys):
    path, values = tmp_path / 'a.tif', landscape(*SIZE)
    write_raster(path, values)
    more = "pipeline.insert(1, dict(type='Resize', scale=(64, 64)))\nmodel['test_cfg'] = dict(mode='whole')\n"
    whole = write_config(tmp_path / 'whole.py', crop=(30, 48), more=more)
    infer(whole, checkpoint, [str(path)], str(tmp_path), 'cpu')
    said = capsys.readouterr().out
    assert 'windows of 48 x 30 pixels every 32 x 20' in said and 'Resize in the test pipeline is left out' in said
    windows = {'model.test_cfg.crop_size': (30, 48), 'model.test_cfg.stride': (20, 32)}
    assert np.array_equal(labels_of(tmp_path / 'pred/a.tif'), in_memory(config, checkpoint, values[::-1], windows))


# Georeference


def test_georeference_tags_and_colours_are_kept(config, checkpoint, tmp_path):
    path = write_raster(tmp_path / 'a.tif', landscape(*SIZE), compress='jpeg', photometric='ycbcr')
    with rasterio.open(path, 'r+') as file:
        file.update_tags(TIFFTAG_DATETIME='2026:11:26 12:00:00', SENSOR='drone')
    infer(config, checkpoint, [str(path)], str(tmp_path), 'cpu')
    with rasterio.open(path) as source, rasterio.open(tmp_path / 'pred/a.tif') as labels:
        assert (labels.crs, labels.transform, labels.shape) == (source.crs, source.transform, SIZE)
        assert labels.tags() == source.tags() and labels.tags()['SENSOR'] == 'drone'
        profile = labels.profile
        assert (profile['dtype'], profile['compress'], profile['tiled']) == ('uint8', 'deflate', True)
        assert labels.nodata is None and labels.colormap(1)[1] == (0, 120, 0, 255)


def test_control_points_and_odd_coordinate_systems_are_kept(config, checkpoint, tmp_path):
    corners = [rasterio.control.GroundControlPoint(y, x, x / 10, y / 10) for y in (0, 90) for x in (0, 130)]
    path = write_raster(tmp_path / 'points.tif', landscape(*SIZE), crs=None, transform=None)
    with rasterio.open(path, 'r+') as file:
        file.gcps = corners, rasterio.crs.CRS.from_epsg(4326)
    pole = '+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39.25 +lon_0=18 +R=6367470 +no_defs'
    write_raster(tmp_path / 'pole.tif', landscape(*SIZE), crs=rasterio.crs.CRS.from_string(pole))
    infer(config, checkpoint, [str(tmp_path / name) for name in ('points.tif', 'pole.tif')], str(tmp_path), 'cpu')
    with rasterio.open(tmp_path / 'pred/points.tif') as labels:
        points, crs = labels.gcps
        assert crs.to_epsg() == 4326 and [(p.row, p.x) for p in points] == [(p.row, p.x) for p in corners]
    with rasterio.open(tmp_path / 'pole.tif') as source, rasterio.open(tmp_path / 'pred/pole.tif') as labels:
        assert labels.crs == source.crs is not None
    assert {path.name for path in (tmp_path / 'pred').iterdir()} == {'points.tif', 'pole.tif', 'pole.tif.aux.xml'}
    infer(config, checkpoint, [str(write_raster(tmp_path / 'pole.tif', landscape(*SIZE)))], str(tmp_path), 'cpu')
    assert not (tmp_path / 'pred/pole.tif.aux.xml').exists()


# Missing values


def hole(values: np.ndarray, fill: float, bands: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """``values`` with ``fill`` in a rectangle, and where that is."""
    values, inside = values.copy(), np.zeros(values.shape[1:], bool)
    inside[10:40, 20:50] = True
    values[bands, inside] = fill
    return values, inside


@pytest.mark.parametrize('how', ['nodata', 'alpha', 'mask'])
def test_pixels_without_a_value_become_void(config, checkpoint, tmp_path, how, narrow_strips):
    values, inside = hole(landscape(*SIZE).clip(min=1), 0)
    path = tmp_path / 'a.tif'
    if how == 'alpha':
        opaque = np.where(inside, 0, 255).astype(np.uint8)
        write_raster(path, np.concatenate([values, opaque[None]]), photometric='rgb', alpha='yes')
    else:
        write_raster(path, values, nodata=0 if how == 'nodata' else None)
    if how == 'mask':
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, 'r+') as file:
            file.write_mask(~inside)
    infer(config, checkpoint, [str(path)], str(tmp_path), 'cpu')
    exact = in_memory(config, checkpoint, values[::-1])
    assert np.array_equal(labels_of(tmp_path / 'pred/a.tif'), np.where(inside, 255, exact))
    with rasterio.open(tmp_path / 'pred/a.tif') as labels:
        assert labels.nodata == 255 and labels.colormap(1)[255][3] == 0


def test_a_pixel_with_one_dark_band_is_not_void(config, checkpoint, tmp_path):
    values, _ = hole(landscape(*SIZE).clip(min=1), 0, slice(2))
    infer(config, checkpoint, [str(write_raster(tmp_path / 'a.tif', values, nodata=0))], str(tmp_path), 'cpu')
    assert np.array_equal(labels_of(tmp_path / 'pred/a.tif'), in_memory(config, checkpoint, values[::-1]))


# Any number and kind of bands


MEAN = [0.5, 0.4, 0.3, 0.2, 0.1]
LOADER = dict(type='LoadRasterFromFile', bands=[2, 1, 3, 4, 6], fill=MEAN)


@pytest.fixture(scope='module')
def many(place) -> tuple[str, str]:
    """A config and a checkpoint for five of six floating-point bands."""
    config = write_config(place / 'many.py', MEAN, LOADER)
    return config, write_checkpoint(place / 'many.pth', config)


def spectrum(size: tuple[int, int] = SIZE) -> np.ndarray:
    return landscape(*size, bands=6).astype(np.float32) / 255


@pytest.mark.parametrize('fill', [np.nan, np.inf, -9999])
def test_float_bands_with_gaps_give_the_labels_of_the_test_loop(many, tmp_path, fill, narrow_strips):
    bands = slice(3, 4) if fill != -9999 else slice(None)
    values, inside = hole(spectrum(), fill, bands)
    path = write_raster(tmp_path / 'a.tif', values, nodata=fill if fill == -9999 else None)
    assert infer(*many, [str(path)], str(tmp_path / 'out'), 'cpu') == []
    found = labels_of(tmp_path / 'out/pred/a.tif')

    cfg = load_config(many[0], {})
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(torch.load(many[1])['state_dict'])
    settings = dict(cfg.test_dataloader.dataset, data_prefix=dict(img_path=str(tmp_path)), img_suffix='.tif')
    [sample] = model.test_step(pseudo_collate([DATASETS.build(settings)[0]]))
    exact = sample.pred_sem_seg.data[0].numpy()
    assert len(np.unique(exact)) == 3 and np.array_equal(found, np.where(inside, 255, exact))


def test_bands_on_the_command_line_choose_and_order_them(config, checkpoint, many, tmp_path):
    values = landscape(*SIZE, bands=4)
    path = str(write_raster(tmp_path / 'a.tif', values, photometric='minisblack'))
    words = f'{config} {checkpoint} {path} --out-dir {tmp_path}/out --device cpu --bands 3 2 1'
    assert main('infer', words.split()) == 0
    assert np.array_equal(labels_of(tmp_path / 'out/pred/a.tif'), in_memory(config, checkpoint, values[:3]))
    deep = str(write_raster(tmp_path / 'b.tif', spectrum()))
    infer(*many, [deep], str(tmp_path / 'out'), 'cpu', bands=[6, 5, 4, 3, 2])
    assert np.array_equal(labels_of(tmp_path / 'out/pred/b.tif'), in_memory(*many, spectrum()[:0:-1]))


def test_a_band_marked_as_transparency_is_read_if_the_model_takes_four(tmp_path):
    config = write_config(tmp_path / 'four.py', [100.0] * 4, dict(type='LoadRasterFromFile'))
    checkpoint, values = write_checkpoint(tmp_path / 'four.pth', config), landscape(*SIZE, bands=4)
    infer(config, checkpoint, [str(write_raster(tmp_path / 'a.tif', values, alpha='yes'))], str(tmp_path), 'cpu')
    assert np.array_equal(labels_of(tmp_path / 'pred/a.tif'), in_memory(config, checkpoint, values))


def test_the_overlay_of_other_than_8_bits_is_stretched(many, tmp_path):
    path = write_raster(tmp_path / 'a.tif', spectrum() * 1e-3)
    infer(*many, [str(path)], str(tmp_path), 'cpu', opacity=0)
    shown = np.asarray(Image.open(tmp_path / 'vis/a.png'))[:HEIGHT, :WIDTH]
    assert shown.min() == 0 and shown.max() == 255
    assert np.corrcoef(shown[..., 0].ravel(), spectrum()[1].ravel())[0, 1] > 0.95  # LOADER's first band is the second


def test_a_mean_that_does_not_fit_the_backbone_is_one_sentence(tmp_path):
    config = write_config(tmp_path / 'a.py', more="model['backbone']['in_channels'] = 4\n")
    init_default_scope('mmseg')
    with pytest.raises(UserError, match=r'data_preprocessor.mean has 3 values, but backbone.in_channels is 4'):
        MODELS.build(load_config(config, {}).model)


@pytest.mark.parametrize(('mean', 'std'), [([1.0, 2.0], [1.0]), ([1.0], [0]), ([], []), (1.0, 1.0), (['a'], [1])])
def test_mean_and_deviation_are_a_number_per_band(mean, std):
    with pytest.raises(UserError, match='must be a number per channel, std positive, got'):
        RasterDataPreProcessor(mean, std)


# Runs that are stopped and go on


@pytest.fixture
def long_run(config, checkpoint, tmp_path, narrow_strips) -> tuple[list, Path]:
    """Arguments of ``infer`` for a raster of 25 blocks, and the labels that an unbroken run writes."""
    path = write_raster(tmp_path / 'a.tif', landscape(150, 130))
    infer(config, checkpoint, [str(path)], str(tmp_path / 'unbroken'), 'cpu', ['labels'])
    return [config, checkpoint, [str(path)], str(tmp_path / 'out'), 'cpu', ['labels']], tmp_path / 'unbroken/pred/a.tif'


def in_child(work) -> int:
    """Run ``work`` in a fork; returns its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def calls_before(monkeypatch, owner: object, name: str, count: int, end) -> None:
    """Make the method end the process, or whatever ``end`` does, at its call number ``count``."""
    calls, method = [], getattr(owner, name)

    def counted(*args, **kwargs):
        if len(calls) == count:
            end()
        calls.append(0)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ('owner', 'name', 'count'),
    [
        (raster_api.Journal, 'append', 1),
        (raster_api.Journal, 'append', 6),
        (raster_api.Journal, 'append', 24),
        (raster_api.Journal, '_write', 9),
        (rasterio.io.DatasetWriter, 'write', 7),
        (raster_api.Journal, 'remove', 0),
    ],
)
def test_a_killed_run_goes_on_with_what_is_finished(long_run, monkeypatch, capsys, owner, name, count):
    arguments, unbroken = long_run
    out = Path(arguments[3], 'pred')
    with monkeypatch.context() as patch:
        calls_before(patch, owner, name, count, kill_self)
        assert in_child(lambda: infer(*arguments)) == -signal.SIGKILL
    left = [path.name for path in out.iterdir()]
    assert all(path.startswith('.partial-') for path in left if path != 'a.tif') and len(left) <= 2
    assert ('a.tif' in left) == (name == 'remove')
    computed = []
    with monkeypatch.context() as patch:
        patch.setattr(SlidingSegmentor, '_logits', count_calls(computed))
        assert infer(*arguments, resume=True) == []
    assert len(computed) < 80 - 2 * count and 'was finished before' in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ['a.tif']
    assert (out / 'a.tif').read_bytes() == unbroken.read_bytes()


def count_calls(calls: list):
    method = SlidingSegmentor._logits
    return lambda self, crops: calls.append(len(crops)) or method(self, crops)


def test_kills_one_after_the_other_give_the_labels_of_an_unbroken_run(long_run, monkeypatch):
    arguments, unbroken = long_run
    monkeypatch.setattr(os, 'fsync', lambda number: None)
    calls_before(monkeypatch, raster_api.Journal, 'append', 2, kill_self)
    runs = 0
    while in_child(lambda: infer(*arguments, resume=True)) == -signal.SIGKILL:
        runs += 1
        assert not Path(arguments[3], 'pred/a.tif').exists()
    assert runs == 12
    assert Path(arguments[3], 'pred/a.tif').read_bytes() == unbroken.read_bytes()


def test_ctrl_c_says_how_to_go_on(long_run, monkeypatch, capsys):
    arguments, unbroken = long_run
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls_before(patch, SlidingSegmentor, '_logits', 20, lambda: signal.raise_signal(signal.SIGINT))
        infer(*arguments)
    assert '--resume goes on after' in capsys.readouterr().out
    infer(*arguments, resume=True)
    assert Path(arguments[3], 'pred/a.tif').read_bytes() == unbroken.read_bytes()


@pytest.mark.parametrize(
    ('changed', 'said'),
    [
        ('raster', 'the raster changed'),
        ('checkpoint', 'the checkpoint changed'),
        ('config', 'the config changed'),
        ('amp', 'an option changed'),
        ('bands', 'an option changed'),
        ('journal', 'a damaged file changed'),
    ],
)
def test_a_change_makes_the_run_start_over_and_is_named(long_run, monkeypatch, capsys, tmp_path, changed, said):
    arguments, _ = long_run
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls_before(patch, SlidingSegmentor, '_logits', 20, lambda: signal.raise_signal(signal.SIGINT))
        infer(*arguments)
    more = {}
    if changed == 'raster':
        write_raster(tmp_path / 'a.tif', landscape(150, 130, seed=1))
    elif changed == 'checkpoint':
        arguments[1] = write_checkpoint(tmp_path / 'other.pth', arguments[0], seed=1)
    elif changed == 'config':
        more = dict(cfg_options={'model.data_preprocessor.mean': [90.0, 90.0, 90.0]})
    elif changed == 'journal':
        [journal] = Path(arguments[3], 'pred').iterdir()
        journal.write_bytes(b'{' + journal.read_bytes())
    else:
        more = {'amp': True} if changed == 'amp' else {'bands': [1, 2, 2]}
    capsys.readouterr()
    infer(*arguments, resume=True, **more)
    output = capsys.readouterr().out
    assert f'a.tif starts over: {said}' in output and 'finished before' not in output
    infer(*arguments[:3], str(tmp_path / 'fresh'), 'cpu', ['labels'], **more)
    assert Path(arguments[3], 'pred/a.tif').read_bytes() == (tmp_path / 'fresh/pred/a.tif').read_bytes()
    infer(*arguments, resume=True, **more)
    assert 'a.tif was finished before' in capsys.readouterr().out


@pytest.mark.parametrize('damage', [-1, -200])
def test_records_after_a_damaged_one_are_computed_again(long_run, monkeypatch, damage):
    arguments, unbroken = long_run
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls_before(patch, SlidingSegmentor, '_logits', 40, lambda: signal.raise_signal(signal.SIGINT))
        infer(*arguments)
    [journal] = Path(arguments[3], 'pred').iterdir()
    content = bytearray(journal.read_bytes())
    content[damage] ^= 255
    journal.write_bytes(content)
    infer(*arguments, resume=True)
    assert Path(arguments[3], 'pred/a.tif').read_bytes() == unbroken.read_bytes()


@pytest.mark.parametrize('missing', [1, 2000])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(long_run, missing):
    arguments, unbroken = long_run
    with small_disk(unbroken.stat().st_size - missing), pytest.raises(UserError, match=r'cannot write .*'):
        infer(*arguments)
    assert not Path(arguments[3], 'pred/a.tif').exists()
    infer(*arguments, resume=True)
    assert Path(arguments[3], 'pred/a.tif').read_bytes() == unbroken.read_bytes()
    assert [path.name for path in Path(arguments[3], 'pred').iterdir()] == ['a.tif']


# Bad input


def damaged(path: Path, bands: int = 3) -> None:
    content = bytearray(write_raster(path, landscape(*SIZE, bands=bands), compress='deflate').read_bytes())
    middle = len(content) // 2
    content[middle:] = b'\xff' * (len(content) - middle)
    path.write_bytes(content)


def palette(path: Path) -> None:
    write_raster(path, landscape(*SIZE, bands=1))
    with rasterio.open(path, 'r+') as file:
        file.write_colormap(1, {1: (1, 2, 3)})


def huge_tile(path: Path) -> None:
    """A TIFF of a few kilobytes that claims to be one tile of 60,000 x 60,000 pixels."""
    content = bytearray(write_raster(path, np.zeros((3, 64, 64), np.uint8), **TILES).read_bytes())
    first = int.from_bytes(content[4:8], 'little') + 2
    for entry in range(first, first + 12 * int.from_bytes(content[first - 2 : first], 'little'), 12):
        if int.from_bytes(content[entry : entry + 2], 'little') in (256, 257, 322, 323):  # width and height, twice
            content[entry + 8 : entry + 12] = (60_000).to_bytes(4, 'little')
    path.write_bytes(content)


TILES = dict(tiled=True, blockxsize=64, blockysize=64, compress='deflate')
BAD = {
    'four bands': (
        lambda path: write_raster(path, landscape(*SIZE, bands=4), photometric='minisblack'),
        r'a\.tif has 4 bands; the model takes 3: choose them with --bands, for example --bands 1 2 3',
    ),
    'one band': (lambda path: write_raster(path, landscape(*SIZE, bands=1)), r'has 1 band; .* --bands 1 1 1'),
    'colour table': (palette, r'has 1 band; the model takes 3: gdal_translate -expand rgb'),
    'complex': (
        lambda path: write_raster(path, landscape(*SIZE).astype(np.complex64)),
        r'a\.tif holds complex64 numbers; real ones are supported',
    ),
    'float': (
        lambda path: write_raster(path, landscape(*SIZE).astype(np.float32)),
        r'holds float32, but the config loads pictures of 8 or 16 bits; LoadRasterFromFile loads',
    ),
    'damaged': (damaged, r'a\.tif is damaged: rows \d+ to \d+ cannot be read \('),
    'cut': (
        lambda path: path.write_bytes(write_raster(path, landscape(*SIZE)).read_bytes()[:9000]),
        r'a\.tif is damaged: rows .* cannot be read|a\.tif cannot be read as a TIFF',
    ),
    'one huge tile': (huge_tile, r'stored in blocks of 60000 x 60000 pixels, 10299 MiB each; store it in'),
    'BigTIFF of nothing': (
        lambda path: path.write_bytes(b'II+\0\x08\0\0\0' + b'\xff' * 64),
        r'cannot be read as a TIFF',
    ),
}


@pytest.mark.parametrize('kind', BAD)
def test_a_raster_that_cannot_be_used_is_one_sentence(config, checkpoint, tmp_path, kind):
    make, message = BAD[kind]
    make(tmp_path / 'a.tif')
    with pytest.raises(UserError, match=message):
        infer(config, checkpoint, [str(tmp_path / 'a.tif')], str(tmp_path / 'out'), 'cpu')
    assert not [path for path in (tmp_path / 'out').rglob('*') if path.is_file()]


def test_bad_rasters_are_skipped_and_the_others_continue(config, checkpoint, tmp_path, capsys):
    damaged(tmp_path / 'a.tif')
    write_raster(tmp_path / 'b.tif', landscape(*SIZE), crs=None)
    Image.fromarray(landscape(*SIZE).transpose(1, 2, 0)).save(tmp_path / 'c.tif')
    skipped = infer(config, checkpoint, [str(tmp_path)], str(tmp_path / 'out'), 'cpu')
    assert skipped == [str(tmp_path / 'a.tif')]
    assert {path.name for path in (tmp_path / 'out/pred').iterdir()} == {'b.tif', 'c.png'}
    output = capsys.readouterr().out
    assert 'a.tif is damaged' in output and 'b.tif has no coordinate reference system' in output
    assert '2 of 3 images segmented' in output


LOADER_KEY = 'test_dataloader.dataset.pipeline.0'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(save=['overlay']), r'a\.tif is a raster, .*; add labels to --save'),
        (dict(save=['labels', 'prob'], void_below=0.5), r'is a raster, .*; leave out prob and --void-below'),
        (dict(ray='local'), r'is a raster, .*; leave out --ray'),
        (dict(bands=[1, 2]), r'--bands has 2 numbers, but the model takes 3 channels'),
        (
            dict(cfg_options={LOADER_KEY: dict(type='LoadRasterFromFile', fill=[1, 2])}),
            r'3 bands are read, but fill of',
        ),
        (dict(bands=[1, 2, 9]), r'a\.tif has 3 bands, so there is no band 9'),
        (dict(bands=[0, 1, 2]), r'has 3 bands, so there is no band 0'),
        (dict(cfg_options={'model.type': 'EncoderDecoder'}), r'need a model of type SlidingSegmentor, but this is Enc'),
        (dict(cfg_options={'model.data_preprocessor.size': None, 'model.test_cfg.mode': 'whole'}), r'how large: add'),
        (
            dict(cfg_options={'test_dataloader.dataset.pipeline.1': dict(type='Rerange')}),
            r'rasters are read in windows, so Rerange in the test pipeline cannot be applied',
        ),
    ],
)
def test_options_that_do_not_go_with_rasters(config, checkpoint, tmp_path, arguments, message):
    path = str(write_raster(tmp_path / 'a.tif', landscape(*SIZE)))
    with pytest.raises(UserError, match=message):
        infer(config, checkpoint, [path], str(tmp_path / 'out'), 'cpu', **arguments)


def test_bands_without_rasters(config, checkpoint, tmp_path):
    Image.new('RGB', (64, 64)).save(tmp_path / 'a.png')
    with pytest.raises(UserError, match='--bands is for rasters, and there are none'):
        infer(config, checkpoint, [str(tmp_path / 'a.png')], str(tmp_path / 'out'), 'cpu', bands=[3, 2, 1])


def test_a_config_for_rasters_takes_neither_videos_nor_pictures(many, tmp_path):
    (tmp_path / 'a.mp4').touch()
    with pytest.raises(UserError, match=r'a\.mp4 is a video, but the config loads rasters'):
        infer(*many, [str(tmp_path / 'a.mp4')], str(tmp_path / 'out'), 'cpu')
    Image.new('RGB', (64, 64)).save(tmp_path / 'a.png')
    with pytest.raises(UserError, match=r'a\.png cannot be read as a TIFF'):
        infer(*many, [str(tmp_path / 'a.png')], str(tmp_path / 'out'), 'cpu')


@pytest.mark.parametrize(
    ('profile', 'bands', 'windows'),
    [
        (dict(crs=None, transform=None), 3, False),
        (dict(crs=None, transform=None), 1, False),
        (dict(crs=None, transform=None), 5, True),
        (dict(crs=None, transform=None, nodata=0), 3, True),
        (dict(crs=None, transform=None, BIGTIFF='YES'), 3, True),
        (dict(crs=None), 3, True),
        (dict(), 3, True),
    ],
)
def test_tiffs_with_a_georeference_gaps_or_many_bands_are_rasters(tmp_path, profile, bands, windows):
    path = write_raster(tmp_path / 'a.tif', landscape(*SIZE, bands=bands), **profile)
    assert is_raster(str(path)) is windows


def test_a_tiff_of_many_pixels_is_a_raster(tmp_path):
    settings = dict(driver='GTiff', width=9000, height=9000, count=3, dtype='uint8', SPARSE_OK=True, compress='deflate')
    with rasterio.open(tmp_path / 'a.tif', 'w', **settings):
        pass
    assert is_raster(str(tmp_path / 'a.tif'))


@pytest.mark.parametrize('name', ['http:', 'ä é.tif', 'new\nline.tif', '%s {0} !.tif', 'GTIFF_DIR:1:a.tif'])
def test_odd_names_are_names(config, checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    name = name if name.endswith('.tif') else 'http:/a.tif'
    Path(name).parent.mkdir(exist_ok=True)
    write_raster(tmp_path / 'a.tif', landscape(*SIZE)).rename(name)
    infer(config, checkpoint, [name], 'out', 'cpu', ['labels'])
    assert labels_of(Path('out/pred', f'{Path(name).stem}.tif')).shape == SIZE


def test_a_name_that_is_not_valid_text_is_one_sentence(config, checkpoint, tmp_path):
    write_raster(tmp_path / 'a.tif', landscape(*SIZE)).rename(tmp_path / '\udcff.tif')
    with pytest.raises(UserError, match='is not a valid name for a raster: GDAL requires UTF-8; rename it'):
        infer(config, checkpoint, [str(tmp_path / '\udcff.tif')], str(tmp_path / 'out'), 'cpu')


def test_a_missing_package_names_its_extra(config, checkpoint, tmp_path, monkeypatch):
    path = str(write_raster(tmp_path / 'a.tif', landscape(*SIZE)))
    hide(monkeypatch, 'rasterio')
    with pytest.raises(UserError, match=r"a\.tif in windows needs rasterio: pip install 'mmseg-volo\[geo\]'"):
        infer(config, checkpoint, [path], str(tmp_path / 'out'), 'cpu')
    with pytest.raises(UserError, match=r"LoadRasterFromFile needs rasterio: pip install 'mmseg-volo\[geo\]'"):
        LoadRasterFromFile()


# Training and checks of data


@pytest.fixture
def data(tmp_path) -> Path:
    """Two rasters of six float bands with gaps, and their labels."""
    for split, seed in (('train', 0), ('val', 1)):
        for kind in ('images', 'labels'):
            (tmp_path / kind / split).mkdir(parents=True)
        values, _ = hole(landscape(*SIZE, bands=6, seed=seed).astype(np.float32) / 255, np.nan)
        write_raster(tmp_path / f'images/{split}/a.tif', values)
        ids = (landscape(*SIZE, bands=1, seed=seed) // 86).astype(np.uint8)
        write_raster(tmp_path / f'labels/{split}/a.tif', ids, nodata=0)
    return tmp_path


def sample(data: Path) -> dict:
    paths = {'img_path': str(data / 'images/train/a.tif'), 'seg_map_path': str(data / 'labels/train/a.tif')}
    return dict(paths, seg_fields=[], reduce_zero_label=False, label_map=None)


def test_raster_and_label_are_read_in_one_random_window(data):
    steps = [LoadRasterFromFile([6, 1], crop_size=(40, 50), fill=[0.5, 0.25]), LoadRasterAnnotations()]
    whole = [LoadRasterFromFile([6, 1], fill=[0.5, 0.25]), LoadRasterAnnotations()]

    def load(steps: list, seed: int) -> dict:
        np.random.seed(seed)
        results = sample(data)
        for step in steps:
            results = step(results)
        return results

    everything = load(whole, 0)
    assert everything['img'].shape == (*SIZE, 2) and everything['img'].dtype == np.float32
    assert (everything['img'][20, 30] == (0.5, 0.25)).all() and np.isfinite(everything['img']).all()
    windows = set()
    for seed in range(8):
        results = load(steps, seed)
        top, left, height, width, _ = results['raster_window']
        inside = slice(top, top + height), slice(left, left + width)
        assert results['img'].shape[:2] == results['gt_seg_map'].shape == results['img_shape'] == (40, 50)
        assert np.array_equal(results['img'], everything['img'][inside])
        assert np.array_equal(results['gt_seg_map'], everything['gt_seg_map'][inside])
        assert load(steps, seed)['raster_window'] == results['raster_window']
        windows.add((top, left))
    assert len(windows) > 5
    assert load([LoadRasterFromFile(crop_size=(1000, 30))], 0)['img'].shape == (HEIGHT, 30, 6)


def test_labels_are_renumbered_as_mmseg_does(data):
    ids = np.arange(256, dtype=np.uint8).reshape(1, 8, 32)
    path = write_raster(data / 'ids.tif', ids, nodata=0)
    Image.fromarray(ids[0]).save(data / 'ids.png')
    for reduce, renamed in ((False, None), (True, None), (False, {0: 3, 3: 255}), (True, {0: 1, 1: 0})):
        results = dict(sample(data), reduce_zero_label=reduce, label_map=renamed)
        ours = LoadRasterAnnotations()(dict(results, seg_map_path=str(path)))['gt_seg_map']
        theirs = TRANSFORMS.build(dict(type='mmseg.LoadAnnotations'))(dict(results, seg_map_path=str(data / 'ids.png')))
        assert np.array_equal(ours, theirs['gt_seg_map'])


@pytest.mark.parametrize(
    ('ids', 'message'),
    [
        (np.zeros((1, 90, 129), np.uint8), r'label .*bad\.tif is 129 x 90, but its raster is 130 x 90'),
        (np.full((1, *SIZE), 256, np.uint16), 'has values outside 0 to 255'),
        (np.zeros((3, *SIZE), np.uint8), 'must have one band of class ids, not 3 of uint8'),
        (np.zeros((1, *SIZE), np.float32), 'must have one band of class ids, not 1 of float32'),
    ],
)
def test_labels_that_cannot_be_used(data, ids, message):
    results = LoadRasterFromFile(crop_size=(40, 50))(sample(data))
    results['seg_map_path'] = str(write_raster(data / 'bad.tif', ids))
    with pytest.raises(UserError, match=message):
        LoadRasterAnnotations()(results)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [(dict(bands=[0]), 'bands of LoadRasterFromFile'), (dict(crop_size=64), 'crop_size of LoadRasterFromFile')],
)
def test_arguments_of_the_loader_are_checked(arguments, message):
    with pytest.raises(UserError, match=message):
        LoadRasterFromFile(**arguments)


TRAINING = """
from mmseg_volo import BeginSample, StreamSampler
train_pipeline = [
    dict(type='BeginSample'), dict(loader, crop_size=(64, 80)), dict(type='LoadRasterAnnotations'),
    dict(type='RandomCrop', crop_size=(32, 48)), dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs'),
]
pipeline.insert(1, dict(type='LoadRasterAnnotations'))
data = dict(
    type='BaseSegDataset', data_root={root!r}, img_suffix='.tif', seg_map_suffix='.tif',
    metainfo=test_dataloader['dataset']['metainfo'],
)
train_dataloader = dict(
    batch_size=2, sampler=dict(type='StreamSampler'),
    dataset=dict(
        **data, pipeline=train_pipeline, data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
    ),
)
val_dataloader = dict(
    batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**data, pipeline=pipeline, data_prefix=dict(img_path='images/val', seg_map_path='labels/val')),
)
test_dataloader = val_dataloader
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg, test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
custom_hooks = [dict(type='ValidationPicturesHook')]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2))
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
log_processor = dict(by_epoch=False)
"""


@pytest.fixture
def training(data) -> str:
    return write_config(data / 'training.py', MEAN, LOADER, more=TRAINING.format(root=str(data)))


def test_a_model_is_trained_measured_and_used_on_rasters(training, data, capsys):
    train(training, str(data / 'work'), seed=0)
    assert list((data / 'work').rglob('val_a*.png'))
    checkpoint = str(data / 'work/iter_2.pth')
    measure(training, checkpoint, str(data / 'work'), show_dir=str(data / 'shown'))
    assert Image.open(data / 'shown/a.png').size[1] == HEIGHT
    assert infer(training, checkpoint, [str(data / 'images/val')], str(data / 'out'), 'cpu') == []
    assert (labels_of(data / 'out/pred/a.tif') == 255).sum() == 30 * 30


def test_check_data_prints_the_statistics_of_the_bands(training, data, capsys):
    larger, _ = hole(spectrum((300, 200)) * 3 + 1000, np.nan)  # far from 0, where sums of squares lose all digits
    write_raster(data / 'images/train/b.tif', larger, tiled=True, blockxsize=64, blockysize=64)
    write_raster(data / 'labels/train/b.tif', np.zeros((1, 300, 200), np.uint8))
    assert main('check-data', [training, '--out', str(data / 'seen.png')]) == 0
    output = capsys.readouterr().out
    values = [read(data / f'images/train/{name}.tif') for name in 'ab']
    pixels = np.concatenate([v[:, ~np.isnan(v).any(0)] for v in values], 1)[[1, 0, 2, 3, 5]].astype(np.longdouble)
    for name, exact in (('mean', pixels.mean(1)), ('std', pixels.std(1))):
        [line] = [line for line in output.splitlines() if line.strip().startswith(f'{name}=')]
        assert np.allclose(eval(line.strip().rstrip(',').partition('=')[2]), exact.astype(float), rtol=1e-5)
    assert Image.open(data / 'seen.png').width > 300


@pytest.mark.parametrize(
    ('size', 'profile'),
    [
        ((70, 5000), dict(blockysize=1)),
        ((70, 5000), dict(blockysize=7)),
        ((700, 5000), dict(blockysize=700)),
        ((700, 900), dict(tiled=True, blockxsize=256, blockysize=128)),
    ],
)
def test_files_are_checked_in_parts_of_a_megapixel(tmp_path, monkeypatch, size, profile):
    monkeypatch.setattr(rasters, 'PART', 256)
    covered = np.zeros(size, int)
    with rasters.Raster(str(write_raster(tmp_path / 'a.tif', np.zeros((1, *size), np.uint8), **profile))) as raster:
        tall, _ = raster.source.block_shapes[0]
        for top, left, height, width in raster.parts():
            assert height * width <= 256**2 and (top % tall == 0 or tall * width > 256**2)
            covered[top : top + height, left : left + width] += 1
    assert (covered == 1).all()


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def test_check_data_finds_mistakes_in_rasters(training, data, capsys):
    values = spectrum()
    write_raster(data / 'images/val/a.tif', values, transform=rasterio.transform.from_origin(0, 0, 10, 10))
    for name, raster in (('b', values[:4]), ('c', values), ('d', read(data / 'images/train/a.tif'))):
        write_raster(data / f'images/val/{name}.tif', raster)
        write_raster(data / f'labels/val/{name}.tif', np.full((1, *SIZE), 9 if name == 'c' else 1, np.uint8))
    damaged(data / 'labels/train/a.tif', bands=1)
    assert main('check-data', [training, '--out', str(data / 'seen.png')]) == 1
    output = capsys.readouterr().out
    for mistake in (
        'error: val: label lies elsewhere than its raster (1 file)',
        'b.tif has 4 bands, so there is no band 6',
        'error: val: id 9 in labels of 3 classes',
        'image is also in train',
        'error: train: label cannot be used (1 file)',
        'a.tif is damaged: rows',
    ):
        assert mistake in output
    with pytest.raises(UserError, match=r'label cannot be used: .*a\.tif is damaged'):
        train(training, str(data / 'work'))


def test_training_on_rasters_with_other_bands_is_one_sentence(training, data):
    options = {f'{split}_dataloader.dataset.pipeline.{i}.bands': [1, 2, 3] for split, i in (('train', 1), ('val', 0))}
    with pytest.raises(UserError, match=r'raster has 3 bands, but data_preprocessor.mean .* for 5; choose'):
        train(training, str(data / 'work'), cfg_options=options)


def test_the_config_of_the_docs_loads_bands_and_fits_the_model(tmp_path):
    page = (ROOT / 'docs/rasters.md').read_text()
    (tmp_path / 'scenes.py').write_text(re.search(r'```python\n(.*?)```', page, re.S)[1])
    cfg = load_config(str(tmp_path / 'scenes.py'), {'data_root': str(tmp_path)})
    init_default_scope('mmseg')
    for split in ('train', 'val'):
        for kind, bands in (('images', 4), ('labels', 1)):
            (tmp_path / kind / split).mkdir(parents=True)
            values = landscape(800, 900, bands)
            write_raster(
                tmp_path / kind / split / 'a.tif', values.astype(np.uint16) * 50 if bands > 1 else values // 86
            )
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    for split, size in (('train', (512, 512)), ('val', (800, 900))):
        sample = DATASETS.build(cfg[f'{split}_dataloader'].dataset)[0]
        assert sample['inputs'].shape == (model.image_channels, *size)
        assert sample['data_samples'].gt_sem_seg.data.shape == (1, *size)
    assert torch.equal(sample['inputs'][:3], torch.from_numpy(read(tmp_path / 'images/val/a.tif')[[2, 1, 0]]).float())
