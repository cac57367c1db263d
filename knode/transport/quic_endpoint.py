"""One UDP socket with all its QUIC connections: who gets which datagram, and who may begin one.

Two tasks move everything: one takes what comes, one does what is due. They belong to the run, as the kernel's
own work for a TCP connection does: an acknowledgement must not wait until somebody asks the link for a frame.
They end with the last connection, when the endpoint does not listen.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import trio
from aioquic._buffer import Buffer
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.events import ConnectionIdIssued, ConnectionIdRetired, ConnectionTerminated
from aioquic.quic.packet import (
    QuicErrorCode,
    QuicHeader,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

from knode.transport.address import join_address
from knode.transport.openings import OPENINGS_AT_ONCE
from knode.transport.quic_connection import CONNECTION_ID_BYTES, VERSION, Connection, refusal
from knode.transport.quic_link import CLOSED_AT_ONCE, QuicLink
from knode.transport.strangers import StrangerLines
from knode.transport.udp import SEGMENTS_AT_ONCE, Path, SocketAddress, UdpSocket
from knode.world import Log

OPENING_SECONDS = 10
CONNECTIONS_AT_ONCE = 1024
DATAGRAMS_A_TURN = 64
"""After so many the loop gets its turn; what the system hands over at once, at most 64 KiB, may exceed it."""

_LONG_HEADER = 0x80
_UNREACHABLE = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM)


@dataclass(slots=True)
class EndpointStatistics:
    """What became of datagrams that no connection took, and of connections that became no link."""

    dropped: int = 0
    """Connections that failed in their opening."""
    garbage: int = 0
    """Datagrams that are no QUIC, or of no connection here."""
    retried: int = 0
    """First datagrams that were answered with a token, to be shown from the same address."""
    bad_tokens: int = 0
    """Tokens that are not ours, too old, or from another address."""
    other_versions: int = 0
    """Datagrams of another version of QUIC."""
    over_limit: int = 0
    """Connections that were one too many."""
    send_faults: int = 0
    """Datagrams that the system did not send."""
    receive_faults: int = 0
    """Errors that the system gave instead of a datagram."""
    faults: int = 0
    """Datagrams and timers at which the protocol's core failed; it ends that connection."""


