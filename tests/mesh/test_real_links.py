"""Nodes on WebSocket and QUIC links over loopback, and a man in the middle who ends TLS between them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

import mesh_cell
import msgspec
import pytest
import trio
from mesh_cell import MeshNode, RecordingLog, Stranger, refused

from knode.errors import Code
from knode.klp.codec import encode
from knode.klp.frames import Kind
from knode.klp.handshake import Hello, WelcomeBody
from knode.klp.messages import Response
from knode.transport import Link, LinkClosed
from knode.transport.certificate import make_certificate
from knode.transport.quic import QuicCarrier
from knode.transport.quic_link import QuicLink
from knode.transport.websocket import WebSocketCarrier
from knode.world.real import RealClock

Edit = Callable[[bytes], bytes]
Kinds = type[WebSocketCarrier] | type[QuicCarrier]
DATA = bytes(range(256)) * 4096


@pytest.fixture(params=["websocket", "quic"])
def link_kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def carrier_of(link_kind: str) -> Kinds:
    return {"websocket": WebSocketCarrier, "quic": QuicCarrier}[link_kind]


@pytest.fixture
async def two(
    tmp_path: Path, certificate: Path, nursery: trio.Nursery, link_kind: str, carrier_of: Kinds
) -> tuple[MeshNode, MeshNode]:
    """The founder of a cell, and a node that belongs to none."""
    a, b = (
        MeshNode(name, tmp_path, {link_kind: carrier_of(certificate, RecordingLog())}, host="127.0.0.1")
        for name in ("a", "b")
    )
    await a.found()
    await a.start(nursery)
    await b.start(nursery)
    return a, b


class ManInTheMiddle:
    """Ends TLS on both sides and passes frames on, edited as the test wants."""

    def __init__(self, carrier: WebSocketCarrier | QuicCarrier, target: MeshNode) -> None:
        self._carrier = carrier
        self._target = target.address
        self.to_target: Edit = lambda frame: frame
        self.from_target: Edit = lambda frame: frame
        self.passed: list[Kind] = []

    async def start(self, nursery: trio.Nursery) -> None:
        listener = await self._carrier.listen("127.0.0.1", 0)
        self.address = listener.addresses[0]
        nursery.start_soon(listener.serve, self._pass_on)

    async def _pass_on(self, link: Link) -> None:
        beyond = await self._carrier.dial(self._target)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, beyond, link, lambda frame: self.from_target(frame))
            await self._pump(link, beyond, lambda frame: self.to_target(frame))
            nursery.cancel_scope.cancel()

    async def _pump(self, source: Link, destination: Link, edit: Edit) -> None:
        try:
            while True:
                frame = edit(await source.receive_frame())
                self.passed.append(Kind(frame[0]))
                await destination.send_frame(frame)
        except LinkClosed:
            await destination.aclose()


@pytest.fixture
async def own_certificate(tmp_path: Path) -> Path:
    path = tmp_path / "mallory.pem"
    path.write_bytes(make_certificate(RealClock().wall()))
    return path


async def test_a_node_joins_and_asks_over_real_links(two: tuple[MeshNode, MeshNode], link_kind: str) -> None:
    a, b = two
    welcome = await b.join(await a.invite())
    assert a.membership.invitations.words()[b.key.public.raw] == welcome.words
    await a.connected(b)
    await b.connected(a)
    assert await b.ask(a, "test.echo", "hello") == "hello"
    assert await a.ask(b, "test.echo", "hello") == "hello"
    assert a.conversation(b).link.carrier == link_kind


async def test_a_mebibyte_comes_with_a_request_over_real_links(two: tuple[MeshNode, MeshNode]) -> None:
    a, b = two
    await b.join(await a.invite())
    await b.connected(a)

    async def chunks() -> AsyncIterator[bytes]:
        for begin in range(0, len(DATA), 100_000):
            yield DATA[begin : begin + 100_000]

    assert await b.ask(a, "test.stream", chunks=chunks()) == sha256(DATA).hexdigest()


async def test_a_request_survives_a_broken_real_link(two: tuple[MeshNode, MeshNode]) -> None:
    a, b = two
    await b.join(await a.invite())
    await b.connected(a)
    answers: list[str] = []

    async def ask() -> None:
        answers.append(await b.ask(a, "test.wait", "slow"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        while not a.ran:  # noqa: ASYNC110
            await trio.sleep(0.01)
        lost = b.conversation(a)
        if isinstance(lost.link, QuicLink):
            lost.link.drop("the test cut it", 1)
        else:
            lost.link._stream.close()  # type: ignore[attr-defined]
        await lost.ended.wait()
        await b.connected(a)
        a.release.set()
    assert answers == ["slow"]
    assert a.ran == ["slow"]


async def test_a_man_in_the_middle_with_his_own_certificate_is_noticed(
    two: tuple[MeshNode, MeshNode], own_certificate: Path, nursery: trio.Nursery, carrier_of: Kinds
) -> None:
    a, b = two
    mallory = ManInTheMiddle(carrier_of(own_certificate, RecordingLog()), a)
    await mallory.start(nursery)
    ticket = msgspec.structs.replace(await a.invite(), addresses=(mallory.address,))
    error = await refused(Code.CHANNEL_MISMATCH, b.join, ticket)
    assert "proxy" in error.next_step
    assert Kind.PROOF not in mallory.passed
    assert Kind.BUNDLE not in mallory.passed
    assert not b.membership.in_cell
    assert len(a.membership.roster.members) == 1
    # The ticket went through his hands, and is as good as before.
    assert (await b.join(msgspec.structs.replace(ticket, addresses=(a.address,)))).member.name == "b"


async def test_a_member_is_not_reached_through_a_man_in_the_middle(
    two: tuple[MeshNode, MeshNode], own_certificate: Path, nursery: trio.Nursery, carrier_of: Kinds
) -> None:
    a, b = two
    await b.join(await a.invite())
    mallory = ManInTheMiddle(carrier_of(own_certificate, RecordingLog()), a)
    await mallory.start(nursery)
    link = await carrier_of(own_certificate, RecordingLog()).dial(mallory.address)
    await refused(Code.CHANNEL_MISMATCH, b.peers.handshakes.with_member, link, a.key.public)
    assert a.peers.refusals[Code.CHANNEL_MISMATCH] == 1


@pytest.fixture
async def thief(
    two: tuple[MeshNode, MeshNode], certificate: Path, nursery: trio.Nursery, carrier_of: Kinds
) -> tuple[ManInTheMiddle, Stranger, MeshNode]:
    """A man in the middle who stole the certificate's key, and a member who speaks through him."""
    a, b = two
    await b.join(await a.invite())
    await b.stop()
    man = ManInTheMiddle(carrier_of(certificate, RecordingLog()), a)
    await man.start(nursery)
    member = Stranger(carrier_of(certificate, RecordingLog()), b.key)
    return man, member, a


