"""Read harmful, odd and damaged checkpoints and models in every way: tests/soak/hostile_files.py [--short]

Print a table, and exit with 1 if a file ran code, ended the interpreter, hung, or raised anything but UserError.
"""

import argparse
import builtins
import copy
import functools
import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmseg.registry import MODELS
from prettytable import PrettyTable
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mmseg_volo import VOLO
from mmseg_volo.apis.predictor import Predictor
from mmseg_volo.apis.sources import load_model, try_out
from mmseg_volo.checkpoints.plain_config import plain_config
from mmseg_volo.checkpoints.reading import read_checkpoint
from mmseg_volo.errors import UserError

ARCH = dict(layers=(1, 1, 1, 1), embed_dims=(8, 16), num_heads=(1, 2), mlp_ratio=1, stem_channels=4)
SECONDS, BYTES = 30, 4 << 30  # time limit per file
OUTCOMES = ['refused', 'loaded as saved', 'loaded, other values', 'other error', 'crashed or hung', 'code ran']

Maker = Callable[[Path, Path], Path | str]  # (new folder, file that code would create) -> checkpoint


class Call:
    """An object that is pickled as a call of ``function``."""

    def __init__(self, function: Callable, *args, state: object = None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def small_volo(**kwargs) -> VOLO:
    torch.manual_seed(0)
    return VOLO(ARCH, img_size=32, **kwargs)


@functools.cache
def _training_checkpoint() -> dict:
    model = small_volo()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return dict(
        meta=dict(epoch=0, iter=3, seed=0, dataset_meta=dict(classes=('a', 'b'), palette=np.eye(2, 3))),
        state_dict=model.state_dict(),
        message_hub=dict(
            log_scalars=OrderedDict(loss=HistoryBuffer([2.0, 1.0], [1, 1])),
            runtime_info=OrderedDict(iter=3, eta=np.float64(0)),
            resumed_keys=OrderedDict(loss=True, iter=True),
        ),
        optimizer=optimizer.state_dict(),
        param_schedulers=[dict(last_step=3)],
        args=argparse.Namespace(lr=1e-3),
    )


def training_checkpoint() -> dict:
    """A checkpoint of ``small_volo`` as mmengine saves it, with settings as timm saves them."""
    return copy.deepcopy(_training_checkpoint())


def saved(contents: object, folder: Path, name: str = 'f.pth', **kwargs) -> Path:
    torch.save(contents, folder / name, **kwargs)
    return folder / name


def rewritten(path: Path, changed: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive with some records replaced or added, and correct checksums."""
    with zipfile.ZipFile(path) as archive:
        records = {name.partition('/')[2]: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in (records | changed).items():
            archive.writestr(f'f/{name}', content)
    return path


def with_pickle(content: bytes) -> Maker:
    return lambda folder, ran: rewritten(saved({}, folder), {'data.pkl': content})


def creating(ran: Path) -> Call:
    return Call(builtins.open, str(ran), 'w')


def within(*keys) -> Maker:
    """A zip archive of a training checkpoint in which the value at ``keys`` creates a file."""

    def make(folder: Path, ran: Path) -> Path:
        contents = part = training_checkpoint()
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = creating(ran)
        return saved(contents, folder)

    return make


def calling(call: Callable[[Path, Path], Call]) -> Maker:
    return lambda folder, ran: saved({'weight': torch.zeros(1), 'x': call(folder, ran)}, folder)


def bare_pickle(protocol: int, name: str = 'f.pth') -> Maker:
    def make(folder: Path, ran: Path) -> Path:
        (folder / name).write_bytes(pickle.dumps({'state_dict': {}, 'x': creating(ran)}, protocol))
        return folder / name

    return make


def old_tar(first: str) -> Maker:
    """The format of torch before 0.1.10, with a member called ``first`` before the others."""

    def make(folder: Path, ran: Path) -> Path:
        parts = {first: b'', 'storages': pickle.dumps(creating(ran), 2), 'tensors': b'', 'pickle': b''}
        with tarfile.open(folder / 'f.pth', 'w', encoding='latin-1') as tar:
            for name, content in parts.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return folder / 'f.pth'

    return make


def another_file(folder: Path, ran: Path) -> Call:
    """Reads a second, harmful file without torch's restrictions."""
    return Call(functools.partial(torch.load, weights_only=False), str(saved(creating(ran), folder, 'second.pth')))


def in_history_buffer(folder: Path, ran: Path) -> HistoryBuffer:
    buffer = HistoryBuffer([1.0], [1])
    buffer._log_history = creating(ran)
    return buffer


# Each file runs code when it is unpickled without restrictions.
HARMFUL: dict[str, Maker] = {
    **{
        f'zip archive, protocol {protocol}': lambda folder, ran, protocol=protocol: saved(
            {'x': creating(ran)}, folder, pickle_protocol=protocol
        )
        for protocol in range(6)
    },
    **{
        f'old format, protocol {protocol}': lambda folder, ran, protocol=protocol: saved(
            {'x': creating(ran)}, folder, pickle_protocol=protocol, _use_new_zipfile_serialization=False
        )
        for protocol in range(6)
    },
    **{f'bare pickle, protocol {protocol}': bare_pickle(protocol) for protocol in range(6)},
    'called .safetensors': bare_pickle(2, 'f.safetensors'),
    'called .pth.tar': bare_pickle(2, 'f.pth.tar'),
    'tar': old_tar('first'),
    'tar that starts like a pickle': old_tar('\x80\x02'),
    'tar that starts like a zip archive': old_tar('PK'),
    'among the weights': within('state_dict', 'pos_embed'),
    'in the optimizer': within('optimizer', 'state', 0),
    'in the log scalars': within('message_hub', 'log_scalars', 'loss'),
    'in the runtime info': within('message_hub', 'runtime_info', 'iter'),
    'in the schedulers': within('param_schedulers', 0),
    'in the classes': within('meta', 'dataset_meta', 'classes'),
    'in a HistoryBuffer': calling(in_history_buffer),
    'in a Namespace': calling(lambda folder, ran: argparse.Namespace(x=creating(ran))),
    'in an array of objects': calling(lambda folder, ran: np.array([creating(ran)], dtype=object)),
    'in the rebuilding of a tensor': calling(
        lambda folder, ran: Call(torch._tensor._rebuild_from_type_v2, builtins.open, torch.Tensor, (str(ran), 'w'), {})
    ),
    'os.system': calling(lambda folder, ran: Call(os.system, f'touch {ran}')),
    'exec': calling(lambda folder, ran: Call(builtins.exec, f'open({str(ran)!r}, "w")')),
    'torch.load': calling(another_file),
    'torch.save': calling(lambda folder, ran: Call(torch.save, 0, str(ran))),
    'Config.fromstring': calling(lambda folder, ran: Call(Config.fromstring, f'open({str(ran)!r}, "w")', '.py')),
}


def training_with(*keys, value: object) -> Maker:
    def make(folder: Path, ran: Path) -> Path:
        contents = part = training_checkpoint()
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        return saved(contents, folder)

    return make


def config_text(folder: Path, ran: Path) -> Path:
    contents = training_checkpoint()
    program = f'open({str(ran)!r}, "w").close()'
    contents['meta'] |= dict(cfg=program, config=program)
    contents['message_hub']['runtime_info']['cfg'] = program
    return saved(contents, folder)


def lying_tensor(offset: int, size: tuple, stride: tuple, **kwargs) -> Maker:
    def make(folder: Path, ran: Path) -> Path:
        call = Call(
            torch._utils._rebuild_tensor_v2, torch.zeros(4)._typed_storage(), offset, size, stride, False, OrderedDict()
        )
        return saved(training_checkpoint() | {'state_dict': {'pos_embed': call}}, folder, **kwargs)

    return make


def strange_tensor(function: Callable, *args) -> Maker:
    return training_with('state_dict', 'pos_embed', value=Call(function, *args))


def array(shape: object, dtype: object, raw: object) -> Maker:
    state = (1, shape, dtype, False, raw)
    call = Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b'b', state=state)
    return training_with('meta', 'dataset_meta', value=call)


def resized_storage(size: int) -> Maker:
    return lambda folder, ran: rewritten(saved(training_checkpoint(), folder), {'data/0': bytes(size)})


def overlapping(folder: Path, ran: Path) -> Path:
    """A zip archive in which a thousand records share the same bytes."""
    path = saved({'a': torch.zeros(10_000)}, folder)
    with zipfile.ZipFile(path, 'a') as archive:
        largest = max(archive.filelist, key=lambda record: record.file_size)
        archive.filelist += [largest] * 1000
        archive._didModify = True
    return path


def safetensors(header: object, data: bytes = bytes(16), length: int | None = None) -> Maker:
    def make(folder: Path, ran: Path) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        content = struct.pack('<Q', len(text) if length is None else length) + text + data
        (folder / 'f.safetensors').write_bytes(content)
        return folder / 'f.safetensors'

    return make


def entry(dtype: object = 'F32', shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return dict(dtype=dtype, shape=shape, data_offsets=offsets)


def place(kind: str, suffix: str = '.pth') -> Maker:
    def make(folder: Path, ran: Path) -> Path | str:
        path = folder / f'f{suffix}'
        match kind:
            case 'empty':
                path.touch()
            case 'folder':
                path.mkdir()
            case 'FIFO':
                os.mkfifo(path)
            case 'link to itself':
                path.symlink_to(path)
            case 'link to a device':
                path.symlink_to('/dev/zero')
        return path

    return make


# These files run no code. They state wrong sizes, are not regular files, or hold unexpected objects.
ODD: dict[str, Maker] = {
    'config that is a program': config_text,
    **{
        f'{kind}, {suffix}': place(kind, suffix)
        for kind in ('empty', 'folder', 'FIFO', 'link to itself', 'link to a device', 'nothing there')
        for suffix in ('.pth', '.safetensors')
    },
    'a name too long': lambda folder, ran: 'x' * 5000,
    'a name with a zero byte': lambda folder, ran: 'x\0y.pth',
    'the home of nobody': lambda folder, ran: '~nobody-of-that-name/f.pth',
    'an empty name': lambda folder, ran: '',
    'a store': lambda folder, ran: 's3://bucket/f.pth',
    'an unknown model': lambda folder, ran: 'torchvision://resnet1',
    'record outside the archive': lambda folder, ran: rewritten(saved({}, folder), {'../../../outside': b'x'}),
    'archive that unpacks to 64 MB': lambda folder, ran: rewritten(
        saved({}, folder), {'data.pkl': bytes(1 << 26)}, zipfile.ZIP_DEFLATED
    ),
    'archive of overlapping records': overlapping,
    'archive of nothing': lambda folder, ran: Path(zipfile.ZipFile(folder / 'f.pth', 'w').filename),
    'TorchScript': lambda folder, ran: rewritten(saved({}, folder), {'constants.pkl': b''}),
    'storage too short': resized_storage(1),
    'storage too long': resized_storage(1 << 16),
    'storage of nothing': resized_storage(0),
    **{
        f'{form} tensor of {size} numbers at {offset}, stride {stride}': lying_tensor(
            offset, size, stride, _use_new_zipfile_serialization=form == 'new'
        )
        for form in ('new', 'old')
        for offset, size, stride in [
            (0, (1 << 40,), (1,)),
            (0, (1 << 62, 8), (8, 1)),
            (1 << 40, (1,), (1,)),
            (-4, (4,), (1,)),
            (0, (4,), (-1,)),
            (0, (4,), (1 << 60,)),
            (0, (-4,), (1,)),
            (3, (4,), (1,)),
        ]
    },
    'sparse tensor outside itself': strange_tensor(
        torch._utils._rebuild_sparse_tensor,
        torch.sparse_coo,
        (torch.tensor([[1 << 40]]), torch.ones(1), torch.Size([2]), False),
    ),
    'sparse tensor': training_with('state_dict', 'pos_embed', value=torch.zeros(1, 2, 2, 16).to_sparse()),
    'nested tensor outside itself': strange_tensor(
        torch._utils._rebuild_nested_tensor,
        torch.zeros(4),
        torch.tensor([[1 << 20]]),
        torch.tensor([[1]]),
        torch.tensor([1 << 30]),
    ),
    'nested tensor': training_with('state_dict', 'pos_embed', value=torch.nested.nested_tensor([torch.zeros(2)])),
    'tensor without numbers': strange_tensor(
        torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (1, 2, 2, 16), (64, 32, 16, 1), False
    ),
    'tensor without storage': strange_tensor(
        torch._utils._rebuild_wrapper_subclass,
        torch.Tensor,
        torch.float32,
        (1, 2, 2, 16),
        (64, 32, 16, 1),
        0,
        torch.strided,
        torch.device('cpu'),
        False,
    ),
    'quantized tensor': training_with(
        'state_dict', 'pos_embed', value=torch.quantize_per_tensor(torch.zeros(1, 2, 2, 16), 0.1, 0, torch.quint8)
    ),
    'complex tensor': training_with('state_dict', 'pos_embed', value=torch.zeros(1, 2, 2, 16, dtype=torch.complex64)),
    'array larger than its bytes': array((1 << 40,), np.dtype('f8'), bytes(8)),
    'array of negative size': array((-3,), np.dtype('f8'), bytes(8)),
    'array of objects': array((2,), np.dtype('O'), [1, 2]),
    'array of objects from bytes': array((1,), np.dtype('O'), bytes(8)),
    'array of records': training_with('meta', 'dataset_meta', value=np.zeros(2, dtype=[('a', 'f8'), ('b', 'O')])),
    'array of what is no dtype': array((1,), 3, bytes(8)),
    'array asked for by size': training_with('meta', 'dataset_meta', value=Call(np.ndarray, (1 << 33,))),
    'number of objects': training_with(
        'meta', 'dataset_meta', value=Call(np._core.multiarray.scalar, np.dtype('O'), bytes(8))
    ),
    'dtype with fields outside itself': training_with(
        'meta',
        'dataset_meta',
        value=Call(
            np.dtype,
            'V8',
            False,
            True,
            state=(3, '|', None, ('a',), {'a': (np.dtype('O'), 1 << 40)}, 8, 1, 0),
        ),
    ),
    'statistics that are others': training_with(
        'message_hub',
        'log_scalars',
        'loss',
        value=Call(
            HistoryBuffer,
            state=dict(statistics_methods=dict(mean=OrderedDict), _log_history=[], _count_history=[], max_length=9),
        ),
    ),
    'HistoryBuffer of text': training_with(
        'message_hub',
        'log_scalars',
        'loss',
        value=Call(HistoryBuffer, state=dict(_log_history='a', _count_history='b', max_length='c')),
    ),
    'Namespace with methods': training_with('args', value=argparse.Namespace(__deepcopy__=OrderedDict, x=1)),
    'Namespace as message hub': training_with('message_hub', value=argparse.Namespace(_log_scalars={})),
    'list as weights': training_with('state_dict', value=[1]),
    'list as meta': training_with('meta', value=[1]),
    'number as hub': training_with('message_hub', value=1),
    'hub without parts': training_with('message_hub', value={}),
    'text as a tensor': training_with('state_dict', 'pos_embed', value='x' * 1000),
    'number as a name': training_with('state_dict', 3, value=torch.zeros(1)),
    'escape sequence as a name': training_with('state_dict', '\x1b[2J\n', value=torch.zeros(1)),
    'weights with a method': training_with(
        'state_dict', value=Call(OrderedDict, state=dict(copy=bytearray, _metadata=3, items=bytearray))
    ),
    'a class': with_pickle(b'\x80\x02ctorch.nn.modules.linear\nLinear\n.'),
    'a name that is no name': with_pickle(b'\x80\x02c\x1b[2J\x00\nsystem\n.'),
    'a name of 2000 letters': with_pickle(b'\x80\x02c' + b'x' * 2000 + b'\ny\n.'),
    'lists in lists': with_pickle(b'\x80\x02' + b']' * 20_000 + b'a' * 19_999 + b'.'),
    'tuples in tuples': with_pickle(b'\x80\x02}X\x01\x00\x00\x00a)' + b'\x85' * 20_000 + b's.'),
    'a dict in itself': with_pickle(b'\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.'),
    'an end without a beginning': with_pickle(b'\x80\x02.'),
    'no end': with_pickle(b'\x80\x02}'),
    'an item set in a class': with_pickle(b'\x80\x02ccollections\nOrderedDict\nK\x01K\x02s.'),
    'safetensors, header of 1 GB': safetensors(b'{}', length=1 << 30),
    'safetensors, header of 2^63': safetensors(b'{}', length=1 << 63),
    'safetensors, no header': safetensors(b''),
    'safetensors, header is text': safetensors(b'hello world'),
    'safetensors, header is a list': safetensors([1]),
    'safetensors, header is no UTF-8': safetensors(b'{"\xff": 1}'),
    'safetensors, nested header': safetensors(b'[' * 100_000),
    'safetensors, the same name twice': safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
    'safetensors, overlap': safetensors({'a': entry(), 'b': entry()}),
    'safetensors, hole': safetensors({'a': entry(offsets=(4, 20))}, bytes(20)),
    'safetensors, beyond the end': safetensors({'a': entry(shape=(1 << 30,), offsets=(0, 1 << 32))}),
    'safetensors, backwards': safetensors({'a': entry(offsets=(16, 0))}),
    'safetensors, negative': safetensors({'a': entry(shape=(-4,), offsets=(-16, 0))}),
    'safetensors, more numbers than bytes': safetensors({'a': entry(shape=(1 << 20,))}),
    'safetensors, product overflows': safetensors({'a': entry(shape=(1 << 62, 4, 4))}),
    'safetensors, unknown dtype': safetensors({'a': entry(dtype='F31')}),
    'safetensors, dtype of 4 bits': safetensors({'a': entry(dtype='F4', shape=(32,))}),
    'safetensors, more behind': safetensors({'a': entry()}, bytes(99)),
}


@functools.cache
def _model() -> tuple[str, dict[str, Tensor]]:
    """``config.json`` and weights of a segmentor with ``small_volo``."""
    init_default_scope('mmseg')
    pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackSegInputs')]
    head = dict(type='FCNHead', in_channels=16, in_index=3, channels=8, num_convs=1, num_classes=2)
    model = dict(
        type='SlidingSegmentor',
        data_preprocessor=dict(type='SegDataPreProcessor', mean=[0.0] * 3, std=[1.0] * 3, size=(32, 32)),
        backbone=dict(type='VOLO', arch=ARCH, img_size=32),
        decode_head=dict(head, norm_cfg=dict(type='BN')),
        test_cfg=dict(mode='slide', crop_size=(32, 32), stride=(16, 16)),
    )
    cfg = Config(dict(model=model, test_pipeline=pipeline, test_dataloader=dict(dataset=dict(pipeline=pipeline))))
    content = plain_config(cfg, 'small', dict(classes=('a', 'b'), palette=[[0, 0, 0], [9, 9, 9]]))
    state = MODELS.build(cfg.model).state_dict()
    state |= {f'backbone.{key}': tensor for key, tensor in _training_checkpoint()['state_dict'].items()}
    return json.dumps(content), state


def model_folder(change: Callable[[dict, Path], object], weights: Callable[[dict], object] = dict) -> Maker:
    """A folder as push writes it, after ``change(content of config.json, ran)`` and ``weights(state)``."""

    def make(folder: Path, ran: Path) -> Path:
        text, state = _model()
        content = json.loads(text)
        changed = change(content, ran)
        text = changed if isinstance(changed, str) else json.dumps(content)
        (folder / 'config.json').write_text(text)
        state = dict(state)
        weights(state)
        save_file(state, folder / 'model.safetensors')
        return folder

    return make


def with_part(*keys: object, value: object) -> Maker:
    """A model folder whose ``config.json`` holds ``value``, or ``value(ran)``, at ``keys``."""

    def change(content: dict, ran: Path) -> None:
        part: object = content
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value(ran) if callable(value) else value

    return model_folder(change)


def touching(ran: Path) -> dict:
    """What mmengine's registry would import and call."""
    return dict(type='os.system', command=f'touch {ran}')


def pickled_weight(ran: Path) -> str:
    """A file from which mmseg's losses would read class weights."""
    path = ran.with_name('weight.pkl')
    path.write_bytes(pickle.dumps(creating(ran)))
    return str(path)


def pickle_as_weights(folder: Path, ran: Path) -> Path:
    model_folder(lambda content, ran: None)(folder, ran)
    bare_pickle(2, 'model.safetensors')(folder, ran)
    return folder


# Models whose files run code, or read other files, where nothing checks them.
HARMFUL_MODELS: dict[str, Maker] = {
    'function as backbone': with_part('model', 'backbone', value=touching),
    'function as model': with_part('model', value=touching),
    'function as norm': with_part('model', 'decode_head', 'norm_cfg', value=touching),
    'function as preprocessor': with_part('model', 'data_preprocessor', value=touching),
    'function in the pipeline': with_part('test_pipeline', 1, value=touching),
    'function in a transform': with_part(
        'test_pipeline', 1, value=lambda ran: dict(type='TestTimeAug', transforms=[[touching(ran)]])
    ),
    'function as average': with_part('tta_model', value=touching),
    'function in the scale': with_part('test_pipeline', 1, 'scale', value=touching),
    'function as class': with_part('dataset_meta', 'classes', 0, value=touching),
    'function under another key': with_part('hooks', value=touching),
    'initial weights': with_part(
        'model', 'backbone', 'init_cfg', value=lambda ran: dict(type='Pretrained', checkpoint=pickled_weight(ran))
    ),
    'class weights in a file': with_part(
        'model',
        'decode_head',
        'loss_decode',
        value=lambda ran: dict(type='CrossEntropyLoss', class_weight=pickled_weight(ran)),
    ),
    'class weights in a file, elsewhere': with_part('model', 'decode_head', 'class_weight', value=pickled_weight),
    'pickle as weights': pickle_as_weights,
}
# Their weights or configs lie, are damaged, or are unusually large.
ODD_MODELS: dict[str, Maker] = {
    'no config': lambda folder, ran: (bare_pickle(2, 'model.safetensors')(folder, ran), folder)[1],
    'no weights': lambda folder, ran: ((folder / 'config.json').write_text(_model()[0]), folder)[1],
    'imports': with_part('custom_imports', value=dict(imports=['os'])),
    'scope': with_part('model', 'backbone', '_scope_', value='os'),
    'base': with_part('_base_', value='/etc/passwd'),
    'path as arch': with_part('model', 'backbone', 'arch', value='../../x'),
    'path as name': with_part('name', value='../../x'),
    'path as file': with_part('weights', value='../../x.safetensors'),
    'backend of files': with_part('test_pipeline', 0, 'backend_args', value=dict(backend='petrel')),
    'escape sequence': with_part('dataset_meta', 'classes', 0, value='\x1b[2J'),
    'another library': model_folder(lambda content, ran: '{"architecture": "volo_d1_224"}'),
    'newer format': with_part('format_version', value=99),
    'empty': model_folder(lambda content, ran: ' '),
    'list': model_folder(lambda content, ran: '[]'),
    'deep': model_folder(lambda content, ran: '[' * 100_000),
    'deep object': model_folder(lambda content, ran: '{"model":' * 50_000),
    'deep but closed': with_part('model', 'x', value=functools.reduce(lambda inner, _: [inner], range(200), 0)),
    'cut off': model_folder(lambda content, ran: json.dumps(content)[:-9]),
    'large': model_folder(lambda content, ran: json.dumps(content) + ' ' * 2**20),
    'NaN': with_part('model', 'decode_head', 'dropout_ratio', value=float('nan')),
    'infinity': model_folder(lambda content, ran: json.dumps(content).replace('"num_convs": 1', '"num_convs": 1e999')),
    'digits': model_folder(
        lambda content, ran: json.dumps(content).replace('"channels": 8', f'"channels": {"9" * 5000}')
    ),
    'wide': with_part('model', 'decode_head', 'channels', value=2**20),
    'wider': with_part('model', 'decode_head', 'channels', value=2**40),
    'many layers': with_part('model', 'decode_head', 'num_convs', value=10**5),
    'many blocks': with_part('model', 'backbone', 'arch', 'layers', 'tuple', value=[10**4] * 4),
    'many entries': with_part('model', 'decode_head', 'in_index', value=list(range(10**4))),
    'many classes': with_part('dataset_meta', 'classes', value=['a'] * 10**4),
    'large picture': with_part('test_pipeline', 1, 'scale', value=dict(tuple=[2**20, 2**20])),
    'other classes': with_part('dataset_meta', 'classes', value=['a', 'b', 'c']),
    'no colours': with_part('dataset_meta', 'palette', value=[]),
    'no pipeline': with_part('test_pipeline', value=[]),
    'pipeline without sizes': with_part('test_pipeline', 1, value=dict(type='Resize')),
    'pipeline of words': with_part('test_pipeline', value=['slide']),
    'model as step': with_part('test_pipeline', 1, value=dict(type='VOLO')),
    'step as model': with_part('model', 'decode_head', value=dict(type='PackSegInputs', num_classes=2)),
    'no mode': with_part('model', 'test_cfg', value={}),
    'steps of nothing': with_part('model', 'test_cfg', 'stride', value=[0, 0]),
    'map that is not there': with_part('model', 'decode_head', 'in_index', value=9),
    'strange argument': with_part('model', 'backbone', 'speed', value=9),
    'tuple of more': with_part('model', 'test_cfg', 'stride', value=dict(tuple=[1], more=1)),
    'tensor missing': model_folder(lambda content, ran: None, lambda state: state.pop('backbone.pos_embed')),
    'tensor too many': model_folder(lambda content, ran: None, lambda state: state.update(more=torch.zeros(1))),
    'tensor of another shape': model_folder(
        lambda content, ran: None, lambda state: state.update({'backbone.pos_embed': torch.zeros(1, 1, 1, 16)})
    ),
    'tensor of integers': model_folder(
        lambda content, ran: None,
        lambda state: state.update({'backbone.pos_embed': state['backbone.pos_embed'].int()}),
    ),
    'tensor of NaN': model_folder(
        lambda content, ran: None,
        lambda state: state.update({'backbone.pos_embed': torch.full_like(state['backbone.pos_embed'], torch.nan)}),
    ),
}


def changed_models(rng: random.Random) -> Iterator[Maker]:
    """An endless stream of models with one value of ``config.json`` replaced, or some of its bytes."""
    values = [None, True, 0, -1, 1, 2, 3, 7.5, 2**20, 'slide', 'bilinear', [], [1, 2], {}, {'tuple': [3, 3]}, [[]]]

    def places(part: object, keys: tuple = ()) -> Iterator[tuple]:
        items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for key, item in items:
            yield (*keys, key)
            yield from places(item, (*keys, key))

    def with_other_bytes(seed: int) -> Maker:
        def change(content: dict, ran: Path) -> str:
            local, text = random.Random(seed), list(json.dumps(content))
            for _ in range(local.randint(1, 4)):
                text[local.randrange(len(text))] = chr(local.randrange(32, 127))
            return ''.join(text)

        return model_folder(change)

    all_places = [keys for keys in places(json.loads(_model()[0])) if keys[0] != 'versions']
    while True:
        yield with_part(*rng.choice(all_places), value=rng.choice(values))
        yield with_other_bytes(rng.getrandbits(32))


def damaged(rng: random.Random) -> Iterator[tuple[str, Maker]]:
    """An endless stream of damaged files: cut off, or with one to eight bytes changed."""
    contents = training_checkpoint()
    forms = {
        'archive': lambda folder: saved(contents, folder),
        'old format': lambda folder: saved(contents, folder, _use_new_zipfile_serialization=False),
        'safetensors': lambda folder: (
            save_file(contents['state_dict'], folder / 'f.safetensors') or folder / 'f.safetensors'
        ),
    }

    def cut_off(content: bytearray, rng: random.Random) -> bytearray:
        return content[: rng.randrange(len(content))]

    def changed(content: bytearray, rng: random.Random) -> bytearray:
        for _ in range(rng.randint(1, 8)):
            near = rng.choice([len(content), min(len(content), 2000)])  # half of the changes hit the headers
            content[rng.choice([1, -1]) * rng.randrange(1, near)] = rng.randrange(256)
        return content

    def of_file(form: Callable, damage: Callable, seed: int) -> Maker:
        def make(folder: Path, ran: Path) -> Path:
            path = form(folder)
            path.write_bytes(damage(bytearray(path.read_bytes()), random.Random(seed)))
            return path

        return make

    def of_pickle(seed: int) -> Maker:
        def make(folder: Path, ran: Path) -> Path:
            path = forms['archive'](folder)
            with zipfile.ZipFile(path) as archive:
                content = bytearray(archive.read('f/data.pkl'))
            return rewritten(path, {'data.pkl': bytes(changed(content, random.Random(seed)))})

        return make

    while True:
        for name, form in forms.items():
            yield f'{name}, cut off', of_file(form, cut_off, rng.getrandbits(32))
            yield f'{name}, bytes changed', of_file(form, changed, rng.getrandbits(32))
        yield 'pickle in an archive, bytes changed', of_pickle(rng.getrandbits(32))


MODEL = small_volo(init_cfg=dict(type='Pretrained', checkpoint=''))


def from_init_cfg(path: str) -> dict:
    MODEL.init_cfg['checkpoint'] = path
    MODEL.init_weights()
    return MODEL.state_dict()


def from_load_checkpoint(path: str) -> dict:
    load_checkpoint(MODEL, path, logger='silent')
    return MODEL.state_dict()


def from_read_checkpoint(path: str) -> dict:
    contents = read_checkpoint(path)
    state = contents.get('state_dict', contents)
    return state if isinstance(state, dict) else {}


def from_folder(path: str) -> dict:
    found = load_model(path, None, {})
    predictor = Predictor(found.config, found.checkpoint, 'cpu', tta=False, amp=False)
    try_out(predictor.model, path)
    return {key.removeprefix('backbone.'): tensor for key, tensor in predictor.model.state_dict().items()}


DOORS = {
    'read_checkpoint': from_read_checkpoint,
    'load_checkpoint': from_load_checkpoint,
    'init_cfg': from_init_cfg,
}


MODEL_DOORS = {'folder': from_folder}


def equal(value: object, tensor: Tensor) -> bool:
    try:
        return torch.equal(value, tensor)
    except (TypeError, RuntimeError):  # not a tensor, or a tensor that cannot be read
        return False


def outcome(path: Path | str, door: str) -> tuple[str, str]:
    """One of ``OUTCOMES``, except the last two, and the exception."""
    expected = _training_checkpoint()['state_dict']
    MODEL.load_state_dict(expected)
    try:
        state = (DOORS | MODEL_DOORS)[door](str(path))
    except UserError as error:
        sentence = str(error)
        return ('refused' if sentence.replace(str(path), '').isprintable() else 'other error'), sentence
    except BaseException as error:
        return 'other error', f'{type(error).__name__}: {error}'
    same = all(equal(state.get(key), tensor) for key, tensor in expected.items())
    return ('loaded as saved' if same else 'loaded, other values'), ''


def outcome_in_time(*args) -> tuple[str, str]:
    """``outcome`` with a time limit, which ends this process."""
    signal.alarm(SECONDS)
    try:
        return outcome(*args)
    finally:
        signal.alarm(0)


def limit_memory() -> None:
    own = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + BYTES, own + BYTES))


