"""The daemon as a process: how it starts, what a signal does at any time, what its log tells live."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_processes import PATIENCE_S, Process, kill_daemons, plain_environment, until

from knode.cli.daemon import answering
from knode.control.client import Client
from knode.errors import Code, KnodeError
from knode.home.layout import Home
from knode.node import initialise


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path / "home", None)
    initialise(made, name="desk", flags={"node.host": "127.0.0.1", "node.port": "0"})
    yield made
    kill_daemons(made.path)


def start(home: Home) -> Process:
    environment = plain_environment()
    line = [sys.executable, "-m", "knode", "up", "--home", str(home.path)]
    return Process(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def connect(home: Home) -> Client:
    client = until(lambda: answering(home))
    assert isinstance(client, Client)
    return client


def events(home: Home) -> list[str]:
    return [json.loads(line)["event"] for line in home.log_file.read_text().splitlines()]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_with_a_task_at_work(home: Home, sent: signal.Signals) -> None:
    with start(home) as process:
        with connect(home) as client:
            params = {"agent": "kExecutor:command", "input": "sleep 987", "direct": True}
            client.call("task.submit", params)
            until(lambda: client.call("status")["tasks"] and list(home.attempts.iterdir()))
        begun = time.monotonic()
        process.send_signal(sent)
        _, said = process.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - begun < 15
    assert process.returncode == 0, said
    assert b"Traceback" not in said
    assert list(home.attempts.iterdir()) == []
    assert not home.socket.exists()
    assert events(home)[-1] != "node failed"
    assert "node goes down" in events(home)
    assert b"sleep\x00987\x00" not in map(_words_of, Path("/proc").glob("[0-9]*"))


def _words_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""  # it has ended meanwhile


def test_a_signal_while_it_starts_leaves_a_home_that_starts(home: Home) -> None:
    with start(home) as process:
        until(lambda: home.lock_file.exists() and home.lock_file.read_text())
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode in (0, -signal.SIGTERM)
    assert b"Traceback" not in said
    with start(home) as process:
        with connect(home) as client:
            assert client.call("status")["name"] == "desk"
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
    assert not home.socket.exists()


def test_a_second_daemon_is_locked_out_and_the_first_goes_on_until_it_is_told_to_stop(home: Home) -> None:
    with start(home) as process, connect(home) as client:
        home.socket.rename(home.run / "aside")
        with start(home) as second:
            _, said = second.communicate(timeout=PATIENCE_S)
        assert second.returncode == KnodeError(Code.LOCKED, "").exit_code
        assert str(process.pid).encode() in said
        assert client.call("status")["name"] == "desk"
        (home.run / "aside").rename(home.socket)
        try:
            assert client.call("stop") == {"stopping": True}
        except KnodeError as error:  # its end may come before its answer
            assert error.code is Code.UNAVAILABLE  # noqa: PT017
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert not home.socket.exists()


def test_the_log_is_told_from_its_last_lines_on_and_each_line_once(home: Home) -> None:
    told: list[dict[str, Any]] = []
    with start(home) as process, connect(home) as client, connect(home) as follower:

        def follow() -> None:
            with pytest.raises(KnodeError):
                follower.call("logs.tail", {"lines": 1000, "follow": True}, lambda step: told.append(step))

        reader = threading.Thread(target=follow)
        reader.start()
        for number in range(5):
            params = {"agent": "kExecutor:text", "input": str(number), "direct": True, "wait": True}
            client.call("task.submit", params)
        until(lambda: len(told) >= len(events(home)) > 10)
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
        reader.join(PATIENCE_S)
    written = home.log_file.read_text().splitlines()
    lines = [step["line"] for step in told]
    assert lines == written[: len(lines)]
    tasks = [json.loads(line) for line in lines if "task" in json.loads(line)]
    assert all({"task", "agent", "trace"} <= set(entry) for entry in tasks)
    assert len({entry["trace"] for entry in tasks}) == 5
