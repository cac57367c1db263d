"""What people get wrong and machines run out of, with real processes: each says what, why and what next."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from real_processes import Process, kill_daemons, plain_environment, until

from knode.cli.main import main
from knode.control.client import Client
from knode.home.layout import Home
from knode.mesh.ticket import Ticket, parse_ticket
from knode.node import initialise
from knode.testnet.processes import daemons_of, free_ports

HERE = ("--host", "127.0.0.1")
PATIENCE_S = 120


@dataclass
class Ended:
    """How a command ended."""

    code: int
    document: Any
    complaints: str

    @property
    def error(self) -> str:
        return str(self.document["error"]["code"])


class Machine:
    """A home, and the command line on it."""

    def __init__(self, path: Path, *, runtime: Path | None = None) -> None:
        self.environment = plain_environment()
        if runtime is not None:
            self.environment["XDG_RUNTIME_DIR"] = str(runtime)
        self.home = Home(path, runtime)

    def __call__(self, *words: str) -> Ended:
        line = [sys.executable, "-m", "knode", *words, "--json", "--home", str(self.home.path)]
        run = subprocess.run(
            line, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=self.environment
        )
        assert "Traceback" not in run.stderr, run.stderr
        return Ended(run.returncode, json.loads(run.stdout) if run.stdout else None, run.stderr)

    def done(self, *words: str) -> Any:
        ended = self(*words)
        assert ended.code == 0, ended
        return ended.document

    def refused(self, code: str, exit_code: int, *words: str) -> str:
        """Run a command that must fail; return what it says."""
        ended = self(*words)
        assert (ended.error, ended.code) == (code, exit_code), ended
        error = ended.document["error"]
        assert error["message"], error
        assert error["next"], error
        return str(error["message"])

    def make(self, name: str = "desk") -> dict[str, Any]:
        """Make a node and a cell, as `knode init` does, without a process for it."""
        return initialise(self.home, name=name, flags={"node.host": "127.0.0.1", "node.port": "0"})

    def up(self, *words: str) -> int:
        return int(self.done("up", "--detach", *words)["pid"])

    def submit(self, *words: str) -> Ended:
        return self("task", "submit", "--direct", "--wait", *words)

    @property
    def daemons(self) -> list[int]:
        return list(daemons_of([self.home.path]))

    def kill(self) -> None:
        kill_daemons(self.home.path)

    def contents(self) -> dict[str, bytes]:
        """What must survive: keys, certificate, configuration, format. Nothing half-written lies there."""
        kept = [self.home.format_file, *self.home.identity.iterdir(), *self.home.config.iterdir()]
        assert [path for path in self.home.path.rglob("*.new")] == []
        return {str(path): path.read_bytes() for path in kept if path.exists()}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine of its own, with nothing on it."""
    made = Machine(tmp_path / "home")
    yield made
    made.kill()


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A node that runs, alone with `beta` in its cell. Tests leave it as it was."""
    made = Machine(tmp_path_factory.mktemp("alpha") / "home")
    made.make("alpha")
    try:
        made.up("--port", str(free_ports(1)[0]))
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def ticket_of_beta(alpha: Machine) -> str:
    return str(alpha.done("invite")["ticket"])


@pytest.fixture(scope="module")
def beta(alpha: Machine, ticket_of_beta: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("beta") / "home")
    try:
        made.done("join", ticket_of_beta, "--name", "beta", "--port", "0", *HERE)
        yield made
    finally:
        made.kill()


# Tickets.


def test_a_text_that_is_no_ticket_is_refused_before_anything_is_made(
    machine: Machine, alpha: Machine
) -> None:
    ticket = alpha.done("invite")["ticket"]
    wrong = "b" if ticket[40] != "b" else "c"
    for text in ("hello", ticket[:-1], ticket[:40] + wrong + ticket[41:]):
        machine.refused("INVALID_ARGUMENT", 2, "join", text, "--port", "0", *HERE)
        assert not machine.home.path.exists()


def test_a_ticket_that_the_inviter_does_not_know_leaves_no_home(machine: Machine, alpha: Machine) -> None:
    real = parse_ticket(alpha.done("invite")["ticket"])
    forged = Ticket(1, real.inviter, real.cell, bytes(16), real.addresses).text()
    machine.refused("TICKET_INVALID", 4, "join", forged, "--port", "0", *HERE)
    assert not machine.home.path.exists()
    assert machine.daemons == []


def test_a_used_ticket_leaves_no_home(
    machine: Machine, alpha: Machine, beta: Machine, ticket_of_beta: str
) -> None:
    machine.refused("TICKET_USED", 4, "join", ticket_of_beta, "--port", "0", *HERE)
    assert not machine.home.path.exists()
    assert [member["name"] for member in alpha.done("member", "list")] == ["alpha", "beta"]


def test_a_node_joins_one_cell_only(alpha: Machine, beta: Machine) -> None:
    before = beta.contents()
    ticket = alpha.done("invite")["ticket"]
    for member in (alpha, beta):
        member.refused("HOME_EXISTS", 1, "join", ticket)
    assert beta.contents() == before
    assert beta.done("status")["cell_id"] == alpha.done("status")["cell_id"]


# Starting.


def test_a_node_is_made_once(machine: Machine) -> None:
    machine.done("init", "--name", "desk")
    before = machine.contents()
    machine.refused("HOME_EXISTS", 1, "init", "--name", "other")
    assert machine.contents() == before


def test_a_port_in_use_is_named_and_the_next_start_works(machine: Machine) -> None:
    machine.make()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = machine.refused("PORT_IN_USE", 1, "up", "--detach", "--port", port)
        assert port in message
        assert machine.daemons == []
        assert not machine.home.socket.exists()
    machine.up("--port", port)


def test_a_home_of_a_newer_version_is_not_touched(machine: Machine) -> None:
    machine.make()
    text = machine.home.format_file.read_text()
    machine.home.format_file.write_text(text.replace('"format": 1', '"format": 99'))
    before = machine.contents()
    assert "99" in machine.refused("HOME_TOO_NEW", 1, "up", "--detach")
    machine.refused("HOME_EXISTS", 1, "init")
    assert machine.contents() == before
    machine.home.format_file.write_text(text)
    with closing(sqlite3.connect(machine.home.database)) as database:
        database.execute("PRAGMA user_version = 99")
    content = machine.home.database.read_bytes()
    assert "99" in machine.refused("HOME_TOO_NEW", 1, "up")
    assert machine.home.database.read_bytes() == content
    assert machine.contents() == {**before, str(machine.home.format_file): text.encode()}


def test_a_broken_configuration_is_named_with_its_file(machine: Machine) -> None:
    machine.make()
    broken = {
        '{"node": {"port": 4747': "not JSON",
        '{"node": {"prot": 4747}}': "node.port",
        '{"node": {"port": "many"}}': "node.port",
        '{"mesh": {"keepalive_s": 5, "dead_after_s": 5}}': "mesh.dead_after_s",
    }
    for content, named in broken.items():
        machine.home.config_user.write_text(content)
        before = machine.contents()
        ended = machine("up")
        error = ended.document["error"]
        assert (error["code"], ended.code) == ("CONFIG_INVALID", 2)
        assert named in error["message"] + error["next"]
        assert str(machine.home.config_user) in error["message"]
        assert machine.contents() == before


def test_an_unknown_configuration_key_is_refused_with_a_near_one(machine: Machine) -> None:
    machine.make()
    before = machine.contents()
    ended = machine("config", "set", "node.prot", "1")
    assert (ended.error, ended.code) == ("CONFIG_INVALID", 2)
    assert "node.port" in ended.document["error"]["next"]
    machine.refused("CONFIG_INVALID", 2, "config", "set", "node.port", "70000")
    machine.environment["KNODE_NODE_PROT"] = "1"
    machine.refused("CONFIG_INVALID", 2, "up", "--detach")
    assert machine.contents() == before
    assert machine.daemons == []


def test_damaged_keys_and_databases_are_named_and_left_alone(machine: Machine) -> None:
    machine.make()
    for path in (machine.home.node_key, machine.home.database):
        content = path.read_bytes()
        path.write_bytes(b"damaged" * 100)
        machine.refused("HOME_DAMAGED", 1, "up")
        assert path.read_bytes() == b"damaged" * 100
        path.write_bytes(content)
    machine.home.node_key.unlink()
    machine.refused("HOME_DAMAGED", 1, "up")
    assert not machine.home.node_key.exists()


def test_a_killed_daemon_starts_again_with_all_it_had_and_refuses_its_expired_ticket(
    machine: Machine, tmp_path: Path
) -> None:
    made, port = machine.make(), str(free_ports(1)[0])
    pid = machine.up("--port", port)
    ticket = machine.done("invite")["ticket"]
    before = machine.contents()
    machine.kill()
    assert machine.home.socket.exists()  # stale: nobody answers there
    machine.refused("NOT_RUNNING", 3, "status")
    (machine.home.attempts / ("ab" * 16) / "input").mkdir(parents=True)
    with closing(sqlite3.connect(machine.home.database)) as database, database:
        assert database.execute("UPDATE ticket SET expires = expires - 1000000").rowcount == 1
    assert machine.up("--port", port) != pid
    status = machine.done("status")
    assert (status["node_id"], status["cell_id"]) == (made["node_id"], made["cell_id"])
    assert [member["name"] for member in status["members"]] == ["desk"]
    assert list(machine.home.attempts.iterdir()) == []
    assert machine.contents() == before
    late = Machine(tmp_path / "late")
    try:
        assert "minutes ago" in late.refused("TICKET_EXPIRED", 4, "join", ticket, "--port", "0", *HERE)
        assert not late.home.path.exists()
        assert late.daemons == []
    finally:
        late.kill()


def test_up_twice_is_one_daemon_and_down_twice_says_so(machine: Machine) -> None:
    machine.make()
    pid = machine.up()
    again = machine.done("up", "--detach")
    assert (again["pid"], again["started"]) == (pid, False)
    assert machine.daemons == [pid]
    machine.done("down")
    machine.refused("NOT_RUNNING", 3, "down")
    assert machine.daemons == []
    assert not machine.home.socket.exists()


def test_a_home_whose_lock_is_held_without_a_socket_is_locked(machine: Machine) -> None:
    machine.make()
    pid = machine.up()
    machine.home.socket.unlink()
    message = machine.refused("LOCKED", 4, "up")
    assert str(pid) in message
    assert machine.daemons == [pid]


def test_a_deep_home_has_its_socket_elsewhere(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    deep = Machine(tmp_path / ("deep" * 20) / ("home" * 20), runtime=runtime)
    assert len(os.fsencode(deep.home.run / "knode.sock")) > 108
    try:
        deep.done("init", "--name", "deep")
        deep.up("--port", "0", *HERE)
        assert deep.home.socket.parent == runtime
        assert deep.submit("kExecutor:python", "--input", "print(6 * 7)").document["result"] == "42\n"
        deep.done("down")
        assert list(runtime.iterdir()) == []
    finally:
        deep.kill()


# Disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB, which only root can make."""
    folder = tmp_path / "disk"
    folder.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "knode-test", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room at all."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_no_node_is_made_on_a_full_disk_and_a_whole_one_after(small_disk: Path) -> None:
    machine = Machine(small_disk / "home")
    filler = fill(small_disk)
    machine.refused("DISK_FULL", 1, "init", "--name", "desk")
    assert not machine.home.format_file.exists()
    filler.unlink()
    machine.done("init", "--name", "desk")
    assert machine.contents()