class Child:
    """A forked process. If a file ends it, the next file gets a new process."""

    def __init__(self):
        self.pool = None

    def outcome(self, *args) -> tuple[str, str]:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, multiprocessing.get_context('fork'), limit_memory)
        try:
            return self.pool.submit(outcome_in_time, *args).result()
        except BrokenProcessPool:
            self.pool = None
            return 'crashed or hung', ''


def main() -> int:
    parser = argparse.ArgumentParser(description='Hostile, odd and damaged checkpoints through every door.')
    parser.add_argument(
        '--short', action='store_true', help='210 damaged files instead of 7000, 60 models instead of 2000'
    )
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')
    stream, models = damaged(random.Random(args.seed)), changed_models(random.Random(args.seed))
    cases = [
        *(('harmful', name, maker) for name, maker in HARMFUL.items()),
        *(('odd', name, maker) for name, maker in ODD.items()),
        *((kind, '', maker) for kind, maker in itertools.islice(stream, 210 if args.short else 7000)),
    ]
    cases = [(*case, DOORS) for case in cases] + [
        *(('harmful models', name, maker, MODEL_DOORS) for name, maker in HARMFUL_MODELS.items()),
        *(('odd models', name, maker, MODEL_DOORS) for name, maker in ODD_MODELS.items()),
        *(('changed models', '', maker, MODEL_DOORS) for maker in itertools.islice(models, 60 if args.short else 2000)),
    ]
    counts: dict[tuple[str, str], Counter] = {}
    child = Child()
    failures = []
    for kind, name, maker, doors in tqdm(cases, disable=None):
        with tempfile.TemporaryDirectory() as folder:
            ran = Path(folder) / 'ran'
            (Path(folder) / 'file').mkdir()
            path = maker(Path(folder) / 'file', ran)
            for door in doors:
                result, sentence = child.outcome(path, door)
                if ran.exists():
                    result = 'code ran'
                    ran.unlink()
                counts.setdefault((kind, door), Counter())[result] += 1
                if result in OUTCOMES[3:] or (kind.startswith('harmful') and result != 'refused'):
                    failures.append(f'{kind} {name}, {door}: {result} {sentence[:300]!r}')
    table = PrettyTable(['files', 'door', 'cases', *OUTCOMES], align='r')
    table.align['files'] = table.align['door'] = 'l'
    for (kind, door), counted in counts.items():
        table.add_row([kind, door, sum(counted.values()), *(counted[result] for result in OUTCOMES)])
    print(table)
    print(*failures, sep='\n')
    return bool(failures)


if __name__ == '__main__':
    sys.exit(main())
