"""Nodes and other libp2p peers on loopback, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import libp2p
import trio
from multiaddr import Multiaddr

from knode.identity import KeyPair
from knode.transport import Link
from knode.transport.libp2p_address import PeerAddress, parse_peer_address
from knode.transport.libp2p_carrier import Libp2pCarrier, Libp2pListener, Libp2pSettings
from knode.transport.libp2p_host import Host
from knode.world.real import real_world

NO_RELAYS = Libp2pSettings()
LIMIT_SECONDS = 300
"""Far beyond what anything here takes, also on a clock ten times as fast: only a hang gets there."""


NO_MESSAGES = [
    b"\xff\xff\xff\x0f",  # far too long
    b"\xff" * 9 + b"\x7f",  # a length of more than 64 bits
    b"\xff" * 10,
    b"\x02\xff\xff",  # no protobuf
]
"""What comes where one message of a libp2p protocol should."""


class Lines:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda event, **fields: self.told.append((event, fields))


async def echo(link: Link) -> None:
    while True:  # ends by LinkClosed
        await link.send_frame(await link.receive_frame())


class Peer:
    """A node that listens on loopback."""

    def __init__(self, name: str, settings: Libp2pSettings = NO_RELAYS) -> None:
        self.key = KeyPair(name.encode().ljust(32))
        self.log = Lines()
        self.carrier = Libp2pCarrier(real_world(), self.key, self.log, settings)
        self.carrier.may_reserve = lambda _: True
        self.listener: Libp2pListener

    async def start(
        self, nursery: trio.Nursery, accept: Callable[[Link], Awaitable[None]] = echo, port: int = 0
    ) -> Peer:
        self.listener = await self.carrier.listen("127.0.0.1", port)
        nursery.start_soon(self.listener.serve, accept)
        await self.carrier.start()
        return self

    @property
    def id(self) -> str:
        return self.key.node_id

    @property
    def host(self) -> Host:
        assert self.carrier._node is not None
        return self.carrier._node.host

    @property
    def address(self) -> str:
        return self.listener.addresses[0]

    @property
    def way(self) -> PeerAddress:
        return parse_peer_address(self.address)

    @property
    def port(self) -> int:
        return self.way.port


async def until(condition: Callable[[], Any]) -> Any:
    """Wait for what comes by itself; return it."""
    with trio.fail_after(LIMIT_SECONDS):
        while not (found := condition()):  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.01)
        return found


@asynccontextmanager
async def other_host(**options: Any) -> AsyncIterator[Any]:
    """A host of py-libp2p, as another program would run one."""
    host = libp2p.new_host(**options)
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield host
        await host.close()
