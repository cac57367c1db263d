"""The command line's side of the socket: plain and synchronous, for it must start in no time."""

from __future__ import annotations

import json
import os
import shlex
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Any

from knode.control.protocol import MAX_MESSAGE_BYTES, PROTOCOL
from knode.errors import Code, KnodeError
from knode.home.layout import Home, locate_home

OnProgress = Callable[[dict[str, Any]], None]
"""Told the params of each progress notification of a call, its request id taken out."""

HELLO_TIMEOUT_S = 5.0

_READ_BYTES = 64 * 1024


class Client:
    """A connection to one home's daemon, one call at a time; a context manager that closes it.

    Closing it while a call runs (Ctrl-C does) makes the daemon cancel what it does for that call.
    """

    def __init__(self, connected: socket.socket, home: Home) -> None:
        self._socket = connected
        self._home = home
        self._buffer = bytearray()
        self._calls = 0

    @classmethod
    def connect(cls, home: Home) -> Client:
        """Connect to the daemon of `home` and hear its hello.

        Raises:
            KnodeError: NOT_RUNNING when nothing answers there, NOT_ALLOWED when the daemon is another
                user's, TIMEOUT when it says nothing for 5 seconds, UNSUPPORTED_VERSION when it speaks
                another protocol, RATE_LIMITED when it has too many clients.
        """
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client = cls(connected, home)
        try:
            connected.settimeout(HELLO_TIMEOUT_S)
            try:
                connected.connect(str(home.socket))
            except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
                raise not_running(home) from error
            except BlockingIOError as error:
                raise KnodeError(
                    Code.UNAVAILABLE,
                    f"the daemon of {home.path} has too many callers",
                    "ask again in a moment",
                ) from error
            except PermissionError as error:
                raise KnodeError(
                    Code.NOT_ALLOWED,
                    f"the daemon of {home.path} belongs to another user",
                    "run the command as that user, or choose your own home with --home",
                ) from error
            client._hear_hello()
            connected.settimeout(None)
        except BaseException:
            connected.close()
            raise
        return client

    @property
    def daemon_pid(self) -> int:
        """The process id of the daemon, as the kernel knows it (Linux)."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid

    def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        on_progress: OnProgress | None = None,
        *,
        silence_s: float | None = None,
    ) -> Any:
        """Ask the daemon and wait for its answer; every wait of the daemon has its own end.

        Args:
            method: a name of the method table.
            params: by name; at most 16 MiB encoded.
            on_progress: told of each step; without it steps are passed over.
            silence_s: how long the daemon may say nothing; for ever unless given.

        Raises:
            KnodeError: what the daemon answered; TOO_LARGE before anything is sent; UNAVAILABLE when
                the daemon went away before it answered; TIMEOUT after `silence_s`, and then the
                connection is of no more use.
        """
        self._calls += 1
        self._socket.settimeout(silence_s)
        request = {"jsonrpc": "2.0", "id": self._calls, "method": method, "params": params or {}}
        self._send(request)
        while True:
            message = self._receive()
            if message.get("method") == "progress":
                progress = message["params"]
                if progress.pop("id") == self._calls and on_progress is not None:
                    on_progress(progress)
            elif "error" in message:
                raise _as_knode_error(message["error"])
            elif message.get("id") == self._calls:
                return message["result"]

    def close(self) -> None:
        """Close the connection; twice is no error."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hear_hello(self) -> None:
        message = self._receive()
        if "error" in message:
            raise _as_knode_error(message["error"])
        spoken = message.get("params", {}).get("protocol")
        if spoken != PROTOCOL:
            raise KnodeError(
                Code.UNSUPPORTED_VERSION,
                f"the daemon of {self._home.path} speaks protocol {spoken} on its socket, "
                f"this command {PROTOCOL}: they are of different versions",
                f"{command_for(self._home, 'down')}, then {command_for(self._home, 'up')}",
            )

    def _send(self, request: dict[str, Any]) -> None:
        try:
            line = json.dumps(request, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except UnicodeEncodeError as error:
            raise KnodeError(
                Code.INVALID_ARGUMENT, f"the text is not UTF-8 ({error.reason})", "give it as UTF-8"
            ) from error
        if len(line) > MAX_MESSAGE_BYTES:
            raise KnodeError(
                Code.TOO_LARGE, f"the request is {len(line)} bytes; the limit is {MAX_MESSAGE_BYTES}"
            )
        try:
            self._socket.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            # The daemon refuses a connection with a last line that may still wait to be read.
            return
        except TimeoutError as error:
            raise self._silent() from error

    def _receive(self) -> dict[str, Any]:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched >= MAX_MESSAGE_BYTES:
                raise KnodeError(Code.TOO_LARGE, f"the daemon's answer is over {MAX_MESSAGE_BYTES} bytes")
            try:
                chunk = self._socket.recv(_READ_BYTES)
            except ConnectionResetError as error:
                raise self._gone() from error
            except TimeoutError as error:
                raise self._silent() from error
            if not chunk:
                raise self._gone()
            self._buffer += chunk
        line = self._buffer[:end]
        del self._buffer[: end + 1]
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise KnodeError(
                Code.INTERNAL, f"what answers at {self._home.socket} is no knode daemon ({error})"
            ) from error
        return message

    def _silent(self) -> KnodeError:
        return KnodeError(
            Code.TIMEOUT,
            f"the daemon of {self._home.path} (process {self.daemon_pid}) takes calls but says nothing",
            f"kill {self.daemon_pid}",
        )

    def _gone(self) -> KnodeError:
        return KnodeError(
            Code.UNAVAILABLE,
            f"the daemon of {self._home.path} went away before it answered",
            command_for(self._home, "status"),
        )


def not_running(home: Home) -> KnodeError:
    """Return the error for a home whose daemon does not answer, with the command that mends it."""
    if not home.path.exists():
        return KnodeError(Code.NOT_RUNNING, f"there is no node at {home.path}", command_for(home, "init"))
    return KnodeError(Code.NOT_RUNNING, f"no daemon runs for {home.path}", command_for(home, "up"))


def command_for(home: Home, *words: str) -> str:
    """Return the command line that does `words` on this home, with --home only when it is needed."""
    here = locate_home(None, os.environ)
    place = [] if home.path == here.path else ["--home", str(home.path)]
    return shlex.join(["knode", *words, *place])


def _as_knode_error(error: dict[str, Any]) -> KnodeError:
    data = error.get("data")
    if not isinstance(data, dict):
        return KnodeError(
            Code.INTERNAL,
            f"the daemon did not understand this command ({error.get('message')}): "
            "they are of different versions",
            "knode down, then knode up",
        )
    known = data["code"] in Code.__members__
    return KnodeError(Code(data["code"]) if known else Code.INTERNAL, data["message"], data["next"])
