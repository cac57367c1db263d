"""Daemons on machines of their own find each other when nothing but multicast DNS says where they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_network import LocalNetwork, local_network
from real_processes import PATIENCE_S, kill_daemons, until


class Owner:
    """Whoever types commands on the machines."""

    def __init__(self, folder: Path, network: LocalNetwork) -> None:
        self.network = network
        self.homes: dict[str, Path] = {}
        self._folder = folder

    def knode(self, machine: str, *words: str) -> Any:
        """Run a command on a machine and return its document."""
        home = self.homes.setdefault(machine, self._folder / machine)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KNODE_", "XDG_"))}
        line = [sys.executable, "-m", "knode", *words, "--home", str(home), "--json", "--no-input"]
        done = subprocess.run(
            self.network.on(machine, *line),
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
            env=kept | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def peer(self, machine: str) -> Any:
        """Return what a machine says of the one other, once it is there."""

        def alive() -> Any:
            [peer] = self.knode(machine, "peer", "list")
            return peer if peer["state"] == "alive" else None

        return until(alive)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    with local_network() as network:
        owner = Owner(tmp_path, network)
        try:
            yield owner
        finally:
            kill_daemons(*owner.homes.values())


def test_nodes_that_all_get_new_addresses_find_each_other_by_multicast_dns_alone(owner: Owner) -> None:
    """They move while they run, as when the router hands out other addresses."""
    network = owner.network
    desk, attic = network.machine("10.99.0.1/24"), network.machine("10.99.0.2/24")
    owner.knode(desk, "init", "--name", "desk")
    owner.knode(desk, "up", "--detach")
    ticket = owner.knode(desk, "invite", "--no-wait")["ticket"]
    owner.knode(attic, "join", ticket, "--name", "attic")
    owner.peer(desk)
    network.move(desk, "10.99.7.1/24")
    network.move(attic, "10.99.7.2/24")

    def has_moved() -> bool:
        [peer] = owner.knode(desk, "peer", "list")
        return peer["state"] == "alive" and "10.99.7." in (peer["address"] or "")

    until(has_moved)
