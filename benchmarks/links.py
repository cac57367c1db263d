"""The WebSocket link beside a bare TLS 1.3 stream: bulk, and the sequential round trip.

Each side of each measurement runs in two processes, trio at both ends, the same TLS settings and the same
certificate. The floor is `trio.SSLStream`, written in pieces of 1 MiB; the figure sends frames.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import trio

from benchmarks.report import ROUNDS, Row
from knode.transport import Link
from knode.transport.certificate import client_context, make_certificate, server_context
from knode.transport.websocket import WebSocketCarrier
from knode.world import SilentLog
from knode.world.real import RealClock

BULK_BYTES = 64 * 1024 * 1024
FLOOR_WRITE_BYTES = 1024 * 1024
FRAME_SIZES = (64 * 1024, 256 * 1024, 1024 * 1024)
ECHOES = 1000
ECHO_BYTES = 200

_READ_BYTES = 256 * 1024
_DONE = b"."

Stream = trio.SSLStream[trio.SocketStream]


def run() -> list[Row]:
    """Measure bulk in frames of three sizes, then round trips."""
    with _both_servers() as (tls_port, link_address):
        seconds: dict[str, list[float]] = {}

        async def measure_all() -> None:
            # in turn, so that a busy moment of the machine hits figure and floor alike
            for _ in range(ROUNDS):
                seconds.setdefault("tls", []).append(await _on_stream(tls_port, _bulk_over_tls))
                for size in FRAME_SIZES:
                    bulk = partial(_bulk_over_link, frame_bytes=size)
                    seconds.setdefault(f"link {size}", []).append(await _on_link(link_address, bulk))
                seconds.setdefault("tls echo", []).append(await _on_stream(tls_port, _echo_over_tls))
                seconds.setdefault("link echo", []).append(await _on_link(link_address, _echo_over_link))

        trio.run(measure_all)
    typical = {name: median(values) for name, values in seconds.items()}
    rows = []
    for size in FRAME_SIZES:
        ratio = typical["tls"] / typical[f"link {size}"]
        rows.append(
            Row(
                name=f"WebSocket link, bulk in frames of {size // 1024} KiB",
                figure=_rate(typical[f"link {size}"]),
                floor=f"{_rate(typical['tls'])} bare TLS",
                ratio=ratio,
                target="at least 0.60",
                met=ratio >= 0.6,
            )
        )
    ratio = typical["link echo"] / typical["tls echo"]
    rows.append(
        Row(
            name=f"WebSocket link, round trip of {ECHO_BYTES} bytes",
            figure=f"{typical['link echo'] * 1e6:.0f} us",
            floor=f"{typical['tls echo'] * 1e6:.0f} us bare TLS",
            ratio=ratio,
            target="at most 2.00",
            met=ratio <= 2,
        )
    )
    return rows


def _rate(seconds: float) -> str:
    return f"{BULK_BYTES / seconds / 1e6:.0f} MB/s"


# the dialling process: each function returns seconds


async def _on_stream(port: int, measure: Callable[[Stream], Awaitable[float]]) -> float:
    tcp = await trio.open_tcp_stream("127.0.0.1", port)
    async with trio.SSLStream(tcp, client_context()) as stream:
        await stream.do_handshake()
        return await measure(stream)


async def _on_link(address: str, measure: Callable[[Link], Awaitable[float]]) -> float:
    link = await WebSocketCarrier(Path("nothing is listened on"), SilentLog()).dial(address)
    try:
        return await measure(link)
    finally:
        await link.aclose()


async def _bulk_over_tls(stream: Stream) -> float:
    piece = bytes(FLOOR_WRITE_BYTES)
    started = time.perf_counter()
    await stream.send_all(b"bulk")
    for _ in range(BULK_BYTES // FLOOR_WRITE_BYTES):
        await stream.send_all(piece)
    await stream.receive_some(1)
    return time.perf_counter() - started


async def _bulk_over_link(link: Link, frame_bytes: int) -> float:
    frame = bytes(frame_bytes)
    started = time.perf_counter()
    await link.send_frame(b"bulk")
    for _ in range(BULK_BYTES // frame_bytes):
        await link.send_frame(frame)
    await link.receive_frame()
    return time.perf_counter() - started


async def _echo_over_tls(stream: Stream) -> float:
    said = bytes(ECHO_BYTES)
    await stream.send_all(b"echo")
    started = time.perf_counter()
    for _ in range(ECHOES):
        await stream.send_all(said)
        received = 0
        while received < ECHO_BYTES:
            received += len(await stream.receive_some(_READ_BYTES))
    return (time.perf_counter() - started) / ECHOES


async def _echo_over_link(link: Link) -> float:
    said = bytes(ECHO_BYTES)
    await link.send_frame(b"echo")
    started = time.perf_counter()
    for _ in range(ECHOES):
        await link.send_frame(said)
        await link.receive_frame()
    return (time.perf_counter() - started) / ECHOES


# the listening process


@contextmanager
def _both_servers() -> Iterator[tuple[int, str]]:
    with tempfile.TemporaryDirectory() as folder:
        certificate = Path(folder, "tls.pem")
        certificate.write_bytes(make_certificate(RealClock().wall()))
        ours, theirs = multiprocessing.Pipe()
        # spawned, not forked: a server process owes nothing to this one
        server = multiprocessing.get_context("spawn").Process(target=_serve, args=(certificate, theirs))
        server.start()
        theirs.close()  # so that a server which dies ends the wait for it
        try:
            yield ours.recv()
        finally:
            server.terminate()
            server.join()


def _serve(certificate: Path, ready: Connection) -> None:
    trio.run(_serve_both, certificate, ready)


async def _serve_both(certificate: Path, ready: Connection) -> None:
    link_listener = await WebSocketCarrier(certificate, SilentLog()).listen("127.0.0.1", 0)
    [tcp_listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    tls_listener = trio.SSLListener(tcp_listener, server_context(certificate))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link_listener.serve, _answer_link)
        nursery.start_soon(trio.serve_listeners, _answer_tls, [tls_listener])
        ready.send((tcp_listener.socket.getsockname()[1], link_listener.addresses[0]))


async def _answer_tls(stream: Stream) -> None:
    what = await stream.receive_some(4)
    if what == b"bulk":
        left = BULK_BYTES
        while left:
            left -= len(await stream.receive_some(_READ_BYTES))
        await stream.send_all(_DONE)
    else:
        while data := await stream.receive_some(_READ_BYTES):
            await stream.send_all(data)


async def _answer_link(link: Link) -> None:
    what = await link.receive_frame()
    if what == b"bulk":
        left = BULK_BYTES
        while left:
            left -= len(await link.receive_frame())
        await link.send_frame(_DONE)
    else:
        while True:
            await link.send_frame(await link.receive_frame())
