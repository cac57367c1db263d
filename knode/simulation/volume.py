"""What a simulated disk holds: files with their synced and unsynced bytes, names, faults."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from knode.world import Randomness


class Write(NamedTuple):
    """Bytes put at an offset."""

    offset: int
    data: bytes


class Truncate(NamedTuple):
    """A file cut, or filled with zeros, to a size."""

    size: int


Change = Write | Truncate
Event = Literal["write", "truncate", "sync", "delete"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that was on a disk at one moment, as programs saw it."""

    files: Mapping[str, bytes]
    folders: frozenset[str]


class File:
    """A file as programs see it, and what of it outlives a power cut.

    What was synced stays. Of the changes since then each may be kept, lost or torn. A file whose first
    sync has not come may be missing altogether.
    """

    def __init__(self, synced: bytes | None = None, settled_bytes: int | None = None) -> None:
        self.content = bytearray(synced or b"")
        self.locks: dict[int, int] = {}
        self._synced = None if synced is None else bytearray(synced)
        self._unsynced: list[Change] = []
        self._settled_bytes = len(self.content) if settled_bytes is None else settled_bytes

    @property
    def is_new(self) -> bool:
        """Whether it was never synced."""
        return self._synced is None

    def change(self, change: Change) -> None:
        """Do it, unsynced."""
        _apply(self.content, change)
        self._unsynced.append(change)

    def sync(self) -> None:
        """Make every change durable."""
        if self._synced is None:
            self._synced = bytearray()
        before = len(self._synced)
        for change in self._unsynced:
            _apply(self._synced, change)
        if self._unsynced:
            self._settled_bytes = min(before, len(self._synced))
        self._unsynced.clear()

    @property
    def settled_bytes(self) -> int:
        """How much of it was durable when the latest sync that did anything began: what was written since
        may know of it."""
        return self._settled_bytes

    def forget_unsynced(self) -> None:
        """Let no later sync make durable what was changed since the last one, though programs go on to
        see it: what systems do with pages that they could not write."""
        self._unsynced.clear()

    def flip(self, bit: int) -> None:
        """Turn one bit of it over, on the platter and for whoever reads."""
        for content in (self.content, self._synced):
            if content is not None and bit // 8 < len(content):
                content[bit // 8] ^= 1 << bit % 8

    def copy(self) -> File:
        """Return the file as another process finds it."""
        file = File(None if self._synced is None else bytes(self._synced), self._settled_bytes)
        file.content = bytearray(self.content)
        file._unsynced = list(self._unsynced)
        return file

    def after_crash(self, randomness: Randomness) -> File | None:
        """Return the file as it may be found after a power cut; None when it is not there."""
        if self._synced is None and _chance(randomness):
            return None
        content = bytearray(self._synced or b"")
        for change in _survivors(self._unsynced, randomness):
            _apply(content, change)
        return File(bytes(content), min(self._settled_bytes, len(content)))


class Volume:
    """Files and folders by name, a capacity, and whether it can be written.

    Folders, and files that are replaced whole, are durable at once. A file that is removed without a sync of
    its folder may be back after a crash.
    """

    def __init__(self, files: Mapping[str, File], folders: frozenset[str]) -> None:
        self.files = dict(files)
        self.folders = set(folders) | {"/"}
        self.capacity_bytes: int | None = None
        self.read_only = False
        self.fails: Callable[[str], bool] | None = None
        """Tells whether a sync of the file with this name fails."""
        self.before: Callable[[Event], None] = lambda event: None
        self._removed: dict[str, File] = {}

    def used_bytes(self) -> int:
        """Return how many bytes the files hold."""
        return sum(len(file.content) for file in self.files.values())

    def room_bytes(self) -> int | None:
        """Return how many more bytes fit; None for no limit."""
        return None if self.capacity_bytes is None else max(0, self.capacity_bytes - self.used_bytes())

    def open(self, name: str) -> File:
        """Return the file, making it unless it is there."""
        file = self.files.get(name)
        if file is None:
            self.must_be_writable(name)
            if os.path.dirname(name) not in self.folders:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            self._removed.pop(name, None)
            file = self.files[name] = File()
        return file

    def change(self, file: File, change: Change) -> None:
        """Change a file, when there is room and the disk can be written."""
        self.before("write" if isinstance(change, Write) else "truncate")
        self.must_be_writable()
        end = change.offset + len(change.data) if isinstance(change, Write) else change.size
        self.must_have_room(end - len(file.content))
        file.change(change)

    def sync(self, file: File) -> None:
        """Make the file's changes durable; a new file's first sync is one of the folders, too."""
        self.before("sync")
        self.must_be_writable()
        if self.fails is not None:
            name = self._name_of(file)
            if self.fails(name):
                file.forget_unsynced()
                raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        if file.is_new:
            self.sync_folder(os.path.dirname(self._name_of(file)))
        file.sync()

    def sync_folder(self, folder: str) -> None:
        """Make what was removed from a folder stay away."""
        for name in [name for name in self._removed if os.path.dirname(name) == folder]:
            del self._removed[name]

    def _name_of(self, file: File) -> str:
        return next((name for name, known in self.files.items() if known is file), "")

    def replace(self, name: str, data: bytes) -> None:
        """Put a whole, durable file in the place of `name`."""
        self.before("write")
        if os.path.dirname(name) not in self.folders:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        self.must_be_writable(name)
        # As on a real disk, old and new are both there for a moment.
        self.must_have_room(len(data))
        if self.fails is not None and self.fails(name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        self.files[name] = File(data)
        self.sync_folder(os.path.dirname(name))
        self.before("sync")

    def delete(self, name: str, *, durable: bool) -> None:
        """Remove a file."""
        self.before("delete")
        self.must_be_writable(name)
        file = self.files.pop(name)
        if not durable:
            self._removed[name] = file

    def must_be_writable(self, name: str = "the disk") -> None:
        """Raise OSError EROFS on a disk that cannot be written."""
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)

    def must_have_room(self, more_bytes: int) -> None:
        """Raise OSError ENOSPC when `more_bytes` do not fit."""
        if more_bytes > 0 and (room := self.room_bytes()) is not None and more_bytes > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def copy(self) -> Volume:
        """Return the volume as it is left to whoever comes after this process."""
        volume = self._with({name: file.copy() for name, file in self.files.items()})
        volume._removed = {name: file.copy() for name, file in self._removed.items()}
        return volume

    def after_crash(self, randomness: Randomness) -> Volume:
        """Return the volume as it may be found after a power cut; this one is unchanged."""
        back = {name: file for name, file in self._removed.items() if _chance(randomness)}
        found = {name: file.after_crash(randomness) for name, file in (back | self.files).items()}
        return self._with({name: file for name, file in found.items() if file is not None})

    def _with(self, files: Mapping[str, File]) -> Volume:
        volume = Volume(files, frozenset(self.folders))
        volume.capacity_bytes = self.capacity_bytes
        volume.read_only = self.read_only
        return volume


def _apply(content: bytearray, change: Change) -> None:
    match change:
        case Write(offset, data):
            if offset > len(content):
                content.extend(bytes(offset - len(content)))
            content[offset : offset + len(data)] = data
        case Truncate(size):
            del content[size:]
            content.extend(bytes(size - len(content)))


def _chance(randomness: Randomness) -> bool:
    return randomness.uniform(0.0, 1.0) < 0.5


def _survivors(changes: list[Change], randomness: Randomness) -> list[Change]:
    """Choose what of `changes` reached the platter: the first few, or any of them; one may be torn."""
    if _chance(randomness):
        cut = int(randomness.uniform(0.0, len(changes) + 1.0))
        kept = changes[:cut]
        return kept + [_torn(change, randomness) for change in changes[cut : cut + 1]]
    kept = [change for change in changes if _chance(randomness)]
    return [_torn(change, randomness) if randomness.uniform(0.0, 1.0) < 0.2 else change for change in kept]


def _torn(change: Change, randomness: Randomness) -> Change:
    match change:
        case Write(offset, data):
            return Write(offset, data[: int(randomness.uniform(0.0, len(data)))])
        case Truncate():
            return change
