"""Links over QUIC (RFC 9000) over UDP: the protocol is aioquic's sans-I/O core, driven here by trio."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from pathlib import Path

import trio

from knode.errors import Code, KnodeError
from knode.transport.address import is_host_and_port, join_address, split_address
from knode.transport.binding import bind, dialable
from knode.transport.certificate import binding_of, damaged
from knode.transport.link import Accept, serve_link
from knode.transport.quic_connection import client_configuration, server_configuration
from knode.transport.quic_endpoint import OPENING_SECONDS, EndpointStatistics, QuicEndpoint
from knode.transport.quic_link import CLOSED_AT_ONCE, QuicLink
from knode.transport.udp import SocketAddress, UdpSocket
from knode.world import Log

BACKLOG = 128
"""How many links may wait for `serve`."""
HEAD_START_SECONDS = 0.25
"""How much earlier the first address of a name is tried than the next (RFC 8305, 5)."""


class QuicListener:
    """A bound UDP port. See `Listener` for the contract.

    Everybody must show that they receive at the address they send from, before a connection costs memory.
    When all openings are taken, the oldest makes room.
    """

    def __init__(self, endpoint: QuicEndpoint) -> None:
        self.endpoint = endpoint
        self._opened, self._waiting = trio.open_memory_channel[QuicLink](BACKLOG)
        self._accepting = trio.CancelScope()
        self._addresses = self._dialable()

    @property
    def statistics(self) -> EndpointStatistics:
        """What strangers did."""
        return self.endpoint.statistics

    @property
    def dropped(self) -> int:
        """How many connections failed in their opening, or were one too many."""
        seen = self.endpoint.statistics
        return seen.dropped + seen.over_limit + seen.bad_tokens

    @property
    def addresses(self) -> list[str]:
        """The addresses that others can dial now: a machine may move to another network."""
        with suppress(OSError):  # no descriptor left to ask the system with: as they were
            self._addresses = self._dialable()
        return self._addresses

    def _dialable(self) -> list[str]:
        return [join_address(host, port) for host, port in dialable(self.endpoint.udp.address)]

    def take(self, link: QuicLink) -> bool:
        """Let a new link wait for `serve`; tell whether there is room."""
        try:
            self._opened.send_nowait(link)
        except trio.WouldBlock:
            return False
        return True

    async def serve(self, accept: Accept) -> None:
        """Accept links; see `Listener.serve`. After `aclose`, returns when the last link is done."""

        async with trio.open_nursery() as links:
            with self._accepting:
                while True:
                    links.start_soon(serve_link, await self._waiting.receive(), accept)

    async def aclose(self) -> None:
        """Stop listening; see `Listener.aclose`. Open links stay open, and the port is theirs."""
        self._accepting.cancel()
        while True:
            try:
                self._waiting.receive_nowait().drop("this end listens no more", CLOSED_AT_ONCE)
            except trio.WouldBlock:
                break
        if self.endpoint.stop_listening():
            with trio.CancelScope(shield=True):  # a turn of the loop
                await self.endpoint.closed.wait()


class QuicCarrier:
    """Listens for QUIC links and dials them, from the port that it listens on where that can be.

    Args:
        certificate_path: the PEM file with the node's TLS key and certificate. Only `listen` reads it.
        log: told of connections that become no link.
    """

    def __init__(self, certificate_path: Path, log: Log) -> None:
        self._certificate_path = certificate_path
        self._log = log
        self._client = client_configuration()
        self._listening: list[QuicEndpoint] = []
        self._dialling: dict[int, QuicEndpoint] = {}
        """For each version of IP, a socket that is there as long as a link needs it."""

    async def listen(self, host: str, port: int) -> QuicListener:
        """Bind; see `Carrier.listen`.

        Args:
            host: an address or a name of this machine; "" and "::" take IPv6 and IPv4, "0.0.0.0" IPv4 alone.
            port: 0 takes a free one.
        """
        try:
            server = server_configuration(self._certificate_path)
            binding = binding_of(self._certificate_path)
        except (OSError, ValueError) as error:
            raise damaged(self._certificate_path, error) from error
        endpoint = QuicEndpoint(
            UdpSocket(await bind(host, port, socket.SOCK_DGRAM, setting="node.port")), self._log
        )
        listener = QuicListener(endpoint)
        endpoint.listen(server, binding, listener.take)
        endpoint.start()
        self._listening = [other for other in self._listening if other.listens] + [endpoint]
        return listener

    def dials(self, address: str) -> bool:
        """Whether it dials such addresses; see `Carrier.dials`."""
        return is_host_and_port(address)

    async def dial(self, address: str) -> QuicLink:
        """Open a link; see `Carrier.dial`."""
        try:
            host, port = split_address(address)
            with trio.fail_after(OPENING_SECONDS):
                found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
                return await self._first_of([(family, remote) for family, *_, remote in found])
        except trio.TooSlowError as error:
            why = f"no answer within {OPENING_SECONDS} seconds"
            raise KnodeError(Code.UNAVAILABLE, f"no link to {address}: {why}") from error
        except (OSError, ValueError) as error:
            raise KnodeError(Code.UNAVAILABLE, f"no link to {address}: {error}") from error

    async def _first_of(self, ways: list[tuple[int, SocketAddress]]) -> QuicLink:
        """Dial the addresses of a name, each a moment after the one before; return the first link."""
        links: list[QuicLink] = []
        faults: dict[str, None] = {}
        failed = trio.Event()

        async def attempt(family: int, remote: SocketAddress) -> None:
            nonlocal failed
            try:
                links.append(await self._open(family, remote))
                nursery.cancel_scope.cancel()
            except OSError as error:
                faults[str(error)] = None
                failed.set()
                failed = trio.Event()

        async with trio.open_nursery() as nursery:
            for family, remote in ways:
                nursery.start_soon(attempt, family, remote)
                with trio.move_on_after(HEAD_START_SECONDS if len(ways) > 1 else 0):
                    await failed.wait()
        for surplus in links[1:]:
            surplus.drop("another address answered first", CLOSED_AT_ONCE)
        if not links:
            raise ConnectionError("; ".join(faults))
        return links[0]

    async def _open(self, family: int, remote: SocketAddress) -> QuicLink:
        endpoint, remote = self._endpoint_to(family, remote)
        link = endpoint.dial(self._client, remote)
        try:
            await link.opened.wait()
            if link.closed_why is not None:
                raise ConnectionError(link.closed_why)
        except BaseException:
            link.drop("the dial was given up", CLOSED_AT_ONCE)
            raise
        return link

    def _endpoint_to(self, family: int, remote: SocketAddress) -> tuple[QuicEndpoint, SocketAddress]:
        """Return from where to dial, and the address as it is written there.

        Raises:
            OSError: there is no socket to be had.
        """
        for endpoint in self._listening:
            if endpoint.listens:
                if endpoint.udp.family == family and _reaches(endpoint.udp.address[0], remote[0]):
                    return endpoint, remote
                if endpoint.udp.takes_both_versions and family == socket.AF_INET:
                    return endpoint, (f"::ffff:{remote[0]}", remote[1], 0, 0)
        if family not in self._dialling or self._dialling[family].is_closing:
            bound = socket.socket(family, socket.SOCK_DGRAM)
            bound.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
            self._dialling[family] = QuicEndpoint(UdpSocket(bound), self._log)
            self._dialling[family].start()
        return self._dialling[family], remote


def _reaches(bound: str, remote: str) -> bool:
    """Whether a socket bound to an address sends to another: loopback goes to loopback alone."""
    if bound in ("::", "0.0.0.0"):
        return True
    return ipaddress.ip_address(bound).is_loopback == ipaddress.ip_address(remote).is_loopback
