"""Links over libp2p, which is imported in a thread when it is needed: that takes a second and 60 MB.

The port is bound, and its addresses are known, before that: who dials meanwhile waits in the kernel's queue.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.transport.binding import dialable
from knode.transport.libp2p_address import PeerAddress, direct_address, parse_peer_address
from knode.transport.link import Accept, Link, serve_link
from knode.transport.tcp import bind_tcp
from knode.world import Log, World

if TYPE_CHECKING:
    from knode.transport.libp2p_connection import MuxedStream
    from knode.transport.libp2p_node import Libp2pNode

OPENING_SECONDS = 10


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives.

    Args:
        reservations: places, for one peer each.
        reservation_seconds: how long a place lasts unless it is asked for again.
        circuits: how many there are at once; half of them for those who may have no place.
        circuits_a_place: how many of them lead to one peer; likewise.
        seconds: how long one lasts; a link that ends by it is opened anew.
        data_bytes: how much one carries, in both directions together.
    """

    reservations: int = 64
    reservation_seconds: int = 60 * 60
    circuits: int = 64
    circuits_a_place: int = 16
    seconds: int = 2 * 60 * 60
    data_bytes: int = 1024**3


@dataclass(frozen=True, slots=True)
class Libp2pSettings:
    """How a node takes part in libp2p.

    Args:
        port: where it listens, if that is free; None: where it is told to.
        relays: where it keeps a place, to be reached through them.
        bootstrap: whom it asks where others are.
        offers_relay: whether it relays for those who may reserve a place, and answers where they are.
        limits: what it gives them.
    """

    port: int | None = None
    relays: Sequence[PeerAddress] = ()
    bootstrap: Sequence[PeerAddress] = ()
    offers_relay: bool = False
    limits: RelayLimits = RelayLimits()


class Libp2pListener:
    """A bound TCP port, and the places at relays. See `Listener` for the contract."""

    def __init__(self, listening: trio.SocketListener, carrier: Libp2pCarrier) -> None:
        self._listening = listening
        self._carrier = carrier
        self._accepting = trio.CancelScope()
        self._direct: list[str] = []
        self._is_broken = False

    @property
    def addresses(self) -> list[str]:
        """The multiaddrs that others can dial now: straight to this machine, then through relays."""
        if self._is_broken:
            return []
        with suppress(OSError):  # closed, or no descriptor left to ask the system with: as they were
            self._direct = [
                direct_address(host, port, self._carrier.node_id)
                for host, port in dialable(self._listening.socket.getsockname())
            ]
        return [*self._direct, *self._carrier.relayed_addresses]

    @property
    def dropped(self) -> int:
        """How many connections failed in their opening; see `Listener.dropped`."""
        return self._carrier.dropped

    async def serve(self, accept: Accept) -> None:
        """Accept links; see `Listener.serve`. After `aclose`, returns when the last connection is done."""
        try:
            node = await self._carrier.start()
        except KnodeError as error:  # the node has other kinds of link
            self._carrier.log.warning("no libp2p", why=str(error))
            self._is_broken = True
            await self.aclose()
            return
        from knode.transport.libp2p_link import PROTOCOL, Libp2pLink

        host = node.host

        async def handle(link: Libp2pLink) -> None:
            try:
                await serve_link(link, accept)
            finally:
                host.release(link.connection)

        async def take_stream(stream: MuxedStream) -> None:
            host.use(stream.connection)
            links.start_soon(handle, Libp2pLink(stream, self._carrier.node_id, ends_connection=False))

        async def take_connection(stream: trio.SocketStream) -> None:
            await host.accept(stream.socket)

        async with trio.open_nursery() as links:
            with self._accepting:
                host.handlers[PROTOCOL] = take_stream
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(node.run, lambda: self.addresses)
                        await trio.serve_listeners(take_connection, [self._listening], handler_nursery=links)
                finally:
                    del host.handlers[PROTOCOL]

    async def aclose(self) -> None:
        """Stop listening; see `Listener.aclose`. Open links stay open."""
        self._accepting.cancel()
        await self._listening.aclose()


