"""A local network of network namespaces on a bridge, for tests that multicast (Linux, root, iproute2)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_processes import PATIENCE_S, Process, kill_daemons, plain_environment, until

_numbers = itertools.count()

LIBP2P_BROWSER = """
from libp2p.discovery.events.peerDiscovery import peerDiscovery
from libp2p.discovery.mdns.listener import PeerListener
from libp2p.peer.peerstore import PeerStore
from zeroconf import Zeroconf
import time

def found(info):
    print("found", info.peer_id, *info.addrs, flush=True)

peerDiscovery.register_peer_discovered_handler(found)
listener = PeerListener(PeerStore(), Zeroconf(), "_p2p._udp.local.", "me._p2p._udp.local.")
time.sleep(600)
"""
"""A program that prints the libp2p nodes which the libp2p library finds by multicast DNS."""


class LocalNetwork:
    """Machines on one Ethernet without any other network; each is a network namespace."""

    def __init__(self, name: str) -> None:
        self.bridge = f"{name}br"
        self.machines: list[str] = []
        self._name = name
        self._ip("link", "add", self.bridge, "type", "bridge", "mcast_snooping", "0")
        self._ip("link", "set", self.bridge, "up")

    def machine(self, *addresses: str) -> str:
        """Add a machine with these addresses (`10.99.0.1/24`) and return its namespace."""
        number = len(self.machines)
        machine, wire = f"{self._name}m{number}", f"{self._name}w{number}"
        self._ip("netns", "add", machine)
        self.machines.append(machine)
        self._ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", machine)
        self._ip("link", "set", wire, "master", self.bridge, "up")
        self._ip("-n", machine, "link", "set", "lo", "up")
        self._ip("-n", machine, "link", "set", "eth0", "up")
        self.move(machine, *addresses)
        return machine

    def move(self, machine: str, *addresses: str) -> None:
        """Give a machine other addresses, in place of those it has."""
        self._ip("-n", machine, "addr", "flush", "dev", "eth0")
        for address in addresses:
            duplicates = ["nodad"] if ":" in address else []
            self._ip("-n", machine, "addr", "add", address, "dev", "eth0", *duplicates)

    def start(self, machine: str, program: str, *words: str) -> Process:
        """Start a Python program on a machine; `line` reads what it prints."""
        return Process(
            self.on(machine, sys.executable, "-c", program, *words),
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def on(self, machine: str, *words: str) -> list[str]:
        """Return the command line that runs `words` on a machine."""
        return ["ip", "netns", "exec", machine, *words]

    def close(self) -> None:
        """Remove everything."""
        for number, machine in enumerate(self.machines):
            # The namespace itself lives on for as long as a socket of it waits for its end.
            self._ip("link", "del", f"{self._name}w{number}")
            self._ip("netns", "del", machine)
        self._ip("link", "del", self.bridge)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60)


def line(process: Process) -> list[str]:
    """Return the next line that a process writes, in words; it has a minute."""
    assert process.stdout is not None
    impatience = threading.Timer(PATIENCE_S, process.kill)
    impatience.start()
    try:
        return process.stdout.readline().split()
    finally:
        impatience.cancel()


@contextlib.contextmanager
def local_network() -> Iterator[LocalNetwork]:
    """Make a local network; the test is skipped where namespaces cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: there is no 'ip' (iproute2)")
    try:
        network = LocalNetwork(f"k{os.getpid() % 100_000}n{next(_numbers)}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces: {error.stderr.strip()}")
    try:
        yield network
    finally:
        network.close()


class Owner:
    """Whoever types commands on the machines."""

    def __init__(self, folder: Path, network: LocalNetwork) -> None:
        self.network = network
        self.homes: dict[str, Path] = {}
        self._folder = folder

    def knode(self, machine: str, *words: str, **variables: str) -> Any:
        """Run a command on a machine, with these variables beside, and return its document."""
        home = self.homes.setdefault(machine, self._folder / machine)
        environment = plain_environment() | {
            "KNODE_DISCOVERY_MDNS": "true",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **variables,
        }
        line = [sys.executable, "-m", "knode", *words, "--home", str(home), "--json", "--no-input"]
        done = subprocess.run(
            self.network.on(machine, *line),
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def peer(self, machine: str) -> Any:
        """Return what a machine says of the one other, once it is there."""

        def alive() -> Any:
            [peer] = self.knode(machine, "peer", "list")
            return peer if peer["state"] == "alive" else None

        return until(alive)


@contextlib.contextmanager
def machines_of_an_owner(folder: Path) -> Iterator[Owner]:
    """Make a local network whose machines run daemons; none is left behind."""
    with local_network() as network:
        owner = Owner(folder, network)
        try:
            yield owner
        finally:
            kill_daemons(*owner.homes.values())
