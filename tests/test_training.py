"""Training, testing and inference of configs that mmseg accepts."""

import gc
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from zipfile import ZipFile

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader
from mmseg.datasets import CityscapesDataset
from mmseg.models import FCNHead
from mmseg.registry import DATASETS, HOOKS, MODELS
from mmseg.structures import SegDataSample
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef

from mmseg_volo import CPUMemoryHook
from mmseg_volo.apis.inference import infer
from mmseg_volo.apis.testing import test as measure
from mmseg_volo.apis.training import train
from mmseg_volo.benchmark.step import profile_step
from mmseg_volo.checkpoints.mmengine_loader import read_ahead
from mmseg_volo.config import data_sets, load_config, type_name, without_steps
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.error_messages import one_sentence_errors
from mmseg_volo.errors import UserError

CONFIG = str(ROOT / 'configs/volo_tiny_toy_streets.py')
NO_VALIDATION = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)
SHARED = dict(in_channels=48, in_index=0, channels=16, num_classes=19, norm_cfg=dict(type='BN'), align_corners=False)
# OCRNet's heads as in mmseg's configs/_base_/models/ocrnet_r50-d8.py, on the neck of volo_tiny.
OCRNET = {
    'model.type': 'SlidingCascadeSegmentor',
    'model.num_stages': 2,
    'model.decode_head': [
        dict(type='FCNHead', num_convs=1, concat_input=False, **SHARED),
        dict(type='OCRHead', ocr_channels=8, **SHARED),
    ],
    'model.auxiliary_head': [dict(type='FCNHead', num_convs=1, **SHARED), dict(type='FCNHead', num_convs=0, **SHARED)],
}
OCRNET['model.auxiliary_head'][1]['channels'] = 48  # without a convolution the width does not change


@pytest.fixture(scope='module')
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('toy')
    make_toy_streets(folder, train=4, val=2, size=(96, 64))
    return folder


def options(toy: Path, **more: object) -> dict:
    loaders = {
        f'{split}_dataloader.{key}': value
        for split in ('train', 'val', 'test')
        for key, value in dict(num_workers=0, persistent_workers=False).items()
    }
    return {
        'data_root': str(toy),
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'train_dataloader.batch_size': 2,
        'default_hooks.checkpoint.interval': 2,
        'visualizer.vis_backends': [dict(type='LocalVisBackend')],
        **loaders,
        **more,
    }


def test_training_without_validation(toy, tmp_path):
    settings = {key: value for key, value in options(toy).items() if not key.startswith('val_dataloader.')}
    for resume, iterations in ((None, 2), ('auto', 4)):
        settings['train_cfg.max_iters'] = iterations
        runner = train(CONFIG, str(tmp_path), resume, cfg_options={**settings, **NO_VALIDATION}, seed=0)
        assert runner.iter == iterations and (tmp_path / f'iter_{iterations}.pth').is_file()
    assert not list(tmp_path.glob('best_*'))


def test_half_a_validation_is_a_mistake_in_the_config(toy, tmp_path):
    settings = {**options(toy), 'val_cfg': None}
    with pytest.raises(SystemExit) as end, one_sentence_errors():
        train(CONFIG, str(tmp_path), cfg_options=settings, seed=0)
    assert end.value.code == 2


def test_a_cascade_of_heads_is_trained_tested_and_used(toy, tmp_path):
    settings = options(toy, **OCRNET)
    runner = train(CONFIG, str(tmp_path), cfg_options=settings, seed=0)
    logged = runner.message_hub.log_scalars
    for loss in ('decode_0.loss_ce', 'decode_1.loss_ce', 'aux_0.loss_ce', 'aux_1.loss_ce'):
        assert torch.isfinite(torch.tensor(logged[f'train/{loss}'].current()))
    checkpoint = str(tmp_path / 'iter_2.pth')
    assert 0 <= measure(CONFIG, checkpoint, str(tmp_path / 'test'), cfg_options=settings)['mIoU'] <= 100
    picture = next(toy.glob('leftImg8bit/val/*/*.png'))
    assert infer(CONFIG, checkpoint, [str(picture)], str(tmp_path / 'out'), cfg_options=settings) == []
    (label,) = (tmp_path / 'out/pred').iterdir()
    assert Image.open(label).size == Image.open(picture).size


