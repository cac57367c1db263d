"""The daemon's side of the socket."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Never

import trio

from knode.control.connection import Connection, Handler, Notify, OnFault, encode_line, knode_error
from knode.errors import Code, KnodeError

__all__ = ["MAX_CONNECTIONS", "Handler", "Notify", "OnFault", "may_connect", "peer_uid", "serve"]

MAX_CONNECTIONS = 64

_FULL = KnodeError(
    Code.RATE_LIMITED,
    f"{MAX_CONNECTIONS} programs wait for answers of this daemon already",
    "close one of them, then run the command again",
)


async def serve(
    socket_path: Path,
    methods: Mapping[str, Handler],
    *,
    hello: dict[str, Any],
    on_fault: OnFault,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> Never:
    """Answer on `socket_path` until cancelled; started once the socket takes connections.

    Cancelling cancels every running handler and removes the socket. A client that closes its side,
    even half of it, cancels its running handlers.

    Args:
        socket_path: at most about 100 bytes; its folder is made when absent. What a dead daemon left
            there is replaced.
        methods: what can be asked.
        hello: params of the first line of every connection: `protocol` and `version`.
        on_fault: told of each exception that is not in the table; the client only learns INTERNAL.

    Raises:
        KnodeError: LOCKED when a daemon answers there already, NOT_ALLOWED when others may enter the
            folder, INVALID_ARGUMENT when the path is too long, DISK_READ_ONLY when it cannot be made.
    """
    first_line = encode_line({"jsonrpc": "2.0", "method": "hello", "params": hello})
    no_room = encode_line({"jsonrpc": "2.0", "id": None, "error": knode_error(_FULL)})
    with _listening(socket_path) as listener:
        connections: dict[Connection, None] = {}

        async def take(stream: trio.SocketStream) -> None:
            async with stream:
                if not may_connect(peer_uid(stream.socket)):
                    return
                connection = Connection(stream, methods, on_fault)
                try:
                    if len(connections) >= MAX_CONNECTIONS and not _make_room(connections):
                        await stream.send_all(no_room)
                        return
                    connections[connection] = None
                    await connection.run(first_line)
                except* trio.BrokenResourceError:
                    pass  # the client is gone, and with it whoever would want to know
                finally:
                    connections.pop(connection, None)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, take, [listener])
            task_status.started()
    raise AssertionError("serve_listeners ends only by an exception")


def _make_room(connections: dict[Connection, None]) -> bool:
    """Close the connection that has been open longest without a request of its own; tell whether one was."""
    oldest = next((connection for connection in connections if connection.is_idle), None)
    if oldest is None:
        return False
    del connections[oldest]
    oldest.close()
    return True


def peer_uid(connected: trio.socket.SocketType) -> int | None:
    """Return the user id of the process at the other end; None where the system cannot tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


def may_connect(uid: int | None) -> bool:
    """Tell whether a user may speak to this daemon: its own, or root.

    An unknown user passed the folder's and the socket's permissions, which is all that can be asked.
    """
    return uid is None or uid in (0, os.geteuid())


@contextmanager
def _listening(path: Path) -> Iterator[trio.SocketListener]:
    _prepare_folder(path.parent)
    _remove_stale(path)
    with _bound(path) as bound:
        made = path.stat()
        try:
            path.chmod(0o600)
            bound.listen(MAX_CONNECTIONS)
            yield trio.SocketListener(trio.socket.from_stdlib_socket(bound))
        finally:
            if path.exists() and path.stat().st_ino == made.st_ino:
                path.unlink()


def _bound(path: Path) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(str(path))
    except OSError as error:
        bound.close()
        if error.errno is None or error.errno == errno.ENAMETOOLONG:
            raise KnodeError(
                Code.INVALID_ARGUMENT,
                f"the path of the daemon's socket is too long for this system ({path})",
                "choose a home with a shorter path with --home",
            ) from error
        raise _not_writable(path, error) from error
    return bound


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError as error:
        raise _not_writable(folder, error) from error
    if mode & 0o077:
        raise KnodeError(
            Code.NOT_ALLOWED,
            f"other users may enter {folder} (mode {mode:o}), where the daemon's socket belongs",
            f"chmod 700 {folder}",
        )


def _remove_stale(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise KnodeError(
            Code.HOME_DAMAGED, f"{path} is in the way of the daemon's socket", f"look at it, then: rm {path}"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # it listens, and is busy
    raise KnodeError(Code.LOCKED, f"a daemon answers at {path} already", "knode status")


def _not_writable(path: Path, error: OSError) -> KnodeError:
    code = Code.DISK_FULL if error.errno == errno.ENOSPC else Code.DISK_READ_ONLY
    return KnodeError(
        code,
        f"the daemon's socket cannot be made at {path} ({error.strerror})",
        "check the folder's owner, permissions and space, or choose another with --home",
    )
