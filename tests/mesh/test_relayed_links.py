"""Members that can only be reached through a relay, which is no member and learns nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from mesh_cell import MeshNode, RecordingLog, key_of

from knode.mesh.ways import Scope, scope_of_link
from knode.transport.libp2p_address import parse_peer_address
from knode.transport.libp2p_carrier import Libp2pCarrier, Libp2pListener, Libp2pSettings
from knode.world.real import real_world

PATIENCE_S = 60


async def listening(carrier: Libp2pCarrier, nursery: trio.Nursery) -> Libp2pListener:
    async def nobody(link: object) -> None:
        raise AssertionError("nobody speaks KLP to the relay")

    listener = await carrier.listen("127.0.0.1", 0)
    nursery.start_soon(listener.serve, nobody)
    return listener


@pytest.fixture
async def relay(nursery: trio.Nursery) -> str:
    """A libp2p relay that is no member of any cell; its address."""
    carrier = Libp2pCarrier(real_world(), key_of("relay"), RecordingLog(), Libp2pSettings(offers_relay=True))
    carrier.may_reserve = lambda _: True
    return (await listening(carrier, nursery)).addresses[0]


async def behind(
    relay: str, name: str, folder: Path, nursery: trio.Nursery, *, founder: bool = False
) -> MeshNode:
    """Start a node of which others know the way through the relay alone."""
    settings = Libp2pSettings(relays=[parse_peer_address(relay)])
    carrier = Libp2pCarrier(real_world(), key_of(name), RecordingLog(), settings)
    node = MeshNode(name, folder, {"libp2p": carrier}, host="127.0.0.1")
    if founder:
        await node.found()
    await node.start(nursery)
    with trio.fail_after(PATIENCE_S):
        while not carrier.relayed_addresses:  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.01)
    [node.address] = carrier.relayed_addresses
    if founder:
        await node.tell_contact()
    return node


async def test_a_cell_lives_behind_a_relay_from_the_first_ticket_on(
    relay: str, tmp_path: Path, nursery: trio.Nursery
) -> None:
    a = await behind(relay, "a", tmp_path, nursery, founder=True)
    b = await behind(relay, "b", tmp_path, nursery)
    c = await behind(relay, "c", tmp_path, nursery)
    with trio.fail_after(PATIENCE_S):
        for joining in (b, c):
            ticket = await a.invite()
            assert ticket.addresses == (a.address,)
            await joining.join(ticket)
        await b.connected(a, c)
        await c.connected(a, b)
        for one, other in ((a, b), (b, c), (c, a)):
            link = one.conversation(other).link
            assert link.relayed
            assert scope_of_link(link) is Scope.RELAYED
            assert await one.ask(other, "test.echo", "hello") == "hello"