def test_a_full_disk_stops_no_node_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    machine = Machine(small_disk / "home")
    machine.make()
    try:
        machine.up()
        artifact = tmp_path / "artifact"
        artifact.write_bytes(bytes(1_000_000))
        before = machine.contents()
        filler = fill(small_disk)
        for agent, text in (("kExecutor:text", '{"op":"count"}'), ("kExecutor:python", "print(1)")):
            ended = machine.submit(agent, "--input", text, "--artifact", str(artifact))
            assert (ended.code, ended.document["state"]) == (1, "failed")
            assert ended.document["error"]["code"] == "DISK_FULL"
            assert ended.document["error"]["next"]
        assert list(machine.home.attempts.iterdir()) == []
        machine.refused("DISK_FULL", 1, "config", "set", "log.level", "debug")
        assert machine.done("status")["name"] == "desk"
        plain = machine.submit("kExecutor:text", "--input", "a b")
        assert plain.document["result"]["total"]["words"] == 2
        assert machine.contents() == before
        filler.unlink()
        ended = machine.submit("kExecutor:text", "--input", '{"op":"count"}', "--artifact", str(artifact))
        assert ended.document["result"]["total"]["bytes"] == 1_000_000
        assert machine.done("invite")["ticket"]
    finally:
        machine.kill()


