"""The QUIC link against strangers, other implementations, bad networks and the system's errors."""

from __future__ import annotations

import errno
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, QuicEvent, StreamDataReceived
from aioquic.quic.packet import QuicErrorCode, QuicPacketType, pull_quic_header

from knode.errors import Code, KnodeError
from knode.transport import MAX_FRAME_BYTES, Link, LinkClosed, LinkFault, quic, quic_connection, quic_endpoint
from knode.transport.certificate import binding_of
from knode.transport.openings import OPENINGS_AT_ONCE
from knode.transport.quic import QuicCarrier, QuicListener
from knode.transport.quic_connection import ALPN, IDLE_SECONDS, KEEPALIVE_SECONDS, STREAM, WINDOW_BYTES
from knode.transport.quic_endpoint import OPENING_SECONDS, QuicEndpoint
from knode.transport.quic_link import UNDELIVERED_BYTES, UNSENT_BYTES, QuicLink
from knode.transport.udp import UdpSocket
from knode.world import SilentLog

MARK = bytes(4)
Drop = Callable[[bytes], bool]


class RecordingLog(SilentLog):
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    def error(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))


class Echo:
    """A listening node that answers each frame with itself, and keeps its links and why they ended."""

    def __init__(self, listener: QuicListener, log: RecordingLog) -> None:
        self.listener = listener
        self.log = log
        self.endpoint = listener.endpoint
        self.statistics = listener.statistics
        self.address = listener.addresses[0]
        self.remote = ("127.0.0.1", int(self.address.rpartition(":")[2]))
        self.links: list[QuicLink] = []
        self.received: list[bytes] = []
        self.ended: list[LinkClosed] = []

    async def accept(self, link: Link) -> None:
        assert isinstance(link, QuicLink)
        self.links.append(link)
        try:
            while True:
                self.received.append(await link.receive_frame())
                await link.send_frame(self.received[-1])
        except LinkClosed as closed:
            self.ended.append(closed)

    async def why_ended(self) -> LinkClosed:
        """Wait for the end of the first link."""
        await until(lambda: bool(self.ended))
        return self.ended[0]

    async def still_works(self) -> None:
        """A good link opens and carries frames."""
        link = await dialler().dial(self.address)
        await exchange(link)
        await link.aclose()


def dialler() -> QuicCarrier:
    return QuicCarrier(Path("dials only"), SilentLog())


async def exchange(link: Link, frame: bytes = b"still here") -> None:
    with trio.fail_after(60):
        await link.send_frame(frame)
        assert await link.receive_frame() == frame


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.01)


