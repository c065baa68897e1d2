"""Finding files, atomic writing, SHA-256, and distinct names for outputs."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')
PARTIAL = '.partial-'  # prefix of the name of a file that is being written


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to ``path`` on success and removed on an error: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_file(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_file(path: Path) -> Path:
    """Where ``whole`` keeps ``path`` until it is complete."""
    return path.with_name(PARTIAL + path.name)  # the same suffix, from which FFmpeg and others take the format


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex digits."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def distinct_names(files: Sequence[str]) -> dict[str, str]:
    """Names for outputs by input file: stems, or if two are equal, paths relative to the folder common to all files.

    The suffix is kept where it alone makes a name unique (``a.jpg`` next to ``a.png``).
    """
    stems = [Path(file).stem for file in files]
    if len(set(stems)) == len(stems):
        return dict(zip(files, stems, strict=True))
    absolute = [os.path.abspath(file) for file in files]
    common = os.path.commonpath([os.path.dirname(file) for file in absolute])
    names = [os.path.relpath(file, common) for file in absolute]
    stems = [os.path.splitext(name)[0] for name in names]
    count = Counter(stems)
    chosen = [name if count[stem] > 1 else stem for name, stem in zip(names, stems, strict=True)]
    return dict(zip(files, chosen if len(set(chosen)) == len(chosen) else names, strict=True))


def files_below(folder: Path) -> list[str]:
    """Files below a folder, sorted, as paths relative to it with ``/``; hidden files and folders are left out."""
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(('.', '__MACOSX'))]
        inside = os.path.relpath(root, folder).replace(os.sep, '/')
        names = [name for name in files if not name.startswith('.')]
        found += names if inside == '.' else [f'{inside}/{name}' for name in names]
    return sorted(found)


def find_files(items: Sequence[str], kinds: Mapping[str, Sequence[str]], left_out: Sequence[str] = ()) -> list[str]:
    """Find files for a command.

    Args:
        items: files, folders with their subfolders, and glob patterns.
        kinds: suffixes of the files to take from folders, by the name of the kind.
        left_out: folders whose files folders and patterns leave out.

    Returns:
        Paths, each file once.

    Raises:
        UserError: an item gives no file.
    """
    suffixes = tuple(suffix for group in kinds.values() for suffix in group)
    folders = [os.path.abspath(folder) for folder in left_out]

    def matches(pattern: str) -> list[str]:
        return [
            path
            for path in sorted(glob.glob(pattern, recursive=True))
            if os.path.isfile(path) and not any(Path(os.path.abspath(path)).is_relative_to(out) for out in folders)
        ]

    files: list[str] = []
    for item in items:
        if os.path.isdir(item):
            inside = matches(os.path.join(glob.escape(item), '**'))
            found = [path for path in inside if path.lower().endswith(suffixes)]
            if not found:
                nothing = ' and '.join(f'no {kind}s' for kind in kinds)
                raise UserError(f'folder {item} has {nothing} ({", ".join(suffixes)})')
        elif os.path.isfile(item):
            found = [item]
        else:
            found = matches(item)
            if not found:
                raise UserError(f'no {", ".join(kinds)}, folder or pattern matches {item}')
        files += found
    return list({os.path.abspath(file): file for file in files}.values())
