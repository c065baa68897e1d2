import builtins
import pickle
import threading
from pathlib import Path

import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim import LinearLR, PolyLR
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from mmseg.apis import MMSegInferencer, init_model
from mmseg.registry import MODELS
from soak import hostile_files
from soak.hostile_files import DOORS, HARMFUL, ODD, Call, saved, training_checkpoint
from torch import nn

from mmseg_volo.checkpoints.mmengine_loader import ZOOS, load_from_plain_data
from mmseg_volo.checkpoints.reading import read_checkpoint
from mmseg_volo.errors import UserError


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """An empty folder, and the path of a file that a harmful checkpoint creates."""
    (tmp_path / 'file').mkdir()
    return tmp_path / 'file', tmp_path / 'ran'


def unrestricted(path: Path) -> None:
    """Read ``path`` without torch's restrictions."""
    try:
        torch.load(path, weights_only=False)
    except Exception:
        pickle.loads(path.read_bytes())


def same(a: object, b: object) -> bool:
    """Whether two nested containers hold equal tensors, arrays and numbers of equal types."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and a == b


# Every file in every function that reads one


@pytest.mark.parametrize('name', HARMFUL)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_a_harmful_file_is_refused_at_every_door_and_nothing_of_it_runs(folders, name):
    folder, ran = folders
    path = HARMFUL[name](folder, ran)
    try:
        unrestricted(path)
    except Exception as error:
        print(error)
    assert ran.exists(), 'this file is harmless and tests nothing'
    ran.unlink()
    for door in DOORS.values():
        with pytest.raises(UserError) as error:
            door(str(path))
        assert str(path) in str(error.value) and str(error.value).isprintable()
        assert not ran.exists()


@pytest.mark.parametrize('name', ODD)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_an_odd_file_is_read_or_refused_with_a_sentence_at_every_door(folders, name):
    folder, ran = folders
    path = ODD[name](folder, ran)
    before = {file.name for file in folder.parent.iterdir()}
    for door in DOORS:
        result, sentence = hostile_files.outcome(path, door)
        assert result in hostile_files.OUTCOMES[:3], sentence
    assert {file.name for file in folder.parent.iterdir()} == before


@pytest.mark.parametrize('name', ['archive that unpacks to 64 MB', 'archive of overlapping records'])
def test_an_archive_larger_than_its_file_is_refused_before_it_is_unpacked(folders, name):
    with pytest.raises(UserError, match='it unpacks to more than its size'):
        read_checkpoint(ODD[name](*folders))


@pytest.mark.parametrize('name', ['nested tensor', 'sparse tensor', 'quantized tensor', 'tensor without numbers'])
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_a_tensor_that_is_no_array_of_numbers_counts_as_missing(folders, name):
    path = str(ODD[name](*folders))
    with pytest.raises(UserError, match=r'1 missing \(pos_embed\)'):
        DOORS['init_cfg'](path)
    with pytest.raises(UserError, match='entries other than named dense tensors: pos_embed'):
        DOORS['load_checkpoint'](path)


def test_the_checkpoint_that_the_others_are_made_from_is_read_at_every_door(tmp_path):
    path = saved(training_checkpoint(), tmp_path)
    for door in DOORS:
        assert hostile_files.outcome(path, door) == ('loaded as saved', '')


def test_damage_of_any_kind_is_read_or_refused(tmp_path):
    stream = hostile_files.damaged(hostile_files.random.Random(1))
    for i in range(42):
        (tmp_path / str(i)).mkdir()
        kind, maker = next(stream)
        path = maker(tmp_path / str(i), tmp_path / 'ran')
        for door in DOORS:
            result, sentence = hostile_files.outcome(path, door)
            assert result in hostile_files.OUTCOMES[:3], f'{kind}: {sentence}'
            assert result != 'loaded, other values' or not kind.startswith('archive'), kind


# mmengine's and mmseg's own functions


def test_every_scheme_of_mmengines_is_read_by_us():
    assert set(CheckpointLoader._schemes.values()) == {load_from_plain_data}


@pytest.mark.parametrize('source', ['s3://b/f.pth', 'cluster:s3://b/f.pth', 'petrel://b/f.pth', 'pavi://f.pth'])
def test_a_store_that_mmengine_reads_by_other_means_is_refused(source):
    with pytest.raises(UserError, match=f'{source} cannot be checked .* give its path'):
        CheckpointLoader.load_checkpoint(source, logger='silent')


@pytest.mark.parametrize('zoo', ['torchvision', 'modelzoo', 'open-mmlab', 'openmmlab', 'mmcls'])
def test_a_name_in_a_zoo_of_mmengines_is_looked_up_there_and_read_by_us(folders, monkeypatch, zoo):
    folder, ran = folders
    good = saved({'state_dict': {'backbone.a': torch.ones(2)}}, folder, 'good.pth')
    (folder / 'harmful').mkdir()
    harmful = HARMFUL['os.system'](folder / 'harmful', ran)
    monkeypatch.setitem(ZOOS, zoo, lambda: {'good': str(good), 'harmful': str(harmful)})
    state = CheckpointLoader.load_checkpoint(f'{zoo}://good', logger='silent')['state_dict']
    assert list(state) == ['a' if zoo == 'mmcls' else 'backbone.a']
    with pytest.raises(UserError, match='refused'):
        CheckpointLoader.load_checkpoint(f'{zoo}://harmful', logger='silent')
    with pytest.raises(UserError, match=f'mmengine has no {zoo}://x; it has good, harmful'):
        CheckpointLoader.load_checkpoint(f'{zoo}://x', logger='silent')
    assert not ran.exists()


@pytest.mark.parametrize(('zoo', 'model'), [('torchvision', 'resnet18'), ('open-mmlab', 'vgg16_caffe')])
def test_the_zoos_are_mmengines_own(monkeypatch, zoo, model):
    asked = []
    monkeypatch.setattr(
        'mmseg_volo.checkpoints.mmengine_loader.read_checkpoint', lambda source, location: asked.append(source) or {}
    )
    CheckpointLoader.load_checkpoint(f'{zoo}://{model}', logger='silent')
    assert asked[0].startswith('https://') and model.split('_')[0] in asked[0]


def segmentor_config() -> Config:
    backbone = dict(type='VOLO', arch=hostile_files.ARCH, img_size=32, out_indices=(3,))
    head = dict(type='FCNHead', in_channels=16, in_index=0, channels=16, num_convs=0, concat_input=False, num_classes=2)
    return Config(
        dict(
            model=dict(type='EncoderDecoder', backbone=backbone, decode_head=head, test_cfg=dict(mode='whole')),
            test_pipeline=[dict(type='LoadImageFromFile'), dict(type='PackSegInputs')],
            test_dataloader=dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='PackSegInputs')])),
        )
    )


def test_mmsegs_init_model_reads_our_checkpoints_and_refuses_harmful_ones(folders):
    folder, ran = folders
    init_default_scope('mmseg')
    model = MODELS.build(segmentor_config().model)
    meta = dict(dataset_meta=dict(classes=('a', 'b'), palette=[[0, 0, 0]] * 2))
    path = saved(dict(state_dict=model.state_dict(), meta=meta), folder, 'good.pth')
    loaded = init_model(segmentor_config(), str(path), device='cpu')
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert loaded.dataset_meta == meta['dataset_meta']
    with pytest.raises(UserError, match='refused'):
        init_model(segmentor_config(), str(HARMFUL['os.system'](folder, ran)), device='cpu')
    assert not ran.exists()


def test_mmsegs_inferencer_does_not_take_its_config_from_a_checkpoint(folders):
    folder, ran = folders
    path = ODD['config that is a program'](folder, ran)
    with pytest.raises(ValueError, match='Cannot find the config in the checkpoint'):
        MMSegInferencer(None, weights=str(path), device='cpu', scope='mmseg')
    assert not ran.exists()


# Resuming


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    def forward(self, x, mode='tensor'):
        return dict(loss=self.layer(x).square().mean())


def trained(work_dir: Path, iterations: int, resume: Path | None = None) -> Runner:
    """A run of mmengine with AdamW, schedulers, a moving average and a message hub in its checkpoint."""
    torch.manual_seed(0)
    data = [dict(x=x) for x in torch.randn(8, 3)]
    runner = Runner(
        Toy(),
        str(work_dir),
        train_dataloader=dict(
            dataset=data,
            batch_size=4,
            sampler=dict(type='InfiniteSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2)),
        param_scheduler=[dict(type=LinearLR, by_epoch=False, end=3), dict(type=PolyLR, by_epoch=False, begin=3, end=9)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False)),
        custom_hooks=[dict(type=EMAHook)],
        load_from=resume and str(resume),
        resume=resume is not None,
        experiment_name=f'{work_dir.name}-{iterations}',
        log_level='ERROR',
    )
    runner.train()
    return runner


def test_a_run_resumes_from_a_checkpoint_whose_config_is_a_program_without_running_it(folders):
    folder, ran = folders
    program = f'open({str(ran)!r}, "w").close()'
    mmengine.Config.fromstring(program, '.py')
    assert ran.exists(), 'this text is harmless and tests nothing'
    ran.unlink()

    trained(folder / 'first', 2)
    contents = torch.load(folder / 'first' / 'iter_2.pth', weights_only=False)
    contents['meta'] |= dict(config=program, cfg=program)
    contents['message_hub']['runtime_info']['cfg'] = program
    resumed = trained(folder / 'resumed', 4, saved(contents, folder))
    assert not ran.exists()
    assert resumed.message_hub.runtime_info['cfg'] == resumed.cfg.pretty_text  # its own

    whole = torch.load(trained(folder / 'whole', 4).work_dir + '/iter_4.pth', weights_only=False)
    again = torch.load(resumed.work_dir + '/iter_4.pth', weights_only=False)
    for part in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        assert same(again[part], whole[part]), part
    assert again['message_hub']['log_scalars'].keys() == whole['message_hub']['log_scalars'].keys()


def hub_after(path: Path, **info) -> dict:
    contents = training_checkpoint()
    contents['message_hub']['runtime_info'] |= info
    return load_from_plain_data(str(saved(contents, path.parent, path.name)))['message_hub']['runtime_info']


@pytest.mark.parametrize('key', ['best_ckpt', 'best_ckpt_mIoU'])
def test_resuming_does_not_delete_files_that_a_checkpoint_names(tmp_path, monkeypatch, key):
    """mmengine removes the previous best checkpoint, and if that path is a folder, everything in it."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / 'iter_3.pth'
    for kept in (str(tmp_path / 'best_mIoU_iter_2.pth'), 'best_mIoU_iter_2.pth'):
        assert hub_after(own, **{key: kept})[key] == kept
    others = ['/home', str(tmp_path), str(tmp_path / 'thesis.tex'), str(tmp_path / 'iter_2.pth'), '../best_x.pth', None]
    for other in [*others, str(tmp_path / 'best_a.pth' / '..'), str(tmp_path / 'sub' / 'best_x.pth')]:
        assert key not in hub_after(own, **{key: other}), other


