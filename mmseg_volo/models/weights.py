"""Checkpoints into VOLO: tensors only, and every tensor accounted for."""

import argparse
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from urllib.parse import urlparse
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner import CheckpointLoader, get_external_models, get_mmcls_models, get_torchvision_models
from mmengine.runner.checkpoint import get_deprecated_model_names
from timm.models import adapt_input_conv, get_pretrained_cfg, list_pretrained
from torch import Tensor, nn

from ..errors import UserError

# What an ImageNet classifier has and a backbone has not.
CLASSIFIER = re.compile(r'(head|aux_head|post_network|norm)\..+|cls_token')
STEM = 'patch_embed.conv.0.weight'

# mmengine's schemes that stand for a URL in one of its tables, and those that it fetches by other means.
ZOOS = {
    'torchvision': get_torchvision_models,
    'modelzoo': get_torchvision_models,
    'open-mmlab': get_external_models,
    'openmmlab': get_external_models,
    'mmcls': get_mmcls_models,
}
STORES = [r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://']
MapLocation = str | torch.device | Callable


def resize_pos_embed(pos_embed: Tensor, size: tuple[int, int]) -> Tensor:
    """Position embedding ``[1, h, w, C]`` resized bicubically to ``size``, as the authors do; dtype kept."""
    exact = pos_embed if pos_embed.dtype == torch.float64 else pos_embed.float()
    resized = F.interpolate(exact.permute(0, 3, 1, 2), size=size, mode='bicubic', align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous().to(pos_embed.dtype)


def pretrained_checkpoint(init_cfg: dict | list[dict] | None) -> str | None:
    """Checkpoint that an ``init_cfg`` of type Pretrained names, else None; raises ``UserError`` on keys it ignores."""
    if isinstance(init_cfg, list):
        named = [cfg for cfg in init_cfg if pretrained_checkpoint(cfg) is not None]
        if named and len(init_cfg) > 1:  # mmengine would load it itself, whether it fits or not
            raise UserError(f'VOLO reads a Pretrained init_cfg alone, got it in a list of {len(init_cfg)}')
        return pretrained_checkpoint(named[0]) if named else None
    kind = init_cfg.get('type') if isinstance(init_cfg, dict) else None
    if kind is not PretrainedInit and str(kind).split('.')[-1] != 'Pretrained':  # 'mmengine.Pretrained' too
        return None
    extra = set(init_cfg) - {'type', 'checkpoint'}
    if extra or 'checkpoint' not in init_cfg:
        raise UserError(f"VOLO reads init_cfg=dict(type='Pretrained', checkpoint=...), got {dict(init_cfg)}")
    return init_cfg['checkpoint']


def load_pretrained(model: nn.Module, source: str, architectures: Mapping[str, Mapping]) -> None:
    """Load ``source`` into a VOLO, and log in one line what was loaded, resized and left out.

    Args:
        model: a VOLO; its tensors are untouched unless all of the checkpoint fits.
        source: path, URL or ``timm://name``; see ``docs/weights.md`` for the forms.
        architectures: rows of numbers by name, to say whose weights these are when they do not fit.

    Raises:
        UserError: unreadable, unsafe, or not these weights: any tensor missing, unexpected or of another shape.
    """
    state = _backbone_tensors(read_checkpoint(source), source)
    own = model.state_dict()
    dropped = [key for key in state if CLASSIFIER.fullmatch(key)]
    state = {key: tensor for key, tensor in state.items() if key not in dropped}
    whose = _whose(state, model.arch, architectures)
    unbuilt = {key for key in state if _is_beyond(key, model.out_indices[-1])}
    state = {key: tensor for key, tensor in state.items() if key not in unbuilt}

    changes = []
    if 'pos_embed' in own and 'pos_embed' in state and state['pos_embed'].dim() == 4 and state['pos_embed'].numel():
        old, new = state['pos_embed'].shape[1:3], own['pos_embed'].shape[1:3]
        if old != new:
            state['pos_embed'] = resize_pos_embed(state['pos_embed'], tuple(new))
            changes.append(f'pos_embed resized from {old[0]}x{old[1]} to {new[0]}x{new[1]}')
    if STEM in state and state[STEM].dim() == 4 and state[STEM].shape[1] == 3 != own[STEM].shape[1]:
        state[STEM] = adapt_input_conv(own[STEM].shape[1], state[STEM])
        changes.append(f'stem adapted from 3 to {own[STEM].shape[1]} channels')

    norms = {key for key in own if re.fullmatch(r'norm\d\..+', key)}
    new = norms if norms.isdisjoint(state) else set()  # ImageNet classifiers have no output norms
    problems = _differences(own, state, allowed_missing=new)
    if problems:
        raise UserError(f'{source} does not fit VOLO arch={model.arch!r}{whose}: ' + '; '.join(problems))

    model.load_state_dict(state, strict=False)
    if dropped or unbuilt:
        changes.append(f'{len(dropped) + len(unbuilt)} tensors of the classifier or of unused stages left out')
    if new:
        changes.append(f'{len(new)} tensors of the output norms are new')
    print_log(
        f'VOLO {model.arch}: {len(state)} of {len(own)} tensors loaded from {source}'
        + ''.join(f'; {c}' for c in changes),
        logger='current',
    )


def load_segmentor(model: nn.Module, source: str) -> dict:
    """Load a whole segmentor's checkpoint strictly and return its ``meta`` (classes, palette, config).

    Raises:
        UserError: unreadable, unsafe, or any tensor missing, unexpected or of another shape.
    """
    contents = read_checkpoint(source)
    state = _tensors(contents['state_dict'] if isinstance(contents.get('state_dict'), Mapping) else contents)
    own = model.state_dict()
    problems = _differences(own, state)
    if problems:
        raise UserError(f'{source} does not fit the model of this config: ' + '; '.join(problems))
    model.load_state_dict(state)
    return contents.get('meta', {})


def read_checkpoint(source: str, map_location: MapLocation = 'cpu') -> dict:
    """Contents of a checkpoint, read without running any code in it.

    Args:
        source: path to ``.safetensors`` or to anything ``torch.save`` wrote, http(s) URL, or ``timm://name``.
        map_location: as in ``torch.load``; ``.safetensors`` come to the CPU.

    Raises:
        UserError: missing, damaged, unreachable, or holding more than tensors and plain data.
    """
    try:
        path = Path(local_copy(str(source))).expanduser()
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a home that nobody has
        raise UserError(f'checkpoint not found: {source} ({_first_sentence(error)})') from None
    if not found:
        raise UserError(f'checkpoint not found: {source}; docs/weights.md lists where weights come from')
    name = f'{source}, kept as {path},' if '://' in str(source) else source
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(path)
        with path.open('rb') as file:
            start = file.read(16)
        if not start.startswith((b'PK', b'\x80')):  # neither a zip archive nor a pickle
            raise ValueError(f'it starts with {start!r}')
        if start.startswith(b'PK'):
            _check_archive(path)
        with _plain_data_only():
            contents = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        if 'weights_only' not in str(error).lower() and 'Unsupported' not in str(error):
            raise UserError(f'{name} is not a checkpoint or is damaged ({_first_sentence(error)})') from None
        blamed = re.search(r'(?:GLOBAL|class) ([\w.]+)', str(error))
        raise UserError(
            f'{name} is refused: it {f"asks to run {blamed[1]}" if blamed else "holds more than tensors"}, '
            'and only tensors are read; ask its author for a .safetensors file'
        ) from None
    except Exception as error:  # torch and safetensors raise a dozen kinds for a damaged file
        raise UserError(f'{name} is not a checkpoint or is damaged ({_first_sentence(error)})') from None
    if not isinstance(contents, Mapping):
        raise UserError(f'{source} holds a {type(contents).__name__}, not a state dict')
    return dict(contents)


@CheckpointLoader.register_scheme(['', 'http://', 'https://', *(f'{zoo}://' for zoo in ZOOS), *STORES], force=True)
def load_from_plain_data(filename: str, map_location: MapLocation | None = None) -> dict:
    """A checkpoint as mmengine wants it, for all that mmengine loads itself.

    Left out is the text of the config, because mmengine would execute it, and names of files that mmengine would delete
    on resuming, unless they are of this run: ``docs/security.md``.

    Args:
        filename: as for ``read_checkpoint``, or a name in a table of mmengine's, ``torchvision://resnet50``.
        map_location: as in ``torch.load``, but None means the CPU.

    Raises:
        UserError: as ``read_checkpoint``, and for parts of another type than mmengine's.
    """
    scheme, separator, model = filename.partition('://')
    source = _url_in_zoo(scheme, model) if separator and scheme in ZOOS else filename
    if any(re.match(store, source) for store in STORES):
        raise UserError(f'{source} cannot be checked before it is read; fetch it by hand and give its path')
    contents = read_checkpoint(source, 'cpu' if map_location is None else map_location)
    if scheme == 'mmcls':
        return dict(state_dict=OrderedDict(_backbone_tensors(contents, source)))
    for key in ('state_dict', 'ema_state_dict', 'meta', 'message_hub'):
        if key in contents and not isinstance(contents[key], dict):
            raise UserError(f'{source} holds a {type(contents[key]).__name__} as {key}, not a dict')
    for key in ('state_dict', 'ema_state_dict'):
        if key in contents:
            contents[key] = _plain_state(contents[key], source)
    if 'state_dict' not in contents:
        contents = _plain_state(contents, source)
    if 'meta' in contents:
        contents['meta'] = {key: value for key, value in contents['meta'].items() if key not in ('cfg', 'config')}
    if 'message_hub' in contents:
        contents['message_hub'] = _plain_hub(contents['message_hub'], source)
    return contents


def _url_in_zoo(zoo: str, model: str) -> str:
    if 'mmlab' in zoo:
        model = get_deprecated_model_names().get(model, model)
    urls = ZOOS[zoo]()
    if model not in urls:
        raise UserError(f'mmengine knows no {zoo}://{model}; it knows {_some(sorted(urls))}')
    return urls[model]


def _plain_state(state: Mapping, source: str) -> OrderedDict:
    """``state`` without attributes of its own, which mmengine would call."""
    strange = [key for key, value in state.items() if not isinstance(key, str) or _is_empty_shell(value)]
    if strange:
        raise UserError(f'{source} holds what is no plain tensor with a name: {_some([str(key) for key in strange])}')
    return OrderedDict(state)


def _plain_hub(hub: Mapping, source: str) -> dict:
    parts = {key: hub.get(key) for key in ('log_scalars', 'runtime_info', 'resumed_keys')}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise UserError(f"{source} holds a message hub that is not mmengine's")
    folder = Path(source).expanduser().resolve().parent
    info = parts['runtime_info']
    return parts | {'runtime_info': {key: info[key] for key in info if not _commands(key, info[key], folder)}}


def _commands(key: str, value: object, folder: Path) -> bool:
    """Whether mmengine would execute this entry of a message hub, or delete a file by it that is not of the run."""
    if key == 'cfg':
        return True
    if str(key).startswith('best_ckpt'):
        path = Path(str(value)).resolve()
        return path.parent != folder or not re.fullmatch(r'best_.+\.pth', path.name)
    if key == 'keep_ckpt_ids':
        return not isinstance(value, list) or not all(type(step) is int for step in value)
    if key == 'outdated_checkpoints':
        return not isinstance(value, list) or not all(re.fullmatch(r'[^/]+\.pth', str(name)) for name in value)
    return False


def _check_archive(path: Path) -> None:
    """Raise if a zip archive would unpack to more than its size, or has a changed byte; torch looks at neither."""
    with ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise ValueError('it unpacks to more than its size, which torch.save never writes')
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f'the checksum of {damaged} is wrong')


# What checkpoints of timm and mmengine hold beside tensors, by the names in the file. Nothing of NumPy, argparse and
# mmengine takes part in reading: their own __setstate__ believes what it is given, down to addresses and methods.


class _Dtype:
    """A numpy.dtype of numbers."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not re.fullmatch(r'[biufc]\d+', code):
            raise UnpicklingError(f'Unsupported dtype {code!r}')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """A numpy.ndarray of numbers; saved again, it is an ordinary one."""

    def __new__(cls, *_):
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple):
        _, shape, kind, by_columns, raw = state
        if not isinstance(kind, _Dtype) or not isinstance(raw, bytes):
            raise UnpicklingError('Unsupported array of objects')
        checked = np.frombuffer(raw, kind.dtype).reshape(shape, order='F' if by_columns else 'C')
        super().__setstate__(checked.__reduce__()[2])

    def __reduce_ex__(self, protocol: int):
        return np.asarray(self).__reduce_ex__(protocol)


def _number(kind: _Dtype, raw: bytes) -> np.generic:
    """A NumPy scalar."""
    if not isinstance(kind, _Dtype):
        raise UnpicklingError(f'Unsupported scalar of {type(kind).__name__}')
    (number,) = np.frombuffer(raw, kind.dtype)
    return number


def _no_bytes() -> bytes:
    """The data of an array without numbers."""
    return b''


class _Buffer:
    """A HistoryBuffer; the statistics it brings are dropped, for mmengine would make them those of all buffers."""

    def __setstate__(self, state: dict):
        values, counts = state['_log_history'], state['_count_history']
        if not (isinstance(values, _Array) and isinstance(counts, _Array) and isinstance(state['max_length'], int)):
            raise UnpicklingError('Unsupported HistoryBuffer')
        self.__class__ = HistoryBuffer
        self.__init__(values, counts, state['max_length'])


def _method(owner: type, name: str) -> None:
    """The statistics of a HistoryBuffer, which are methods."""
    if owner is not _Buffer or name.startswith('_'):
        raise UnpicklingError(f'Unsupported getattr({owner!r}, {name!r})')


class _Settings:
    """An argparse.Namespace without special methods, which ``copy.deepcopy`` would call."""

    def __setstate__(self, state: dict):
        self.__class__ = argparse.Namespace
        self.__dict__.update({name: value for name, value in state.items() if not name.startswith('__')})


PLAIN_DATA = [
    (_Dtype, 'numpy.dtype'),
    (_Array, 'numpy.ndarray'),
    (_Array, 'numpy._core.multiarray._reconstruct'),
    (_Array, 'numpy.core.multiarray._reconstruct'),
    (_number, 'numpy._core.multiarray.scalar'),
    (_number, 'numpy.core.multiarray.scalar'),
    (_no_bytes, 'builtins.bytes'),
    (_Buffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_method, 'builtins.getattr'),
    (_Settings, 'argparse.Namespace'),
]
READING = threading.Lock()  # torch's list of safe types belongs to the process


@contextmanager
def _plain_data_only() -> Iterator[None]:
    """Make ``PLAIN_DATA`` all that torch takes beside tensors, and put back afterwards what others allowed it."""
    with READING:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(PLAIN_DATA)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def local_copy(source: str) -> str:
    """Path of ``source`` on this machine, downloaded into torch's or huggingface_hub's cache where needed.

    Args:
        source: ``timm://name``; http(s) URL, which may end in ``#sha256=`` and 64 hex digits; or a path, passed on.

    Raises:
        UserError: cannot be had, or has another SHA-256, in which case the file is removed.
    """
    if source.startswith('timm://'):
        return _from_timm(source.removeprefix('timm://'))
    if not source.startswith(('http://', 'https://')):
        return source
    url = source.partition('#')[0]
    expected = _expected_sha256(source)
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    try:
        # With a hash, because every file on the Hugging Face hub is called model.safetensors.
        path = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}'
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))  # to a temporary name, then renamed
    except (OSError, HTTPException, ValueError) as error:  # ValueError: no URL
        raise UserError(f'cannot download {source} ({error}); fetch it by hand and give its path') from None
    if expected and not (actual := file_sha256(path)).startswith(expected):
        path.unlink()
        raise UserError(f'{url} is refused: its SHA-256 should be {expected}, but is {actual}; the download is removed')
    return str(path)


def _expected_sha256(source: str) -> str:
    """All of the SHA-256 that a URL tells, or its beginning, or nothing."""
    url, _, fragment = source.partition('#')
    if fragment.startswith('sha256='):
        digest = fragment.removeprefix('sha256=').lower()
        if not re.fullmatch('[0-9a-f]{64}', digest):
            raise UserError(f'#sha256= takes 64 hex digits, got {digest!r}')
        return digest
    # torch.hub's convention. OpenMMLab's names look alike, but tell of another file: the one before publishing.
    named = re.fullmatch(r'https://download\.pytorch\.org/.+-([0-9a-f]{8,64})\.pth', url)
    return named[1] if named else ''


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _from_timm(name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        cfg = get_pretrained_cfg(name) if name.startswith('volo_') else None
    except RuntimeError:  # the model is known, the tag is not
        cfg = None
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(f'timm has no VOLO weights named {name!r}; it has {", ".join(list_pretrained("volo_*"))}')
    repo = cfg.hf_hub_id if not cfg.hf_hub_id.endswith('/') else f'{cfg.hf_hub_id}{cfg.architecture}.{cfg.tag}'
    try:
        return hf_hub_download(repo, 'model.safetensors')
    except Exception as error:  # offline, proxy, hub down: huggingface_hub raises many kinds
        raise UserError(
            f'cannot get timm://{name} from the Hugging Face hub ({_first_sentence(error)}); '
            'without a network, download it elsewhere (docs/weights.md) and give its path'
        ) from None


def _backbone_tensors(contents: Mapping, source: str) -> dict[str, Tensor]:
    """Unwrap the state dict and strip ``module.`` and ``backbone.``."""
    for key in ('state_dict_ema', 'state_dict', 'model'):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
            break
    state = _tensors(contents)
    if any(key.startswith('backbone.') for key in state):
        state = {key.removeprefix('backbone.'): value for key, value in state.items() if key.startswith('backbone.')}
    if not state:
        raise UserError(f'{source} holds no tensors')
    return state


def _tensors(contents: Mapping) -> dict[str, Tensor]:
    return {
        key.removeprefix('module.'): value
        for key, value in contents.items()
        if isinstance(key, str) and isinstance(value, Tensor) and not _is_empty_shell(value)
    }


def _is_empty_shell(value: object) -> bool:
    """Whether ``value`` is a tensor that is no array of numbers in memory, and that models cannot copy."""
    return isinstance(value, Tensor) and (
        value.layout is not torch.strided or value.is_meta or value.is_quantized or value.is_nested
    )


def _is_beyond(key: str, last_stage: int) -> bool:
    """Whether a tensor belongs to a stage after ``last_stage``, which the model does not build."""
    if last_stage == 0 and key == 'pos_embed':
        return True
    stage = re.match(r'network\.(\d+)\.', key)
    return bool(stage) and (last_stage + 1 if last_stage else 0) < int(stage[1]) <= 4  # 4 is the last of any VOLO


def _differences(own: Mapping, state: Mapping, allowed_missing: frozenset[str] | set[str] = frozenset()) -> list[str]:
    missing = [key for key in own if key not in state and key not in allowed_missing]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f'{key} is {list(state[key].shape)} instead of {list(own[key].shape)}'
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    named = [('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)]
    return [f'{len(keys)} {what} ({_some(keys)})' for what, keys in named if keys]


def _some(keys: list[str], most: int = 5) -> str:
    return ', '.join(_printable(key) for key in keys[:most]) + (
        f' and {len(keys) - most} more' if len(keys) > most else ''
    )


def _whose(state: Mapping[str, Tensor], arch: str, architectures: Mapping[str, Mapping]) -> str:
    """Sentence part that says which architecture a state dict is of, if it is one of ours and another than ``arch``."""
    blocks = {re.match(r'network\.(\d+\.\d+)\.', key)[1] for key in state if re.match(r'network\.\d+\.\d+\.', key)}
    layers = tuple(sum(block.startswith(f'{stage}.') for block in blocks) for stage in (0, 2, 3, 4))
    stem = state.get('patch_embed.proj.weight')
    for name, row in architectures.items():
        if stem is not None and name != arch and layers == row['layers']:
            if tuple(stem.shape[:2]) == (row['embed_dims'][0], row['stem_channels']):
                return f', it is VOLO arch={name!r}'
    return ''


def _first_sentence(error: Exception) -> str:
    return _printable((str(error) or type(error).__name__).splitlines()[0].split('. ')[0])


def _printable(text: str, most: int = 300) -> str:
    """``text`` without what a file's author might send to a terminal."""
    return ''.join(character if character.isprintable() else '?' for character in text[:most])