def test_a_daemon_that_cannot_start_on_a_full_disk_says_so(small_disk: Path) -> None:
    machine = Machine(small_disk / "home")
    machine.make()
    before = machine.contents()
    filler = fill(small_disk)
    try:
        machine.refused("DISK_FULL", 1, "up", "--detach")
        assert machine.daemons == []
        filler.unlink()
        machine.up()
        assert machine.contents() == before
    finally:
        machine.kill()


def test_a_read_only_disk_is_named_by_every_command_that_writes(small_disk: Path) -> None:
    machine = Machine(small_disk / "home")
    machine.make()
    before = machine.contents()
    remount(small_disk, "ro")
    try:
        machine.refused("DISK_READ_ONLY", 1, "up", "--detach")
        machine.refused("DISK_READ_ONLY", 1, "config", "set", "log.level", "debug")
        Machine(small_disk / "other").refused("DISK_READ_ONLY", 1, "init")
        assert machine.done("config", "list")
        assert machine.contents() == before
        assert machine.daemons == []
    finally:
        remount(small_disk, "rw")


# Commands.


NEEDS_A_DAEMON = [
    ("status",),
    ("down",),
    ("invite",),
    ("peer", "list"),
    ("peer", "show", "beta"),
    ("peer", "ping", "beta"),
    ("member", "list"),
    ("member", "role", "beta", "voter"),
    ("member", "revoke", "beta"),
    ("agent", "list"),
    ("agent", "show", "kExecutor:text"),
    ("agent", "install", "/"),
    ("agent", "start", "kExecutor:text"),
    ("agent", "stop", "kExecutor:text"),
    ("task", "submit", "kExecutor:text", "--direct"),
    ("task", "list"),
    ("task", "show", "0"),
    ("task", "watch", "0"),
    ("task", "cancel", "0"),
    ("logs", "tail"),
]