class QuicEndpoint:
    """A UDP socket and its connections.

    Args:
        udp: its socket, which it owns.
        log: told of connections that become no link.
    """

    def __init__(self, udp: UdpSocket, log: Log) -> None:
        self.statistics = EndpointStatistics()
        self.udp = udp
        self.closed = trio.Event()
        self._log = log
        self._lines = StrangerLines()
        self._tokens = QuicRetryTokenHandler()
        self._server: tuple[QuicConfiguration, bytes] | None = None
        self._accept: Callable[[QuicLink], bool] = lambda _: False
        self._routes: dict[bytes, QuicLink] = {}
        self._links: dict[QuicLink, set[bytes]] = {}
        """Every connection that is not over yet, with its connection ids."""
        self._openings: dict[QuicLink, float] = {}
        """Connections from outside that are no links yet, with when they must be."""
        self._nap = trio.CancelScope()
        self._running = trio.CancelScope()
        self.is_closing = False

    def start(self) -> None:
        """Begin to carry datagrams, until `close`."""
        trio.lowlevel.spawn_system_task(self._run, name=f"QUIC at {self.udp.address}")

    def listen(
        self, configuration: QuicConfiguration, binding: bytes, accept: Callable[[QuicLink], bool]
    ) -> None:
        """Take connections from outside, too.

        Args:
            binding: the channel binding of the certificate in `configuration`.
            accept: called with each new link; False refuses it.
        """
        self._server = configuration, binding
        self._accept = accept

    @property
    def listens(self) -> bool:
        """Whether it takes connections from outside."""
        return self._server is not None and not self.is_closing

    def stop_listening(self) -> bool:
        """Take no more connections from outside, drop those in their opening; tell whether none is left."""
        self._server = None
        for link in list(self._openings):
            self._drop_opening(link, "this end listens no more")
        self._close_if_idle()
        return self.is_closing

    def dial(self, configuration: QuicConfiguration, remote: SocketAddress) -> QuicLink:
        """Begin a connection. Await its `opened`, or drop it.

        Raises:
            OSError: the system does not send there.
        """
        now = trio.current_time()
        connection = Connection(configuration)
        link = QuicLink(connection, b"", self._pump, self._pump_soon, now)
        self._add(link, connection.host_cid)
        connection.connect(Path(remote), now)
        self._pump(link)
        return link

    def close(self) -> None:
        """End everything at once; `closed` follows when its socket is closed. Twice is no error."""
        if not self.is_closing:
            self.is_closing = True
            for link in list(self._links):
                link.drop("this end of all links was closed", CLOSED_AT_ONCE)
                self._remove(link)
            self._running.cancel()

    async def _run(self) -> None:
        try:
            with self._running:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._receive)
                    nursery.start_soon(self._tick)
        finally:
            self.close()
            self.udp.close()
            self.closed.set()

    async def _receive(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.udp.bound)
            now = trio.current_time()
            touched: dict[QuicLink, None] = {}
            room = DATAGRAMS_A_TURN
            while room > 0:
                try:
                    datagrams, path = self.udp.receive()
                except BlockingIOError:
                    break
                except OSError:
                    self.statistics.receive_faults += 1
                    room -= 1
                    continue
                room -= len(datagrams)
                for data in datagrams:
                    link = self._take(data, path, now)
                    if link is not None:
                        touched[link] = None
            for remote, number in self.udp.refusals():
                self._refused(remote, number)
            for link in touched:
                self._pump(link)

    async def _tick(self) -> None:
        while True:
            deadline = min((link.timer_at for link in self._links), default=math.inf)
            with trio.CancelScope(deadline=deadline) as self._nap:
                await trio.sleep_forever()
            now = trio.current_time()
            for link in [link for link in self._links if link.timer_at <= now]:
                self._pump(link)

    def _take(self, data: bytes, path: Path, now: float) -> QuicLink | None:
        """Give a datagram to whose it is; return that connection when it has something new."""
        link = None
        try:
            link = self._link_of(data, path, now)
            if link is not None:
                link.receive_datagram(data, path, now)
        except Exception:
            self._fault(link)
            return None
        return link

    def _pump(self, link: QuicLink) -> None:
        """Let a connection do what is due, and send what it has to say."""
        if link not in self._links:
            return
        now = trio.current_time()
        try:
            if link.timer_at <= now:
                link.tick(now)
            over = self._follow(link)
            unreachable = self._send(link.connection.datagrams_to_send(now))
            over |= self._follow(link)
        except Exception:
            self._fault(link)
            return
        if link in self._openings:
            self._follow_opening(link, now)
        elif unreachable is not None:
            self._end_dial(link, str(unreachable))
        if over:
            self._remove(link)
            return
        link.timer_at = min(link.next_timer(), self._openings.get(link, math.inf))
        if link.timer_at < self._nap.deadline:
            self._nap.deadline = link.timer_at
        if link.closed_why is not None:
            self._close_if_idle()

    def _send(self, datagrams: list[tuple[bytes, Path]]) -> OSError | None:
        """Send datagrams, those of one size and way together; return why an address cannot be reached."""
        unreachable = None
        begin = 0
        while begin < len(datagrams):
            data, path = datagrams[begin]
            size, end = len(data), begin + 1
            if self.udp.sends_segments:
                last = min(len(datagrams), begin + SEGMENTS_AT_ONCE)
                while end < last and len(datagrams[end][0]) == size and datagrams[end][1] is path:
                    end += 1
            try:
                if end == begin + 1:
                    self.udp.send(data, path)
                else:
                    together = b"".join(data for data, _ in datagrams[begin:end])
                    self.udp.send(together, path, segment_bytes=size)
            except OSError as error:
                self.statistics.send_faults += 1  # as good as lost on the way
                if error.errno in _UNREACHABLE:
                    unreachable = error
                elif end > begin + 1 and not isinstance(error, BlockingIOError):
                    self.udp.sends_segments = False  # not by this interface, or not of this size
            begin = end
        return unreachable

    def _pump_soon(self, link: QuicLink) -> None:
        link.timer_at = self._nap.deadline = -math.inf

    def _follow(self, link: QuicLink) -> bool:
        """Take a connection's events; tell whether it is over."""
        over = False
        while link in self._links and (event := link.connection.next_event()) is not None:
            match event:
                case ConnectionIdIssued(connection_id=connection_id):
                    self._links[link].add(connection_id)
                    self._routes[connection_id] = link
                case ConnectionIdRetired(connection_id=connection_id):
                    self._links[link].discard(connection_id)
                    self._routes.pop(connection_id, None)
                case ConnectionTerminated():
                    over = True
                case _:
                    link.handle(event)
        link.follow()
        return over

    def _add(self, link: QuicLink, *connection_ids: bytes) -> None:
        self._links[link] = set(connection_ids)
        for connection_id in connection_ids:
            self._routes[connection_id] = link

    def _remove(self, link: QuicLink) -> None:
        """Forget a connection that is over."""
        for connection_id in self._links.pop(link, ()):
            self._routes.pop(connection_id, None)
        self._openings.pop(link, None)
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._server is None and all(link.closed_why is not None for link in self._links):
            self.close()

    def _fault(self, link: QuicLink | None) -> None:
        """End a connection whose core failed, whoever made it: no datagram ends the endpoint."""
        self.statistics.faults += 1
        left_out = self._lines.admit("any host:0", trio.current_time())
        if left_out is not None:
            self._log.error("a QUIC datagram could not be taken", left_out=left_out, exc_info=True)
        if link is not None:
            self._remove(link)
            link.drop("the protocol's core failed", CLOSED_AT_ONCE)

    def _end_dial(self, link: QuicLink, why: str) -> None:
        """End a dial to where nobody is. An open link bears that message: anybody can send it."""
        if not link.opened.is_set():
            link.drop(why, CLOSED_AT_ONCE)

    def _refused(self, remote: SocketAddress, number: int) -> None:
        """Take the network's word that it does not reach an address."""
        if number in _UNREACHABLE:
            for link in set(self._links) - set(self._openings):
                if link.connection.remote()[:2] == remote[:2]:
                    self._end_dial(link, os.strerror(number))

    # connections from outside

    def _follow_opening(self, link: QuicLink, now: float) -> None:
        if link.was_opened:
            del self._openings[link]
            if not self._accept(link):
                self.statistics.over_limit += 1
                self._say_dropped(link.remote_address, "too many links wait already")
                link.drop("too many links wait already", CLOSED_AT_ONCE)
        elif link.closed_why is not None:
            self._drop_opening(link, link.closed_why)
        elif self._openings[link] <= now:
            self._drop_opening(link, f"not open after {OPENING_SECONDS} seconds")

    def _drop_opening(self, link: QuicLink, why: str) -> None:
        del self._openings[link]
        self.statistics.dropped += 1
        self._say_dropped(link.remote_address, why)
        link.drop(why, CLOSED_AT_ONCE)

    def _say_dropped(self, remote: str, why: str) -> None:
        left_out = self._lines.admit(remote, trio.current_time())
        if left_out is not None:
            self._log.info("link opening dropped", remote=remote, reason=why, left_out=left_out)

    def _link_of(self, data: bytes, path: Path, now: float) -> QuicLink | None:
        """Return whose datagram it is, or whose it is from now on; strangers are answered or forgotten."""
        if data and not data[0] & _LONG_HEADER:
            link = self._routes.get(data[1 : 1 + CONNECTION_ID_BYTES])
            self.statistics.garbage += link is None
            return link
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=CONNECTION_ID_BYTES)
        except ValueError:
            self.statistics.garbage += 1
            return None
        link = self._routes.get(header.destination_cid)
        if link is not None:
            return link
        return self._meet(header, data, path, now)

    def _meet(self, header: QuicHeader, data: bytes, path: Path, now: float) -> QuicLink | None:
        """Answer a stranger, at no cost of memory; return the connection of one who showed a token."""
        if (
            self._server is None
            or len(data) < SMALLEST_MAX_DATAGRAM_SIZE
            or header.packet_type is QuicPacketType.VERSION_NEGOTIATION
            or (header.version == VERSION and header.packet_type is not QuicPacketType.INITIAL)
        ):
            self.statistics.garbage += 1
        elif header.version != VERSION:
            self.statistics.other_versions += 1
            self._answer(
                encode_quic_version_negotiation(header.destination_cid, header.source_cid, [VERSION]), path
            )
        elif not header.token:
            self.statistics.retried += 1
            self._answer(self._retry(header, path, now), path)
        else:
            return self._admit(header, path, now)
        return None

    def _retry(self, header: QuicHeader, path: Path, now: float) -> bytes:
        """Ask for a token that only who receives at this address can show (RFC 9000, 8.1.2)."""
        connection_id = os.urandom(CONNECTION_ID_BYTES)
        token = self._tokens.create_token(
            address=path.remote,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=connection_id,
            now=now,
        )
        return bytes(
            encode_quic_retry(
                version=VERSION,
                source_cid=connection_id,
                destination_cid=header.source_cid,
                original_destination_cid=header.destination_cid,
                retry_token=token,
            )
        )

    def _admit(self, header: QuicHeader, path: Path, now: float) -> QuicLink | None:
        """Begin a connection with who showed a token, if there is room."""
        assert self._server is not None, "strangers are met only by who listens"
        configuration, binding = self._server
        try:
            first_id = self._tokens.validate_token(
                address=path.remote, destination_cid=header.destination_cid, token=header.token, now=now
            )
        except ValueError:
            self.statistics.bad_tokens += 1
            self._answer(refusal(header, QuicErrorCode.INVALID_TOKEN), path)
            return None
        if len(self._links) >= CONNECTIONS_AT_ONCE:
            self.statistics.over_limit += 1
            self._say_dropped(
                join_address(*path.remote[:2]), f"{CONNECTIONS_AT_ONCE} connections are here already"
            )
            self._answer(refusal(header, QuicErrorCode.CONNECTION_REFUSED), path)
            return None
        if len(self._openings) == OPENINGS_AT_ONCE:
            # an honest one takes milliseconds
            self._drop_opening(next(iter(self._openings)), "the oldest when others came")
        connection = Connection(
            configuration,
            original_destination_connection_id=first_id,
            retry_source_connection_id=header.destination_cid,
        )
        link = QuicLink(connection, binding, self._pump, self._pump_soon, now)
        self._add(link, header.destination_cid, connection.host_cid)
        self._openings[link] = now + OPENING_SECONDS
        return link

    def _answer(self, data: bytes, path: Path) -> None:
        try:
            self.udp.send(data, path)
        except OSError:
            self.statistics.send_faults += 1
