"""Links through a relay, which sees none of what they carry, and the limits of what it gives."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status, StopMessage
from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol
from libp2p.tools.anyio_service import background_trio_service
from libp2p_peers import LIMIT_SECONDS, NO_MESSAGES, Peer, other_host, until
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.transport import Link, LinkClosed, libp2p_relay
from knode.transport.libp2p_address import circuit_address, parse_peer_address
from knode.transport.libp2p_carrier import Libp2pSettings, RelayLimits
from knode.transport.libp2p_connection import MuxedStream, StreamEnded
from knode.transport.libp2p_messages import read_message, write_message
from knode.transport.libp2p_relay import HOP, STOP

MARKER = b"nobody but the two of us reads this. " * 100


async def relay_of(nursery: trio.Nursery, limits: RelayLimits = RelayLimits(), port: int = 0) -> Peer:  # noqa: B008
    return await Peer("relay", Libp2pSettings(offers_relay=True, limits=limits)).start(nursery, port=port)


async def behind(relay: Peer, name: str, nursery: trio.Nursery) -> Peer:
    """Start a node with a place at a relay."""
    peer = await Peer(name, Libp2pSettings(relays=[relay.way])).start(nursery)
    await until(lambda: peer.carrier.relayed_addresses)
    return peer


async def echoed(link: Link, said: bytes) -> None:
    with trio.fail_after(LIMIT_SECONDS):
        await link.send_frame(said)
        assert await link.receive_frame() == said


async def test_a_link_through_a_relay_works_and_the_relay_sees_nothing_of_it(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_on = bytearray()
    read = MuxedStream.read

    async def read_and_keep(stream: MuxedStream, n: int | None = None) -> bytes:
        data = await read(stream, n)
        if n == libp2p_relay.PASSED_ON_BYTES:
            passed_on.extend(data)
        return data

    monkeypatch.setattr(MuxedStream, "read", read_and_keep)
    accepted: list[Link] = []

    async def accept(link: Link) -> None:
        accepted.append(link)
        while True:
            await link.send_frame(await link.receive_frame())

    relay = await relay_of(nursery)
    settings = Libp2pSettings(relays=[relay.way])
    hidden = await Peer("hidden", settings).start(nursery, accept)
    [address] = await until(lambda: hidden.carrier.relayed_addresses)
    assert address == circuit_address(relay.address, hidden.id)
    assert address in hidden.listener.addresses
    dialling = Peer("dialling")
    link = await dialling.carrier.dial(address)
    assert link.relayed
    assert link.remote_address == address
    await echoed(link, MARKER)
    for _ in range(8):
        await echoed(link, bytes(500_000))
    [far] = accepted
    assert far.relayed
    assert far.channel_binding == link.channel_binding
    assert len(passed_on) > 2 * 8 * 500_000
    assert MARKER[:37] not in passed_on
    assert b"/klp/1.0.0" not in passed_on
    await link.aclose()
    await until(lambda: not relay.carrier._node.relay_server._circuits)  # type: ignore[union-attr]


async def test_circuits_to_one_peer_end_one_by_one(nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery)
    hidden = await behind(relay, "hidden", nursery)
    [address] = hidden.carrier.relayed_addresses
    links = [await Peer(name).carrier.dial(address) for name in ("a", "b", "c")]
    await links[0].aclose()
    links[1].connection.abort()  # type: ignore[attr-defined]
    for turn in range(3):
        await echoed(links[2], b"still here %d" % turn)
    await links[2].aclose()


async def test_two_nodes_behind_one_relay_reach_each_other(nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery)
    a, b = await behind(relay, "a", nursery), await behind(relay, "b", nursery)
    for one, other in ((a, b), (b, a)):
        link = await one.carrier.dial(other.carrier.relayed_addresses[0])
        await echoed(link, b"hello")
        await link.aclose()
    assert len([c for c in relay.host.connections if c.peer_id == a.id]) == 1, (
        "the one to the relay is shared"
    )


# what a relay refuses


async def refused(relay: Peer, name: str, *, status: str) -> None:
    with pytest.raises(KnodeError, match=status) as raised:
        await Peer("dialling").carrier.dial(circuit_address(relay.address, Peer(name).id))
    assert raised.value.code is Code.UNAVAILABLE


async def test_who_has_no_place_is_not_reached(nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery)
    await Peer("hidden").start(nursery)
    await refused(relay, "hidden", status="NO_RESERVATION")


async def test_a_place_ends_with_its_connection(nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery)
    async with trio.open_nursery() as short:
        hidden = await behind(relay, "hidden", short)
        connection = hidden.host.connections[0]
        short.cancel_scope.cancel()
    connection.abort()
    await until(lambda: not relay.host.connections)
    await refused(relay, "hidden", status="NO_RESERVATION")


async def test_only_who_may_gets_a_place(nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery)
    relay.carrier.may_reserve = lambda node_id: node_id == Peer("member").id
    stranger = await Peer("stranger", Libp2pSettings(relays=[relay.way])).start(nursery)
    await until(lambda: [f for e, f in stranger.log.told if e == "no place at the relay"])
    assert "PERMISSION_DENIED" in stranger.log.told[-1][1]["why"]
    assert stranger.carrier.relayed_addresses == []
    member = await behind(relay, "member", nursery)
    link = await Peer("anybody").carrier.dial(member.carrier.relayed_addresses[0])
    await echoed(link, b"the handshake of KLP decides")
    await link.aclose()


async def test_places_are_limited_and_are_kept_by_who_has_one(nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery, RelayLimits(reservations=1))
    first = await behind(relay, "first", nursery)
    second = await Peer("second", Libp2pSettings(relays=[relay.way])).start(nursery)
    await until(lambda: [f for e, f in second.log.told if "RESERVATION_REFUSED" in f.get("why", "")])
    client = first.carrier._node.relay_client  # type: ignore[union-attr]
    [connection] = client._reserved
    assert await client._reserve(connection) > 3500, "asked again"


async def test_circuits_are_limited(nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery, RelayLimits(circuits_a_place=1))
    hidden = await behind(relay, "hidden", nursery)
    link = await Peer("first").carrier.dial(hidden.carrier.relayed_addresses[0])
    await refused(relay, "hidden", status="RESOURCE_LIMIT_EXCEEDED")
    await link.aclose()
    server = relay.carrier._node.relay_server  # type: ignore[union-attr]
    await until(lambda: not server._circuits)
    link = await Peer("second").carrier.dial(hidden.carrier.relayed_addresses[0])
    await echoed(link, b"there is room again")
    await link.aclose()


async def test_half_of_the_circuits_are_for_those_who_may_have_a_place(nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery, RelayLimits(circuits_a_place=2))
    hidden = await behind(relay, "hidden", nursery)
    first = await Peer("first").carrier.dial(hidden.carrier.relayed_addresses[0])
    relay.carrier.may_reserve = lambda node_id: node_id == Peer("known").id
    await refused(relay, "hidden", status="RESOURCE_LIMIT_EXCEEDED")
    known = await Peer("known").carrier.dial(hidden.carrier.relayed_addresses[0])
    await echoed(known, b"there is room for it")
    await first.aclose()
    await known.aclose()


async def test_a_circuit_carries_so_many_bytes_and_no_more(nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery, RelayLimits(data_bytes=300_000))
    hidden = await behind(relay, "hidden", nursery)
    link = await Peer("dialling").carrier.dial(hidden.carrier.relayed_addresses[0])
    await echoed(link, bytes(100_000))
    with pytest.raises(LinkClosed):
        await echoed(link, bytes(100_000))
    await link.aclose()
    assert relay.carrier._node.relay_server.counters["data limit"] == 1  # type: ignore[union-attr]


async def test_a_circuit_lasts_so_long_and_no_longer(tenfold_clock: MockClock, nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery, RelayLimits(seconds=3))
    hidden = await behind(relay, "hidden", nursery)
    link = await Peer("dialling").carrier.dial(hidden.carrier.relayed_addresses[0])
    await echoed(link, b"now")
    with trio.fail_after(LIMIT_SECONDS), pytest.raises(LinkClosed):
        await link.receive_frame()
    await link.aclose()
    assert relay.carrier._node.relay_server.counters["time limit"] == 1  # type: ignore[union-attr]


async def test_nobody_asks_a_relay_through_a_relay(nursery: trio.Nursery) -> None:
    outer = await relay_of(nursery)
    inner = await Peer("inner", Libp2pSettings(relays=[outer.way], offers_relay=True)).start(nursery)
    await until(lambda: inner.carrier.relayed_addresses)
    asking = Peer("asking")
    node = await asking.carrier.start()
    connection = await node.dial(parse_peer_address(inner.carrier.relayed_addresses[0]))
    stream = await node.host.open_stream(connection, HOP)
    with trio.fail_after(LIMIT_SECONDS):
        await write_message(stream, HopMessage(type=HopMessage.RESERVE))
        answer = await read_message(stream, HopMessage, 4096)
    assert answer.status == Status.PERMISSION_DENIED
    connection.abort()


@pytest.mark.parametrize(
    "question", [HopMessage(type=HopMessage.STATUS), HopMessage(type=HopMessage.CONNECT), b"\xff\xff\xff\x0f"]
)
async def test_what_makes_no_sense_ends_a_stream_alone(nursery: trio.Nursery, question: Any) -> None:
    relay = await relay_of(nursery)
    node = await Peer("asking").carrier.start()
    connection = await node.host.dial(relay.way)
    stream = await node.host.open_stream(connection, HOP)
    with trio.fail_after(LIMIT_SECONDS):
        if isinstance(question, bytes):
            await stream.write(question)
        else:
            await write_message(stream, question)
        await stream.discard()
    hidden = await behind(relay, "hidden", nursery)
    await echoed(await Peer("dialling").carrier.dial(hidden.carrier.relayed_addresses[0]), b"works")


@pytest.mark.parametrize("answer", NO_MESSAGES)
async def test_a_relay_that_answers_nonsense_gives_no_link(nursery: trio.Nursery, answer: bytes) -> None:
    relay = await relay_of(nursery)

    async def nonsense(stream: MuxedStream) -> None:
        await stream.write(answer)
        await stream.discard()

    relay.host.handlers[HOP] = nonsense
    address = circuit_address(relay.address, Peer("hidden").id)
    with trio.fail_after(LIMIT_SECONDS), pytest.raises(KnodeError, match="does not answer") as raised:
        await Peer("dialling").carrier.dial(address)
    assert raised.value.code is Code.UNAVAILABLE


async def test_circuits_come_from_a_relay_that_was_asked_and_from_nobody_else(nursery: trio.Nursery) -> None:
    relay = await relay_of(nursery)
    hidden = await behind(relay, "hidden", nursery)
    node = await Peer("stranger").carrier.start()
    connection = await node.host.dial(hidden.way)
    stream = await node.host.open_stream(connection, STOP)
    agreed_bytes = stream.received_bytes
    with suppress(StreamEnded):
        await write_message(stream, StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=b"x" * 38)))
    with trio.fail_after(LIMIT_SECONDS):
        await stream.discard()
    assert stream.received_bytes == agreed_bytes
    connection.abort()


# places that are lost


async def test_a_place_is_asked_for_again_well_before_it_ends(
    tenfold_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_relay, "RESERVATION_LONGEST_S", 2)
    relay = await relay_of(nursery)
    hidden = await behind(relay, "hidden", nursery)
    places = relay.carrier._node.relay_server._places  # type: ignore[union-attr]
    for _ in range(3):
        ends_at = places[hidden.id].ends_at
        await until(lambda ends_at=ends_at: places[hidden.id].ends_at > ends_at)
    link = await Peer("dialling").carrier.dial(hidden.carrier.relayed_addresses[0])
    await echoed(link, b"still there")
    await link.aclose()


async def test_a_relay_that_went_away_is_tried_again(tenfold_clock: MockClock, nursery: trio.Nursery) -> None:
    async with trio.open_nursery() as first:
        relay = await relay_of(first)
        port = relay.port
        hidden = await behind(relay, "hidden", nursery)
        first.cancel_scope.cancel()
    await relay.listener.aclose()
    await until(lambda: not hidden.carrier.relayed_addresses)
    relay = await relay_of(nursery, port=port)
    await until(lambda: hidden.carrier.relayed_addresses)
    link = await Peer("dialling").carrier.dial(hidden.carrier.relayed_addresses[0])
    await echoed(link, b"back again")
    await link.aclose()


# with other implementations


@asynccontextmanager
async def other_relay() -> Any:
    """A relay by py-libp2p."""
    async with other_host() as host:
        protocol = CircuitV2Protocol(host, allow_hop=True)
        async with background_trio_service(protocol):
            await protocol.event_started.wait()
            yield str(host.get_addrs()[0])


async def test_a_relay_of_another_implementation_serves_too(nursery: trio.Nursery) -> None:
    async with other_relay() as address:
        settings = Libp2pSettings(relays=[parse_peer_address(address)])
        hidden = await Peer("hidden", settings).start(nursery)
        [through] = await until(lambda: hidden.carrier.relayed_addresses)
        link = await Peer("dialling").carrier.dial(through)
        await echoed(link, MARKER)
        await link.aclose()
