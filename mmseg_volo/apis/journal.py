"""The finished part of a long computation on disk, so that a later run can go on with it."""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path


class Journal:
    """An append-only file of byte strings: each is on disk as a whole, or counts as missing.

    Args:
        path: the file.
        circumstances: texts on which the contents depend, by their names in messages. They are the first line.
        resume: keep the records of a file that was written under the same circumstances. Otherwise start with none.
    """

    def __init__(self, path: Path, circumstances: Mapping[str, str], resume: bool):
        self.path = path
        self.records: list[tuple[int, int, int]] = []  # place, length and CRC-32
        self.changed: list[str] = []  # circumstances that kept the records from being used
        path.parent.mkdir(parents=True, exist_ok=True)
        end = self._read(circumstances) if resume and path.exists() else 0
        self.file = path.open('r+b' if end else 'w+b')
        self.file.truncate(end)
        self.file.seek(end)
        if not end:
            self._write(json.dumps(dict(circumstances)).encode() + b'\n')

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[bytes]:
        """The records in order."""
        with self.path.open('rb') as file:
            for place, length, _ in self.records:
                file.seek(place)
                yield file.read(length)

    def append(self, record: bytes) -> None:
        """Add a record and wait until it is on the disk; raises ``OSError`` if it cannot be written."""
        head = json.dumps([len(record), zlib.crc32(record)]).encode() + b'\n'
        place = self.file.tell() + len(head)
        self._write(head + record)
        self.records.append((place, len(record), zlib.crc32(record)))

    def close(self) -> None:
        """Keep the file for a later run if it has records."""
        self.file.close()
        if not self.records:
            self.path.unlink()

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.file.flush()
        os.fsync(self.file.fileno())

    def _read(self, circumstances: Mapping[str, str]) -> int:
        """Read what fits the circumstances, up to the first damage; returns where to go on, 0 for the beginning."""
        with self.path.open('rb') as file:
            try:
                before = json.loads(file.readline())
                self.changed = [name for name in circumstances if before.get(name) != circumstances[name]]
            except (ValueError, AttributeError):
                self.changed = ['a damaged file']
            if self.changed:
                return 0
            end = file.tell()
            while head := file.readline():
                try:
                    length, crc = json.loads(head)
                    place, record = file.tell(), file.read(length)
                except (ValueError, TypeError):
                    break
                if len(record) != length or zlib.crc32(record) != crc:
                    break
                self.records.append((place, length, crc))
                end = file.tell()
        return end