@pytest.mark.parametrize(
    'test_cfg', [dict(mode='slide', crop_size=(32, 48), stride=(20, 30)), dict(mode='whole')], ids=['slide', 'whole']
)
def test_a_cascade_gives_the_logits_of_mmseg(test_cfg):
    init_default_scope('mmseg')
    image = torch.randint(0, 256, (3, 70, 100), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ours, theirs = (
        MODELS.build(load_config(CONFIG, {**OCRNET, 'model.type': kind, 'model.test_cfg': test_cfg}).model).eval()
        for kind in ('SlidingCascadeSegmentor', 'CascadeEncoderDecoder')
    )
    theirs.load_state_dict(ours.state_dict())
    sample = SegDataSample(metainfo=dict(ori_shape=(70, 100), img_shape=(70, 100), img_path='x.png'))
    with torch.no_grad():
        exact = theirs.test_step(dict(inputs=[image], data_samples=[sample]))[0].seg_logits.data
    torch.testing.assert_close(ours.segment(image, (70, 100), logits=True), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'model.decode_head': []}, r'model.decode_head must not be empty'),
        ({'model.decode_head': [3]}, 'model.decode_head.0 must be of type dict, got 3'),
        (
            {'model.decode_head': [dict(type='FCNHead')]},
            'model.decode_head.0.num_classes must be of type int, got None',
        ),
        (
            {'model.decode_head': [dict(type='FCNHead', num_classes=19), dict(type='OCRHead', num_classes=18)]},
            r'must have one num_classes, got \[19, 18\]',
        ),
    ],
)
def test_a_cascade_that_cannot_work_is_a_mistake(options, message):
    with pytest.raises(UserError, match=message):
        load_config(CONFIG, options)


def test_one_image_per_batch_is_refused_for_any_head_of_a_cascade(toy, tmp_path):
    uper = Config.fromfile(CONFIG).model.decode_head
    heads = [uper, OCRNET['model.decode_head'][1]]
    settings = options(toy, **{**OCRNET, 'model.decode_head': heads, 'train_dataloader.batch_size': 1})
    with pytest.raises(UserError, match='batch_size=1 cannot train UPerHead'):
        train(CONFIG, str(tmp_path), cfg_options=settings)


def test_one_image_per_batch_trains_with_the_norm_that_the_message_names(toy, tmp_path):
    single = options(toy, **{'train_dataloader.batch_size': 1, 'train_cfg.max_iters': 1, 'train_cfg.val_interval': 1})
    with pytest.raises(UserError, match='batch_size=1 cannot train UPerHead') as error:
        train(CONFIG, str(tmp_path), cfg_options=single)
    advice = re.findall(r'model\.decode_head\.norm_cfg\.(\w+)=(\w+)', str(error.value))
    norm = {f'model.decode_head.norm_cfg.{key}': int(value) if value.isdigit() else value for key, value in advice}
    train(CONFIG, str(tmp_path), cfg_options={**single, **norm, 'model.auxiliary_head': None})


def test_a_profile_of_a_cascade_is_refused():
    with pytest.raises(UserError, match='cascade of decode heads'):
        profile_step(CONFIG, cfg_options=OCRNET, batch=1, images=1)


