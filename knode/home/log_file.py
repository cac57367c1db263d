"""The log on disk: a file of whole lines, bounded by rotation. Real only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class LogFile:
    """Appends lines to `path`, and keeps `keep` files of at most `max_bytes` each.

    When a file is full, `path` becomes `path.1`, `path.1` becomes `path.2`, and the oldest goes. A
    line that cannot be written is counted in `lost`, and nothing of it stays: a full disk does not
    stop a node. Lines are not synced.
    """

    def __init__(self, path: Path, *, max_bytes: int, keep: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._descriptor = -1
        self._size = 0
        self.lost = 0
        """Lines that could not be written since `take_lost` was last called."""

    def append(self, line: str) -> bool:
        """Write one line, without its line end; tell whether it is in the file."""
        data = line.encode() + b"\n"
        try:
            if self._size + len(data) > self._max_bytes and self._size:
                self._rotate()
            if self._descriptor < 0:
                self._open()
            self._write(data)
        except OSError:
            self.lost += 1
            self.close()
            return False
        return True

    def take_lost(self) -> int:
        """Return how many lines were lost, and count from zero again."""
        lost, self.lost = self.lost, 0
        return lost

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._size = 0

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._descriptor).st_size
        # A crash may have left half a line.
        if self._size and os.pread(self._descriptor, 1, self._size - 1) != b"\n":
            self._write(b"\n")

    def _write(self, data: bytes) -> None:
        written = os.write(self._descriptor, data)
        if written < len(data):
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise OSError("only a part of the line could be written")
        self._size += written

    def _rotate(self) -> None:
        self.close()
        files = [self._path, *(Path(f"{self._path}.{number}") for number in range(1, self._keep))]
        for older, newer in zip(reversed(files), reversed(files[:-1]), strict=False):
            if newer.exists():
                newer.replace(older)
        if self._keep == 1:
            self._path.unlink()
