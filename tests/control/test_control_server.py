from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from knode.control import server
from knode.control.connection import MAX_QUEUED_PROGRESS_BYTES, MAX_REQUESTS, Handler, Notify
from knode.control.protocol import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    KNODE_ERROR,
    MAX_MESSAGE_BYTES,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    PROTOCOL,
)
from knode.control.server import MAX_CONNECTIONS, may_connect, serve
from knode.errors import Code, KnodeError

HELLO = {"protocol": PROTOCOL, "version": "0.1.0"}


class Daemon:
    """The methods of the tests, and what the server told about them."""

    def __init__(self) -> None:
        self.faults: list[tuple[str, Exception]] = []
        self.waiting = 0
        self.cancelled = 0
        self.changed = trio.Event()

    def methods(self) -> dict[str, Handler]:
        return {
            "echo": self.echo,
            "wait": self.wait,
            "missing": self.missing,
            "broken": self.broken,
            "grouped": self.grouped,
            "count": self.count,
            "large": self.large,
            "odd": self.odd,
            "clumsy": self.clumsy,
        }

    async def echo(self, params: dict[str, Any], notify: Notify) -> Any:
        return params

    async def wait(self, params: dict[str, Any], notify: Notify) -> Any:
        self.waiting += 1
        self._change()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled += 1
            self._change()

    async def missing(self, params: dict[str, Any], notify: Notify) -> Any:
        raise KnodeError(Code.NOT_FOUND, "there is no task 7", "knode task list")

    async def broken(self, params: dict[str, Any], notify: Notify) -> Any:
        raise ZeroDivisionError("a secret detail")

    async def grouped(self, params: dict[str, Any], notify: Notify) -> Any:
        async with trio.open_nursery():
            raise KnodeError(Code.NO_AGENT, "no such agent")

    async def count(self, params: dict[str, Any], notify: Notify) -> Any:
        for number in range(params["to"]):
            notify({"number": number, "text": "x" * params.get("size", 0)})
            if params.get("pause"):
                await trio.lowlevel.checkpoint()
        return "counted"

    async def large(self, params: dict[str, Any], notify: Notify) -> Any:
        return "x" * MAX_MESSAGE_BYTES

    async def odd(self, params: dict[str, Any], notify: Notify) -> Any:
        return object()

    async def clumsy(self, params: dict[str, Any], notify: Notify) -> Any:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await self.wait(params, notify)
            finally:
                raise ZeroDivisionError("while it tidied up")

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(60):
            while not condition():
                await self.changed.wait()

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class Peer:
    """A client that writes bytes as it likes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def line(self) -> dict[str, Any]:
        with trio.fail_after(60):
            while b"\n" not in self.buffer:
                chunk = await self.stream.receive_some()
                assert chunk, "the server closed the connection"
                self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    async def ended(self) -> bool:
        with trio.fail_after(60):
            return not self.buffer and await self.stream.receive_some() == b""

    async def ask(self, method: str, params: Any = None, request_id: int = 1) -> None:
        request = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params or {}}
        await self.stream.send_all(json.dumps(request).encode() + b"\n")

    async def answer(self, line: bytes) -> dict[str, Any]:
        await self.stream.send_all(line + b"\n")
        return await self.line()


@asynccontextmanager
async def running(path: Path, daemon: Daemon | None = None) -> AsyncIterator[Daemon]:
    daemon = daemon or Daemon()
    async with trio.open_nursery() as nursery:

        async def start(task_status: trio.TaskStatus[None]) -> None:
            await serve(
                path,
                daemon.methods(),
                hello=HELLO,
                on_fault=lambda method, error: daemon.faults.append((method, error)),
                task_status=task_status,
            )

        await nursery.start(start)
        yield daemon
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Peer]:
    async with await trio.open_unix_socket(path) as stream:
        peer = Peer(stream)
        assert await peer.line() == {"jsonrpc": "2.0", "method": "hello", "params": HELLO}
        yield peer


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "knode.sock"


async def test_an_answer_carries_the_result_under_the_id_of_its_request(path: Path) -> None:
    async with running(path), connected(path) as peer:
        await peer.ask("echo", {"text": "grüße"}, request_id=41)
        assert await peer.line() == {"jsonrpc": "2.0", "id": 41, "result": {"text": "grüße"}}


async def test_a_quick_request_is_answered_while_a_slow_one_runs(path: Path) -> None:
    async with running(path) as daemon, connected(path) as peer:
        await peer.ask("wait", request_id=1)
        await daemon.until(lambda: daemon.waiting == 1)
        await peer.ask("echo", request_id=2)
        assert (await peer.line())["id"] == 2


async def test_an_error_of_the_table_reaches_the_client_with_its_next_step(path: Path) -> None:
    async with running(path), connected(path) as peer:
        await peer.ask("missing")
        assert (await peer.line())["error"] == {
            "code": KNODE_ERROR,
            "message": "there is no task 7",
            "data": {"code": "NOT_FOUND", "message": "there is no task 7", "next": "knode task list"},
        }


async def test_an_error_of_the_table_is_found_inside_a_nursery_s_group(path: Path) -> None:
    async with running(path) as daemon, connected(path) as peer:
        await peer.ask("grouped")
        assert (await peer.line())["error"]["data"]["code"] == "NO_AGENT"
        assert daemon.faults == []


async def test_a_fault_goes_to_the_log_and_never_to_the_client(path: Path) -> None:
    async with running(path) as daemon, connected(path) as peer:
        await peer.ask("broken")
        answer = await peer.line()
        assert answer["error"]["data"]["code"] == "INTERNAL"
        assert "secret" not in json.dumps(answer)
        [(method, error)] = daemon.faults
        assert method == "broken"
        assert isinstance(error, ZeroDivisionError)
        assert error.__traceback__ is not None


async def test_a_result_that_is_no_json_is_a_fault(path: Path) -> None:
    async with running(path) as daemon, connected(path) as peer:
        await peer.ask("odd")
        assert (await peer.line())["error"]["data"]["code"] == "INTERNAL"
        assert [method for method, _ in daemon.faults] == ["odd"]


@pytest.mark.parametrize(
    ("line", "number", "request_id"),
    [
        (b"", PARSE_ERROR, None),
        (b"{", PARSE_ERROR, None),
        (b"\xff\xfe", PARSE_ERROR, None),
        (b'"\\ud800"', PARSE_ERROR, None),
        (b"[" * 100_000, PARSE_ERROR, None),
        (b"[]", INVALID_REQUEST, None),
        (b'{"id":1,"method":"echo"}', INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","method":"echo"}', INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":true,"method":"echo"}', INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":1,"method":7}', INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","id":"a","method":"nothing"}', METHOD_NOT_FOUND, "a"),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":[1]}', INVALID_PARAMS, 1),
    ],
)
async def test_what_is_no_request_is_named_and_the_connection_goes_on(
    path: Path, line: bytes, number: int, request_id: Any
) -> None:
    async with running(path), connected(path) as peer:
        answer = await peer.answer(line)
        assert (answer["error"]["code"], answer["id"]) == (number, request_id)
        await peer.ask("echo", request_id=9)
        assert (await peer.line())["id"] == 9


@settings(max_examples=60, deadline=None)
@given(garbage=st.binary(max_size=200).filter(lambda data: b"\n" not in data))
def test_any_bytes_get_an_answer_that_is_an_error(tmp_path_factory: Any, garbage: bytes) -> None:
    async def main() -> None:
        path = tmp_path_factory.mktemp("garbage") / "run" / "s"
        async with running(path), connected(path) as peer:
            assert "error" in await peer.answer(garbage)

    trio.run(main)


async def test_a_line_at_the_limit_is_taken_and_one_over_it_ends_the_connection(path: Path) -> None:
    empty = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "missing", "params": {"text": ""}}).encode()
    fits = empty.replace(b'""', b'"' + b"x" * (MAX_MESSAGE_BYTES - len(empty) - 1) + b'"')
    async with running(path):
        async with connected(path) as peer:
            assert (await peer.answer(fits))["error"]["data"]["code"] == "NOT_FOUND"
        async with connected(path) as peer:
            await peer.stream.send_all(fits + b"x")
            answer = await peer.line()
            assert answer["error"]["code"] == INVALID_REQUEST
            assert answer["error"]["data"]["code"] == "TOO_LARGE"
            assert await peer.ended()


async def test_an_answer_over_the_limit_is_named_instead_of_sent(path: Path) -> None:
    async with running(path), connected(path) as peer:
        await peer.ask("large")
        assert (await peer.line())["error"]["data"]["code"] == "TOO_LARGE"


async def test_a_client_that_goes_away_cancels_what_runs_for_it_alone(path: Path) -> None:
    async with running(path) as daemon, connected(path) as stays:
        await stays.ask("wait")
        async with connected(path) as leaves:
            await leaves.ask("wait", request_id=1)
            await leaves.ask("wait", request_id=2)
            await daemon.until(lambda: daemon.waiting == 3)
        await daemon.until(lambda: daemon.cancelled == 2)
        await stays.ask("echo", request_id=5)
        assert (await stays.line())["id"] == 5
        assert daemon.cancelled == 2


async def test_a_client_that_leaves_without_reading_harms_nobody(path: Path) -> None:
    async with running(path), connected(path) as stays:
        for _ in range(20):
            leaves = await trio.open_unix_socket(path)
            await Peer(leaves).ask("count", {"to": 3000, "size": 1000})
            await Peer(leaves).ask("wait")
            await leaves.aclose()
        await stays.ask("echo")
        assert (await stays.line())["id"] == 1


async def test_a_handler_that_fails_while_it_is_cancelled_ends_no_daemon(path: Path) -> None:
    async with running(path) as daemon, connected(path) as stays:
        async with connected(path) as leaves:
            await leaves.ask("clumsy")
            await daemon.until(lambda: daemon.waiting == 1)
        await daemon.until(lambda: daemon.cancelled == 1)
        await stays.ask("echo")
        assert (await stays.line())["id"] == 1
        assert [method for method, _ in daemon.faults] == ["clumsy"]


async def test_requests_over_the_limit_are_refused_and_the_others_go_on(path: Path) -> None:
    async with running(path) as daemon, connected(path) as peer:
        for number in range(MAX_REQUESTS):
            await peer.ask("wait", request_id=number)
        await daemon.until(lambda: daemon.waiting == MAX_REQUESTS)
        await peer.ask("echo", request_id=1000)
        answer = await peer.line()
        assert (answer["id"], answer["error"]["data"]["code"]) == (1000, "RATE_LIMITED")
        assert daemon.cancelled == 0


async def test_an_answered_request_makes_room_at_once(path: Path) -> None:
    async with running(path) as daemon, connected(path) as peer:
        for number in range(MAX_REQUESTS - 1):
            await peer.ask("wait", request_id=number)
        await daemon.until(lambda: daemon.waiting == MAX_REQUESTS - 1)
        for number in range(100):
            await peer.ask("echo", request_id=1000 + number)
            assert "result" in await peer.line()


async def test_the_oldest_idle_connection_makes_room_for_a_new_one(path: Path) -> None:
    async with running(path) as daemon, trio.open_nursery() as nursery:
        peers = [Peer(await trio.open_unix_socket(path)) for _ in range(MAX_CONNECTIONS)]
        for peer in peers:
            assert (await peer.line())["method"] == "hello"
        await peers[0].ask("wait")
        await daemon.until(lambda: daemon.waiting == 1)
        extra = Peer(await trio.open_unix_socket(path))
        assert (await extra.line())["method"] == "hello"
        await extra.ask("echo")
        assert (await extra.line())["id"] == 1
        assert await peers[1].ended()
        for peer in (peers[2], peers[-1]):
            await peer.ask("echo")
            assert (await peer.line())["id"] == 1
        assert daemon.cancelled == 0
        for peer in [*peers, extra]:
            nursery.start_soon(peer.stream.aclose)


async def test_connections_over_the_limit_are_told_so_and_closed(path: Path) -> None:
    async with running(path) as daemon, trio.open_nursery() as nursery:
        peers = [Peer(await trio.open_unix_socket(path)) for _ in range(MAX_CONNECTIONS)]
        for peer in peers:
            assert (await peer.line())["method"] == "hello"
            await peer.ask("wait")
        await daemon.until(lambda: daemon.waiting == MAX_CONNECTIONS)
        extra = Peer(await trio.open_unix_socket(path))
        assert (await extra.line())["error"]["data"]["code"] == "RATE_LIMITED"
        assert await extra.ended()
        await peers[0].ask("echo", request_id=2)
        assert (await peers[0].line())["id"] == 2
        for peer in [*peers, extra]:
            nursery.start_soon(peer.stream.aclose)


async def test_progress_comes_in_order_and_before_the_answer(path: Path) -> None:
    async with running(path), connected(path) as peer:
        await peer.ask("count", {"to": 50, "pause": True}, request_id=3)
        for number in range(50):
            message = await peer.line()
            assert message["method"] == "progress"
            assert (message["params"]["id"], message["params"]["number"]) == (3, number)
        assert await peer.line() == {"jsonrpc": "2.0", "id": 3, "result": "counted"}


async def test_progress_that_a_slow_reader_cannot_take_is_left_out_and_counted(path: Path) -> None:
    async with running(path), connected(path) as peer:
        await peer.ask("count", {"to": 3000, "size": 1000})
        received = dropped = 0
        while (message := await peer.line()).get("method") == "progress":
            received += 1
            dropped += message["params"].get("dropped", 0)
        assert message["result"] == "counted"
        assert 0 < received < 3000
        assert received * 1000 <= MAX_QUEUED_PROGRESS_BYTES
        await peer.ask("count", {"to": 1}, request_id=2)
        assert received + dropped + (await peer.line())["params"]["dropped"] == 3000


async def test_only_the_owner_can_reach_the_socket(path: Path) -> None:
    async with running(path):
        assert [permissions(path), permissions(path.parent)] == [0o600, 0o700]
    assert not await trio.Path(path).exists()


async def test_a_folder_that_others_may_enter_is_refused(path: Path) -> None:
    path.parent.mkdir(mode=0o755)
    path.parent.chmod(0o755)
    with pytest.raises(KnodeError) as caught:
        await serve(path, {}, hello=HELLO, on_fault=lambda method, error: None)
    assert caught.value.code is Code.NOT_ALLOWED


@pytest.mark.parametrize(
    ("uid", "allowed"), [(os.geteuid(), True), (0, True), (None, True), (os.geteuid() + 1, False)]
)
def test_the_same_user_and_root_may_connect(uid: int | None, allowed: bool) -> None:
    assert may_connect(uid) is allowed


async def test_another_user_is_closed_without_a_word(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(server, "peer_uid", lambda connected: 54321)
    async with running(path), await trio.open_unix_socket(path) as stream:
        assert await Peer(stream).ended()


async def test_the_kernel_names_the_user_at_the_other_end() -> None:
    left, right = trio.socket.socketpair()
    with left, right:
        assert server.peer_uid(left) == os.geteuid()


async def test_the_socket_of_a_dead_daemon_is_replaced(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with running(path), connected(path) as peer:
        await peer.ask("echo")
        assert (await peer.line())["id"] == 1


async def test_a_living_daemon_is_not_replaced(path: Path) -> None:
    async with running(path):
        with pytest.raises(KnodeError) as caught:
            await serve(path, {}, hello=HELLO, on_fault=lambda method, error: None)
        assert caught.value.code is Code.LOCKED
        async with connected(path) as peer:
            await peer.ask("echo")
            assert (await peer.line())["id"] == 1


def test_a_file_in_the_socket_s_place_is_left_alone(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_text("mine")
    with pytest.raises(KnodeError) as caught:
        trio.run(partial(serve, path, {}, hello=HELLO, on_fault=lambda method, error: None))
    assert caught.value.code is Code.HOME_DAMAGED
    assert path.read_text() == "mine"


async def test_a_path_that_is_too_long_is_named(path: Path) -> None:
    with pytest.raises(KnodeError) as caught:
        await serve(path.parent / ("x" * 150), {}, hello=HELLO, on_fault=lambda method, error: None)
    assert caught.value.code is Code.INVALID_ARGUMENT
