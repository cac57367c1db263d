"""The unit is what it should be, and a real systemd runs it: at once, after a crash and after a reboot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from real_processes import kill_daemons, until
from user_systemd import UserSystemd, user_systemd

from knode.agents.sandbox.choice import choose_sandbox
from knode.control import service
from knode.control.client import Client
from knode.control.service import command_of, unit_text
from knode.errors import Code, KnodeError
from knode.home.layout import Home
from knode.node import initialise
from knode.world.real import real_world

ROOT = Path(__file__).parents[2]
FLAGS = {"node.host": "127.0.0.1", "node.port": "0", "discovery.libp2p": "false"}
DEPLOYED = ROOT / "deploy" / "knode.service"


def test_the_unit_in_the_repository_is_the_one_that_is_installed() -> None:
    command = "%h/knode/.venv/bin/knode up --background --home %h/.local/share/knode"
    assert DEPLOYED.read_text() == unit_text(command)


@pytest.mark.parametrize("name", ["home", 'a "b" c', "50%", "$HOME", "back\\slash", "semi;colon"])
def test_systemd_accepts_the_unit_whatever_the_homes_path_is(tmp_path: Path, name: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    home = tmp_path / name
    unit = tmp_path / "knode.service"
    unit.write_text(unit_text(command_of(Home(home))))
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--user", str(unit)],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (checked.returncode, checked.stderr) == (0, "")


def test_without_systemd_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for work in (service.state, service.uninstall, lambda: service.install(Home(tmp_path), start=True)):
        with pytest.raises(KnodeError) as refused:
            work()
        assert refused.value.code is Code.UNAVAILABLE
        assert "no systemd" in refused.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_systemd_that_does_not_answer_is_named_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if shutil.which("systemctl") is None:
        pytest.skip("there is no systemctl")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "nobody"))
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(KnodeError, match="does not answer"):
        service.install(Home(tmp_path / "home"), start=True)
    assert list(tmp_path.iterdir()) == []


class User:
    """Someone with a home folder, a systemd and a command line."""

    def __init__(self, systemd: UserSystemd) -> None:
        self.systemd = systemd
        self.home = Home(systemd.home / ".local/share/knode", None)

    def knode(self, *words: str, code: int = 0) -> Any:
        done = self.systemd.run(sys.executable, "-m", "knode", *words, "--json")
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def status(self) -> Any:
        """Return what the daemon says, once it is there."""

        def asked() -> Any:
            try:
                with Client.connect(self.home) as client:
                    return client.call("status")
            except KnodeError as error:
                if error.code not in (Code.NOT_RUNNING, Code.UNAVAILABLE):  # not yet, or killed just now
                    raise
                return None

        return until(asked)

    def pid(self) -> int:
        with Client.connect(self.home) as client:
            return client.daemon_pid


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    with user_systemd(tmp_path) as systemd:
        made = User(systemd)
        try:
            yield made
        finally:
            kill_daemons(made.home.path)


def _sandbox(folder: Path) -> str | None:
    """The sandbox that holds for a program that no systemd has hardened."""
    choice = trio.run(choose_sandbox, real_world(), folder / "probe")
    return choice.sandbox.name if choice.sandbox else None


def test_systemd_keeps_the_daemon_running_and_agents_have_their_sandbox(user: User, tmp_path: Path) -> None:
    initialise(user.home, name="desk", flags=FLAGS)
    installed = user.knode("service", "install")
    assert (installed["enabled"], installed["active"]) == (True, True)
    assert user.status()["sandbox"] == _sandbox(tmp_path)  # the hardening takes nothing from the agents
    unit = Path(installed["unit"])
    assert unit.read_text() == unit_text(command_of(user.home))

    first = user.pid()
    assert user.knode("service", "install") == installed
    assert user.pid() == first

    override = unit.with_suffix(".service.d") / "soon.conf"
    override.parent.mkdir()
    override.write_text("[Service]\nRestartSec=100ms\n")
    user.systemd.run("systemctl", "--user", "daemon-reload")
    os.kill(first, 9)
    user.status()
    second = user.pid()
    assert second != first

    user.systemd.shut_down()
    assert not Path(f"/proc/{second}").exists()
    user.systemd.boot()
    user.status()

    user.knode("down")
    assert user.knode("service", "status")["active"] is False
    assert user.knode("service", "uninstall")["installed"] is False
    assert not unit.exists()
    assert user.home.format_file.exists()


def test_a_unit_of_another_home_is_left_as_it_is(user: User) -> None:
    for name in ("a", "b"):
        initialise(Home(user.systemd.home / name), name=name, flags=FLAGS)
    unit = user.systemd.home / ".config/systemd/user/knode.service"
    unit.parent.mkdir(parents=True)
    unit.write_text(unit_text(command_of(Home(user.systemd.home / "a"))))
    before = unit.read_text()
    refused = user.knode("service", "install", "--home", str(user.systemd.home / "b"), code=1)
    assert refused["error"]["code"] == "HOME_EXISTS"
    assert unit.read_text() == before
