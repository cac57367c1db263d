"""One client of the daemon's socket: its lines in, its answers and progress out."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

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

MAX_REQUESTS = 64
"""Requests of one connection that may run at once."""
MAX_QUEUED_PROGRESS_BYTES = 1024 * 1024
"""Progress of one connection that waits for a slow reader."""

_READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Request:
    id: int | str
    method: str
    params: dict[str, Any]


class Refused(Exception):
    """A line that is not taken, and the error object that says why."""

    def __init__(self, error: dict[str, Any], request_id: int | str | None = None) -> None:
        super().__init__(error["message"])
        self.answer = encode_line({"jsonrpc": "2.0", "id": request_id, "error": error})


class Connection:
    """One client: a reader, a writer of progress, and a task for each request."""

    def __init__(self, stream: trio.SocketStream, methods: Mapping[str, Handler], on_fault: OnFault) -> None:
        self._stream = stream
        self._methods = methods
        self._on_fault = on_fault
        self._running = 0
        self._scope = trio.CancelScope()
        self._sending = trio.Lock()
        self._progress: deque[bytes] = deque()
        self._progress_bytes = 0
        self._dropped = 0
        self._has_progress = trio.Event()

    @property
    def is_idle(self) -> bool:
        """Whether no request of the client is being answered."""
        return self._running == 0

    def close(self) -> None:
        """Let the client go: `run` ends."""
        self._scope.cancel()

    async def run(self, first_line: bytes) -> None:
        """Talk until the client goes away; its handlers are cancelled then."""
        with self._scope:
            await self._talk(first_line)

    async def _talk(self, first_line: bytes) -> None:
        await self._stream.send_all(first_line)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_progress)
            try:
                async for line in _lines(self._stream):
                    try:
                        request = self._accept(line)
                    except Refused as refusal:
                        await self._send(refusal.answer)
                    else:
                        self._running += 1
                        nursery.start_soon(self._answer, request)
            except Refused as refusal:  # over-long: nobody knows where the next line begins
                await self._send(refusal.answer)
            nursery.cancel_scope.cancel()

    def _accept(self, line: bytes) -> _Request:
        request = _parse(line)
        if request.method not in self._methods:
            raise Refused(_error(METHOD_NOT_FOUND, f"there is no method {request.method!r}"), request.id)
        if self._running >= MAX_REQUESTS:
            error = KnodeError(
                Code.RATE_LIMITED,
                f"{MAX_REQUESTS} requests of this connection are running",
                "wait for an answer before the next request",
            )
            raise Refused(knode_error(error), request.id)
        return request

    async def _answer(self, request: _Request) -> None:
        def notify(params: dict[str, Any]) -> None:
            self._queue_progress(request.id, params)

        try:
            result = await self._methods[request.method](request.params, notify)
            answer = encode_line({"jsonrpc": "2.0", "id": request.id, "result": result})
            if len(answer) > MAX_MESSAGE_BYTES:
                raise KnodeError(
                    Code.TOO_LARGE,
                    f"the answer to {request.method} has {len(answer)} bytes of {MAX_MESSAGE_BYTES} at most",
                )
        except Exception as error:
            named = self._named(request.method, error)
            answer = encode_line({"jsonrpc": "2.0", "id": request.id, "error": knode_error(named)})
        except BaseExceptionGroup as group:  # it failed while it was cancelled: a fault that ends no daemon
            cancelled, faults = group.split(trio.Cancelled)
            if cancelled is None or not isinstance(faults, ExceptionGroup):
                raise
            self._on_fault(request.method, faults)
            raise cancelled from None
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
        line = encode_line({"jsonrpc": "2.0", "method": "progress", "params": {**params, "id": request_id}})
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
            raise Refused({**knode_error(error), "code": INVALID_REQUEST})
        chunk = await stream.receive_some(min(_READ_BYTES, MAX_MESSAGE_BYTES - searched))
        if not chunk:
            return
        buffer += chunk


def _parse(line: bytes) -> _Request:
    try:
        message = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(_error(PARSE_ERROR, f"not JSON: {error}")) from error
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise Refused(_error(INVALID_REQUEST, "not a JSON-RPC 2.0 request"))
    request_id = message.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, int | str):
        raise Refused(_error(INVALID_REQUEST, "a request has an id, a number or a text"))
    method = message.get("method")
    if not isinstance(method, str):
        raise Refused(_error(INVALID_REQUEST, "a request names its method"), request_id)
    params = message.get("params", {})
    if not isinstance(params, dict):
        raise Refused(_error(INVALID_PARAMS, "params are an object, by name"), request_id)
    return _Request(request_id, method, params)


def _error(number: int, message: str) -> dict[str, Any]:
    return {"code": number, "message": message}


def knode_error(error: KnodeError) -> dict[str, Any]:
    """Return an error of the table as JSON-RPC carries it."""
    data = {"code": error.code.value, "message": error.message, "next": error.next_step}
    return {"code": KNODE_ERROR, "message": error.message, "data": data}


def encode_line(message: dict[str, Any]) -> bytes:
    """Return a message as it stands on the socket."""
    return msgspec.json.encode(message) + b"\n"
