"""Lines that go dead without a word, over real sockets: what is sent vanishes, and nobody is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import mesh_cell
import pytest
import trio
from mesh_cell import MeshNode, RecordingLog

from knode.mesh import ways
from knode.mesh.liveness import PeerState
from knode.mesh.ways import Scope, Way
from knode.transport import Carrier
from knode.transport.quic import QuicCarrier
from knode.transport.websocket import WebSocketCarrier

PATIENCE_S = 60
CARRIERS = {"websocket": WebSocketCarrier, "quic": QuicCarrier}


async def happens(condition: Callable[[], bool]) -> None:
    """Wait until something is so, however slow the machine is."""
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.02)


class Line:
    """Passes TCP and UDP on to a node; dead, it swallows all that comes and ends no connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lives = True
        self._ways: dict[tuple[str, int], trio.socket.SocketType] = {}

    async def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        [listener] = await nursery.start(partial(trio.serve_tcp, self._pass_on, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._udp = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
        await self._udp.bind(("127.0.0.1", port))
        nursery.start_soon(self._pass_datagrams)

    def cut(self) -> None:
        self._lives = False

    def heal(self) -> None:
        """Let new connections through. Those that were cut stay dead: their addresses are gone."""
        self._lives = True
        self._ways.clear()

    async def _pass_on(self, near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, far, near)
            await self._pump(near, far)
            nursery.cancel_scope.cancel()

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            while data := await source.receive_some(65536):
                if not self._lives:
                    await trio.sleep_forever()
                await target.send_all(data)

    async def _pass_datagrams(self) -> None:
        while True:
            data, client = await self._udp.recvfrom(65536)
            if not self._lives:
                continue
            if client not in self._ways:
                self._ways[client] = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
                await self._ways[client].connect(("127.0.0.1", self._port))
                self._nursery.start_soon(self._pass_back, client, self._ways[client])
            with suppress(OSError):
                await self._ways[client].send(data)

    async def _pass_back(self, client: tuple[str, int], far: trio.socket.SocketType) -> None:
        with suppress(OSError):
            while True:
                data = await far.recv(65536)
                if self._ways.get(client) is far and self._lives:
                    await self._udp.sendto(data, client)


@pytest.fixture(params=list(CARRIERS))
async def two(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    certificate: Path,
    nursery: trio.Nursery,
) -> tuple[MeshNode, MeshNode, Line]:
    """Two members; only the second dials, and all that it says goes over a line."""
    monkeypatch.setattr(mesh_cell, "KEEPALIVE_S", 0.25)
    monkeypatch.setattr(mesh_cell, "DEAD_AFTER_S", 1.5)
    a, b = (
        MeshNode(
            name,
            tmp_path,
            {request.param: CARRIERS[request.param](certificate, RecordingLog())},
            host="127.0.0.1",
        )
        for name in ("a", "b")
    )
    await a.found()
    await a.start(nursery)
    await b.start(nursery)
    line = Line(int(a.address.rpartition(":")[2]))
    await line.start(nursery)
    await a.tell_contact(line.address)
    await b.joining.join(await a.invite(), "b", b.contact("127.0.0.1:1"))
    await b.connected(a)
    await a.connected(b)
    return a, b, line


def partings(node: MeshNode) -> list[object]:
    return [fields["why"] for _, event, fields in node.log.lines if event == "peer disconnected"]


async def test_a_half_open_link_is_found_dead_at_both_ends_and_replaced(
    two: tuple[MeshNode, MeshNode, Line],
) -> None:
    a, b, line = two
    sessions = a.conversation(b).established.session_id
    line.cut()
    await happens(lambda: a.peer(b).state is b.peer(a).state is PeerState.FAILED)
    for node in (a, b):  # the state is seen a moment before the link is let go
        await happens(lambda node=node: "nothing heard for 1.5 s" in partings(node))  # type: ignore[misc]
    line.heal()
    await happens(lambda: a.peer(b).state is b.peer(a).state is PeerState.ALIVE)
    assert a.conversation(b).established.session_id != sessions
    assert await a.ask(b, "test.echo", "there again") == "there again"
    assert len(b.log.events("error")) == len(a.log.events("error")) == 0


async def test_a_request_whose_line_goes_dead_is_answered_once_over_the_next(
    two: tuple[MeshNode, MeshNode, Line], nursery: trio.Nursery
) -> None:
    a, b, line = two
    answers: list[str] = []

    async def ask() -> None:
        answers.append(await b.ask(a, "test.wait", "slow"))

    nursery.start_soon(ask)
    await happens(lambda: a.ran == ["slow"])
    line.cut()
    await happens(lambda: b.peer(a).conversation is None)
    a.release.set()
    line.heal()
    await happens(lambda: answers == ["slow"])
    assert a.ran == ["slow"]


async def test_a_member_that_moves_is_found_at_its_new_address(
    two: tuple[MeshNode, MeshNode, Line], nursery: trio.Nursery
) -> None:
    a, b, _ = two
    await b.stop()
    b._port = 0
    b.clock.moved_ms += 1000
    await b.start(nursery)
    await b.connected(a)
    moved = b.address
    await happens(lambda: a.membership.contacts[b.key.public.raw].body.addresses == (moved,))
    b.peers.dialling._is_wanted = lambda peer: False  # it waits to be dialled
    a.conversation(b).close("by the test")
    await happens(
        lambda: a.peer(b).conversation is not None and a.conversation(b).link.remote_address == moved
    )
    assert await a.ask(b, "test.echo", "found") == "found"


async def test_where_udp_vanishes_the_link_over_tcp_comes_a_moment_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificate: Path, nursery: trio.Nursery
) -> None:
    monkeypatch.setitem(ways._ORDER, Scope.LOCAL, ("quic", "websocket"))  # as across the internet
    both: dict[str, Carrier] = {name: make(certificate, RecordingLog()) for name, make in CARRIERS.items()}
    a = MeshNode("a", tmp_path, both, host="127.0.0.1")
    b = MeshNode(
        "b", tmp_path, {"websocket": WebSocketCarrier(certificate, RecordingLog())}, host="127.0.0.1"
    )
    await b.found()
    await b.start(nursery)
    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as black_hole:
        await black_hole.bind(("127.0.0.1", int(b.address.rpartition(":")[2])))
        await a.start(nursery)
        await a.joining.join(await b.invite(), "a", a.contact("127.0.0.1:1"))
        await a.connected(b)
        assert a.conversation(b).link.carrier == "websocket"
        # it was not waited for: no dial of it has come to its end
        assert a.peers.dialling.failure(a.peer(b), Way("quic", b.address)) is None
        with trio.fail_after(PATIENCE_S):
            assert (await black_hole.recvfrom(2048))[0]  # the test is about something
