"""Links over libp2p, which is imported in a thread when it is needed: that takes a second and 60 MB.

The port is bound, and its addresses are known, before that: who dials meanwhile waits in the kernel's queue.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import trio

from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.transport.binding import dialable
from knode.transport.libp2p_address import direct_address, parse_peer_address
from knode.transport.link import Accept, Link, LinkClosed
from knode.transport.tcp import bind_tcp
from knode.world import Log

if TYPE_CHECKING:
    from knode.transport.libp2p_connection import MuxedStream
    from knode.transport.libp2p_host import Host

OPENING_SECONDS = 10
LINKS_WAITING = 16


class Libp2pListener:
    """A bound TCP port, and the places at relays. See `Listener` for the contract."""

    def __init__(self, listening: trio.SocketListener, carrier: Libp2pCarrier) -> None:
        self._listening = listening
        self._carrier = carrier
        self._accepting = trio.CancelScope()
        self._direct: list[str] = []

    @property
    def addresses(self) -> list[str]:
        """The multiaddrs that others can dial now."""
        with suppress(OSError):  # closed, or no descriptor left to ask the system with: as they were
            self._direct = [
                direct_address(host, port, self._carrier.node_id)
                for host, port in dialable(self._listening.socket.getsockname())
            ]
        return self._direct

    async def serve(self, accept: Accept) -> None:
        """Accept links; see `Listener.serve`. After `aclose`, returns when the last link is done."""
        from knode.transport.libp2p_link import PROTOCOL, Libp2pLink

        host = await self._carrier.host()

        async def handle(link: Libp2pLink) -> None:
            try:
                with suppress(LinkClosed):  # how every link ends
                    await accept(link)
            finally:
                await link.aclose()
                host.release(link.connection)

        async def take(stream: MuxedStream) -> None:
            host.use(stream.connection)
            links.start_soon(handle, Libp2pLink(stream, self._carrier.node_id, ends_connection=False))

        async def take_tcp(stream: trio.SocketStream) -> None:
            await host.accept(stream.socket)

        async with trio.open_nursery() as links:
            with self._accepting:
                host.handlers[PROTOCOL] = take
                try:
                    await trio.serve_listeners(take_tcp, [self._listening], handler_nursery=links)
                finally:
                    del host.handlers[PROTOCOL]

    async def aclose(self) -> None:
        """Stop listening; see `Listener.aclose`. Open links stay open."""
        self._accepting.cancel()
        await self._listening.aclose()


class Libp2pCarrier:
    """Listens for libp2p links and dials them.

    Args:
        key: the node's; its PeerId is who others find at the other end.
        log: told of connections that come to nothing.
    """

    def __init__(self, key: KeyPair, log: Log) -> None:
        self.node_id = str(key.node_id)
        self._key = key
        self._log = log
        self._host: Host | None = None
        self._importing = trio.Lock()

    async def host(self) -> Host:
        """Return the host, once libp2p is imported."""
        async with self._importing:
            if self._host is None:
                load = partial(importlib.import_module, "knode.transport.libp2p_host")
                module = await trio.to_thread.run_sync(load)
                self._host = module.Host(self._key, self._log)
        return self._host

    async def listen(self, host: str, port: int) -> Libp2pListener:
        """Bind; see `Carrier.listen`, and `bind_tcp`."""
        return Libp2pListener(await bind_tcp(host, port, setting="discovery.libp2p_port"), self)

    def dials(self, address: str) -> bool:
        """Whether it dials such addresses; see `Carrier.dials`."""
        try:
            parse_peer_address(address)
        except ValueError:
            return False
        return True

    async def dial(self, address: str) -> Link:
        """Open a link; see `Carrier.dial`."""
        try:
            where = parse_peer_address(address)
        except ValueError as error:
            raise KnodeError(Code.UNAVAILABLE, f"no link to {address[:80]}: {error}") from error
        host = await self.host()
        from knode.transport.libp2p_host import NotOpened
        from knode.transport.libp2p_link import PROTOCOL, Libp2pLink

        try:
            with trio.fail_after(OPENING_SECONDS):
                connection = await host.dial(where)
                try:
                    stream = await host.open_stream(connection, PROTOCOL)
                except BaseException:
                    connection.abort()
                    raise
                return Libp2pLink(stream, self.node_id, ends_connection=True)
        except trio.TooSlowError as error:
            why = f"no answer within {OPENING_SECONDS} seconds"
            raise KnodeError(Code.UNAVAILABLE, f"no link to {address}: {why}") from error
        except NotOpened as error:
            raise KnodeError(Code.UNAVAILABLE, f"no link to {address}: {error}") from error
