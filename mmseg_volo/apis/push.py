"""Give a model to others: on the Hugging Face hub, or as a folder of the same files."""

import json
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config
from safetensors import SafetensorError
from safetensors.torch import save_file

from .._files import file_sha256
from .._version import __version__
from ..checkpoints.download import local_file
from ..checkpoints.hub import CONFIG, WEIGHTS, explained, repository
from ..checkpoints.plain_config import plain_config
from ..config import first_test_set, load_config, make_writable
from ..errors import UserError
from ..export.runtime import is_exported
from ..models.pretrained import pretrained_checkpoint
from .model_card import model_card
from .predictor import Predictor
from .sources import load_model, try_out


def push(
    config: str,
    checkpoint: str,
    target: str,
    metrics: str | None = None,
    license: str = 'unknown',
    private: bool = False,
    message: str | None = None,
    cfg_options: dict | None = None,
) -> str:
    """Write a model as ``config.json``, ``model.safetensors`` and ``README.md``.

    ``mmseg-volo infer TARGET`` reads them and gives the labels that ``checkpoint`` gives, bit for bit.

    Args:
        config: a file, or the name of a shipped config.
        checkpoint: a segmentor's weights, of which averaged ones are taken if there are any.
        target: ``hf://owner/name``, which is created if necessary, or a new or empty folder.
        metrics: ``metrics.json`` of these weights for the model card; by default the one beside ``checkpoint``, if any.
        license: the hub's name of the weights' licence.
        private: make a new repository private.
        message: the commit's message.
        cfg_options: values that override the config, by dotted key.

    Returns:
        Address of the commit, or the folder.

    Raises:
        UserError: the config has parts that ``config.json`` cannot hold, the checkpoint does not fit it, ``metrics``
            belongs to another checkpoint, or ``target`` cannot be written.
    """
    if not re.fullmatch(r'[a-z0-9][a-z0-9.-]*', license):
        raise UserError(f"--license must be one of the hub's names, such as apache-2.0 or cc-by-4.0, got {license!r}")
    if is_exported(checkpoint):
        raise UserError(f'{checkpoint} is an exported file, from which nobody can train: give the checkpoint')
    on_hub = target.startswith('hf://')
    if on_hub:
        _check_repository(target)
    parent = None if on_hub else _check_folder(target)
    cfg = load_config(config, cfg_options or {})
    with TemporaryDirectory(prefix='.partial-', dir=parent) as scratch:
        folder = Path(scratch, 'model')
        folder.mkdir()
        _write(folder, cfg, Path(config).stem, checkpoint, target, metrics, license)
        found = load_model(str(folder), None, {})  # what readers will see
        try_out(Predictor(found.config, found.checkpoint, 'cpu', tta=False, amp=False).model, target)
        if on_hub:
            address = _upload(
                folder, target, private, message or f'Upload {Path(config).stem} with mmseg_volo {__version__}'
            )
        else:
            os.replace(folder, target)
            address = target
    print(f'{address}: {CONFIG}, {WEIGHTS} and README.md; try: mmseg-volo infer {target} PICTURE')
    return address


def _check_repository(target: str) -> None:
    """Raise ``UserError`` unless something can be uploaded to ``target``."""
    from huggingface_hub import constants, get_token

    if repository(target)[1] is not None:
        raise UserError(f'push makes a new commit on the main branch, so {target} must not name a revision')
    if constants.HF_HUB_OFFLINE:
        raise UserError(f'{target} cannot be written: HF_HUB_OFFLINE is set')
    if get_token() is None:
        raise UserError(f'{target} cannot be written without a token: log in with hf auth login, or set HF_TOKEN')


def _check_folder(target: str) -> Path:
    """The folder in which ``target`` is to be; raises ``UserError`` unless it is new or empty."""
    path = Path(target)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f'{target} is not empty: choose a new folder, or hf://owner/name for the hub')
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f'{target} is not a folder')
    return make_writable(path.absolute().parent)


def _write(
    folder: Path, cfg: Config, name: str, checkpoint: str, target: str, metrics: str | None, license: str
) -> None:
    start = pretrained_checkpoint(cfg.model.backbone.get('init_cfg'))
    predictor = Predictor(cfg, checkpoint, 'cpu', tta=False, amp=False)
    content = plain_config(cfg, name, dict(classes=predictor.classes, palette=predictor.palette))
    measured = _measured(metrics, local_file(checkpoint))
    card = model_card(content, target, license, _data_set(cfg), start, measured)
    state = {key: tensor.contiguous() for key, tensor in predictor.model.state_dict().items()}
    try:
        (folder / CONFIG).write_text(json.dumps(content, indent=2, allow_nan=False) + '\n')
        (folder / 'README.md').write_text(card)
        save_file(state, folder / WEIGHTS, metadata={'format': 'pt'})
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets only the owner read
    except (OSError, SafetensorError) as error:
        raise UserError(f'cannot write to {folder.parent.parent} ({error})') from None


def _data_set(cfg: Config) -> str | None:
    """Name of the test set: that of its folder."""
    root = first_test_set(cfg).get('data_root')
    return re.sub(r'[^\w.-]', '-', Path(root).name) or None if root else None


def _measured(metrics: str | None, checkpoint: Path) -> dict | None:
    """Content of the ``metrics.json`` of a checkpoint."""
    path = Path(metrics) if metrics else checkpoint.with_name('metrics.json')
    if not metrics and not path.is_file():
        print(f'no metrics.json beside {checkpoint}: the model card says "Not measured"')
        return None
    try:
        record: Any = json.loads(path.read_text())
        measured = record['checkpoint_sha256']
        {
            *record['metrics'],
            *record['classes'][0],
            *record['versions'],
            record['images'],
            record['tta'],
            record['device'],
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f'{path} is no metrics.json of mmseg-volo test ({type(error).__name__}: {error})') from None
    if measured == file_sha256(checkpoint):
        return record
    if metrics:
        raise UserError(f'{path} belongs to another checkpoint: {record.get("checkpoint")}')
    print(f'{path} belongs to another checkpoint: the model card says "Not measured"')
    return None


def _upload(folder: Path, target: str, private: bool, message: str) -> str:
    """Upload a folder in one commit and return its address."""
    from huggingface_hub import HfApi

    api, (repo, _) = HfApi(library_name='mmseg_volo', library_version=__version__), repository(target)
    with explained(target, 'the model cannot be uploaded'):
        api.create_repo(repo, private=private or None, exist_ok=True)
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url
