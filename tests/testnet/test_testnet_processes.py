from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from knode.errors import Code, KnodeError
from knode.testnet.processes import CommandLine, daemons_of, end, free_ports


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start_ready(code: str, *words: str) -> subprocess.Popen[bytes]:
    """Start Python on `code` and return once it says that it is ready."""
    script = f"import signal, time\n{code}\nprint(flush=True)\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", script, *words], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_daemon_is_found_by_its_arguments_and_others_are_not(tmp_path: Path, started: list) -> None:
    ours, other = tmp_path / "node1", tmp_path / "node2"
    started.append(start_ready("", "knode", "up", "--home", str(ours)))
    started.append(start_ready("", "knode", "status", "--home", str(ours)))
    started.append(start_ready("", "knode", "up", "--home", str(other)))
    assert daemons_of([ours]) == {started[0].pid: ours}


def test_a_dead_daemon_that_nobody_buried_is_gone(tmp_path: Path, started: list) -> None:
    started.append(start_ready("", "knode", "up", "--home", str(tmp_path)))
    assert end([started[0].pid], signal.SIGKILL) == []
    assert daemons_of([tmp_path]) == {}


def test_a_process_that_ignores_a_signal_is_told(started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knode.testnet.processes.END_TIMEOUT_S", 0.2)
    started.append(start_ready("signal.signal(signal.SIGTERM, signal.SIG_IGN)"))
    started.append(start_ready(""))
    assert end([process.pid for process in started], signal.SIGTERM) == [started[0].pid]


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(32)
    assert len(set(ports)) == 32
    for port in ports:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_a_command_s_document_is_returned(tmp_path: Path) -> None:
    row = CommandLine().run(tmp_path, "config", "get", "node.port")
    assert row == {"key": "node.port", "value": 4747, "source": "default"}


def test_a_command_s_error_is_raised_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(KnodeError) as caught:
        CommandLine().run(tmp_path, "status")
    assert caught.value.code is Code.NOT_RUNNING
    assert caught.value.next_step == f"knode up --home {tmp_path}"


def test_after_an_interruption_nothing_begins(tmp_path: Path) -> None:
    command_line = CommandLine()
    command_line.interrupt()
    with pytest.raises(KnodeError) as caught:
        command_line.run(tmp_path, "status")
    assert caught.value.code is Code.CANCELLED
