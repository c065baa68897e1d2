"""Files named by a path or by a URL such as ``s3://bucket/folder``, which fsspec opens."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import fsspec

from ._files import whole
from .errors import UserError

PROBE = '.mmseg-volo-may-write'


def is_url(path: str) -> bool:
    """Whether fsspec opens ``path``; ``file://`` is only another way to write a path."""
    return '://' in path


def without_file_scheme(path: str) -> str:
    """The path that a ``file://`` URL stands for; anything else as it is."""
    return path.removeprefix('file://')


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn whatever a store's client raises into one sentence."""
    try:
        yield
    except Exception as error:  # each client has types of its own
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'cannot use {url} ({type(error).__name__}: {reason})') from None


def find_in_store(url: str, suffixes: Sequence[str], left_out: Sequence[str] = ()) -> list[str]:
    """URLs of the files at ``url``, which is a file, a pattern or a folder, except those in folders left out."""
    with storage_errors(url):
        store, root = fsspec.core.url_to_fs(url)
        if any(sign in root for sign in '*?['):
            found = store.glob(root)
        else:
            found = [root] if store.isfile(root) else store.find(root)
        urls = [store.unstrip_protocol(path) for path in sorted(found) if path.lower().endswith(tuple(suffixes))]
        hidden = tuple(store.unstrip_protocol(folder) + '/' for folder in left_out if is_url(folder))
        return [url for url in urls if not url.startswith(hidden)]


def read_file(path: str) -> bytes:
    """The content of a file."""
    if not is_url(path):
        return Path(path).read_bytes()
    store, name = fsspec.core.url_to_fs(path)
    return store.cat_file(name)


def write_file(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file, whole or not at all: renamed when complete or, in a store, sent at once."""
    if not is_url(path):
        with whole(Path(path)) as partial, partial.open('wb') as file:
            write(file)
        return
    content = io.BytesIO()
    write(content)
    with storage_errors(path):
        store, name = fsspec.core.url_to_fs(path)
        store.pipe_file(name, content.getvalue())


def check_store(url: str) -> str:
    """Check that ``url`` can be written to, and return it; raises ``UserError`` otherwise."""
    with storage_errors(url):
        store, root = fsspec.core.url_to_fs(url)
        store.pipe_file(f'{root}/{PROBE}', b'')
        store.rm_file(f'{root}/{PROBE}')
    return url.rstrip('/')


def existing(folder: str) -> Callable[[str], bool]:
    """A function that says whether a file in ``folder``, named by its path from there, exists."""
    if not is_url(folder):
        return lambda name: os.path.isfile(os.path.join(folder, name))
    with storage_errors(folder):
        store, root = fsspec.core.url_to_fs(folder)
        names = {path.removeprefix(root).lstrip('/') for path in store.find(root)}  # one request for a thousand files
    return names.__contains__