def test_the_steps_of_checkpoints_to_keep_are_numbers_and_those_to_remove_are_names(tmp_path):
    own = tmp_path / 'iter_3.pth'
    good = dict(keep_ckpt_ids=[1, 2], outdated_checkpoints=['iter_1.pth'])
    assert good.items() <= hub_after(own, **good).items()
    for ids in (['x/../../f'], [1, None], 3):
        assert 'keep_ckpt_ids' not in hub_after(own, keep_ckpt_ids=ids)
    for names in (['/etc/f.pth'], ['../f.pth'], ['iter_1.pth', 'thesis.tex'], 'iter_1.pth'):
        assert 'outdated_checkpoints' not in hub_after(own, outdated_checkpoints=names)


def test_optimizers_and_schedulers_of_every_kind_are_read_as_saved(tmp_path):
    model = nn.Linear(2, 2)
    states = {'scaler': torch.amp.GradScaler('cpu').state_dict()}
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS):
        optimizer = kind(model.parameters(), lr=0.1)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step(lambda: model(torch.ones(1, 2)).sum())
        states[kind.__name__] = optimizer.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for kind in (torch.optim.lr_scheduler.CosineAnnealingLR, torch.optim.lr_scheduler.OneCycleLR):
        states[kind.__name__] = kind(optimizer, 9, 9).state_dict()
    states['ema'] = torch.optim.swa_utils.AveragedModel(model).state_dict()
    states['random'] = dict(numpy=np.random.get_state(), torch=torch.get_rng_state(), words=np.uint64(2**63))
    read = read_checkpoint(saved(states, tmp_path))
    assert same(read, states)


