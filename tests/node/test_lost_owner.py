"""The owner's machine is lost, and the recovery key is on paper: the whole story, with real daemons."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_processes import PATIENCE_S, kill_daemons, plain_environment, until

from knode.control.client import Client
from knode.home.layout import Home

HERE = ("--host", "127.0.0.1", "--port", "0")


class Machine:
    """A home, and the command line on it."""

    def __init__(self, path: Path) -> None:
        self.home = Home(path, None)

    def knode(self, *words: str, given: str = "", code: int = 0) -> Any:
        """Run a command, which must end with `code`, and return its document."""
        line = [sys.executable, "-m", "knode", *words, "--json", "--home", str(self.home.path)]
        run = subprocess.run(
            line,
            input=given,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
            check=False,
            env=plain_environment(),
        )
        assert run.returncode == code, (words, run)
        return json.loads(run.stdout)

    def join(self, other: Machine, name: str) -> None:
        ticket = other.knode("invite", "--no-wait")["ticket"]
        self.knode("join", ticket, "--name", name, *HERE)

    def ask(self, method: str) -> Any:
        """Ask the daemon itself: less work than a process for each look."""
        with Client.connect(self.home) as client:
            return client.call(method)

    @property
    def members(self) -> list[str]:
        return [member["name"] for member in self.ask("member.list")]

    def state_of(self, name: str) -> str:
        [member] = [m for m in self.ask("status")["members"] if m["name"] == name]
        return str(member["state"])


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    made = [Machine(tmp_path / name) for name in ("desk", "attic", "barn", "new", "spy")]
    yield made
    kill_daemons(*(machine.home.path for machine in made))


def test_a_cell_whose_owner_s_machine_was_lost_goes_on_with_the_recovery_key(machines: list[Machine]) -> None:
    desk, attic, barn, new, spy = machines
    recovery = desk.knode("init", "--name", "desk", *HERE)["recovery_key"]
    desk.knode("up", "--detach")
    attic.join(desk, "attic")
    barn.join(desk, "barn")
    until(lambda: attic.state_of("barn") == "alive")
    attic.knode("member", "revoke", "desk", code=4)
    attic.knode("invite", "--no-wait", code=4)
    attic.knode("member", "recover", given=recovery[:-2] + "\n", code=2)
    assert attic.members == ["attic", "barn", "desk"]

    desk.knode("down")
    recovered = attic.knode("member", "recover", "--revoke", "desk", given=recovery + "\n")
    assert [member["name"] for member in recovered["revoked"]] == ["desk"]
    until(lambda: barn.members == ["attic", "barn"])
    desk.knode("up", "--detach")
    until(lambda: any("this node was revoked" in warning for warning in desk.ask("status")["warnings"]))
    assert desk.state_of("barn") != "alive"
    submission = ("kExecutor:text", "--input", '{"op":"count","text":"a b"}', "--direct", "--wait")
    desk.knode("task", "submit", *submission, "--on", "barn", code=1)

    # The first owner's key brings nobody in: whoever joins there is let in by nobody else.
    spy.join(desk, "spy")
    assert barn.members == ["attic", "barn"]

    # The new owner's does.
    new.join(attic, "new")
    until(lambda: barn.members == ["attic", "barn", "new"])
    until(lambda: new.state_of("barn") == "alive")
    assert new.knode("task", "submit", *submission, "--on", "barn")["state"] == "succeeded"
    attic.knode("member", "role", "barn", "admin")

    # A member changes its key meanwhile, and a start finds all as it was.
    before = {member["name"]: member["id"] for member in attic.ask("member.list")}
    changed = barn.knode("member", "rotate")
    assert changed["id"] == before["barn"] != changed["key"]
    until(lambda: new.state_of("barn") == "alive")
    assert barn.ask("status")["role"] == "admin"
    assert {member["name"]: member["id"] for member in new.ask("member.list")} == before
    attic.knode("down")
    attic.knode("up", "--detach")
    until(lambda: attic.state_of("barn") == "alive")
    attic.knode("member", "revoke", "new")
    until(lambda: barn.members == ["attic", "barn"])
