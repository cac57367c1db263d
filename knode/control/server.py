"""The daemon's side of the socket."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import msgspec
import trio

from knode.control.protocol import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    KNODE_ERROR,
    MAX_MESSAGE_BYTES,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
)
from knode.errors import Code, KnodeError

Notify = Callable[[dict[str, Any]], None]
"""Tells the client of a request how it gets on. Never blocks and never raises for a slow reader: what
does not fit is left out, and the next that fits says how many were (`dropped`)."""

Handler = Callable[[dict[str, Any], Notify], Awaitable[Any]]
"""Answers one method: params in, a value that msgspec can write as JSON out, or a `KnodeError`."""

OnFault = Callable[[str, Exception], None]
"""Told of an exception that is no `KnodeError`: the method's name and the exception, for the log."""

MAX_CONNECTIONS = 64
MAX_REQUESTS = 64
"""Requests of one connection that may run at once."""
MAX_QUEUED_PROGRESS_BYTES = 1024 * 1024
"""Progress of one connection that waits for a slow reader."""

_READ_BYTES = 64 * 1024


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
    first_line = _line({"jsonrpc": "2.0", "method": "hello", "params": hello})
    with _listening(socket_path) as listener:
        open_connections = 0

        async def take(stream: trio.SocketStream) -> None:
            nonlocal open_connections
            async with stream:
                if not may_connect(peer_uid(stream.socket)):
                    return
                open_connections += 1
                try:
                    if open_connections > MAX_CONNECTIONS:
                        await stream.send_all(_TOO_MANY_CONNECTIONS.answer)
                    else:
                        await _Connection(stream, methods, on_fault).run(first_line)
                except trio.BrokenResourceError:
                    pass  # the client is gone, and with it whoever would want to know
                finally:
                    open_connections -= 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, take, [listener])
            task_status.started()
    raise AssertionError("serve_listeners ends only by an exception")


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


@dataclass(frozen=True, slots=True)
class _Request:
    id: int | str
    method: str
    params: dict[str, Any]


class _Refused(Exception):
    """A line that is not taken, and the error object that says why."""

    def __init__(self, error: dict[str, Any], request_id: int | str | None = None) -> None:
        super().__init__(error["message"])
        self.answer = _line({"jsonrpc": "2.0", "id": request_id, "error": error})