def test_without_a_daemon_every_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in NEEDS_A_DAEMON:
        monkeypatch.setattr(sys, "argv", ["knode", *words, "--json", "--home", str(tmp_path / "absent")])
        assert main() == 3, words
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["code"] == "NOT_RUNNING"
        assert error["next"].startswith("knode init --home ")
    assert not (tmp_path / "absent").exists()


def test_people_read_what_and_next_on_standard_error(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "knode", "status", "--home", str(tmp_path / "absent")]
    run = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (run.returncode, run.stdout) == (3, "")
    said, following = run.stderr.splitlines()
    assert said.startswith("error: ")
    assert following.startswith("next: knode init")


def test_an_agent_that_is_not_there_has_its_exit_code(alpha: Machine, beta: Machine) -> None:
    submit = ("task", "submit", "--direct", "--wait", "kExecutor:nope")
    alpha.refused("NO_ELIGIBLE_NODE", 6, *submit)
    alpha.refused("NO_AGENT", 5, *submit, "--on", "beta")
    alpha.refused("NOT_FOUND", 5, *submit, "--on", "nobody")
    alpha.refused("NO_AGENT", 5, "agent", "show", "kExecutor:nope")
    alpha.refused("INVALID_ARGUMENT", 2, "task", "submit", "--direct", "k" * 65)
    assert alpha.done("task", "list") == []


