"""Addresses at which somebody else answers, nobody, or a liar: what dialling them costs and changes."""

from __future__ import annotations

import pytest
import trio
from mesh_cell import Cell, MeshNode, until

from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.klp.frames import refusal
from knode.klp.messages import Context, Event
from knode.klp.objects import Domain, sign
from knode.mesh.contact import MAX_ADDRESSES, Contact
from knode.mesh.dialling import BACKOFF_LONGEST_S, CLAIMED_ADDRESSES, DIALS_AT_ONCE
from knode.mesh.gossip import CONTACTS_TOPIC, Objects
from knode.mesh.handshakes import HANDSHAKE_S
from knode.mesh.liveness import PeerState
from knode.transport import Link
from knode.transport.memory import OPENING_SECONDS


class Dials:
    """Watches what a node dials."""

    def __init__(self, node: MeshNode) -> None:
        self.begun: list[str] = []
        self.under_way = 0
        self.most_at_once = 0
        self._carrier = node.peers._carriers["memory"]
        self._dial = self._carrier.dial
        self._carrier.dial = self._watched  # type: ignore[method-assign]

    async def _watched(self, address: str) -> Link:
        self.begun.append(address)
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            return await self._dial(address)
        finally:
            self.under_way -= 1


async def tell(of: MeshNode, *addresses: str, to: MeshNode) -> None:
    """Have `to` know other addresses of a member than before."""
    of.clock.moved_ms += 1000
    await to.membership.add_contacts([of.contact(*addresses)])


@pytest.mark.parametrize("answers", ["a third member", "the node that dials"])
async def test_where_another_node_answers_the_peer_has_refused_nothing(cell: Cell, answers: str) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    address = b.address
    await cell.crash(b)
    # Both machines have an interface of this address, or the peer was given another one meanwhile.
    await tell(b, a.address if answers == "the node that dials" else c.address, address, to=a)
    await trio.sleep(120)
    assert a.peers.refusals[Code.NOT_RECIPIENT] > 3
    assert a.peer(b).refusal is None
    assert not a.peer(b).shuts_out
    await b.start(cell.nursery)
    b.peers.dialling.follow = lambda peer, nursery: None  # type: ignore[method-assign]
    assert await until(lambda: a.peer(b).state is PeerState.ALIVE) < BACKOFF_LONGEST_S * 1.5 + 1


async def test_a_refusal_from_an_address_that_anybody_may_claim_is_not_the_peers(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await cell.crash(b)

    async def refuse(link: Link) -> None:
        await link.receive_frame()
        await link.send_frame(refusal(KnodeError(Code.KEY_REVOKED, "you are revoked, believe me")))
        await link.receive_frame()

    liar = await cell.network.carrier("liar").listen("", 0)
    cell.nursery.start_soon(liar.serve, refuse)
    a.peers.discovered(b.key.node_id, liar.addresses)
    await until(lambda: a.peers.refusals[Code.KEY_REVOKED] > 3)
    assert a.peer(b).refusal is None
    assert not a.peer(b).shuts_out


async def test_claimed_addresses_where_nobody_speaks_do_not_hold_up_the_true_one(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    true = "8.8.8.8:4747"  # what is claimed on the local network is tried before that
    await cell.crash(b)
    silent = [await cell.network.carrier(f"10.0.0.{n}").listen("", 4747) for n in range(CLAIMED_ADDRESSES)]
    for listener in silent:

        async def listen(link: Link) -> None:
            await trio.sleep_forever()

        cell.nursery.start_soon(listener.serve, listen)
    a.peers.discovered(b.key.node_id, [listener.addresses[0] for listener in silent])
    dials = Dials(a)
    await tell(b, true, to=a)
    a.peers.dial_now(b.key.public)
    begun = trio.current_time()
    await until(lambda: true in dials.begun)
    assert trio.current_time() - begun < 5


async def test_a_member_that_tells_only_dead_addresses_costs_a_bounded_number_of_dials(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await cell.crash(b)
    holes = [f"10.9.9.{n}:4747" for n in range(MAX_ADDRESSES)]
    for hole in holes:
        cell.network.cut("a", hole.split(":")[0])
    absurd = ["0.0.0.0:1", "[::]:1", "255.255.255.255:1", "224.0.0.1:1"]
    await tell(b, *absurd, *holes[len(absurd) :], to=a)
    dials = Dials(a)
    a.peers.dial_now(b.key.public)
    await trio.sleep(600)
    assert not set(absurd) & set(dials.begun)
    assert dials.most_at_once <= DIALS_AT_ONCE
    each_round_s = OPENING_SECONDS + BACKOFF_LONGEST_S / 2
    assert len(dials.begun) <= MAX_ADDRESSES * (600 / each_round_s + 6)
    assert len(dials.begun) > MAX_ADDRESSES * 10  # the test is about something
    assert await c.ask(a, "test.echo", "lives") == "lives"
    assert HANDSHAKE_S + OPENING_SECONDS < 60  # no round takes longer than a minute


async def test_an_address_of_another_member_in_a_contact_leads_to_that_member_alone(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await b.tell_contact(c.address)  # b says that it is where c is
    await trio.sleep(1)
    session = a.conversation(c).established.session_id
    a.conversation(b).close("by the test")
    await trio.sleep(60)
    assert a.peer(b).state is PeerState.ALIVE  # it dials, too
    assert a.conversation(c).established.session_id == session
    assert a.membership.contacts[c.key.public.raw].body.addresses == (c.address,)


async def test_a_member_speaks_for_its_own_address_and_agents_alone(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    heard: list[tuple[bytes, bytes]] = []
    a.peers.on_event("test.offer", lambda key, body: heard.append((key.raw, body)))
    true = a.membership.contacts[c.key.public.raw]
    older = c.contact("nowhere:1")  # signed by c, long ago
    c.clock.moved_ms += 1000
    await c.tell_contact("elsewhere:2")
    await until(lambda: a.membership.contacts[c.key.public.raw] is not true)
    newest = a.membership.contacts[c.key.public.raw]
    await b.stop()
    rogue = cell.stranger(b.key)
    await rogue.shake_hands(a)
    body = Contact(c.key.public.raw, ("mallory:1",), "0.1.0", newest.body.issued + 1)
    forged = sign(b.key, Domain.NODE, encode(body))
    for data in (forged, older.data):
        await rogue.say(Event(CONTACTS_TOPIC, Context(), encode(Objects((data,)))))
    await rogue.say(Event("test.offer", Context(), b"as c would say it"))
    await until(lambda: heard == [(b.key.public.raw, b"as c would say it")])
    await trio.sleep(5)
    assert a.membership.contacts[c.key.public.raw].data == newest.data
    assert "roster news not taken" in a.log.events("warning")
