"""The QUIC link beside bare aioquic under trio, and beside the WebSocket link.

Each side of each measurement runs in two processes over loopback, with the same certificate and the same
size of datagrams. The floor is what is below in this file: aioquic's core, one UDP socket, a task that
receives and one that sends for each connection, and nothing else: no limits, no back-pressure, no frames, no
address validation.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import ssl
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median

import trio
from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionIdIssued, HandshakeCompleted, StreamDataReceived
from aioquic.quic.packet import QuicPacketType, pull_quic_header

from benchmarks.report import ROUNDS, Row
from knode.transport import Carrier, Link
from knode.transport.certificate import make_certificate
from knode.transport.quic import QuicCarrier
from knode.transport.quic_connection import DATAGRAM_BYTES
from knode.transport.websocket import WebSocketCarrier
from knode.world import SilentLog
from knode.world.real import RealClock

BULK_BYTES = 16 * 1024 * 1024
FRAME_BYTES = 64 * 1024
ECHOES = 500
REQUEST_BYTES = 200
IN_FLIGHT = 32
REQUESTS = 4000

_DONE = b"."


def run() -> list[Row]:
    """Measure requests, round trips and bulk; then how QUIC compares with WebSocket."""
    with _servers() as (floor_port, quic_address, websocket_address, server):
        seconds: dict[str, list[float]] = {}
        processor: dict[str, list[float]] = {}

        async def measure(name: str, work: Callable[[], Awaitable[float]]) -> None:
            before = time.process_time() + _processor_seconds(server)
            seconds.setdefault(name, []).append(await work())
            processor.setdefault(name, []).append(time.process_time() + _processor_seconds(server) - before)

        async def measure_all() -> None:
            quic = QuicCarrier(Path("nothing is listened on"), SilentLog())
            websocket = WebSocketCarrier(Path("nothing is listened on"), SilentLog())
            # in turn, so that a busy moment of the machine hits figure and floor alike
            for _ in range(ROUNDS):
                for name, on_floor, on_link in (
                    ("many", _many_on_floor, _many_on_link),
                    ("echo", _echo_on_floor, _echo_on_link),
                    ("bulk", _bulk_on_floor, _bulk_on_link),
                ):
                    await measure(f"floor {name}", partial(_with_floor, floor_port, on_floor))
                    await measure(f"quic {name}", partial(_with_link, quic, quic_address, on_link))
                    await measure(
                        f"websocket {name}", partial(_with_link, websocket, websocket_address, on_link)
                    )

        trio.run(measure_all)
    taken = {name: median(values) for name, values in seconds.items()}
    worked = {name: median(values) for name, values in processor.items()}
    many = taken["floor many"] / taken["quic many"]
    echo = taken["quic echo"] / taken["floor echo"]
    bulk = taken["floor bulk"] / taken["quic bulk"]
    rows = [
        Row(
            name=f"QUIC link, {REQUEST_BYTES} bytes there and back, {IN_FLIGHT} in flight",
            figure=_pace(taken["quic many"]),
            floor=f"{_pace(taken['floor many'])} bare aioquic",
            ratio=many,
            target="at least 0.50",
            met=many >= 0.5,
        ),
        Row(
            name=f"QUIC link, round trip of {REQUEST_BYTES} bytes",
            figure=_round_trip(taken["quic echo"]),
            floor=f"{_round_trip(taken['floor echo'])} bare aioquic",
            ratio=echo,
            target="at most 2.00",
            met=echo <= 2,
        ),
        Row(
            name=f"QUIC link, bulk in frames of {FRAME_BYTES // 1024} KiB",
            figure=_rate(taken["quic bulk"]),
            floor=f"{_rate(taken['floor bulk'])} bare aioquic",
            ratio=bulk,
            target="at least 0.80",
            met=bulk >= 0.8,
        ),
    ]
    for name, unit in (("many", _pace), ("echo", _round_trip), ("bulk", _rate)):
        rows.append(
            Row(
                name=f"QUIC beside WebSocket, {name}",
                figure=unit(taken[f"quic {name}"]),
                floor=f"{unit(taken[f'websocket {name}'])} WebSocket",
                ratio=taken[f"quic {name}"] / taken[f"websocket {name}"],
                target="none: for the choice of links",
                met=True,
            )
        )
    rows.append(
        Row(
            name="QUIC beside WebSocket, processor time for bulk, both ends",
            figure=_work(worked["quic bulk"]),
            floor=f"{_work(worked['websocket bulk'])} WebSocket",
            ratio=worked["quic bulk"] / worked["websocket bulk"],
            target="none: for the choice of links",
            met=True,
        )
    )
    return rows


def _pace(seconds: float) -> str:
    return f"{REQUESTS / seconds:.0f}/s"


def _round_trip(seconds: float) -> str:
    return f"{seconds / ECHOES * 1e6:.0f} us"


def _rate(seconds: float) -> str:
    return f"{BULK_BYTES / seconds / 1e6:.1f} MB/s"


def _work(seconds: float) -> str:
    return f"{seconds / BULK_BYTES * 1e9:.1f} ms/MB"


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# the dialling process: each function returns seconds


async def _with_link(carrier: Carrier, address: str, measure: Callable[[Link], Awaitable[float]]) -> float:
    link = await carrier.dial(address)
    try:
        return await measure(link)
    finally:
        await link.aclose()


async def _echo_on_link(link: Link) -> float:
    said = bytes(REQUEST_BYTES)
    await link.send_frame(b"echo")
    started = time.perf_counter()
    for _ in range(ECHOES):
        await link.send_frame(said)
        await link.receive_frame()
    return time.perf_counter() - started


async def _many_on_link(link: Link) -> float:
    said = bytes(REQUEST_BYTES)
    await link.send_frame(b"echo")
    started = time.perf_counter()
    for _ in range(IN_FLIGHT):
        await link.send_frame(said)
    for _ in range(REQUESTS - IN_FLIGHT):
        await link.receive_frame()
        await link.send_frame(said)
    for _ in range(IN_FLIGHT):
        await link.receive_frame()
    return time.perf_counter() - started


async def _bulk_on_link(link: Link) -> float:
    frame = bytes(FRAME_BYTES)
    started = time.perf_counter()
    await link.send_frame(b"bulk")
    for _ in range(BULK_BYTES // FRAME_BYTES):
        await link.send_frame(frame)
    await link.receive_frame()
    return time.perf_counter() - started


async def _with_floor(port: int, measure: Callable[[Floor], Awaitable[float]]) -> float:
    async with trio.open_nursery() as nursery:
        floor = Floor(("127.0.0.1", 0), _configuration(is_client=True), nursery)
        floor.dial(("127.0.0.1", port))
        await floor.handshaken.wait()
        taken = await measure(floor)
        nursery.cancel_scope.cancel()
    floor.socket.close()
    return taken


async def _echo_on_floor(floor: Floor) -> float:
    started = time.perf_counter()
    await floor.ask(ECHOES)
    return time.perf_counter() - started


async def _many_on_floor(floor: Floor) -> float:
    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(IN_FLIGHT):
            nursery.start_soon(floor.ask, REQUESTS // IN_FLIGHT)
    return time.perf_counter() - started


async def _bulk_on_floor(floor: Floor) -> float:
    started = time.perf_counter()
    stream_id = floor.only.get_next_available_stream_id()
    floor.arrived[stream_id] = trio.Event()
    for _ in range(BULK_BYTES // FRAME_BYTES):
        floor.only.send_stream_data(stream_id, b"b" * FRAME_BYTES)
    floor.wake[floor.only].set()
    await floor.arrived[stream_id].wait()
    return time.perf_counter() - started


# the floor: bare aioquic under trio


def _configuration(*, is_client: bool) -> QuicConfiguration:
    return QuicConfiguration(
        is_client=is_client,
        max_datagram_size=DATAGRAM_BYTES,
        verify_mode=ssl.CERT_NONE,
        alpn_protocols=["floor"],
    )


class Floor:
    """A UDP socket and its connections. A server answers requests with themselves, and the end of bulk."""

    def __init__(
        self, address: tuple[str, int], configuration: QuicConfiguration, nursery: trio.Nursery
    ) -> None:
        self.socket = socket.socket(type=socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self.socket.setsockopt(socket.SOL_SOCKET, option, 4 * 1024 * 1024)
        self.socket.bind(address)
        self.configuration = configuration
        self.nursery = nursery
        self.routes: dict[bytes, QuicConnection] = {}
        self.wake: dict[QuicConnection, trio.Event] = {}
        self.arrived: dict[int, trio.Event] = {}
        self.received: dict[tuple[QuicConnection, int], int] = {}
        self.handshaken = trio.Event()
        nursery.start_soon(self.receive_all)

    def dial(self, remote: tuple[str, int]) -> None:
        self.only = QuicConnection(configuration=self.configuration)
        self.only.connect(remote, trio.current_time())
        self.add(self.only, self.only.host_cid)

    def add(self, connection: QuicConnection, *connection_ids: bytes) -> None:
        for connection_id in connection_ids:
            self.routes[connection_id] = connection
        self.wake[connection] = trio.Event()
        self.nursery.start_soon(self.send_all, connection)

    async def receive_all(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.socket)
            now = trio.current_time()
            touched: dict[QuicConnection, None] = {}
            for _ in range(64):
                try:
                    data, remote = self.socket.recvfrom(65_536)
                except BlockingIOError:
                    break
                header = pull_quic_header(Buffer(data=data), host_cid_length=8)
                connection = self.routes.get(header.destination_cid)
                if connection is None and header.packet_type is QuicPacketType.INITIAL:
                    connection = QuicConnection(
                        configuration=self.configuration,
                        original_destination_connection_id=header.destination_cid,
                    )
                    self.add(connection, header.destination_cid, connection.host_cid)
                if connection is not None:
                    connection.receive_datagram(data, remote, now)
                    touched[connection] = None
            for connection in touched:
                self.follow(connection)
                self.wake[connection].set()

    async def send_all(self, connection: QuicConnection) -> None:
        while True:
            now = trio.current_time()
            for data, remote in connection.datagrams_to_send(now):
                self.socket.sendto(data, remote)
            self.follow(connection)
            timer = connection.get_timer()
            if timer is None:
                return
            self.wake[connection] = trio.Event()
            with trio.move_on_at(timer):
                await self.wake[connection].wait()
            if trio.current_time() >= timer:
                connection.handle_timer(trio.current_time())

    def follow(self, connection: QuicConnection) -> None:
        while (event := connection.next_event()) is not None:
            match event:
                case ConnectionIdIssued(connection_id=connection_id):
                    self.routes[connection_id] = connection
                case HandshakeCompleted():
                    self.handshaken.set()
                case StreamDataReceived(stream_id=stream_id, data=data):
                    self.take(connection, stream_id, data)

    def take(self, connection: QuicConnection, stream_id: int, data: bytes) -> None:
        received = self.received.get((connection, stream_id), 0) + len(data)
        self.received[connection, stream_id] = received
        if self.configuration.is_client:
            self.arrived[stream_id].set()
        elif data[0] != ord("b"):
            connection.send_stream_data(stream_id, data)
        elif received == BULK_BYTES:
            connection.send_stream_data(stream_id, _DONE)

    async def ask(self, times: int) -> None:
        """Send a request on a stream of its own and await its answer, again and again."""
        said = bytes(REQUEST_BYTES)
        stream_id = self.only.get_next_available_stream_id()
        for asked in range(1, times + 1):
            self.only.send_stream_data(stream_id, said)
            self.wake[self.only].set()
            while self.received.get((self.only, stream_id), 0) < asked * REQUEST_BYTES:
                self.arrived[stream_id] = trio.Event()
                await self.arrived[stream_id].wait()


# the listening process


@contextmanager
def _servers() -> Iterator[tuple[int, str, str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        certificate = Path(folder, "tls.pem")
        certificate.write_bytes(make_certificate(RealClock().wall()))
        ours, theirs = multiprocessing.Pipe()
        # spawned, not forked: a server process owes nothing to this one
        server = multiprocessing.get_context("spawn").Process(target=_serve, args=(certificate, theirs))
        server.start()
        theirs.close()  # so that a server which dies ends the wait for it
        try:
            yield *ours.recv(), server.pid or 0
        finally:
            server.terminate()
            server.join()


def _serve(certificate: Path, ready: Pipe) -> None:
    trio.run(_serve_all, certificate, ready)


async def _serve_all(certificate: Path, ready: Pipe) -> None:
    configuration = _configuration(is_client=False)
    configuration.load_cert_chain(certificate, keyfile=certificate)
    async with trio.open_nursery() as nursery:
        floor = Floor(("127.0.0.1", 0), configuration, nursery)
        addresses = []
        for carrier in (QuicCarrier(certificate, SilentLog()), WebSocketCarrier(certificate, SilentLog())):
            listener = await carrier.listen("127.0.0.1", 0)
            nursery.start_soon(listener.serve, _answer)
            addresses.append(listener.addresses[0])
        ready.send((floor.socket.getsockname()[1], *addresses))


async def _answer(link: Link) -> None:
    what = await link.receive_frame()
    if what == b"bulk":
        left = BULK_BYTES
        while left:
            left -= len(await link.receive_frame())
        await link.send_frame(_DONE)
    else:
        while True:
            await link.send_frame(await link.receive_frame())
