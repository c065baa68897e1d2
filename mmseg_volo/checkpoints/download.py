"""Downloads of checkpoints from URLs, from timm and from the Hugging Face hub."""

import hashlib
import os
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch
from timm.models import get_pretrained_cfg, list_pretrained

from .._files import file_sha256
from ..errors import UserError
from .hub import WEIGHTS, model_file
from .wording import first_sentence

FAMILIES = {'volo_': 'VOLO', 'coatnet_': 'CoAtNet'}  # by the start of timm's names


def local_file(source: str) -> Path:
    """``local_copy`` as a path without ``~``."""
    return Path(local_copy(source)).expanduser()


def local_copy(source: str) -> str:
    """Path of ``source`` on this machine, downloaded into torch's or huggingface_hub's cache where needed.

    Args:
        source: ``timm://name``; ``hf://owner/name``, which may end in ``@revision``; http(s) URL, which may end in
            ``#sha256=`` and 64 hex digits; a folder that ``mmseg-volo push`` wrote; or another path, passed on.

    Raises:
        UserError: it cannot be downloaded, or its SHA-256 is wrong; the file is then removed.
    """
    if source.startswith('timm://'):
        return _from_timm(source.removeprefix('timm://'))
    if source.startswith('hf://') or os.path.isfile(os.path.join(source, WEIGHTS)):
        return str(model_file(source, WEIGHTS))
    if not source.startswith(('http://', 'https://')):
        return source
    url = source.partition('#')[0]
    expected = _expected_sha256(source)
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    try:
        # The hash tells apart files of one name: all on the Hugging Face hub are called model.safetensors.
        path = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}'
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))  # to a temporary name, then renamed
    except (OSError, HTTPException, ValueError) as error:  # ValueError: not a URL
        raise UserError(f'cannot download {source} ({error}); download it by hand and give its path') from None
    if expected and not (actual := file_sha256(path)).startswith(expected):
        path.unlink()
        raise UserError(f'{url} is refused: its SHA-256 must be {expected}, got {actual}; the download was removed')
    return str(path)


def _expected_sha256(source: str) -> str:
    """The SHA-256 that a URL specifies, its first digits, or an empty string."""
    url, _, fragment = source.partition('#')
    if fragment.startswith('sha256='):
        digest = fragment.removeprefix('sha256=').lower()
        if not re.fullmatch('[0-9a-f]{64}', digest):
            raise UserError(f'#sha256= must be 64 hex digits, got {digest!r}')
        return digest
    # torch.hub's convention. OpenMMLab's names look alike but contain the hash of the file before its publication.
    named = re.fullmatch(r'https://download\.pytorch\.org/.+-([0-9a-f]{8,64})\.pth', url)
    return named[1] if named else ''


def _from_timm(name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        cfg = get_pretrained_cfg(name) if name.startswith(tuple(FAMILIES)) else None
    except RuntimeError:  # the model is known, the tag is not
        cfg = None
    if cfg is None or not cfg.hf_hub_id:
        prefix = next((prefix for prefix in FAMILIES if name.startswith(prefix)), 'volo_')
        known = ', '.join(list_pretrained(f'{prefix}*'))
        raise UserError(f'timm has no {FAMILIES[prefix]} weights named {name!r}; it has {known}')
    repo = cfg.hf_hub_id if not cfg.hf_hub_id.endswith('/') else f'{cfg.hf_hub_id}{cfg.architecture}.{cfg.tag}'
    try:
        return hf_hub_download(repo, 'model.safetensors')
    except Exception as error:  # offline, proxy, hub down: huggingface_hub raises many kinds
        raise UserError(
            f'cannot download timm://{name} from the Hugging Face hub ({first_sentence(error)}); '
            'without a network, download it elsewhere (docs/weights.md) and give its path'
        ) from None
