"""The disk: whole small files, files written from start to end, and a name for SQLite's VFS.

All calls block: small files at start-up are read in place, the rest goes through `World.blocking`.
Errors are named: a full disk is DISK_FULL, one that cannot be written is DISK_READ_ONLY.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol


class WritableFile(Protocol):
    """A file that grows at its end."""

    def write(self, data: bytes) -> None:
        """Append `data`. After an error any first part of it may be in the file."""
        ...

    def sync(self) -> None:
        """Return once all that was written is durable.

        After an error nobody can say what of it is, and a later sync may succeed without it: the system
        forgets what it could not write.
        """
        ...

    def close(self) -> None:
        """Close; what was not synced may be lost in a crash."""
        ...

    def __enter__(self) -> WritableFile: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Disk(Protocol):
    """A node's files."""

    @property
    def sqlite_vfs(self) -> str | None:
        """Name of the SQLite VFS over this disk; None for SQLite's own."""
        ...

    def exists(self, path: Path) -> bool:
        """Tell whether a file or folder is there."""
        ...

    def is_plain(self, path: Path) -> bool:
        """Tell whether a file is nothing but a file: no folder, link, pipe or device, and under no other
        name; and its owner may read it. NOT_FOUND when there is nothing."""
        ...

    def size(self, path: Path) -> int:
        """Return a file's size in bytes; NOT_FOUND when there is none."""
        ...

    def read(self, path: Path, *, limit_bytes: int) -> bytes:
        """Return a whole file; NOT_FOUND when there is none, TOO_LARGE over the limit."""
        ...

    def read_at(self, path: Path, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset` on, empty at the end; NOT_FOUND when there is no file."""
        ...

    def write(self, path: Path, data: bytes, *, mode: int = 0o600) -> None:
        """Replace a whole file, durably and atomically: after a crash it is the old or the new one."""
        ...

    def create(self, path: Path, *, mode: int = 0o600) -> WritableFile:
        """Open a new empty file to write to, replacing one of that name."""
        ...

    def append(self, path: Path, size: int) -> WritableFile:
        """Open a file that is there to write on from `size` on; what it holds beyond that is cut off.

        The cut is durable with the next sync; until then a crash may bring any part of the old end back.
        NOT_FOUND when there is no file, INVALID_ARGUMENT when it is shorter than `size`.
        """
        ...

    def make_folder(self, path: Path, *, mode: int = 0o700) -> None:
        """Make a folder and its parents; no error when it is there. Durable with `sync_folder`."""
        ...

    def sync_folder(self, path: Path) -> None:
        """Return once it is durable which files and folders a folder holds; NOT_FOUND when there is none."""
        ...

    def list_folder(self, path: Path) -> list[str]:
        """Return the names in a folder, sorted; empty when there is none."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file or a folder with all that is in it; no error when there is none."""
        ...
