"""What tests of real processes share: nothing outlives its test, and an event has a minute to come."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knode.errors import Code, KnodeError
from knode.testnet.namespaces import Namespaces
from knode.testnet.processes import daemons_of, end
from knode.testnet.topology import Topology

PATIENCE_S = 60.0


class Process(subprocess.Popen):
    """A process that is killed where its `with` block ends: a test that fails must not wait for it."""

    def __exit__(self, *error: Any) -> None:
        self.kill()
        super().__exit__(*error)


def plain_environment() -> dict[str, str]:
    """The environment without what whoever runs the tests has set for knode, and with what the tests set."""
    kept = {key: text for key, text in os.environ.items() if not key.startswith(("KNODE_", "XDG_"))}
    return kept | {key: text for key, text in os.environ.items() if key.startswith("KNODE_DISCOVERY_")}


def until(condition: Callable[[], Any]) -> Any:
    """Ask again and again for a minute, however slow the machine is; return what was found at last."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it has not happened within a minute"
        time.sleep(0.02)
    return found


def kill_daemons(*homes: Path) -> None:
    """Kill the daemons of these homes, whatever state they are in."""
    assert end(list(daemons_of(homes)), signal.SIGKILL) == []


def namespaces_or_skip(folder: Path, topology: Topology) -> Namespaces:
    """Start a network in namespaces; where the system allows none, the test is skipped and says why."""
    try:
        return Namespaces.start(folder, topology)
    except KnodeError as error:
        if error.code is not Code.UNAVAILABLE:
            raise
        pytest.skip(str(error))
