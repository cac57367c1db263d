"""A disk in memory that can lose power, fill up, or refuse to be written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType

from knode.errors import Code, LocalError
from knode.simulation.sqlite_vfs import VolumeVfs
from knode.simulation.volume import Event, File, Snapshot, Truncate, Volume, Write
from knode.world import Randomness
from knode.world.real import must_reach, named_disk_errors


class SimulatedDisk:
    """`World.disk` in memory, with a SQLite VFS over it.

    A power cut gives a new disk, on which the restarted node runs: what the dying one still writes to
    the old disk, or does in closing its databases, reaches nothing that survives.

    Paths are absolute. To be used with `Blocking` of any kind, by one node.
    """

    def __init__(self, volume: Volume | None = None) -> None:
        self._volume = volume or Volume({}, frozenset())
        self._vfs = VolumeVfs(self._volume)

    @classmethod
    def restored(cls, snapshot: Snapshot) -> SimulatedDisk:
        """Return a disk with what was in `snapshot`, all of it durable: a restored backup."""
        # No byte of it is one that `flip` may hit before it is synced again.
        files = {name: File(data, 0) for name, data in snapshot.files.items()}
        return cls(Volume(files, snapshot.folders))

    def snapshot(self) -> Snapshot:
        """Return a copy of all that is on the disk now, synced or not."""
        files = {name: bytes(file.content) for name, file in self._volume.files.items()}
        return Snapshot(files, frozenset(self._volume.folders))

    def crash(self, randomness: Randomness) -> SimulatedDisk:
        """Return the disk as it may be found after a power cut at this moment.

        What was synced is there; of what was not, `randomness` keeps the first part or any part, and
        may tear a write. This disk stays as it is, for the dying.
        """
        return SimulatedDisk(self._volume.after_crash(randomness))

    def after_kill(self) -> SimulatedDisk:
        """Return the disk as the next process finds it when this one is killed: all that was written is
        there to be read, and what was not synced still is not. This disk stays, for the dying."""
        return SimulatedDisk(self._volume.copy())

    def flip(self, randomness: Randomness, files: str) -> str | None:
        """Turn one bit of one file over, as platters do in time; return the file's name.

        Only bytes are hit that were durable before the latest sync of their file began, so that what was
        written after them knew of them; None when no file has such bytes.

        Args:
            files: which may be hit, by their paths: `*/raft/*.log`.
        """
        hit = {name: file for name, file in self._files(files) if file.settled_bytes}
        if not hit:
            return None
        name = sorted(hit)[_drawn(randomness, len(hit))]
        hit[name].flip(_drawn(randomness, hit[name].settled_bytes * 8))
        return name

    def fail_sync(self, files: str) -> None:
        """Let the next sync of one of these files fail, and lose what was not synced of it.

        Args:
            files: which, by their paths: `*/raft/*.log`.
        """

        def fails(name: str) -> bool:
            if not fnmatchcase(name, files):
                return False
            self.mend_sync()
            return True

        self._volume.fails = fails

    def mend_sync(self) -> None:
        """Let syncs succeed again, if none has failed yet."""
        self._volume.fails = None

    def fill(self) -> None:
        """Let nothing more fit, until `free`."""
        self._volume.capacity_bytes = self._volume.used_bytes()

    def free(self, capacity_bytes: int | None = None) -> None:
        """Let files hold `capacity_bytes` together; None for no limit."""
        self._volume.capacity_bytes = capacity_bytes

    @property
    def read_only(self) -> bool:
        """Whether every write is refused."""
        return self._volume.read_only

    @read_only.setter
    def read_only(self, value: bool) -> None:
        self._volume.read_only = value

    def watch(self, before: Callable[[Event], None]) -> None:
        """Call `before` ahead of each write, truncate, sync and delete: where a power cut can strike."""
        self._volume.before = before

    def close(self) -> None:
        """Forget the VFS; every database on it is closed by now."""
        self._vfs.unregister()

    @property
    def sqlite_vfs(self) -> str:
        """Name of the VFS over this disk."""
        return self._vfs.name

    def exists(self, path: Path) -> bool:
        """Tell whether a file or folder is there."""
        return str(path) in self._volume.files or str(path) in self._volume.folders

    def is_plain(self, path: Path) -> bool:
        """Tell whether it is a file: links and the like this disk has not."""
        if str(path) in self._volume.folders:
            return False
        self._file(path)
        return True

    def size(self, path: Path) -> int:
        """Return a file's size in bytes."""
        return len(self._file(path).content)

    def read(self, path: Path, *, limit_bytes: int) -> bytes:
        """Return a whole file."""
        content = self._file(path).content
        if len(content) > limit_bytes:
            raise LocalError(Code.TOO_LARGE, f"{path} is larger than {limit_bytes} bytes")
        return bytes(content)

    def read_at(self, path: Path, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset` on."""
        return bytes(self._file(path).content[offset : offset + size])

    def write(self, path: Path, data: bytes, *, mode: int = 0o600) -> None:
        """Replace a whole file, at once and durably."""
        with named_disk_errors(path):
            self._volume.replace(str(path), data)

    def create(self, path: Path, *, mode: int = 0o600) -> SimulatedFile:
        """Open a new empty file."""
        with named_disk_errors(path):
            file = self._volume.open(str(path))
            self._volume.change(file, Truncate(0))
        return SimulatedFile(self._volume, file, path)

    def append(self, path: Path, size: int) -> SimulatedFile:
        """Open a file that is there, cut to `size`."""
        file = self._file(path)
        with named_disk_errors(path):
            self._volume.must_be_writable(str(path))
            must_reach(path, len(file.content), size)
            if len(file.content) > size:
                self._volume.change(file, Truncate(size))
        return SimulatedFile(self._volume, file, path)

    def make_folder(self, path: Path, *, mode: int = 0o700) -> None:
        """Make a folder and its parents."""
        wanted = {str(folder) for folder in (path, *path.parents)}
        if not wanted <= self._volume.folders:
            with named_disk_errors(path):
                self._volume.must_be_writable(str(path))
            self._volume.folders |= wanted

    def sync_folder(self, path: Path) -> None:
        """Make what was removed from the folder stay away."""
        if str(path) not in self._volume.folders:
            raise LocalError(Code.NOT_FOUND, f"there is no {path}", "check the path")
        self._volume.sync_folder(str(path))

    def list_folder(self, path: Path) -> list[str]:
        """Return the names in a folder, sorted."""
        names = (*self._volume.files, *self._volume.folders)
        return sorted(os.path.basename(name) for name in names if os.path.dirname(name) == str(path) != name)

    def remove(self, path: Path) -> None:
        """Remove a file or a whole folder."""
        inside = f"{path}/"
        files = [name for name in self._volume.files if name == str(path) or name.startswith(inside)]
        folders = {name for name in self._volume.folders if name == str(path) or name.startswith(inside)}
        if files or folders:
            with named_disk_errors(path):
                self._volume.must_be_writable(str(path))
                for name in files:
                    self._volume.delete(name, durable=False)
            self._volume.folders -= folders

    def _files(self, pattern: str) -> Iterator[tuple[str, File]]:
        return (pair for pair in self._volume.files.items() if fnmatchcase(pair[0], pattern))

    def _file(self, path: Path) -> File:
        file = self._volume.files.get(str(path))
        if file is None:
            raise LocalError(Code.NOT_FOUND, f"there is no {path}", "check the path")
        return file


def _drawn(randomness: Randomness, count: int) -> int:
    """Return a number in [0, count)."""
    return min(int(randomness.uniform(0.0, count)), count - 1)


class SimulatedFile:
    """A file that grows at its end."""

    def __init__(self, volume: Volume, file: File, path: Path) -> None:
        self._volume = volume
        self._file = file
        self._path = path
        self._closed = False

    def write(self, data: bytes) -> None:
        """Append `data`, unsynced; when it does not fit, the part that does."""
        assert not self._closed, "written after close"
        with named_disk_errors(self._path):
            at, data = len(self._file.content), bytes(data)
            if (fits := self._volume.room_bytes()) is not None and 0 < fits < len(data):
                self._volume.change(self._file, Write(at, data[:fits]))
                at, data = at + fits, data[fits:]
            self._volume.change(self._file, Write(at, data))

    def sync(self) -> None:
        """Make what was written durable."""
        assert not self._closed, "synced after close"
        with named_disk_errors(self._path):
            self._volume.sync(self._file)

    def close(self) -> None:
        """Close; twice is no error."""
        self._closed = True

    def __enter__(self) -> SimulatedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
