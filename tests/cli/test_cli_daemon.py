from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_processes import kill_daemons, until

from knode.cli.daemon import answering
from knode.home.layout import Home
from knode.identity import KeyPair
from knode.mesh.ticket import Ticket
from knode.node import initialise
from knode.testnet.processes import daemons_of

HERE = ("--port", "0", "--host", "127.0.0.1")


class Program:
    """The command line as processes, on one home."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def __call__(self, *words: str, **environment: str) -> tuple[int, Any]:
        line = [sys.executable, "-m", "knode", *words, "--json", "--home", str(self.home.path)]
        run = subprocess.run(
            line, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
        )
        return run.returncode, json.loads(run.stdout) if run.stdout else run.stderr

    @property
    def daemons(self) -> list[int]:
        return list(daemons_of([self.home.path]))


@pytest.fixture
def program(home: Home) -> Iterator[Program]:
    program = Program(home)
    yield program
    kill_daemons(home.path)


def test_a_node_s_day(program: Program) -> None:
    code, made = program("init", "--name", "desk")
    assert (code, made["name"], made["home"]) == (0, "desk", str(program.home.path))
    assert made["recovery_key"]
    code, started = program("up", "--detach", *HERE)
    assert (code, started["started"]) == (0, True)
    assert program.daemons == [started["pid"]]
    code, status = program("status")
    assert (code, status["node_id"], status["cell_id"]) == (0, made["node_id"], made["cell_id"])
    assert [member["state"] for member in status["members"]] == ["alive"]
    assert (program.home.log / "start-up.txt").read_text() == ""  # its log has limits, this file has none
    code, again = program("up", "--detach", *HERE)
    assert (code, again["started"], again["pid"]) == (0, False, started["pid"])
    code, stopped = program("down")
    assert (code, stopped) == (0, {"pid": started["pid"], "running": False})
    assert program.daemons == []
    assert not program.home.socket.exists()
    code, refused = program("down")
    assert (code, refused["error"]["code"]) == (3, "NOT_RUNNING")


def test_two_who_start_it_at_once_get_the_same_daemon(program: Program, process: Any) -> None:
    initialise(program.home, name="desk", flags={})
    with (
        process("up", "--detach", *HERE, "--json") as one,
        process("up", "--detach", *HERE, "--json") as other,
    ):
        documents = [json.loads(run.communicate(timeout=60)[0]) for run in (one, other)]
    assert documents[0]["pid"] == documents[1]["pid"]
    assert program.daemons == [documents[0]["pid"]]


def test_a_port_in_use_is_named_by_the_one_who_starts_it(program: Program) -> None:
    initialise(program.home, name="desk", flags={})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, document = program("up", "--detach", "--port", port, "--host", "127.0.0.1")
    assert (code, document["error"]["code"]) == (1, "PORT_IN_USE")
    assert program.daemons == []


def test_a_broken_configuration_is_named_by_the_one_who_starts_it(program: Program) -> None:
    initialise(program.home, name="desk", flags={})
    code, document = program("up", "--detach", *HERE, KNODE_LOG_LEVEL="shouting")
    assert (code, document["error"]["code"]) == (2, "CONFIG_INVALID")
    assert program.daemons == []


def test_a_home_is_not_made_twice(knode: Any, home: Home) -> None:
    assert knode("init").code == 0
    before = home.node_key.read_bytes()
    run = knode("init", "--json")
    assert (run.code, json.loads(run.out)["error"]["code"]) == (1, "HOME_EXISTS")
    assert home.node_key.read_bytes() == before


def test_a_foreground_daemon_ends_at_ctrl_c(program: Program, process: Any) -> None:
    initialise(program.home, name="desk", flags={})
    with process("up", *HERE) as running:
        until(lambda: answering(program.home)).close()
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    assert running.returncode in (0, 130)
    assert not program.home.socket.exists()


@pytest.mark.parametrize("folder_is_there", [False, True])
def test_a_join_that_reaches_nobody_leaves_nothing(program: Program, folder_is_there: bool) -> None:
    if folder_is_there:
        program.home.path.mkdir()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        stranger = KeyPair(bytes(range(32))).public
        ticket = Ticket(1, stranger.raw, bytes(32), bytes(16), (address,)).text()
        code, document = program("join", ticket, "--name", "late", *HERE)
    assert code != 0
    assert document["error"]["code"] in ("UNAVAILABLE", "TIMEOUT")
    assert program.daemons == []
    assert _entries(program.home.path) == ([] if folder_is_there else None)


def test_a_join_does_not_touch_a_folder_of_other_files(program: Program) -> None:
    program.home.path.mkdir()
    (program.home.path / "mine").write_text("x")
    ticket = Ticket(1, KeyPair(bytes(range(32))).public.raw, bytes(32), bytes(16), ("127.0.0.1:1",)).text()
    code, document = program("join", ticket, *HERE)
    assert (code, document["error"]["code"]) == (1, "HOME_EXISTS")
    assert _entries(program.home.path) == ["mine"]


def _entries(folder: Path) -> list[str] | None:
    return sorted(os.listdir(folder)) if folder.exists() else None
