"""Each fault is found, and what `doctor` says mends it: where that is a command, it is run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from real_processes import kill_daemons

from knode.control import doctor
from knode.control.doctor import SPACE_FAIL_BYTES, SPACE_WARN_BYTES, examine
from knode.home.configuration import set_value
from knode.home.layout import Home
from knode.node import initialise
from knode.node.health import Finding, Grade
from knode.testnet.processes import free_ports
from knode.world import WallTime
from knode.world.real import real_world

ENVIRONMENT = {"KNODE_DISCOVERY_MDNS": "false", "KNODE_DISCOVERY_LIBP2P": "true"}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path / "home", None)
    port, libp2p_port = map(str, free_ports(2))
    flags = {"node.host": "127.0.0.1", "node.port": port, "discovery.libp2p_port": libp2p_port}
    initialise(made, name="desk", flags=flags)
    yield made
    kill_daemons(made.path)


def port_of(home: Home, key: str = "node.port") -> int:
    section, name = key.split(".")
    return int(json.loads(home.config_user.read_text())[section][name])


def found(home: Home, check: str) -> list[Finding]:
    return [finding for finding in examine(home, ENVIRONMENT) if finding.check == check]


def grades(home: Home, check: str) -> list[Grade]:
    return [finding.grade for finding in found(home, check)]


def run(fix: str) -> None:
    """Do what a finding says."""
    for command in fix.split("; "):
        subprocess.run(shlex.split(command), check=True, timeout=60)


def test_a_sound_home_without_a_daemon_fails_nowhere_and_says_what_was_left_out(home: Home) -> None:
    findings = examine(home, ENVIRONMENT)
    assert [f for f in findings if f.grade is Grade.FAIL] == []
    passed = {f.check for f in findings if f.grade is Grade.PASS}
    assert passed >= {
        "python",
        "dependencies",
        "home",
        "configuration",
        "permissions",
        "disk",
        "clock",
        "ports",
    }
    skipped = {f.check for f in findings if f.grade is Grade.SKIP}
    assert skipped >= {"cell", "mdns", "clock of others", "reachability"}
    assert all(f.fix for f in findings if f.grade is Grade.WARN)
    assert sorted(home.run.iterdir()) == []


def test_a_folder_without_a_node_is_found_and_nothing_is_made_there(tmp_path: Path) -> None:
    findings = examine(Home(tmp_path / "none"), ENVIRONMENT)
    [whole] = [f for f in findings if f.check == "home"]
    assert whole.grade is Grade.FAIL
    assert "knode init" in whole.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda home: home.node_key.chmod(0o644),
        lambda home: home.owner_key.chmod(0o640),
        lambda home: home.certificate.chmod(0o604),
        lambda home: home.path.chmod(0o755),
        lambda home: (home.node_key.chmod(0o644), home.identity.chmod(0o750)),
    ],
)
def test_keys_that_others_may_read_are_found_and_mended(home: Home, spoil: Callable[[Home], Any]) -> None:
    spoil(home)
    [finding] = found(home, "permissions")
    assert finding.grade is Grade.FAIL
    run(finding.fix)
    assert grades(home, "permissions") == [Grade.PASS]


@pytest.mark.parametrize(
    ("kind", "name", "key"),
    [
        (socket.SOCK_STREAM, "TCP", "node.port"),
        (socket.SOCK_DGRAM, "UDP", "node.port"),
        (socket.SOCK_STREAM, "TCP", "discovery.libp2p_port"),
    ],
)
def test_a_port_that_another_program_holds_is_found(
    home: Home, kind: socket.SocketKind, name: str, key: str
) -> None:
    port = port_of(home, key)
    with socket.socket(socket.AF_INET, kind) as taker:
        taker.bind(("127.0.0.1", port))
        if kind is socket.SOCK_STREAM:
            taker.listen()
        findings = found(home, "ports")
    [failed] = [f for f in findings if f.grade is Grade.FAIL]
    assert failed.found == f"{name} port {port} on 127.0.0.1: another program holds it"
    assert key in failed.fix
    assert len(findings) == 3


def test_an_address_that_is_not_this_machines_is_found(home: Home) -> None:
    set_value(real_world(), home, "node.host", "192.0.2.77")
    assert set(grades(home, "ports")) == {Grade.FAIL}


def test_a_broken_configuration_is_found_and_the_rest_is_still_checked(home: Home) -> None:
    home.config_user.write_text('{"node": {"prt": 1}}')
    [finding] = found(home, "configuration")
    assert finding.grade is Grade.FAIL
    assert "node.prt" in finding.found
    assert grades(home, "disk") == [Grade.PASS]


def test_a_clock_before_the_home_was_made_is_found(home: Home) -> None:
    world = real_world()
    whole, _ = doctor._home(world, home)
    assert whole is not None
    finding = doctor._clock(WallTime(86_400_000), whole)
    assert finding.grade is Grade.FAIL
    assert "1970-01-02" in finding.found
    assert doctor._clock(world.clock.wall(), whole).grade is Grade.PASS


class Usage(NamedTuple):
    free: int


def test_little_space_is_a_warning_and_none_a_failure(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, grade in (
        (SPACE_FAIL_BYTES - 1, Grade.FAIL),
        (SPACE_WARN_BYTES - 1, Grade.WARN),
        (SPACE_WARN_BYTES, Grade.PASS),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(free))
        assert grades(home, "disk") == [grade]


def test_a_disk_that_cannot_be_written_is_found(home: Home) -> None:
    home.run.rename(home.path / "elsewhere")
    home.run.write_text("no folder")
    finding = doctor._disk(real_world(), home)
    assert finding.grade is Grade.FAIL
    assert finding.fix


def test_missing_and_old_dependencies_are_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["no-such-thing>=1", "trio>=99", "msgspec>=0.1,<0.2", "pynacl>=1.6", 'hypothesis; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    [finding] = found(home, "dependencies")
    assert finding.grade is Grade.FAIL
    assert "no-such-thing is missing" in finding.found
    assert "trio is " in finding.found
    assert "msgspec is " in finding.found
    assert "pynacl" not in finding.found


def test_a_node_that_is_told_to_use_no_sandbox_is_warned(home: Home) -> None:
    set_value(real_world(), home, "sandbox.prefer", "none")
    [finding] = found(home, "sandbox")
    assert finding.grade is Grade.WARN
    assert finding.fix == "knode config set sandbox.prefer auto"


def knode(home: Home, *words: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    line = [sys.executable, "-m", "knode", *words, "--home", str(home.path)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_with_a_daemon_its_own_findings_are_shown_and_a_failure_is_the_exit_code(home: Home) -> None:
    assert knode(home, "up", "--detach").returncode == 0
    done = knode(home, "doctor", "--json")
    document = json.loads(done.stdout)
    checks = {check["check"]: check for check in document["checks"]}
    assert (done.returncode, document["ok"]) == (0, True)
    assert {"check", "grade", "found", "fix"} == set(checks["cell"])
    assert (checks["daemon"]["grade"], checks["cell"]["grade"]) == ("pass", "pass")
    assert str(port_of(home)) in checks["ports"]["found"]
    assert checks["mdns"]["grade"] == "skip"
    home.node_key.chmod(0o644)
    failed = knode(home, "doctor")
    assert failed.returncode == 1
    assert f"fix: chmod 600 {home.node_key}" in failed.stdout