# Replacements for NumPy's and mmengine's types


@pytest.mark.parametrize('dtype', ['f2', '>f4', 'f8', 'i1', '<i8', '>u2', 'u8', 'b1', 'c16'])
@pytest.mark.parametrize('shape', [(), (0,), (3,), (2, 3)], ids=str)
def test_arrays_and_numbers_are_read_as_saved_and_saved_as_ordinary_ones(tmp_path, dtype, shape):
    array = np.asfortranarray(np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape)).astype(dtype)
    read = read_checkpoint(saved({'array': array, 'number': array.dtype.type(1)}, tmp_path))
    expected = pickle.loads(pickle.dumps(array, 2))  # in this machine's byte order
    np.testing.assert_array_equal(read['array'], expected, strict=True)
    assert type(read['number']) is array.dtype.type and read['number'] == 1
    again = torch.load(saved(read, tmp_path, 'again.pth'), weights_only=False)
    assert type(again['array']) is np.ndarray
    for protocol in range(6):
        assert type(pickle.loads(pickle.dumps(read['array'], protocol))) is np.ndarray


def test_a_history_buffer_brings_its_numbers_but_no_methods(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1], max_length=5)
    own = dict(HistoryBuffer._statistics_methods)
    buffer._statistics_methods = {'mean': HistoryBuffer.max, 'open': HistoryBuffer.min}
    buffer.extra = 1
    read = read_checkpoint(saved({'x': buffer}, tmp_path))['x']
    assert type(read) is HistoryBuffer and HistoryBuffer._statistics_methods == own
    assert read.statistics('mean') == 1.5 and read.max_length == 5 and not hasattr(read, 'extra')
    for _ in range(9):
        read.update(3.0)
    assert list(read.data[0]) == [3.0] * 5


