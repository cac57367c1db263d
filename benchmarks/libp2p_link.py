"""The libp2p link beside a stream of py-libp2p's own host: bulk, one request at a time, 32 in flight; memory.

Each side of each measurement runs in two processes, trio at both ends. The floor is a stream of protocol
`/echo/1.0.0` between two hosts of py-libp2p (TCP, Noise, Yamux); the figure sends frames.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import trio

from benchmarks.node import FLAGS, _daemon
from benchmarks.node import resident_mib as resident_mib_of
from benchmarks.report import Row
from knode.home.layout import Home
from knode.identity import KeyPair
from knode.node import initialise
from knode.transport import Link
from knode.transport.libp2p_carrier import Libp2pCarrier
from knode.world import SilentLog
from knode.world.real import real_world

ROUNDS = 5
"""Fewer than elsewhere: the floor takes a second for each."""
BULK_BYTES = 32 * 1024 * 1024
FRAME_BYTES = 256 * 1024
REQUEST_BYTES = 200
ECHOES = 500
IN_FLIGHT = 32
IMPORTED_S = 5.0
MORE_MIB = 80e6 / 2**20
_ECHO = "/echo/1.0.0"

Measure = Callable[["Pipe"], Awaitable[float]]


class Pipe:
    """Messages of known sizes over a link, or over a stream of the library."""

    def __init__(self, link: Link | None, stream: Any) -> None:
        self._link = link
        self._stream = stream

    async def send(self, data: bytes) -> None:
        if self._link is not None:
            await self._link.send_frame(data)
        else:
            await self._stream.write(data)

    async def receive(self, size: int) -> None:
        if self._link is not None:
            await self._link.receive_frame()
        else:
            while size:
                size -= len(await self._stream.read(size))


def run() -> list[Row]:
    """Measure all, figure and floor in turn."""
    seconds: dict[str, list[float]] = {}
    measures: dict[str, Measure] = {"bulk": _bulk, "echo": _echo, "flight": _flight}

    async def measure_all(link_address: str, host_address: str) -> None:
        for _ in range(ROUNDS):
            for name, measure in measures.items():
                async with _over_link(link_address) as pipe:
                    seconds.setdefault(name, []).append(await measure(pipe))
                async with _over_library(host_address) as pipe:
                    seconds.setdefault(f"floor {name}", []).append(await measure(pipe))

    with _both_servers() as addresses:
        trio.run(measure_all, *addresses)
    typical = {name: median(values) for name, values in seconds.items()}
    bulk, flight = (typical[f"floor {name}"] / typical[name] for name in ("bulk", "flight"))
    echo = typical["echo"] / typical["floor echo"]
    return [
        Row(
            name=f"libp2p link, bulk in frames of {FRAME_BYTES // 1024} KiB",
            figure=f"{BULK_BYTES / typical['bulk'] / 1e6:.0f} MB/s",
            floor=f"{BULK_BYTES / typical['floor bulk'] / 1e6:.0f} MB/s py-libp2p's own stream",
            ratio=bulk,
            target="at least 0.80",
            met=bulk >= 0.8,
        ),
        Row(
            name=f"libp2p link, round trip of {REQUEST_BYTES} bytes",
            figure=f"{typical['echo'] * 1e6:.0f} us",
            floor=f"{typical['floor echo'] * 1e6:.0f} us py-libp2p's own stream",
            ratio=echo,
            target="at most 2.00",
            met=echo <= 2,
        ),
        Row(
            name=f"libp2p link, {IN_FLIGHT} requests of {REQUEST_BYTES} bytes in flight",
            figure=f"{1 / typical['flight']:.0f} a second",
            floor=f"{1 / typical['floor flight']:.0f} a second py-libp2p's own stream",
            ratio=flight,
            target="at least 0.50",
            met=flight >= 0.5,
        ),
        _memory(),
    ]


def _memory() -> Row:
    """Compare what two idle daemons hold, five seconds after they answer."""
    resident_mib = {}
    for libp2p in ("false", "true"):
        with tempfile.TemporaryDirectory() as folder:
            home = Home(Path(folder, "daemon"))
            flags = FLAGS | {"discovery.libp2p": libp2p, "discovery.libp2p_port": "0"}
            initialise(home, name="daemon", flags=flags)
            with _daemon(home) as (pid, _):
                time.sleep(IMPORTED_S)
                resident_mib[libp2p] = resident_mib_of(pid)
    more_mib = resident_mib["true"] - resident_mib["false"]
    return Row(
        name="libp2p on: memory of an idle daemon beyond that with libp2p off",
        figure=f"{more_mib:.0f} MiB",
        floor=f"{resident_mib['false']:.0f} MiB with libp2p off",
        ratio=more_mib / MORE_MIB,
        target=f"at most {MORE_MIB:.0f} MiB",
        met=more_mib <= MORE_MIB,
    )


async def _bulk(pipe: Pipe) -> float:
    frame = bytes(FRAME_BYTES)
    started = time.perf_counter()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            for _ in range(BULK_BYTES // FRAME_BYTES):
                await pipe.send(frame)

        for _ in range(BULK_BYTES // FRAME_BYTES):
            await pipe.receive(FRAME_BYTES)
    return time.perf_counter() - started


async def _echo(pipe: Pipe) -> float:
    said = bytes(REQUEST_BYTES)
    started = time.perf_counter()
    for _ in range(ECHOES):
        await pipe.send(said)
        await pipe.receive(REQUEST_BYTES)
    return (time.perf_counter() - started) / ECHOES


async def _flight(pipe: Pipe) -> float:
    said = bytes(REQUEST_BYTES)
    left = trio.Semaphore(IN_FLIGHT)
    started = time.perf_counter()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            for _ in range(4 * ECHOES):
                await left.acquire()
                await pipe.send(said)

        for _ in range(4 * ECHOES):
            await pipe.receive(REQUEST_BYTES)
            left.release()
    return (time.perf_counter() - started) / (4 * ECHOES)


@asynccontextmanager
async def _over_link(address: str) -> AsyncIterator[Pipe]:
    link = await Libp2pCarrier(real_world(), KeyPair(b"d" * 32), SilentLog()).dial(address)
    try:
        yield Pipe(link, None)
    finally:
        await link.aclose()


@asynccontextmanager
async def _over_library(address: str) -> AsyncIterator[Pipe]:
    from libp2p.custom_types import TProtocol
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    host = _library_host()
    async with host.run(listen_addrs=[]):
        info = info_from_p2p_addr(Multiaddr(address))
        await host.connect(info)
        yield Pipe(None, await host.new_stream(info.peer_id, [TProtocol(_ECHO)]))
        await host.close()


def _library_host() -> Any:
    """A host of py-libp2p with Noise alone, as it is used here."""
    import libp2p
    from libp2p.crypto.x25519 import create_new_key_pair
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport

    key = libp2p.generate_new_ed25519_identity()
    noise = Transport(key, noise_privkey=create_new_key_pair().private_key)
    return libp2p.new_host(key_pair=key, sec_opt={PROTOCOL_ID: noise}, muxer_preference="YAMUX")


# the listening process


@contextmanager
def _both_servers() -> Iterator[tuple[str, str]]:
    ours, theirs = multiprocessing.Pipe()
    # spawned, not forked: a server process owes nothing to this one
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,))
    server.start()
    theirs.close()  # so that a server which dies ends the wait for it
    try:
        yield ours.recv()
    finally:
        server.terminate()
        server.join()


def _serve(ready: Connection) -> None:
    trio.run(_serve_both, ready)


async def _serve_both(ready: Connection) -> None:
    from libp2p.custom_types import TProtocol
    from multiaddr import Multiaddr

    carrier = Libp2pCarrier(real_world(), KeyPair(b"l" * 32), SilentLog())
    listener = await carrier.listen("127.0.0.1", 0)
    host = _library_host()
    host.set_stream_handler(TProtocol(_ECHO), _echo_stream)
    async with trio.open_nursery() as nursery, host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        nursery.start_soon(listener.serve, _echo_link)
        await carrier.start()
        ready.send((listener.addresses[0], str(host.get_addrs()[0])))
        await trio.sleep_forever()


async def _echo_link(link: Link) -> None:
    while True:
        await link.send_frame(await link.receive_frame())


async def _echo_stream(stream: Any) -> None:
    from libp2p.network.stream.exceptions import StreamError

    try:
        while True:
            await stream.write(await stream.read(FRAME_BYTES))
    except StreamError:
        await stream.reset()