def test_no_thread_of_a_training_computes_with_denormal_numbers(toy, tmp_path):
    code = """
        import sys
        import torch
        from mmengine.hooks import Hook
        from mmseg.registry import HOOKS
        from mmseg_volo.apis.training import train

        class LookHook(Hook):
            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
                denormals.append(sevenths(10**6))

        def sevenths(count):
            return (torch.full((count,), 2e-38) / 7).count_nonzero().item()

        HOOKS.register_module(module=LookHook)
        denormals = []
        before = sevenths(100)  # too few for a second thread, which would keep the setting that it starts with
        train(*sys.argv[1:3], seed=0, cfg_options=eval(sys.argv[3]))
        print('counted', before, *denormals, sevenths(100))
    """
    command = [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)]
    settings = options(toy, custom_hooks=[dict(type='LookHook')], **NO_VALIDATION)
    arguments = [CONFIG, str(tmp_path), repr(settings)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ['counted 100 0 0 100'], done.stdout + done.stderr


@HOOKS.register_module()
class LeakHook(Hook):
    """Record the memory of a loaded checkpoint that is alive during training, without the optimizer's."""

    loaded: ClassVar[list] = []
    alive: ClassVar[list] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Measure in every iteration."""
        gc.collect()
        states = runner.optim_wrapper.optimizer.state.values()
        owned = {memory_of(tensor) for state in states for tensor in state.values()}
        self.alive.append([memory for memory in self.loaded if not memory.expired() and memory not in owned])


def memory_of(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


@pytest.mark.parametrize('resume', ['auto', 'path', None])
def test_a_checkpoint_is_read_once_and_freed(toy, tmp_path, monkeypatch, resume):
    settings = options(toy, custom_hooks=[dict(type='EMAHook')])
    train(CONFIG, str(tmp_path), cfg_options=settings, seed=0)
    checkpoint = str(tmp_path / 'iter_2.pth')
    load, check, reads = torch.load, ZipFile.testzip, []

    def counting_load(path, *args, **kwargs):
        reads.append('load')
        contents = load(path, *args, **kwargs)
        parts = (contents['state_dict'], contents['ema_state_dict'], *contents['optimizer']['state'].values())
        LeakHook.loaded += [memory_of(value) for part in parts for value in part.values() if torch.is_tensor(value)]
        return contents

    monkeypatch.setattr(torch, 'load', counting_load)
    monkeypatch.setattr(ZipFile, 'testzip', lambda archive: (reads.append('check'), check(archive))[1])
    LeakHook.alive.clear()
    LeakHook.loaded.clear()
    settings['custom_hooks'].append(dict(type='LeakHook'))
    settings['train_cfg.max_iters'] = 4
    if resume is None:
        settings['load_from'] = checkpoint
    start = checkpoint if resume == 'path' else resume
    runner = train(CONFIG, str(tmp_path), start, cfg_options=settings, seed=0)
    assert sorted(reads) == ['check', 'load']
    assert len(LeakHook.loaded) > 100 and len(LeakHook.alive) == (4 if resume is None else 2)
    assert not any(LeakHook.alive) and runner.iter == 4


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    path = tmp_path / 'x.pth'
    for value in range(2):
        torch.save(dict(state_dict=dict(a=torch.full((1,), value))), path)
        if value == 0:
            read_ahead(str(path))
    assert CheckpointLoader.load_checkpoint(str(path))['state_dict']['a'] == 1


def test_a_type_is_named_in_three_ways():
    for kind in ('FCNHead', 'mmseg.FCNHead', FCNHead):
        assert type_name(dict(type=kind)) == 'FCNHead'
    assert type_name(dict(type=None)) == 'None'  # mmengine refuses this


def test_steps_are_left_out_at_any_depth():
    load, flip, pack = (dict(type=name) for name in ('LoadAnnotations', 'RandomFlip', 'PackSegInputs'))
    pipeline = [load, dict(type='TestTimeAug', transforms=[[flip], [load], [flip, load, pack]])]
    assert without_steps(pipeline, ['LoadAnnotations']) == [dict(type='TestTimeAug', transforms=[[flip], [flip, pack]])]


@pytest.mark.parametrize('built', [False, True])
def test_data_sets_are_found_inside_their_wrappers(toy, built):
    cfg = load_config(CONFIG, options(toy))
    leaf = cfg.train_dataloader.dataset.to_dict()
    wrapped = dict(type='ConcatDataset', datasets=[leaf, dict(type='RepeatDataset', times=2, dataset=leaf)])
    init_default_scope('mmseg')
    found = data_sets(DATASETS.build(wrapped) if built else wrapped)
    assert [type(dataset) for dataset in found] == [CityscapesDataset if built else dict] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_amp_without_a_gpu_is_refused(toy, tmp_path):
    with pytest.raises(UserError, match='--amp requires a GPU'):
        train(CONFIG, str(tmp_path), amp=True, cfg_options=options(toy))


def test_pictures_of_equal_names_go_to_their_own_folders(toy, tmp_path):
    for kind, suffix in (('leftImg8bit', 'leftImg8bit'), ('gtFine', 'gtFine_labelTrainIds')):
        sources = sorted((toy / kind / 'val').rglob(f'*_{suffix}.png'))
        for city, source in zip(('frankfurt', 'munster'), sources, strict=True):
            target = tmp_path / 'data' / kind / 'val' / city / f'x_{suffix}.png'
            target.parent.mkdir(parents=True)
            shutil.copy(source, target)
    settings = options(tmp_path / 'data')
    init_default_scope('mmseg')
    model = MODELS.build(load_config(CONFIG, settings).model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'x.pth')
    shown = tmp_path / 'shown'
    measure(CONFIG, str(tmp_path / 'x.pth'), str(tmp_path / 'work'), show_dir=str(shown), cfg_options=settings)
    names = {str(path.relative_to(shown)) for path in shown.rglob('*.png')}
    assert names == {'frankfurt/x_leftImg8bit.png', 'munster/x_leftImg8bit.png'}


def test_memory_is_logged_on_a_system_that_measures_it(monkeypatch):
    scalars: list = []
    runner = SimpleNamespace(message_hub=SimpleNamespace(update_scalar=lambda *scalar: scalars.append(scalar)))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    CPUMemoryHook().after_train_iter(runner, 0)
    ((name, megabytes),) = scalars
    assert name == 'train/memory' and 100 < megabytes < 10**6


def test_the_package_works_without_the_module_resource_as_on_windows():
    code = """
        import sys
        sys.modules['resource'] = None
        import mmseg_volo.apis
        mmseg_volo.CPUMemoryHook().after_train_iter(None, 0)
    """
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_test_with_tta_takes_wrapped_data_sets_and_requires_a_pipeline(toy, tmp_path):
    settings = options(toy)
    init_default_scope('mmseg')
    cfg = load_config(CONFIG, settings)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'x.pth')
    cfg.test_dataloader.dataset = dict(type='RepeatDataset', times=1, dataset=cfg.test_dataloader.dataset)
    cfg.tta_pipeline[1].transforms[0] = [dict(type='Resize', scale_factor=0.5, keep_ratio=True)]
    cfg.dump(str(tmp_path / 'wrapped.py'))
    cfg.pop('tta_model')
    cfg.dump(str(tmp_path / 'bare.py'))
    arguments = str(tmp_path / 'x.pth'), str(tmp_path / 'work')
    assert 0 <= measure(str(tmp_path / 'wrapped.py'), *arguments, tta=True)['mIoU'] <= 100
    with pytest.raises(UserError, match='--tta requires tta_pipeline and tta_model in .*bare.py'):
        measure(str(tmp_path / 'bare.py'), *arguments, tta=True)
