"""What makes a daemon the only one in its home: a lock, and a folder for its socket that is its own.

Real only: both ask the operating system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator

from knode.errors import Code, KnodeError
from knode.home.layout import Home
from knode.world.real import named_disk_errors


@contextlib.contextmanager
def hold_home(home: Home) -> Iterator[None]:
    """Hold the home's lock; the system frees it when the process ends, however it ends.

    Raises:
        KnodeError: LOCKED, naming the process that holds it; DISK_READ_ONLY, DISK_FULL.
    """
    with named_disk_errors(home.lock_file):
        descriptor = os.open(home.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise KnodeError(
                Code.LOCKED,
                f"a knode daemon (process {holder}) already runs in {home.path}",
                f"'knode status' shows it, 'knode down' stops it; if neither finds it: 'kill {holder}'",
            ) from error
        with named_disk_errors(home.lock_file):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def make_socket_folder(home: Home) -> None:
    """Make the folder of the home's socket, and see that nobody else can put a socket there.

    Raises:
        KnodeError: NOT_ALLOWED when the folder belongs to someone else or others may write to it.
    """
    folder = home.socket.parent
    with named_disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not private or status.st_uid != os.getuid():
        raise KnodeError(
            Code.NOT_ALLOWED,
            f"{folder} is not a private folder of this user, so the daemon's socket cannot be there",
            "remove it, or choose a home with a shorter path with --home",
        )
