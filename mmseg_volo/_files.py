"""Files: written whole or not at all, and their SHA-256."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = '.partial-'  # before the name of a file that is being written


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` unless something is raised, so that nobody finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(PARTIAL + path.name)  # of the same suffix: OpenCV goes by it
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