class Libp2pCarrier:
    """Listens for libp2p links and dials them, straight or through a relay.

    Args:
        world: its clock and randomness.
        key: the node's; its PeerId is who others find at the other end.
        log: told of connections that come to nothing, and of relays.
        settings: how the node takes part.
    """

    def __init__(
        self, world: World, key: KeyPair, log: Log, settings: Libp2pSettings = Libp2pSettings()
    ) -> None:
        self.node_id = str(key.node_id)
        self.may_reserve: Callable[[str], bool] = lambda node_id: False
        """Tells whether a node may have a place at the relay that this one is."""
        self._world = world
        self._key = key
        self.log = log
        self._settings = settings
        self._node: Libp2pNode | None = None
        self._starting = trio.Lock()

    @property
    def relayed_addresses(self) -> list[str]:
        """The multiaddrs at which others reach this node through relays now."""
        return self._node.relay_client.addresses if self._node is not None else []

    @property
    def dropped(self) -> int:
        """How many connections of others came to nothing."""
        return self._node.host.counters["dropped"] if self._node is not None else 0

    async def start(self) -> Libp2pNode:
        """Return this node among libp2p's peers, once libp2p is imported.

        Raises:
            KnodeError: UNAVAILABLE, when it cannot be.
        """
        async with self._starting:
            if self._node is None:
                load = partial(importlib.import_module, "knode.transport.libp2p_node")
                try:
                    module = await trio.to_thread.run_sync(load)
                except ImportError as error:
                    raise KnodeError(
                        Code.UNAVAILABLE,
                        f"libp2p cannot be imported ({error})",
                        "install knode again with 'make setup', or switch discovery.libp2p off",
                    ) from error
                self._node = module.Libp2pNode(
                    self._world, self._key, self.log, self._settings, lambda each: self.may_reserve(each)
                )
        return self._node

    async def listen(self, host: str, port: int) -> Libp2pListener:
        """Bind; see `Carrier.listen`, and `bind_tcp`.

        The port of the settings is taken instead, if any; when another program has that, a free one: a node
        does not stay down for want of this link.
        """
        setting = "discovery.libp2p_port"
        if self._settings.port is None:
            return Libp2pListener(await bind_tcp(host, port, setting=setting), self)
        try:
            bound = await bind_tcp(host, self._settings.port, setting=setting)
        except KnodeError as error:
            if error.code is not Code.PORT_IN_USE:
                raise
            self.log.warning("libp2p listens on another port", why=str(error))
            bound = await bind_tcp(host, 0, setting=setting)
        return Libp2pListener(bound, self)

    def dials(self, address: str) -> bool:
        """Whether it dials such addresses; see `Carrier.dials`."""
        try:
            parse_peer_address(address)
        except ValueError:
            return False
        return True

    async def dial(self, address: str) -> Link:
        """Open a link; see `Carrier.dial`. Each has a connection of its own."""
        try:
            where = parse_peer_address(address)
        except ValueError as error:
            raise KnodeError(Code.UNAVAILABLE, f"no link to {address[:80]}: {error}") from error
        node = await self.start()
        from knode.transport.libp2p_host import NotOpened
        from knode.transport.libp2p_link import PROTOCOL, Libp2pLink

        try:
            with trio.fail_after(OPENING_SECONDS):
                connection = await node.dial(where)
                try:
                    stream = await node.host.open_stream(connection, PROTOCOL)
                except BaseException:
                    connection.abort()
                    raise
                return Libp2pLink(stream, self.node_id, ends_connection=True)
        except trio.TooSlowError as error:
            why = f"no answer within {OPENING_SECONDS} seconds"
            raise KnodeError(Code.UNAVAILABLE, f"no link to {address}: {why}") from error
        except NotOpened as error:
            raise KnodeError(Code.UNAVAILABLE, f"no link to {address}: {error}") from error

    async def find(self, node_id: str) -> list[str]:
        """Return multiaddrs that somebody claims for a node; see `Lookup.find`."""
        node = await self.start()
        return await node.lookup.find(node_id)
