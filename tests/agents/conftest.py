from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from sandbox_helpers import RunPython, processes_with

from knode.agents.limits import Limits
from knode.agents.sandbox import SANDBOXES, Command, Outcome, Sandbox
from knode.agents.sandbox.choice import probe
from knode.agents.sandbox.surroundings import python_program
from knode.errors import KnodeError
from knode.world import World
from knode.world.real import real_world


@pytest.fixture
def world() -> World:
    return real_world()


@pytest.fixture(scope="session")
def missing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The sandboxes that cannot be started on this machine, and why."""
    why = {}
    for name, make in SANDBOXES.items():
        try:
            trio.run(probe, real_world(), make(), tmp_path_factory.mktemp("home") / "probe")
        except KnodeError as error:
            why[name] = error.message
    assert len(why) < len(SANDBOXES), f"no sandbox can be started here, so nothing was tested: {why}"
    return why


@pytest.fixture(params=list(SANDBOXES))
def sandbox(request: pytest.FixtureRequest, missing: dict[str, str]) -> Sandbox:
    if request.param in missing:
        pytest.skip(f"{request.param} cannot be started on this machine: {missing[request.param]}")
    return SANDBOXES[request.param]()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The attempt's folder, in a node's home."""
    path = tmp_path / "home" / "attempts" / "t1"
    path.mkdir(parents=True, mode=0o700)
    return path


@pytest.fixture
def run_python(sandbox: Sandbox, folder: Path) -> RunPython:
    """Run Python source in the sandbox; keyword arguments are limits."""

    async def run(source: str, *arguments: object, stdin: bytes = b"", **limits: Any) -> Outcome:
        command = Command(
            argv=[os.fspath(python_program()), "-I", "-c", source, *map(str, arguments)],
            folder=folder,
            stdin=stdin,
        )
        return await sandbox.run(command, Limits(**limits), lambda fraction, text: None)

    return run


@pytest.fixture
def marker() -> Iterator[str]:
    """A word that no other process has in its command line; none may have it at the end."""
    word = f"knode-marker-{os.getpid()}-{time.monotonic_ns()}"
    yield word
    assert processes_with(word) == []
