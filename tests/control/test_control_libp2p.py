"""A daemon that is a libp2p host."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import libp2p
import pytest
import trio
from libp2p.host.ping import PingService
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr
from real_processes import PATIENCE_S, Process, kill_daemons, plain_environment, until

from knode.control.client import Client
from knode.errors import EXIT_USAGE, KnodeError
from knode.home.configuration import set_value
from knode.home.layout import Home
from knode.node import initialise
from knode.world.real import real_world


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path / "home", None)
    initialise(made, name="desk", flags={"node.host": "127.0.0.1", "node.port": "0"})
    yield made
    kill_daemons(made.path)


def start(home: Home) -> Process:
    environment = plain_environment() | {
        "KNODE_DISCOVERY_LIBP2P": "true",
        "KNODE_DISCOVERY_LIBP2P_PORT": "0",
    }
    line = [sys.executable, "-m", "knode", "up", "--home", str(home.path)]
    return Process(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


async def ping(address: str) -> None:
    host = libp2p.new_host()
    async with host.run(listen_addrs=[]):
        info = info_from_p2p_addr(Multiaddr(address))
        with trio.fail_after(PATIENCE_S):
            await host.connect(info)
            await PingService(host).ping(info.peer_id)
        await host.close()


def answering(home: Home) -> Client | None:
    try:
        return Client.connect(home)
    except KnodeError:
        return None


def test_any_libp2p_host_pings_a_daemon_which_goes_down_in_order(home: Home) -> None:
    with start(home) as process:
        with until(lambda: answering(home)) as client:
            status = client.call("status")
        [_, multiaddr] = status["addresses"]
        assert multiaddr.endswith(f"/p2p/{status['node_id']}")
        trio.run(ping, multiaddr)
        process.terminate()
        _, said = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, b"Traceback" in said) == (0, False), said
    assert "node failed" not in [json.loads(line)["event"] for line in home.log_file.read_text().splitlines()]


def test_a_relay_that_only_looks_like_one_is_named(home: Home) -> None:
    set_value(real_world(), home, "discovery.relays", "/ip4/999.0.0.1/tcp/4748/p2p/12D3KooW")
    with start(home) as process:
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == EXIT_USAGE
    assert b"999.0.0.1" in said
    assert b"discovery.relays" in said
