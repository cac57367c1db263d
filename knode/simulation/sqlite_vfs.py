"""SQLite's way to a simulated volume: enough of a VFS for a write-ahead log in exclusive locking mode."""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Iterator
from typing import Any

import apsw

from knode.simulation.volume import File, Truncate, Volume, Write

_NOT_OFFERED = {"xDlOpen", "xDlSym", "xDlError", "xDlClose"}
_NOT_OFFERED |= {"xSetSystemCall", "xGetSystemCall", "xNextSystemCall"}
_SECTOR_BYTES = 4096
_numbers = itertools.count(1)


@contextlib.contextmanager
def _sqlite_errors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise apsw.CantOpenError(str(error)) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise apsw.FullError(str(error)) from error
        if error.errno == errno.EIO:
            raise apsw.IOError(str(error)) from error
        raise apsw.ReadOnlyError(str(error)) from error


class VolumeVfs(apsw.VFS):
    """A VFS over one volume, registered under a name of its own until `unregister`."""

    def __init__(self, volume: Volume) -> None:
        self.name = f"knode-simulated-{next(_numbers)}"
        self._volume = volume
        super().__init__(self.name, exclude=_NOT_OFFERED)

    def xFullPathname(self, name: str) -> str:
        """Names are absolute."""
        return name

    def xAccess(self, pathname: str, flags: int) -> bool:
        """Tell whether a file is there; SQLite wants an empty one to count as absent."""
        file = self._volume.files.get(pathname)
        if flags == apsw.SQLITE_ACCESS_READWRITE:
            return file is not None and not self._volume.read_only
        return file is not None and bool(file.content)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        """Open or make a file; one without a name is a temporary one."""
        asked = flags[0]
        if name is None:
            return VolumeFile(self._volume, File(), "")
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        if path not in self._volume.files and not asked & apsw.SQLITE_OPEN_CREATE:
            raise apsw.CantOpenError(f"there is no {path}")
        with _sqlite_errors():
            file = self._volume.open(path)
        flags[1] = asked
        if self._volume.read_only:
            flags[1] = asked & ~(apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
            flags[1] |= apsw.SQLITE_OPEN_READONLY
        temporary = path if asked & apsw.SQLITE_OPEN_DELETEONCLOSE else ""
        return VolumeFile(self._volume, file, temporary)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        """Remove a file; durably only with `syncdir`."""
        if filename not in self._volume.files:
            raise apsw.exception_for(apsw.SQLITE_IOERR_DELETE_NOENT)
        with _sqlite_errors():
            self._volume.delete(filename, durable=syncdir)

    def xGetLastError(self) -> tuple[int, str]:
        """Nothing is known beyond the error itself."""
        return 0, ""

    def xSleep(self, microseconds: int) -> int:
        """Nobody sleeps: who holds a lock here holds it for good."""
        return microseconds

    def xCurrentTime(self) -> float:
        """Refuse: SQL must not ask for the time, since a run would then depend on it."""
        raise apsw.MisuseError("SQL asked for the time of day")

    def xCurrentTimeInt64(self) -> int:
        """Refuse, as `xCurrentTime`."""
        raise apsw.MisuseError("SQL asked for the time of day")


class VolumeFile(apsw.VFSFile):
    """One open file of a volume. The base class is named for its type alone; it opens nothing."""

    def __init__(self, volume: Volume, file: File, temporary: str) -> None:
        self._volume = volume
        self._file = file
        self._temporary = temporary

    def xRead(self, amount: int, offset: int) -> bytes:
        """Return at most `amount` bytes."""
        return bytes(self._file.content[offset : offset + amount])

    def xWrite(self, data: Any, offset: int) -> None:
        """Write, unsynced."""
        with _sqlite_errors():
            self._volume.change(self._file, Write(offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        """Cut, unsynced."""
        with _sqlite_errors():
            self._volume.change(self._file, Truncate(newsize))

    def xSync(self, flags: int) -> None:
        """Make what was written durable."""
        with _sqlite_errors():
            self._volume.sync(self._file)

    def xFileSize(self) -> int:
        """Return the size in bytes."""
        return len(self._file.content)

    def xClose(self) -> None:
        """Let go of the locks, and of a temporary file."""
        self._file.locks.pop(id(self), None)
        if self._temporary:
            self._volume.files.pop(self._temporary, None)

    def xLock(self, level: int) -> None:
        """Take a lock of SQLite's ladder (shared, reserved, pending, exclusive), or raise BusyError."""
        others = [held for owner, held in self._file.locks.items() if owner != id(self)]
        bar = {apsw.SQLITE_LOCK_SHARED: apsw.SQLITE_LOCK_PENDING}.get(
            level,
            apsw.SQLITE_LOCK_RESERVED if level == apsw.SQLITE_LOCK_RESERVED else apsw.SQLITE_LOCK_SHARED,
        )
        if any(held >= bar for held in others):
            raise apsw.BusyError("another connection holds the file")
        self._file.locks[id(self)] = max(level, self._file.locks.get(id(self), 0))

    def xUnlock(self, level: int) -> None:
        """Go down to `level`."""
        self._file.locks[id(self)] = level

    def xCheckReservedLock(self) -> bool:
        """Tell whether anyone is about to write."""
        return any(held >= apsw.SQLITE_LOCK_RESERVED for held in self._file.locks.values())

    def xFileControl(self, op: int, ptr: int) -> bool:
        """Nothing special is known."""
        return False

    def xSectorSize(self) -> int:
        """Return what SQLite's own VFS assumes."""
        return _SECTOR_BYTES

    def xDeviceCharacteristics(self) -> int:
        """As SQLite's own VFS: a torn write does not touch its neighbours."""
        return apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE
