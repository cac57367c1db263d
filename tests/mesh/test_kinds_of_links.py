"""What the mesh keeps over every kind of link, and several kinds at one port."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

import pytest
import trio
from mesh_cell import MeshNode, RecordingLog, SeededRandomness, key_of, refused

from knode.errors import Code
from knode.transport import Carrier
from knode.transport.libp2p_carrier import Libp2pCarrier
from knode.transport.memory import MemoryNetwork
from knode.transport.quic import QuicCarrier
from knode.transport.websocket import WebSocketCarrier
from knode.world.real import real_world

BULK_BYTES = 32 * 1024 * 1024
CHUNK = bytes(range(256)) * 1024


@pytest.fixture(params=["quic", "websocket", "libp2p", "memory"])
async def two(
    request: pytest.FixtureRequest, tmp_path: Path, certificate: Path, nursery: trio.Nursery
) -> tuple[MeshNode, MeshNode]:
    """Two members of a cell with one kind of link."""
    network = MemoryNetwork(SeededRandomness("network"))

    def node(name: str) -> MeshNode:
        carrier: Carrier
        match request.param:
            case "quic":
                carrier = QuicCarrier(certificate, RecordingLog())
            case "websocket":
                carrier = WebSocketCarrier(certificate, RecordingLog())
            case "libp2p":
                carrier = Libp2pCarrier(real_world(), key_of(name), RecordingLog())
            case _:
                return MeshNode(name, tmp_path, {"memory": network.carrier(name)})
        return MeshNode(name, tmp_path, {request.param: carrier}, host="127.0.0.1")

    a, b = node("a"), node("b")
    await a.found()
    await a.start(nursery)
    await b.start(nursery)
    await b.join(await a.invite())
    await b.connected(a)
    await a.connected(b)
    assert a.conversation(b).link.carrier == request.param
    return a, b


async def test_requests_do_not_wait_until_bulk_is_through(two: tuple[MeshNode, MeshNode]) -> None:
    a, b = two
    under_way, answers_when_through = trio.Event(), 0
    answered = 0

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(BULK_BYTES // len(CHUNK)):
            yield CHUNK
            under_way.set()

    async def ask(number: int) -> None:
        nonlocal answered
        for turn in range(4):
            text = f"{number}, {turn}"
            assert await b.ask(a, "test.echo", text, within_s=280) == text
            answered += 1

    with trio.fail_after(280):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def stream() -> None:
                nonlocal answers_when_through
                digest = await b.ask(a, "test.stream", chunks=chunks(), within_s=280)
                answers_when_through = answered
                assert digest == sha256(CHUNK * (BULK_BYTES // len(CHUNK))).hexdigest()

            await under_way.wait()
            for number in range(8):
                nursery.start_soon(ask, number)
    assert answers_when_through == 32, "all had been answered while the bulk was under way"


# several kinds at one port


def both(certificate: Path) -> dict[str, Carrier]:
    return {
        "websocket": WebSocketCarrier(certificate, RecordingLog()),
        "quic": QuicCarrier(certificate, RecordingLog()),
    }


async def test_all_kinds_that_dial_host_and_port_listen_at_one(
    tmp_path: Path, certificate: Path, nursery: trio.Nursery
) -> None:
    a = MeshNode("a", tmp_path, both(certificate), host="127.0.0.1")
    await a.found()
    await a.start(nursery)
    assert {address for listener in a.listeners for address in listener.addresses} == {a.address}


async def test_a_port_that_another_program_has_for_udp_is_named_and_nothing_stays_bound(
    tmp_path: Path, certificate: Path, nursery: trio.Nursery
) -> None:
    a = MeshNode("a", tmp_path, both(certificate), host="127.0.0.1")
    await a.found()
    await a.start(nursery)
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        error = await refused(Code.PORT_IN_USE, a.peers.listen, "127.0.0.1", port)
        assert f"UDP port {port}" in error.message
        with socket.create_server(("127.0.0.1", port)):
            pass  # TCP is free again


async def test_any_port_is_one_that_is_free_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificate: Path, nursery: trio.Nursery
) -> None:
    a = MeshNode("a", tmp_path, both(certificate), host="127.0.0.1")
    await a.found()
    await a.start(nursery)
    websocket = a.peers._carriers["websocket"]
    listen = websocket.listen
    taken: list[socket.socket] = []

    async def listen_where_udp_is_taken(host: str, port: int) -> object:
        listener = await listen(host, port)
        if len(taken) < 3:
            other = socket.socket(type=socket.SOCK_DGRAM)
            other.bind(("127.0.0.1", int(listener.addresses[0].rpartition(":")[2])))
            taken.append(other)
        return listener

    monkeypatch.setattr(websocket, "listen", listen_where_udp_is_taken)
    listeners = await a.peers.listen("127.0.0.1", 0)
    assert len(taken) == 3
    assert listeners[0].addresses == listeners[1].addresses
    for each in [*listeners]:
        await each.aclose()
    for other in taken:
        other.close()