@pytest.fixture
async def echo(certificate: Path) -> AsyncIterator[Echo]:
    log = RecordingLog()
    listener = await QuicCarrier(certificate, log).listen("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        echo = Echo(listener, log)
        nursery.start_soon(listener.serve, echo.accept)
        yield echo
        nursery.cancel_scope.cancel()


def bare_configuration(*, is_client: bool = True, **more: Any) -> QuicConfiguration:
    more = {"alpn_protocols": [ALPN], "supported_versions": [1], "verify_mode": ssl.CERT_NONE, **more}
    return QuicConfiguration(is_client=is_client, **more)


class Bare:
    """aioquic alone, as another implementation, over a socket of its own."""

    def __init__(self, connection: QuicConnection, remote: tuple[str, int] | None) -> None:
        self.connection = connection
        self.socket = trio.socket.socket(type=socket.SOCK_DGRAM)
        self.events: list[QuicEvent] = []
        self.wake = trio.Event()
        if remote is not None:
            connection.connect(remote, trio.current_time())

    async def run(self) -> None:
        """Carry datagrams until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            while True:
                self.wake = trio.Event()
                await self.say()
                timer = self.connection.get_timer()
                with trio.move_on_at(trio.current_time() + 3600 if timer is None else timer):
                    await self.wake.wait()
                if timer is not None and trio.current_time() >= timer:
                    self.connection.handle_timer(trio.current_time())

    async def _receive(self) -> None:
        while True:
            data, remote = await self.socket.recvfrom(65_536)
            self.connection.receive_datagram(data, remote, trio.current_time())
            self.wake.set()

    async def say(self) -> None:
        for data, remote in self.connection.datagrams_to_send(trio.current_time()):
            await self.socket.sendto(data, remote)
        while (event := self.connection.next_event()) is not None:
            self.events.append(event)

    def write(self, data: bytes, stream: int = STREAM, *, end: bool = False) -> None:
        self.connection.send_stream_data(stream, data, end_stream=end)
        self.wake.set()

    def read(self) -> bytes:
        return b"".join(event.data for event in self.events if isinstance(event, StreamDataReceived))

    def terminated(self) -> ConnectionTerminated | None:
        return next((event for event in self.events if isinstance(event, ConnectionTerminated)), None)

    async def handshaken(self) -> None:
        await until(lambda: any(isinstance(event, HandshakeCompleted) for event in self.events))


@asynccontextmanager
async def bare_client(echo: Echo, **more: Any) -> AsyncIterator[Bare]:
    bare = Bare(QuicConnection(configuration=bare_configuration(**more)), echo.remote)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bare.run)
        try:
            yield bare
        finally:
            nursery.cancel_scope.cancel()
            bare.socket.close()


class Nat:
    """A router between a node and the world: passes datagrams on from a port of its own, which may change."""

    def __init__(self, target: tuple[str, int], nursery: trio.Nursery) -> None:
        self.target = target
        self.drop: Drop = lambda _: False
        self.inside: tuple[str, int] | None = None
        self._nursery = nursery
        self._inner = trio.socket.socket(type=socket.SOCK_DGRAM)
        self._outer = trio.socket.socket(type=socket.SOCK_DGRAM)

    async def start(self) -> str:
        await self._inner.bind(("127.0.0.1", 0))
        await self._outer.bind(("127.0.0.1", 0))
        self._nursery.start_soon(self._out)
        self._nursery.start_soon(self._in, self._outer)
        return f"127.0.0.1:{self._inner.getsockname()[1]}"

    @property
    def outside(self) -> str:
        """The address that the world sees."""
        return f"127.0.0.1:{self._outer.getsockname()[1]}"

    async def rebind(self) -> None:
        """Forget the mapping, as after a time of silence or a start of the router."""
        other = trio.socket.socket(type=socket.SOCK_DGRAM)
        await other.bind(("127.0.0.1", 0))
        self._outer.close()
        self._outer = other
        self._nursery.start_soon(self._in, self._outer)

    async def _out(self) -> None:
        while True:
            data, self.inside = await self._inner.recvfrom(65_536)
            if not self.drop(data):
                with suppress(OSError):  # the other side is not there
                    await self._outer.sendto(data, self.target)

    async def _in(self, outer: trio.socket.SocketType) -> None:
        with suppress(trio.ClosedResourceError):
            while outer.fileno() >= 0:
                with suppress(OSError):  # the other side is not there, or this one was rebound
                    data = await outer.recv(65_536)
                    if self.inside is not None and not self.drop(data):
                        await self._inner.sendto(data, self.inside)


def nothing_left(*endpoints: QuicEndpoint) -> bool:
    return not any(each._links or each._routes or each._openings for each in endpoints)


def endpoint_of(link: Link) -> QuicEndpoint:
    assert isinstance(link, QuicLink)
    endpoint = link._pump.__self__  # type: ignore[attr-defined]
    assert isinstance(endpoint, QuicEndpoint)
    return endpoint


# other implementations


async def test_another_implementation_opens_sends_and_closes(echo: Echo) -> None:
    async with bare_client(echo) as bare:
        await bare.handshaken()
        bare.write(MARK + b"\0\0\0\5hello\0\0\0\1")
        bare.write(b"!")
        await until(lambda: bare.read() == b"\0\0\0\5hello\0\0\0\1!")
        bare.write(b"", end=True)
        await echo.why_ended()
    assert echo.received == [b"hello", b"!"]
    assert echo.ended[0].reason == "it was closed by the other end"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"\0\0\0\0", "a length of 0 bytes"),
        ((MAX_FRAME_BYTES + 1).to_bytes(4), "a length of 1048577 bytes"),
        (b"\xff" * 100, "a length of 4294967295 bytes"),
    ],
    ids=["empty", "one byte too large", "garbage"],
)
async def test_what_is_no_frame_ends_the_link_behind_the_frames_before_it(
    echo: Echo, said: bytes, why: str
) -> None:
    async with bare_client(echo) as bare:
        await bare.handshaken()
        bare.write(MARK + b"\0\0\0\4good" + said + b"\0\0\0\3bad")
        closed = await echo.why_ended()
        await until(lambda: bare.terminated() is not None)
    assert echo.received == [b"good"]
    assert isinstance(closed, LinkFault)
    assert why in closed.reason
    assert bare.terminated().error_code == 2  # type: ignore[union-attr]


async def test_an_end_inside_a_frame_says_so(echo: Echo) -> None:
    async with bare_client(echo) as bare:
        await bare.handshaken()
        bare.write(MARK + b"\0\0\0\4go", end=True)
        assert (await echo.why_ended()).reason == "it was closed by the other end, inside a frame"
    assert echo.received == []


@pytest.mark.parametrize("stream", [4, 2], ids=["bidirectional", "unidirectional"])
async def test_a_second_stream_ends_the_connection(echo: Echo, stream: int) -> None:
    async with bare_client(echo) as bare:
        await bare.handshaken()
        bare.write(MARK)
        await until(lambda: bool(echo.links))
        bare.connection._remote_max_streams_bidi = bare.connection._remote_max_streams_uni = 10
        bare.connection._remote_max_stream_data_uni = 10
        bare.write(b"more", stream)
        await until(lambda: bare.terminated() is not None)
        await echo.why_ended()
    assert bare.terminated().error_code == QuicErrorCode.STREAM_LIMIT_ERROR  # type: ignore[union-attr]
    await echo.still_works()


@pytest.mark.parametrize("how", ["reset", "stop"])
async def test_a_stream_that_is_broken_off_ends_the_link(echo: Echo, how: str) -> None:
    async with bare_client(echo) as bare:
        await bare.handshaken()
        bare.write(MARK + b"\0\0\0\4good")
        await until(lambda: bare.read() == b"\0\0\0\4good")
        if how == "reset":
            bare.connection.reset_stream(STREAM, 7)
        else:
            bare.connection.stop_stream(STREAM, 7)
        bare.wake.set()
        assert "broke the stream off" in (await echo.why_ended()).reason
    assert echo.received == [b"good"]


async def test_a_wrong_opening_mark_is_dropped(echo: Echo) -> None:
    async with bare_client(echo) as bare:
        await bare.handshaken()
        bare.write(b"\0\0\0\4spam")
        await until(lambda: echo.statistics.dropped == 1)
    assert echo.links == []
    await echo.still_works()


async def test_another_protocol_is_refused_and_named(echo: Echo) -> None:
    async with bare_client(echo, alpn_protocols=["h3"]) as bare:
        await until(lambda: bare.terminated() is not None)
        await until(lambda: echo.statistics.dropped == 1)
    assert "ALPN" in echo.log.lines[0][1]["reason"]
    await echo.still_works()


async def test_no_session_can_be_resumed_and_no_early_data_sent(echo: Echo) -> None:
    tickets: list[Any] = []
    connection = QuicConnection(configuration=bare_configuration(), session_ticket_handler=tickets.append)
    bare = Bare(connection, echo.remote)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bare.run)
        await bare.handshaken()
        bare.write(MARK + b"\0\0\0\4good")
        await until(lambda: bare.read() == b"\0\0\0\4good")
        nursery.cancel_scope.cancel()
    assert tickets == []


async def test_the_binding_is_the_digest_of_the_server_s_certificate(echo: Echo, certificate: Path) -> None:
    link = await dialler().dial(echo.address)
    assert link.channel_binding == binding_of(certificate)
    await link.aclose()


# strangers


async def ask_raw(echo: Echo, data: bytes, near: socket.socket | None = None) -> bytes | None:
    """Send one datagram; return the answer, or None when the endpoint has read it and says nothing."""
    with near or socket.socket(type=socket.SOCK_DGRAM) as near:
        near.setblocking(False)
        before = heard(echo)
        near.sendto(data, echo.remote)
        await until(lambda: heard(echo) > before)
        try:
            return near.recv(65_536)
        except BlockingIOError:
            return None


def heard(echo: Echo) -> int:
    """How many datagrams of strangers it has judged."""
    seen = echo.statistics
    return seen.garbage + seen.retried + seen.bad_tokens + seen.other_versions + seen.over_limit


def first_datagram(echo: Echo, **more: Any) -> tuple[QuicConnection, bytes]:
    connection = QuicConnection(configuration=bare_configuration(**more))
    connection.connect(echo.remote, trio.current_time())
    [(data, _), *_] = connection.datagrams_to_send(trio.current_time())
    return connection, data


async def test_a_stranger_is_asked_for_a_token_at_no_cost_of_memory(echo: Echo) -> None:
    _, first = first_datagram(echo)
    for _ in range(100):
        answer = await ask_raw(echo, first)
        assert answer is not None
        header = pull_quic_header(Buffer(data=answer), host_cid_length=8)
        assert header.packet_type is QuicPacketType.RETRY
        assert len(answer) < len(first), "no amplification"
    assert echo.statistics.retried == 100
    assert nothing_left(echo.endpoint)


@pytest.mark.parametrize("fault", ["other address", "too old", "made up"])
async def test_a_token_counts_only_from_its_address_and_for_a_moment(echo: Echo, fault: str) -> None:
    connection, _ = first_datagram(echo)
    with socket.socket(type=socket.SOCK_DGRAM) as near:
        near.bind(("127.0.0.1", 0))
        token = echo.endpoint._tokens.create_token(
            address=("127.0.0.1", 9) if fault == "other address" else near.getsockname(),
            original_destination_connection_id=os.urandom(8),
            retry_source_connection_id=connection.original_destination_connection_id,
            now=trio.current_time() - (31 if fault == "too old" else 0),
        )
        connection._peer_token = os.urandom(len(token)) if fault == "made up" else token
        connection._connect(trio.current_time())
        [(data, _)] = connection.datagrams_to_send(trio.current_time())
        answer = await ask_raw(echo, data, near)
    assert echo.statistics.bad_tokens == 1
    assert nothing_left(echo.endpoint)
    assert answer is not None
    assert len(answer) < 100
    connection.receive_datagram(answer, echo.remote, trio.current_time())
    assert connection._close_event.error_code == QuicErrorCode.INVALID_TOKEN  # type: ignore[union-attr]


async def half_open(echo: Echo, near: trio.socket.SocketType) -> QuicConnection:
    """Begin a connection with a good token, and say no more."""
    connection = QuicConnection(configuration=bare_configuration())
    first_id = connection.original_destination_connection_id
    connection._peer_token = echo.endpoint._tokens.create_token(
        address=near.getsockname(),
        original_destination_connection_id=os.urandom(8),
        retry_source_connection_id=first_id,
        now=trio.current_time(),
    )
    connection.connect(echo.remote, trio.current_time())
    [(data, remote), *_] = connection.datagrams_to_send(trio.current_time())
    await near.sendto(data, remote)
    await until(lambda: first_id in echo.endpoint._routes)
    return connection


async def test_what_was_sent_before_the_token_does_not_count_as_in_flight(
    autojump_clock: object, echo: Echo
) -> None:
    link = await dialler().dial(echo.address)
    await exchange(link)
    await trio.sleep(1)
    assert link.connection._loss.bytes_in_flight == 0
    await link.aclose()


async def test_half_open_connections_shut_nobody_out(echo: Echo) -> None:
    near = trio.socket.socket(type=socket.SOCK_DGRAM)
    await near.bind(("127.0.0.1", 0))
    for _ in range(OPENINGS_AT_ONCE + 10):
        await half_open(echo, near)
    assert len(echo.endpoint._openings) == OPENINGS_AT_ONCE
    assert echo.statistics.dropped == 10
    await echo.still_works()
    assert [event for event, _ in echo.log.lines] == ["link opening dropped"], "one line about one host"
    near.close()


@pytest.mark.parametrize("handshaken", [False, True])
async def test_a_slow_opening_is_dropped_after_ten_seconds(
    autojump_clock: object, echo: Echo, handshaken: bool
) -> None:
    async with bare_client(echo) as bare:
        if handshaken:
            await bare.handshaken()
        else:
            near = trio.socket.socket(type=socket.SOCK_DGRAM)
            await near.bind(("127.0.0.1", 0))
            await half_open(echo, near)
        started = trio.current_time()
        await until(lambda: echo.statistics.dropped >= 1 + (not handshaken))
        assert OPENING_SECONDS - 1 < trio.current_time() - started < OPENING_SECONDS + 1
    await echo.still_works()
    assert echo.links[1:] == []


async def test_garbage_is_counted_and_nothing_else(echo: Echo) -> None:
    rng = random.Random(1)
    link = await dialler().dial(echo.address)
    _, first = first_datagram(echo)
    garbage = [rng.randbytes(rng.choice([0, 1, 5, 20, 100, 1199, 1200, 1500, 9000])) for _ in range(300)]
    garbage += [first[: rng.randrange(1199)] for _ in range(100)]  # never answered: too short
    before = heard(echo)
    with socket.socket(type=socket.SOCK_DGRAM) as near:
        for number, each in enumerate(garbage, 1):
            near.sendto(each, echo.remote)
            if number % 50 == 0:
                await until(lambda number=number: heard(echo) == before + number)  # type: ignore[misc]
    assert echo.statistics.garbage >= 300
    assert len(echo.endpoint._links) == 1
    await exchange(link)
    await link.aclose()


async def test_forged_packets_of_an_open_link_change_nothing(echo: Echo) -> None:
    rng = random.Random(2)
    link = await dialler().dial(echo.address)
    await exchange(link)
    ids = list(echo.endpoint._routes)
    with socket.socket(type=socket.SOCK_DGRAM) as near:
        for _ in range(500):
            near.sendto(b"\x40" + rng.choice(ids) + rng.randbytes(rng.randrange(1200)), echo.remote)
            await trio.lowlevel.checkpoint()
    assert link.closed_why is None
    await exchange(link)
    assert echo.links[0].remote_address == f"127.0.0.1:{endpoint_of(link).udp.bound.getsockname()[1]}"
    await link.aclose()


async def test_another_version_is_answered_when_the_datagram_is_long(echo: Echo) -> None:
    _, first = first_datagram(echo)
    unknown = first[:1] + b"\x0a\x0a\x0a\x0a" + first[5:]
    answer = await ask_raw(echo, unknown)
    assert answer is not None
    assert len(answer) < 50
    header = pull_quic_header(Buffer(data=answer), host_cid_length=8)
    assert header.packet_type is QuicPacketType.VERSION_NEGOTIATION
    assert header.supported_versions == [1]
    assert await ask_raw(echo, unknown[:1199]) is None
    assert await ask_raw(echo, answer + bytes(1200)) is None, "two of them would answer each other for ever"
    assert nothing_left(echo.endpoint)


async def test_who_only_dials_answers_no_stranger(echo: Echo) -> None:
    link = await dialler().dial(echo.address)
    endpoint = endpoint_of(link)
    _, first = first_datagram(echo)
    with socket.socket(type=socket.SOCK_DGRAM) as near:
        near.setblocking(False)
        near.sendto(first, ("127.0.0.1", endpoint.udp.bound.getsockname()[1]))
        await until(lambda: endpoint.statistics.garbage == 1)
        with pytest.raises(BlockingIOError):
            near.recv(65_536)
    await link.aclose()


async def test_a_connection_too_many_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, echo: Echo) -> None:
    monkeypatch.setattr(quic_endpoint, "CONNECTIONS_AT_ONCE", 2)
    links = [await dialler().dial(echo.address) for _ in range(2)]
    with pytest.raises(KnodeError, match="CONNECTION_REFUSED") as raised:
        await dialler().dial(echo.address)
    assert raised.value.code is Code.UNAVAILABLE
    assert echo.statistics.over_limit == 1
    await links[0].aclose()
    await until(lambda: len(echo.endpoint._links) == 1)
    await echo.still_works()
    await links[1].aclose()


async def test_links_that_nobody_serves_are_bounded(
    monkeypatch: pytest.MonkeyPatch, certificate: Path
) -> None:
    monkeypatch.setattr(quic, "BACKLOG", 3)
    listener = await QuicCarrier(certificate, SilentLog()).listen("127.0.0.1", 0)
    carrier = dialler()
    links = [await carrier.dial(listener.addresses[0]) for _ in range(4)]
    await until(lambda: any(link.closed_why is not None for link in links))
    assert listener.statistics.over_limit == 1
    await listener.aclose()
    await until(lambda: all(link.closed_why is not None for link in links))


# memory


async def test_what_nobody_takes_is_bounded(certificate: Path) -> None:
    listener = await QuicCarrier(certificate, SilentLog()).listen("127.0.0.1", 0)
    near = await dialler().dial(listener.addresses[0])
    async with trio.open_nursery() as nursery:
        accepted: list[Link] = []

        async def hold(link: Link) -> None:
            accepted.append(link)
            await trio.sleep_forever()

        nursery.start_soon(listener.serve, hold)

        @nursery.start_soon
        async def send() -> None:
            while True:
                await near.send_frame(bytes(100_000))

        await until(lambda: bool(accepted) and accepted[0].connection.furthest_bytes == WINDOW_BYTES)  # type: ignore[attr-defined]
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert accepted[0].connection.furthest_bytes == WINDOW_BYTES  # type: ignore[attr-defined]
        assert near.connection.unsent_bytes <= UNSENT_BYTES + 100_004
        assert near.connection.undelivered_bytes <= UNDELIVERED_BYTES + 100_004
        nursery.cancel_scope.cancel()
    with trio.CancelScope() as at_once:
        at_once.cancel()
        await near.aclose()
    await listener.aclose()


async def test_who_sends_more_than_it_was_given_credit_for_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, echo: Echo
) -> None:
    async with bare_client(echo) as bare:
        await bare.handshaken()
        bare.write(MARK)
        await until(lambda: bool(echo.links))
        taker = echo.links[0].connection
        taker._streams[STREAM].max_stream_data_local = 1000
        monkeypatch.setattr(taker, "_credit_is_due", lambda _: False)
        bare.write(b"\0\x0f\0\0" + bytes(2000))
        await until(lambda: bare.terminated() is not None)
    assert bare.terminated().error_code == QuicErrorCode.FLOW_CONTROL_ERROR  # type: ignore[union-attr]
    await echo.still_works()


async def test_nothing_is_left_of_links_that_are_over(echo: Echo) -> None:
    carrier = dialler()
    links = [await carrier.dial(echo.address) for _ in range(20)]
    endpoint = endpoint_of(links[0])
    for number, link in enumerate(links):
        await exchange(link)
        if number % 3 == 0:
            await link.aclose()
        elif number % 3 == 1:
            await echo.links[number].aclose()
        else:
            with trio.CancelScope() as at_once:
                at_once.cancel()
                await link.aclose()
    await until(lambda: nothing_left(echo.endpoint))
    for link in links:
        await link.aclose()
    await until(lambda: nothing_left(endpoint))
    assert endpoint.closed.is_set(), "a socket that was opened to dial goes with its last link"
    assert endpoint.udp.bound.fileno() == -1


async def test_a_dial_that_is_cancelled_at_any_moment_leaves_nothing(echo: Echo) -> None:
    for turns in range(0, 40, 2):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def cancel(turns: int = turns, scope: trio.CancelScope = scope) -> None:
                    for _ in range(turns):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                link = await dialler().dial(echo.address)
                await link.aclose()
    await until(lambda: nothing_left(echo.endpoint))
    await echo.still_works()


async def test_who_stops_listening_drops_those_in_their_opening(echo: Echo) -> None:
    near = trio.socket.socket(type=socket.SOCK_DGRAM)
    await near.bind(("127.0.0.1", 0))
    await half_open(echo, near)
    await echo.listener.aclose()
    assert nothing_left(echo.endpoint)
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        other.bind(echo.remote)
    near.close()


# time


async def test_an_idle_link_stays(autojump_clock: object, echo: Echo) -> None:
    link = await dialler().dial(echo.address)
    await trio.sleep(10 * IDLE_SECONDS)
    await exchange(link)
    await link.aclose()


async def test_a_silent_peer_ends_the_link_in_bounded_time(autojump_clock: object, echo: Echo) -> None:
    link = await dialler().dial(echo.address)
    await exchange(link)
    echo.endpoint._remove(echo.links[0])
    started = trio.current_time()
    with pytest.raises(LinkClosed, match="nothing was heard"):
        await link.receive_frame()
    assert trio.current_time() - started < IDLE_SECONDS + KEEPALIVE_SECONDS + 1
    await link.aclose()
    await until(lambda: nothing_left(endpoint_of(link)))


async def test_closing_waits_two_seconds_for_a_peer_that_is_gone(autojump_clock: object, echo: Echo) -> None:
    link = await dialler().dial(echo.address)
    await exchange(link)
    echo.endpoint._remove(echo.links[0])
    started = trio.current_time()
    await link.aclose()
    assert 1.9 < trio.current_time() - started < 2.1


async def test_a_dial_into_a_black_hole_ends_after_ten_seconds(autojump_clock: object) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as hole:
        hole.bind(("127.0.0.1", 0))
        started = trio.current_time()
        with pytest.raises(KnodeError, match="no answer within 10 seconds") as raised:
            await dialler().dial(f"127.0.0.1:{hole.getsockname()[1]}")
        assert raised.value.code is Code.UNAVAILABLE
        assert trio.current_time() - started < OPENING_SECONDS + 0.1


async def test_a_dial_to_where_nobody_listens_ends_at_once(autojump_clock: object) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        port = gone.getsockname()[1]
    started = trio.current_time()
    with pytest.raises(KnodeError, match="refused"):
        await dialler().dial(f"127.0.0.1:{port}")
    assert trio.current_time() - started < 1


# bad networks


@pytest.fixture
async def nat(echo: Echo, nursery: trio.Nursery) -> Nat:
    return Nat(echo.remote, nursery)


async def test_a_link_goes_on_from_a_new_address(echo: Echo, nat: Nat) -> None:
    link = await dialler().dial(await nat.start())
    await exchange(link)
    assert echo.links[0].remote_address == nat.outside
    for number in range(5):
        await nat.rebind()
        await exchange(link, str(number).encode())
        assert echo.links[0].remote_address == nat.outside
        await until(lambda: echo.links[0].connection._network_paths[0].is_validated)
    assert len(echo.links) == 1
    assert len(echo.endpoint._routes) < 20
    await link.aclose()
    await until(lambda: nothing_left(echo.endpoint))


async def test_bulk_goes_on_from_new_addresses(autojump_clock: object, echo: Echo, nat: Nat) -> None:
    link = await dialler().dial(await nat.start())
    frames = [random.Random(number).randbytes(100_000) for number in range(12)]
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                for number, frame in enumerate(frames):
                    await link.send_frame(frame)
                    if number % 4 == 2:
                        await nat.rebind()

            for frame in frames:
                assert await link.receive_frame() == frame
    await link.aclose()


async def test_nobody_else_takes_a_link_to_another_address(echo: Echo, nat: Nat) -> None:
    """Datagrams that somebody copied and sends first, from his own address, move the link for a moment."""
    link = await dialler().dial(await nat.start())
    await exchange(link)
    thief = socket.socket(type=socket.SOCK_DGRAM)
    copied = 0

    def copy_and_lose(data: bytes) -> bool:
        nonlocal copied
        if copied < 3 and data[1:9] in echo.endpoint._routes:
            copied += 1
            thief.sendto(data, echo.remote)
            return True
        return False

    nat.drop = copy_and_lose
    await exchange(link)
    await exchange(link)
    assert copied == 3
    assert echo.links[0].remote_address == nat.outside
    await link.aclose()
    thief.close()


@pytest.mark.parametrize("seed", range(3))
async def test_lost_datagrams_lose_no_frame(autojump_clock: object, echo: Echo, nat: Nat, seed: int) -> None:
    rng = random.Random(seed)
    nat.drop = lambda _: rng.random() < 0.1
    link = await dialler().dial(await nat.start())
    frames = [rng.randbytes(rng.choice([1, 200, 5000, 50_000])) for _ in range(40)]
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                for frame in frames:
                    await link.send_frame(frame)

            for frame in frames:
                assert await link.receive_frame() == frame
    nat.drop = lambda _: False
    await link.aclose()


async def test_a_copied_old_datagram_changes_nothing(echo: Echo, nat: Nat) -> None:
    seen: list[bytes] = []
    nat.drop = lambda data: bool(seen.append(data))
    link = await dialler().dial(await nat.start())
    for number in range(10):
        await exchange(link, str(number).encode())
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        for data in seen:
            other.sendto(data, echo.remote)
            await trio.lowlevel.checkpoint()
    await exchange(link)
    assert echo.received == [*(str(number).encode() for number in range(10)), b"still here"]
    assert echo.links[0].remote_address == nat.outside
    await link.aclose()


# the system's errors, and our own


@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.ENETUNREACH, errno.EMSGSIZE, errno.ENOBUFS, errno.EINVAL, errno.EAGAIN]
)
async def test_a_datagram_that_the_system_does_not_send_is_as_good_as_lost(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object, echo: Echo, number: int
) -> None:
    rng = random.Random(number)
    link = await dialler().dial(echo.address)
    await exchange(link)
    send = UdpSocket.send

    def fail_often(udp: UdpSocket, *arguments: Any, **more: Any) -> None:
        if rng.random() < 0.1:
            raise OSError(number, os.strerror(number))
        send(udp, *arguments, **more)

    monkeypatch.setattr(UdpSocket, "send", fail_often)
    for _ in range(5):
        await exchange(link, bytes(20_000))
    monkeypatch.undo()
    assert echo.statistics.send_faults + endpoint_of(link).statistics.send_faults > 0
    await link.aclose()


async def test_an_error_instead_of_a_datagram_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, echo: Echo
) -> None:
    link = await dialler().dial(echo.address)
    receive = UdpSocket.receive
    errors = [errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENOMEM] * 10

    def fail_first(udp: UdpSocket) -> Any:
        if errors:
            raise OSError(errors.pop(), "as the system would")
        return receive(udp)

    monkeypatch.setattr(UdpSocket, "receive", fail_first)
    await exchange(link)
    assert echo.statistics.receive_faults + endpoint_of(link).statistics.receive_faults == 30
    await link.aclose()


async def test_a_peer_s_closed_port_ends_no_listener(echo: Echo) -> None:
    link = await dialler().dial(echo.address)
    await exchange(link)
    endpoint_of(link)._remove(link)  # its socket closes: the network tells the echo
    await until(lambda: endpoint_of(link).closed.is_set())
    with suppress(LinkClosed):
        for _ in range(20):
            await echo.links[0].send_frame(b"is anyone there?")
            await trio.lowlevel.checkpoint()
    await echo.still_works()


async def test_a_fault_in_the_core_ends_one_connection_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, echo: Echo
) -> None:
    staying = await dialler().dial(echo.address)
    await exchange(staying)
    link = await dialler().dial(echo.address)
    await exchange(link)

    def fail(*_: object) -> None:
        raise IndexError("a fault of the core")

    monkeypatch.setattr(echo.links[1].connection, "receive_datagram", fail)
    await link.send_frame(b"what it cannot bear")
    assert "core failed" in (await echo.why_ended()).reason
    assert echo.statistics.faults == 1
    assert echo.log.lines[-1][0] == "a QUIC datagram could not be taken"
    await exchange(staying)
    await staying.aclose()
    with trio.CancelScope() as at_once:
        at_once.cancel()
        await link.aclose()


async def test_keys_are_changed_in_time(monkeypatch: pytest.MonkeyPatch, echo: Echo) -> None:
    monkeypatch.setattr(quic_connection, "KEY_UPDATE_PACKETS", 50)
    link = await dialler().dial(echo.address)
    secrets = set()
    for _ in range(20):
        await exchange(link, bytes(30_000))
        secrets |= {crypto.send.secret for crypto in link.connection._cryptos.values() if crypto.send.secret}
    assert len(secrets) > 5
    await link.aclose()


# addresses


@pytest.mark.parametrize("host", ["", "::", "0.0.0.0", "localhost", "127.0.0.1"])
async def test_every_address_that_a_listener_names_can_be_dialled(certificate: Path, host: str) -> None:
    listener = await QuicCarrier(certificate, SilentLog()).listen(host, 0)
    assert listener.addresses
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, Echo(listener, RecordingLog()).accept)
        for address in listener.addresses:
            assert not address.startswith(("0.0.0.0", "[::]"))
            link = await dialler().dial(address)
            await exchange(link)
            assert link.remote_address == address
            await link.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", ["", "0.0.0.0"])
async def test_who_listens_everywhere_answers_from_where_it_was_asked(certificate: Path, host: str) -> None:
    listener = await QuicCarrier(certificate, SilentLog()).listen(host, 0)
    port = listener.addresses[0].rpartition(":")[2]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, Echo(listener, RecordingLog()).accept)
        link = await dialler().dial(f"127.0.0.2:{port}")  # what it sends to here comes from 127.0.0.1 else
        await exchange(link, bytes(50_000))
        await link.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", ""])
async def test_who_listens_dials_from_the_same_port(echo: Echo, certificate: Path, host: str) -> None:
    carrier = QuicCarrier(certificate, SilentLog())
    listener = await carrier.listen(host, 0)
    link = await carrier.dial(echo.address)
    await exchange(link)
    assert echo.links[0].remote_address.rpartition(":")[2] == listener.addresses[0].rpartition(":")[2]
    await link.aclose()
    await listener.aclose()


async def test_a_node_can_dial_itself(certificate: Path) -> None:
    carrier = QuicCarrier(certificate, SilentLog())
    listener = await carrier.listen("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, Echo(listener, RecordingLog()).accept)
        link = await carrier.dial(listener.addresses[0])
        await exchange(link)
        await link.aclose()
        nursery.cancel_scope.cancel()


async def test_a_name_with_several_addresses_is_dialled_until_one_answers(
    monkeypatch: pytest.MonkeyPatch, echo: Echo
) -> None:
    async def several(*_: object, **__: object) -> list[Any]:
        hole = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", silent.getsockname()[1]))
        return [hole, (socket.AF_INET, socket.SOCK_DGRAM, 17, "", echo.remote)]

    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setattr(trio.socket, "getaddrinfo", several)
        link = await dialler().dial("desk.example:4747")
        await exchange(link)
        assert link.remote_address == echo.address
        await link.aclose()


async def test_a_udp_port_that_another_program_holds_is_named(certificate: Path) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        with pytest.raises(KnodeError, match=f"UDP port {port}") as raised:
            await QuicCarrier(certificate, SilentLog()).listen("127.0.0.1", port)
    assert raised.value.code is Code.PORT_IN_USE


@pytest.mark.parametrize(
    "content", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
async def test_a_damaged_certificate_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tls.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KnodeError, match="holds no TLS key and certificate") as raised:
        await QuicCarrier(path, SilentLog()).listen("127.0.0.1", 0)
    assert raised.value.code is Code.HOME_DAMAGED
