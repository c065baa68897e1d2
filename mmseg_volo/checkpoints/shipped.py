"""Weights that come with the package, for shipped configs."""

import json
from pathlib import Path

from .._files import file_sha256
from ..errors import UserError

# A file CONFIG.safetensors per config, and index.json: {CONFIG: {"sha256": 64 hex digits}}.
FOLDER = Path(__file__).parents[1] / 'weights'


def shipped_weights(config: str) -> str | None:
    """Path of the weights that come with the package for a shipped config, given by its name, or None.

    Raises:
        UserError: the file is not the one that was shipped.
    """
    entry = json.loads((FOLDER / 'index.json').read_text()).get(config)
    if entry is None:
        return None
    path = FOLDER / f'{config}.safetensors'
    if not path.is_file() or file_sha256(path) != entry['sha256']:
        raise UserError(f'{path}, which comes with mmseg-volo, is missing or damaged: install the package again')
    return str(path)
