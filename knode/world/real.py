"""The real world: the operating system's clocks, randomness, disk and threads."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import trio

from knode.errors import Code, LocalError
from knode.world.clock import Monotonic, WallTime
from knode.world.turns import Turns
from knode.world.world import World

T = TypeVar("T")
BLOCKING_AT_ONCE = 16


class RealClock:
    """trio's clock for durations, the system's for the time of day."""

    def monotonic(self) -> Monotonic:
        """Return trio's time, in seconds."""
        return Monotonic(trio.current_time())

    def wall(self) -> WallTime:
        """Return the system's time of day, in milliseconds."""
        return WallTime(time.time_ns() // 1_000_000)


class RealRandomness:
    """The operating system's randomness."""

    def token(self, size: int) -> bytes:
        """Return `size` bytes fit for keys."""
        return secrets.token_bytes(size)

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high]."""
        return random.uniform(low, high)


class RealBlocking:
    """A bounded set of threads."""

    def __init__(self) -> None:
        self._turns = Turns(BLOCKING_AT_ONCE)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread; cancelling waits for it to end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        async with self._turns:
            return await _in_thread(work)


async def _in_thread(work: Callable[[], T]) -> T:
    """Do what `trio.to_thread.run_sync` does, but for calls back into the loop and a copied context, which
    cost as much as the rest of it."""
    task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()

    def deliver(result: Any) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)

    trio.lowlevel.start_thread_soon(work, deliver)
    # Whoever is cancelled waits for what the thread does.
    result: T = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
    return result


@contextlib.contextmanager
def named_disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's disk errors into those of the table."""
    try:
        yield
    except FileNotFoundError as error:
        raise LocalError(Code.NOT_FOUND, f"there is no {path}", "check the path") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LocalError(
                Code.DISK_FULL, f"no space left for {path}", "free some space, then run the command again"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise LocalError(
                Code.DISK_READ_ONLY,
                f"{path} cannot be read or written ({error.strerror})",
                "check its owner and permissions, or choose another folder with --home",
            ) from error
        if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            raise LocalError(
                Code.INVALID_ARGUMENT, f"{path} cannot be used ({error.strerror})", "check the path"
            ) from error
        raise LocalError(
            Code.UNAVAILABLE, f"{path} cannot be read or written ({error.strerror})", "check the disk"
        ) from error


def must_reach(path: Path, has_bytes: int, size: int) -> None:
    """Refuse to go on at `size` in a file that is shorter."""
    if has_bytes < size:
        raise LocalError(Code.INVALID_ARGUMENT, f"{path} has {has_bytes} bytes, and {size} were to be kept")


class RealWritableFile:
    """A file of the operating system, open at its end for writing; its errors name `meant`."""

    def __init__(self, descriptor: int, meant: Path) -> None:
        self._descriptor = descriptor
        self._path = meant

    @classmethod
    def create(cls, path: Path, mode: int, *, meant: Path | None = None) -> RealWritableFile:
        """Open a new empty file; its errors name `meant`, by default the file."""
        with named_disk_errors(meant or path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        return cls(descriptor, meant or path)

    @classmethod
    def append(cls, path: Path, size: int) -> RealWritableFile:
        """Open a file that is there, cut to `size`."""
        with named_disk_errors(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                must_reach(path, os.fstat(descriptor).st_size, size)
                os.ftruncate(descriptor, size)
            except BaseException:
                os.close(descriptor)
                raise
        return cls(descriptor, path)

    def write(self, data: bytes) -> None:
        """Append `data`."""
        view = memoryview(data)
        with named_disk_errors(self._path):
            while view:
                view = view[os.write(self._descriptor, view) :]

    def sync(self) -> None:
        """Return once all is on the disk."""
        with named_disk_errors(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; twice is no error."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> RealWritableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RealDisk:
    """The operating system's files."""

    sqlite_vfs: str | None = None

    def exists(self, path: Path) -> bool:
        """Tell whether a file or folder is there."""
        with named_disk_errors(path):
            return path.exists()

    def is_plain(self, path: Path) -> bool:
        """Tell whether a file is nothing but a file."""
        with named_disk_errors(path):
            status = path.lstat()
        return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and bool(status.st_mode & stat.S_IRUSR)

    def size(self, path: Path) -> int:
        """Return a file's size in bytes."""
        with named_disk_errors(path):
            return path.stat().st_size

    def read(self, path: Path, *, limit_bytes: int) -> bytes:
        """Return a whole file."""
        with named_disk_errors(path), path.open("rb") as file:
            data = file.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise LocalError(Code.TOO_LARGE, f"{path} is larger than {limit_bytes} bytes")
        return data

    def read_at(self, path: Path, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset` on."""
        with named_disk_errors(path), path.open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size) or b""

    def write(self, path: Path, data: bytes, *, mode: int = 0o600) -> None:
        """Replace a whole file: temporary file, fsync, rename, fsync of the folder."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            with RealWritableFile.create(temporary, mode, meant=path) as file:
                file.write(data)
                file.sync()
            with named_disk_errors(path):
                temporary.replace(path)
                _sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def create(self, path: Path, *, mode: int = 0o600) -> RealWritableFile:
        """Open a new empty file."""
        return RealWritableFile.create(path, mode)

    def append(self, path: Path, size: int) -> RealWritableFile:
        """Open a file that is there, cut to `size`."""
        return RealWritableFile.append(path, size)

    def make_folder(self, path: Path, *, mode: int = 0o700) -> None:
        """Make a folder and its parents, each with `mode`."""
        with named_disk_errors(path):
            for folder in (*reversed(path.parents), path):
                if not folder.exists():
                    folder.mkdir(mode=mode, exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Return once the names in the folder are on the disk."""
        with named_disk_errors(path):
            _sync_folder(path)

    def list_folder(self, path: Path) -> list[str]:
        """Return the names in a folder, sorted."""
        with named_disk_errors(path):
            return sorted(os.listdir(path)) if path.is_dir() else []

    def remove(self, path: Path) -> None:
        """Remove a file or a whole folder."""
        with named_disk_errors(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def real_world() -> World:
    """Return the world of a node in production."""
    return World(clock=RealClock(), randomness=RealRandomness(), disk=RealDisk(), blocking=RealBlocking())