def test_input_and_artifacts_that_cannot_be_sent_are_refused(
    alpha: Machine, beta: Machine, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(64 * 1024 * 1024 + 1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "odd\nname").write_text("x")
    submit = ("task", "submit", "kExecutor:text", "--direct", "--wait", "--on", "beta")
    alpha.refused("TOO_LARGE", 1, *submit, "--input", f"@{large}")
    alpha.refused("NOT_FOUND", 5, *submit, "--input", f"@{tmp_path}/missing")
    for path in ("missing", "pipe", "."):
        alpha.refused("NOT_FOUND", 5, *submit, "--artifact", str(tmp_path / path))
    alpha.refused("INVALID_ARGUMENT", 2, *submit, "--artifact", str(tmp_path / "odd\nname"))
    alpha.refused("INVALID_ARGUMENT", 2, *submit, "--input", "a", "--deadline", "301")
    assert alpha.done("task", "list") == []
    for node in ("beta", "alpha"):
        ended = alpha.submit("kExecutor:text", "--artifact", str(large), "--on", node)
        assert (ended.code, ended.document["state"]) == (1, "failed")
        assert ended.document["error"]["code"] == "TOO_LARGE"
        assert ended.document["error"]["next"]
    for machine in (alpha, beta):
        assert list(machine.home.attempts.iterdir()) == []


def test_the_largest_artifact_arrives_whole(alpha: Machine, beta: Machine, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    ended = alpha.submit(
        "kExecutor:command", "--input", "wc -c < input/large", "--artifact", str(large), "--on", "beta"
    )
    assert (ended.code, ended.document["result"].strip()) == (0, str(64 * 1024 * 1024))
    assert list(beta.home.attempts.iterdir()) == []


def test_an_agent_s_failure_is_not_the_mesh_s(alpha: Machine, beta: Machine) -> None:
    ended = alpha.submit("kExecutor:command", "--input", "echo why >&2; exit 3", "--on", "beta")
    assert (ended.code, ended.document["state"]) == (1, "failed")
    assert ended.document["error"]["code"] == "AGENT_FAILED"
    assert "exited with 3: why" in ended.document["error"]["message"]
    late = alpha.submit("kExecutor:command", "--input", "sleep 60", "--on", "beta", "--deadline", "1")
    assert (late.code, late.document["state"]) == (1, "expired")


def test_a_task_that_its_submitter_leaves_is_stopped(alpha: Machine, beta: Machine) -> None:
    line = [sys.executable, "-m", "knode", "task", "submit", "kExecutor:command", "--direct", "--wait"]
    line += ["--input", "echo knode:progress 0 runs >&2; sleep 100", "--on", "beta"]
    line += ["--home", str(alpha.home.path)]
    with Process(line, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        assert "runs" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        waiting.communicate(timeout=PATIENCE_S)
    assert waiting.returncode == 130
    with Client.connect(alpha.home) as client:
        newest = client.call("task.list")[0]
        assert client.call("task.watch", {"task": newest["id"]})["state"] == "cancelled"


def test_one_trace_is_in_the_logs_of_both_nodes(alpha: Machine, beta: Machine) -> None:
    task = alpha.submit("kExecutor:text", "--input", "a", "--on", "beta").document["id"]
    traces = []
    for machine in (alpha, beta):
        line = [sys.executable, "-m", "knode", "logs", "tail", "--json", "--home", str(machine.home.path)]
        run = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
        lines = [entry for entry in map(json.loads, run.stdout.splitlines()) if entry.get("task") == task]
        assert {entry["agent"] for entry in lines} == {"kExecutor:text"}
        traces += [entry["trace"] for entry in lines]
    assert len(traces) == 4
    assert len(set(traces)) == 1


def test_a_second_node_of_a_name_gets_a_number_and_a_revoked_one_is_told(
    alpha: Machine, beta: Machine, machine: Machine
) -> None:
    joined = machine.done("join", alpha.done("invite")["ticket"], "--name", "beta", "--port", "0", *HERE)
    assert joined["name"] == "beta-2"
    for words in (("peer", "ping"), ("member", "revoke")):
        alpha.refused("INVALID_ARGUMENT", 2, *words, "12D3KooW")
    submit = ("task", "submit", "--direct", "kExecutor:text", "--input", "a", "--on")
    alpha.refused("INVALID_ARGUMENT", 2, *submit, "12D3KooW")
    alpha.done("member", "revoke", "beta-2")
    alpha.refused("NOT_FOUND", 5, "peer", "show", "beta-2")
    refused = machine(
        "task", "submit", "--direct", "--wait", "kExecutor:text", "--input", "a", "--on", "alpha"
    )
    assert refused.code != 0
    assert refused.document.get("error", {}).get("next"), refused
    with Client.connect(machine.home) as client:
        until(lambda: "was revoked" in str(client.call("status")["warnings"]))
    assert [member["name"] for member in alpha.done("member", "list")] == ["alpha", "beta"]
    assert alpha.submit("kExecutor:text", "--input", "a", "--on", "beta").code == 0
