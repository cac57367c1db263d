from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from knode.control import client as client_module
from knode.control.client import Client, command_for
from knode.control.protocol import MAX_MESSAGE_BYTES, PROTOCOL
from knode.errors import Code, KnodeError
from knode.home.layout import Home

HELLO = {"jsonrpc": "2.0", "method": "hello", "params": {"protocol": PROTOCOL, "version": "x"}}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.run.mkdir()
    return home


@contextmanager
def answering(home: Home, speak: Callable[[socket.socket], None]) -> Iterator[None]:
    """A daemon of one connection that says what the test wants."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home.socket))
        listener.listen()

        def run() -> None:
            connected, _ = listener.accept()
            with connected:
                speak(connected)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join(60)
        assert not thread.is_alive()


def say(connected: socket.socket, *messages: object) -> None:
    connected.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))


def hear(connected: socket.socket) -> dict[str, object]:
    with connected.makefile("rb") as lines:
        return json.loads(lines.readline())


def code_of(call: Callable[[], object]) -> Code:
    with pytest.raises(KnodeError) as caught:
        call()
    return caught.value.code


def test_a_call_returns_the_result_and_passes_on_the_progress(home: Home) -> None:
    def speak(connected: socket.socket) -> None:
        say(connected, HELLO)
        request = hear(connected)
        assert request == {"jsonrpc": "2.0", "id": 1, "method": "task.watch", "params": {"task": "ä"}}
        step = {"jsonrpc": "2.0", "method": "progress", "params": {"id": 1, "text": "half"}}
        other = {"jsonrpc": "2.0", "method": "progress", "params": {"id": 99, "text": "another's"}}
        say(connected, step, other, {"jsonrpc": "2.0", "id": 1, "result": [1]})

    steps: list[dict[str, object]] = []
    with answering(home, speak), Client.connect(home) as client:
        assert client.call("task.watch", {"task": "ä"}, steps.append) == [1]
    assert steps == [{"text": "half"}]


def test_the_kernel_names_the_daemon_s_process(home: Home) -> None:
    with answering(home, lambda connected: say(connected, HELLO)), Client.connect(home) as client:
        assert client.daemon_pid == os.getpid()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({"code": "NO_AGENT", "message": "none", "next": "x"}, Code.NO_AGENT),
        ({"code": "OF_THE_FUTURE", "message": "none", "next": ""}, Code.INTERNAL),
        (None, Code.INTERNAL),
    ],
)
def test_an_error_is_raised_as_the_table_names_it(home: Home, data: object, code: Code) -> None:
    def speak(connected: socket.socket) -> None:
        say(connected, HELLO)
        hear(connected)
        say(
            connected, {"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": "none", "data": data}}
        )

    with answering(home, speak), Client.connect(home) as client:
        assert code_of(lambda: client.call("task.show")) is code


def test_a_home_without_daemon_names_the_command_that_starts_it(home: Home) -> None:
    with pytest.raises(KnodeError) as caught:
        Client.connect(home)
    assert caught.value.code is Code.NOT_RUNNING
    assert caught.value.next_step == f"knode up --home {home.path}"


def test_the_socket_of_a_dead_daemon_is_no_running_one(home: Home) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(home.socket))
    assert code_of(lambda: Client.connect(home)) is Code.NOT_RUNNING


def test_another_protocol_is_refused_before_anything_is_asked(home: Home) -> None:
    newer = {**HELLO, "params": {"protocol": PROTOCOL + 1}}
    with answering(home, lambda connected: say(connected, newer)):
        assert code_of(lambda: Client.connect(home)) is Code.UNSUPPORTED_VERSION


def test_a_daemon_without_room_says_so_instead_of_hello(home: Home) -> None:
    data = {"code": "RATE_LIMITED", "message": "64 programs", "next": "wait"}
    full = {"jsonrpc": "2.0", "id": None, "error": {"code": -32000, "message": "64 programs", "data": data}}
    with answering(home, lambda connected: say(connected, full)):
        assert code_of(lambda: Client.connect(home)) is Code.RATE_LIMITED


def test_a_silent_daemon_is_given_up_and_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "HELLO_TIMEOUT_S", 0.05)
    done = threading.Event()

    def speak(connected: socket.socket) -> None:
        done.wait(60)

    with answering(home, speak):
        with pytest.raises(KnodeError) as caught:
            Client.connect(home)
        done.set()
    assert caught.value.code is Code.TIMEOUT
    assert caught.value.next_step == f"kill {os.getpid()}"


def test_a_call_may_limit_the_silence(home: Home) -> None:
    done = threading.Event()

    def speak(connected: socket.socket) -> None:
        say(connected, HELLO)
        done.wait(60)

    with answering(home, speak), Client.connect(home) as client:
        assert code_of(lambda: client.call("status", silence_s=0.05)) is Code.TIMEOUT
        done.set()


def test_a_daemon_that_dies_before_its_answer_is_unavailable(home: Home) -> None:
    def speak(connected: socket.socket) -> None:
        say(connected, HELLO)
        hear(connected)

    with answering(home, speak), Client.connect(home) as client:
        assert code_of(lambda: client.call("status")) is Code.UNAVAILABLE


def test_a_daemon_that_dies_before_the_request_is_unavailable(home: Home) -> None:
    with answering(home, lambda connected: say(connected, HELLO)):
        client = Client.connect(home)
    with client:
        assert code_of(lambda: client.call("status")) is Code.UNAVAILABLE


def test_what_is_no_daemon_is_told_from_one(home: Home) -> None:
    with answering(home, lambda connected: connected.sendall(b"220 mail ready\n")):
        assert code_of(lambda: Client.connect(home)) is Code.INTERNAL


def test_an_endless_answer_is_given_up_at_the_limit(home: Home) -> None:
    def speak(connected: socket.socket) -> None:
        say(connected, HELLO)
        try:
            while True:
                connected.sendall(b"x" * 65536)
        except (BrokenPipeError, ConnectionResetError):
            return

    with answering(home, speak):
        client = Client.connect(home)
        assert code_of(lambda: client.call("status")) is Code.TOO_LARGE
        client.close()


def test_a_request_over_the_limit_and_one_of_odd_bytes_are_not_sent(home: Home) -> None:
    done = threading.Event()

    def speak(connected: socket.socket) -> None:
        say(connected, HELLO)
        done.wait(60)
        assert connected.recv(1) == b""

    with answering(home, speak):
        with Client.connect(home) as client:
            assert code_of(lambda: client.call("x", {"t": "x" * MAX_MESSAGE_BYTES})) is Code.TOO_LARGE
            assert code_of(lambda: client.call("x", {"t": "\udcff"})) is Code.INVALID_ARGUMENT
        done.set()


def test_a_command_names_the_home_only_when_it_is_not_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNODE_HOME", str(tmp_path / "usual"))
    assert command_for(Home(tmp_path / "usual"), "up") == "knode up"
    assert command_for(Home(tmp_path / "o t"), "up") == f"knode up --home '{tmp_path}/o t'"
