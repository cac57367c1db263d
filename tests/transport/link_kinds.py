"""Every kind of link, opened the same way. A new kind is one entry in `KINDS`."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from knode.identity import KeyPair
from knode.transport import Carrier, Link
from knode.transport.libp2p_carrier import Libp2pCarrier
from knode.transport.memory import MemoryLink, MemoryNetwork, MemorySettings
from knode.transport.quic import QuicCarrier
from knode.transport.quic_connection import STREAM
from knode.transport.quic_link import QuicLink
from knode.transport.websocket import WebSocketCarrier
from knode.transport.websocket_link import WebSocketLink
from knode.world import SilentLog
from knode.world.real import real_world


class SeededRandomness:
    """The simulator's kind of randomness."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def token(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


@dataclass(frozen=True)
class Kind:
    """One kind of link under the contract.

    Args:
        carriers: makes the dialling and the listening carrier.
        listen_host: where the listening one listens.
        sever: lets this end die without a word, as a crash does.
        garble: lets this end say what is no frame; None where nothing but frames can be said.
    """

    name: str
    carriers: Callable[[Path], tuple[Carrier, Carrier]]
    listen_host: str
    sever: Callable[[Any], None]
    garble: Callable[[Any], Awaitable[None]] | None


def _websocket_carriers(certificate: Path) -> tuple[Carrier, Carrier]:
    return WebSocketCarrier(Path("only listened with"), SilentLog()), WebSocketCarrier(
        certificate, SilentLog()
    )


def _websocket_sever(link: WebSocketLink) -> None:
    link._stream.close()


async def _websocket_garble(link: WebSocketLink) -> None:
    link._stream.queue(b"\xff" * 1000)
    await link._stream.flush()


def _libp2p_carriers(_: Path) -> tuple[Carrier, Carrier]:
    world = real_world()
    return tuple(Libp2pCarrier(world, KeyPair(seed * 32), SilentLog()) for seed in (b"a", b"b"))


def _libp2p_sever(link: Any) -> None:
    link.connection.abort()


async def _libp2p_garble(link: Any) -> None:
    await link._stream.write(b"\xff" * 1000)


def _memory_carriers(_: Path) -> tuple[Carrier, Carrier]:
    network = MemoryNetwork(SeededRandomness(1), MemorySettings(delay_seconds=(0, 0.0005)))
    return network.carrier("a"), network.carrier("b")


def _memory_sever(link: MemoryLink) -> None:
    link._network.break_links(link.host)


def _quic_carriers(certificate: Path) -> tuple[Carrier, Carrier]:
    return QuicCarrier(Path("only listened with"), SilentLog()), QuicCarrier(certificate, SilentLog())


def _quic_sever(link: QuicLink) -> None:
    endpoint = link._pump.__self__
    endpoint._remove(link)  # as if the machine had lost its memory


async def _quic_garble(link: QuicLink) -> None:
    link.connection.send_stream_data(STREAM, b"\xff" * 1000)
    link._pump(link)


KINDS = [
    Kind("quic", _quic_carriers, "127.0.0.1", _quic_sever, _quic_garble),
    Kind("websocket", _websocket_carriers, "127.0.0.1", _websocket_sever, _websocket_garble),
    Kind("libp2p", _libp2p_carriers, "127.0.0.1", _libp2p_sever, _libp2p_garble),
    Kind("memory", _memory_carriers, "", _memory_sever, None),
]


Pair = tuple[Link, Link]


@asynccontextmanager
async def open_pair(dialling: Carrier, listening: Carrier, host: str) -> AsyncIterator[Pair]:
    """Open one link; yields the end that dialled and the end that accepted."""
    accepted_one, accepted = trio.open_memory_channel[Link](1)
    over = trio.Event()

    async def accept(link: Link) -> None:
        await accepted_one.send(link)
        await over.wait()

    listener = await listening.listen(host, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, accept)
        dialled = await dialling.dial(listener.addresses[0])
        try:
            yield dialled, await accepted.receive()
        finally:
            nursery.cancel_scope.cancel()
            await dialled.aclose()
            await listener.aclose()