async def through(man: ManInTheMiddle, member: Stranger, a: MeshNode, **more: object) -> None:
    address, a.address = a.address, man.address
    try:
        await member.shake_hands(a, **more)  # type: ignore[arg-type]
    finally:
        a.address = address


async def test_whoever_only_passes_on_changes_nothing(
    thief: tuple[ManInTheMiddle, Stranger, MeshNode],
) -> None:
    man, member, a = thief
    await through(man, member, a)
    answer = await member.ask(1, "test.echo", b"\x91\xa1x")
    assert isinstance(answer, Response)
    assert a.ran == ["x"]


def strip_hello(frame: bytes) -> bytes:
    if frame[0] != Kind.HELLO:
        return frame
    hello = msgspec.msgpack.decode(frame[1:], type=Hello)
    return frame[:1] + encode(msgspec.structs.replace(hello, versions=(1,)))


async def test_a_version_that_was_stripped_from_the_hello_is_noticed(
    thief: tuple[ManInTheMiddle, Stranger, MeshNode],
) -> None:
    man, member, a = thief
    man.to_target = strip_hello
    await refused(Code.BAD_SIGNATURE, through, man, member, a, versions=(1, 2))
    man.to_target = lambda frame: frame
    await through(man, member, a, versions=(1, 2))  # without him it is fine


