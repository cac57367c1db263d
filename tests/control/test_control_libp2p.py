"""A daemon that is a libp2p host."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from knode.identity import KeyPair
from knode.node import initialise
from knode.transport.libp2p_address import parse_peer_address
from knode.transport.libp2p_carrier import Libp2pCarrier, Libp2pSettings
from knode.world.real import real_world


class RecordingLog:
    """Keeps what was logged of a refusal."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, event: str, **fields: Any) -> None:
        pass

    def warning(self, event: str, **fields: Any) -> None:
        assert "PERMISSION_DENIED" in fields["why"]
        self.lines.append(event)


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


async def take_a_place(relay: str, key: KeyPair) -> bool:
    """Ask for a place at a relay; tell whether it is given."""
    log = RecordingLog()
    settings = Libp2pSettings(relays=[parse_peer_address(relay)])
    carrier = Libp2pCarrier(real_world(), key, log, settings)
    listener = await carrier.listen("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, lambda link: link.aclose())
        with trio.fail_after(PATIENCE_S):
            while not (carrier.relayed_addresses or log.lines):  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        given = bool(carrier.relayed_addresses)
        nursery.cancel_scope.cancel()
    await listener.aclose()
    return given


def test_a_daemon_is_pinged_by_any_libp2p_host_relays_for_its_guests_and_goes_down_in_order(
    home: Home,
) -> None:
    guest, stranger = KeyPair(b"g" * 32), KeyPair(b"s" * 32)
    set_value(real_world(), home, "discovery.relay_server", "true")
    set_value(real_world(), home, "discovery.relay_guests", guest.node_id)
    with start(home) as process:
        with until(lambda: answering(home)) as client:
            status = client.call("status")
        [_, multiaddr] = status["addresses"]
        assert multiaddr.endswith(f"/p2p/{status['node_id']}")
        trio.run(ping, multiaddr)
        assert trio.run(take_a_place, multiaddr, guest)
        assert not trio.run(take_a_place, multiaddr, stranger)
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