class _Connection:
    """One client: a reader, a writer of progress, and a task for each request."""

    def __init__(self, stream: trio.SocketStream, methods: Mapping[str, Handler], on_fault: OnFault) -> None:
        self._stream = stream
        self._methods = methods
        self._on_fault = on_fault
        self._running = 0
        self._sending = trio.Lock()
        self._progress: deque[bytes] = deque()
        self._progress_bytes = 0
        self._dropped = 0
        self._has_progress = trio.Event()

    async def run(self, first_line: bytes) -> None:
        """Talk until the client goes away; its handlers are cancelled then."""
        await self._stream.send_all(first_line)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_progress)
            try:
                async for line in _lines(self._stream):
                    try:
                        request = self._accept(line)
                    except _Refused as refusal:
                        await self._send(refusal.answer)
                    else:
                        self._running += 1
                        nursery.start_soon(self._answer, request)
            except _Refused as refusal:  # over-long: nobody knows where the next line begins
                await self._send(refusal.answer)
            nursery.cancel_scope.cancel()

    def _accept(self, line: bytes) -> _Request:
        request = _parse(line)
        if request.method not in self._methods:
            raise _Refused(_error(METHOD_NOT_FOUND, f"there is no method {request.method!r}"), request.id)
        if self._running >= MAX_REQUESTS:
            error = KnodeError(
                Code.RATE_LIMITED,
                f"{MAX_REQUESTS} requests of this connection are running",
                "wait for an answer before the next request",
            )
            raise _Refused(_knode_error(error), request.id)
        return request

    async def _answer(self, request: _Request) -> None:
        def notify(params: dict[str, Any]) -> None:
            self._queue_progress(request.id, params)

        try:
            result = await self._methods[request.method](request.params, notify)
            answer = _line({"jsonrpc": "2.0", "id": request.id, "result": result})
            if len(answer) > MAX_MESSAGE_BYTES:
                raise KnodeError(
                    Code.TOO_LARGE,
                    f"the answer to {request.method} has {len(answer)} bytes of {MAX_MESSAGE_BYTES} at most",
                )
        except Exception as error:
            named = self._named(request.method, error)
            answer = _line({"jsonrpc": "2.0", "id": request.id, "error": _knode_error(named)})
        async with self._sending:
            await self._flush()
            self._running -= 1  # before the client can see the answer and ask again
            await self._stream.send_all(answer)

    def _named(self, method: str, error: Exception) -> KnodeError:
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
            cause = cause.exceptions[0]
        if isinstance(cause, KnodeError):
            return cause
        self._on_fault(method, error)
        return KnodeError(Code.INTERNAL, f"{method} failed by a fault of knode itself", "knode logs tail")

    def _queue_progress(self, request_id: int | str, params: dict[str, Any]) -> None:
        if self._dropped:
            params = {**params, "dropped": self._dropped}
        line = _line({"jsonrpc": "2.0", "method": "progress", "params": {**params, "id": request_id}})
        if self._progress_bytes + len(line) > MAX_QUEUED_PROGRESS_BYTES:
            self._dropped += 1
            return
        self._dropped = 0
        self._progress.append(line)
        self._progress_bytes += len(line)
        self._has_progress.set()

    async def _send_progress(self) -> None:
        while True:
            await self._has_progress.wait()
            self._has_progress = trio.Event()
            async with self._sending:
                await self._flush()

    async def _send(self, answer: bytes) -> None:
        async with self._sending:
            await self._flush()
            await self._stream.send_all(answer)

    async def _flush(self) -> None:
        """Send the progress that waits; before each answer, so that none overtakes its own progress."""
        while self._progress:
            lines = b"".join(self._progress)
            self._progress.clear()
            self._progress_bytes = 0
            await self._stream.send_all(lines)


async def _lines(stream: trio.SocketStream) -> AsyncIterator[bytes]:
    """Yield each line without its newline; what stands after the last newline is no message."""
    buffer = bytearray()
    searched = 0
    while True:
        end = buffer.find(b"\n", searched)
        if end >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            searched = 0
            yield line
            continue
        searched = len(buffer)
        if searched >= MAX_MESSAGE_BYTES:
            error = KnodeError(Code.TOO_LARGE, f"a message has at most {MAX_MESSAGE_BYTES} bytes")
            raise _Refused({**_knode_error(error), "code": INVALID_REQUEST})
        chunk = await stream.receive_some(min(_READ_BYTES, MAX_MESSAGE_BYTES - searched))
        if not chunk:
            return
        buffer += chunk


def _parse(line: bytes) -> _Request:
    try:
        message = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Refused(_error(PARSE_ERROR, f"not JSON: {error}")) from error
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise _Refused(_error(INVALID_REQUEST, "not a JSON-RPC 2.0 request"))
    request_id = message.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, int | str):
        raise _Refused(_error(INVALID_REQUEST, "a request has an id, a number or a text"))
    method = message.get("method")
    if not isinstance(method, str):
        raise _Refused(_error(INVALID_REQUEST, "a request names its method"), request_id)
    params = message.get("params", {})
    if not isinstance(params, dict):
        raise _Refused(_error(INVALID_PARAMS, "params are an object, by name"), request_id)
    return _Request(request_id, method, params)


def _error(number: int, message: str) -> dict[str, Any]:
    return {"code": number, "message": message}


def _knode_error(error: KnodeError) -> dict[str, Any]:
    data = {"code": error.code.value, "message": error.message, "next": error.next_step}
    return {"code": KNODE_ERROR, "message": error.message, "data": data}


def _line(message: dict[str, Any]) -> bytes:
    return msgspec.json.encode(message) + b"\n"


_TOO_MANY_CONNECTIONS = _Refused(
    _knode_error(
        KnodeError(
            Code.RATE_LIMITED,
            f"{MAX_CONNECTIONS} programs are connected to this daemon already",
            "close one of them, then run the command again",
        )
    )
)