async def test_a_lower_version_than_both_speak_is_noticed(
    thief: tuple[ManInTheMiddle, Stranger, MeshNode],
) -> None:
    man, member, a = thief

    def pretend_more(frame: bytes) -> bytes:
        if frame[0] != Kind.WELCOME:
            return frame
        body = msgspec.msgpack.decode(frame[65:], type=WelcomeBody)
        hello = msgspec.structs.replace(body.hello, versions=(1, 2))
        return frame[:65] + encode(WelcomeBody(hello, 1))

    man.from_target = pretend_more
    await refused(Code.DOWNGRADE, through, man, member, a, versions=(1, 2))


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.WELCOME, Kind.PROOF, Kind.BUNDLE])
async def test_an_edited_frame_is_noticed(
    thief: tuple[ManInTheMiddle, Stranger, MeshNode], kind: Kind
) -> None:
    man, member, a = thief

    def edit(frame: bytes) -> bytes:
        if frame[0] != kind:
            return frame
        if kind is Kind.HELLO:
            hello = msgspec.msgpack.decode(frame[1:], type=Hello)
            return frame[:1] + encode(msgspec.structs.replace(hello, boot=bytes(16)))
        if kind is Kind.WELCOME:
            body = msgspec.msgpack.decode(frame[65:], type=WelcomeBody)
            hello = msgspec.structs.replace(body.hello, roster_digest=bytes(32))
            return frame[:65] + encode(WelcomeBody(hello, body.version))
        return frame[:-1] + bytes([frame[-1] ^ 1])

    man.to_target = man.from_target = edit

    async def speak() -> None:
        await through(man, member, a)
        await member.ask(1, "test.echo", b"\x91\xa1x")

    await refused(Code.BAD_SIGNATURE, speak)
    assert a.ran == []


class SlowRelay:
    """Passes bytes on, to the target no faster than `RATE` bytes a second."""

    RATE = 160_000
    STEP_S = 0.05

    def __init__(self, target: MeshNode) -> None:
        self._port = int(target.address.rpartition(":")[2])

    async def start(self, nursery: trio.Nursery) -> None:
        [listener] = await nursery.start(partial(trio.serve_tcp, self._pass_on, 0, host="127.0.0.1"))
        self.address = f"127.0.0.1:{listener.socket.getsockname()[1]}"

    async def _pass_on(self, near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, far, near, 0)
            await self._pump(near, far, self.STEP_S)
            nursery.cancel_scope.cancel()

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream, pause_s: float) -> None:
        with suppress(trio.BrokenResourceError):
            while data := await source.receive_some(int(self.RATE * self.STEP_S)):
                await target.send_all(data)
                await trio.sleep(pause_s)


async def test_a_large_message_on_a_slow_link_is_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificate: Path, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(mesh_cell, "KEEPALIVE_S", 0.25)
    monkeypatch.setattr(mesh_cell, "DEAD_AFTER_S", 0.75)
    carrier = {"websocket": WebSocketCarrier(certificate, RecordingLog())}
    a, b = (MeshNode(name, tmp_path, carrier, host="127.0.0.1") for name in ("a", "b"))
    await a.found()
    await a.start(nursery)
    await b.start(nursery)
    relay = SlowRelay(a)
    await relay.start(nursery)
    await a.tell_contact(relay.address)
    await b.joining.join(await a.invite(), "b", b.contact("127.0.0.1:1"))
    await b.connected(a)
    await a.connected(b)
    before = a.conversation(b)
    text = "x" * 250_000  # more than one and a half seconds of that link
    assert await b.ask(a, "test.echo", text) == text
    assert a.conversation(b) is before