def test_types_that_others_allowed_are_not_read(tmp_path):
    path = saved({'x': Call(builtins.range, 3)}, tmp_path)
    torch.serialization.add_safe_globals([builtins.range])
    try:
        assert torch.load(path)['x'] == range(3)
        with pytest.raises(UserError, match='refused: it asks to run range'):
            read_checkpoint(path)
        assert torch.load(path)['x'] == range(3)
    finally:
        torch.serialization.clear_safe_globals()


def test_threads_may_read_at_once(tmp_path):
    path = saved(training_checkpoint(), tmp_path)
    read = []
    threads = [threading.Thread(target=lambda: read.extend(read_checkpoint(path) for _ in range(5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 40


def test_a_changed_byte_in_an_archives_weights_is_noticed(tmp_path):
    path = saved({'a': torch.zeros(1000)}, tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 2000] = 1
    path.write_bytes(content)
    assert torch.load(path)['a'].any(), 'torch does not notice'
    with pytest.raises(UserError, match='damaged .the checksum of f/data/0 is wrong'):
        read_checkpoint(path)


def test_the_device_is_the_callers(tmp_path):
    path = saved({'a': torch.ones(2)}, tmp_path)
    assert read_checkpoint(path, torch.device('meta'))['a'].is_meta
    assert load_from_plain_data(str(path), 'cpu')['a'].device.type == 'cpu'


def test_a_bare_state_dict_loads_into_a_model_by_mmengine(tmp_path):
    theirs, ours = nn.Linear(2, 2), nn.Linear(2, 2)
    load_checkpoint(ours, str(saved(theirs.state_dict(), tmp_path)), logger='silent')
    assert torch.equal(ours.weight, theirs.weight)
