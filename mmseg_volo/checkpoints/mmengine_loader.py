"""mmengine's loader of checkpoints, replaced by one that runs no code in them."""

import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from mmengine.runner import CheckpointLoader, get_external_models, get_mmcls_models, get_torchvision_models
from mmengine.runner.checkpoint import get_deprecated_model_names

from ..errors import UserError
from .reading import MapLocation, read_checkpoint
from .state_dict import backbone_tensors, is_not_dense
from .wording import some

# mmengine looks up these schemes in tables of URLs, and fetches those of STORES by other means.
ZOOS = {
    'torchvision': get_torchvision_models,
    'modelzoo': get_torchvision_models,
    'open-mmlab': get_external_models,
    'openmmlab': get_external_models,
    'mmcls': get_mmcls_models,
}
STORES = [r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://']
_READ_AHEAD: dict[tuple | None, dict] = {}  # file to contents; at most one entry


def read_ahead(path: str) -> dict:
    """Read a checkpoint that mmengine loads next, and keep it until then.

    A file of gigabytes is then read and checked only once, before the run begins: ``load_from_plain_data`` takes the
    contents, which are freed when mmengine has copied them.
    """
    contents = read_checkpoint(path)
    _READ_AHEAD.clear()
    _READ_AHEAD[_version(path)] = contents
    return contents


def _version(path: str) -> tuple | None:
    """Identity of the file at ``path``, which changes when the file is replaced; None unless it is a local file."""
    if '://' in path or not os.path.isfile(path):
        return None
    status = os.stat(path)
    return os.path.abspath(path), status.st_mtime_ns, status.st_size, status.st_ino


def load_from_plain_data(filename: str, map_location: MapLocation | None = None) -> dict:
    """Load a checkpoint for mmengine, in the form that mmengine expects.

    The config text is dropped, because mmengine would execute it. Names of files that mmengine would delete on resuming
    are dropped unless they belong to this run; see ``docs/security.md``.

    Args:
        filename: as for ``read_checkpoint``, or a name from one of mmengine's tables, such as ``torchvision://resnet50``.
        map_location: as in ``torch.load``, but None means the CPU.

    Raises:
        UserError: as for ``read_checkpoint``, or a part of the checkpoint has another type than mmengine's.
    """
    scheme, separator, model = filename.partition('://')
    source = _url_in_zoo(scheme, model) if separator and scheme in ZOOS else filename
    if any(re.match(store, source) for store in STORES):
        raise UserError(f'{source} cannot be checked before it is read; download it and give its path')
    contents = _READ_AHEAD.pop(_version(source), None)
    if contents is None:
        contents = read_checkpoint(source, 'cpu' if map_location is None else map_location)
    if scheme == 'mmcls':
        return dict(state_dict=OrderedDict(backbone_tensors(contents, source)))
    for key in ('state_dict', 'ema_state_dict', 'meta', 'message_hub'):
        if key in contents and not isinstance(contents[key], dict):
            raise UserError(f'{key} in {source} must be a dict, got {type(contents[key]).__name__}')
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


def use_safe_loader() -> None:
    """Make ``load_from_plain_data`` mmengine's checkpoint loader in this process.

    ``load_from``, ``--resume``, ``init_model`` and ``MMSegInferencer`` then run no code from a checkpoint.
    """
    schemes = ['', 'http://', 'https://', *(f'{zoo}://' for zoo in ZOOS), *STORES]
    CheckpointLoader.register_scheme(schemes, load_from_plain_data, force=True)


def _url_in_zoo(zoo: str, model: str) -> str:
    if 'mmlab' in zoo:
        model = get_deprecated_model_names().get(model, model)
    urls = ZOOS[zoo]()
    if model not in urls:
        raise UserError(f'mmengine has no {zoo}://{model}; it has {some(sorted(urls))}')
    return urls[model]


def _plain_state(state: Mapping, source: str) -> OrderedDict:
    """Copy ``state`` without its own attributes, which mmengine would call."""
    strange = [key for key, value in state.items() if not isinstance(key, str) or is_not_dense(value)]
    if strange:
        raise UserError(
            f'{source} contains entries other than named dense tensors: {some([str(key) for key in strange])}'
        )
    return OrderedDict(state)


def _plain_hub(hub: Mapping, source: str) -> dict:
    parts: dict = {key: hub.get(key) for key in ('log_scalars', 'runtime_info', 'resumed_keys')}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise UserError(f"{source} contains a message hub that is not mmengine's")
    folder = Path(source).expanduser().resolve().parent
    info = parts['runtime_info']
    return parts | {'runtime_info': {key: info[key] for key in info if not _commands(key, info[key], folder)}}


def _commands(key: str, value: object, folder: Path) -> bool:
    """Whether mmengine would execute this entry of a message hub, or delete a file outside the run because of it."""
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
