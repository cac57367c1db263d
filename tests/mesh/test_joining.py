from __future__ import annotations

import msgspec
import pytest
import trio
from mesh_cell import Cell, MeshNode, key_of, refused, until

from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.klp.messages import Context, Event, Failure
from knode.mesh.gossip import CONTACTS_TOPIC, STATEMENTS_TOPIC, Objects
from knode.mesh.joining import Join
from knode.mesh.liveness import PeerState
from knode.mesh.peers import JOIN_S, JOINING_AT_ONCE
from knode.mesh.statements import Role
from knode.mesh.ticket import Ticket


async def test_both_ends_of_a_join_see_the_same_words(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    b = await cell.node("b")
    welcome = await b.join(await a.invite(Role.OBSERVER))
    assert (welcome.member.name, welcome.member.role) == ("b", Role.OBSERVER)
    assert len(welcome.words) == 4
    assert a.membership.invitations.words() == {b.key.public.raw: welcome.words}
    assert a.membership.roster == b.membership.roster


async def test_a_joined_node_is_a_peer_at_once_and_stays_one_after_a_restart(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    b = await cell.node("b")
    await b.join(await a.invite())
    await b.connected(a)
    assert await b.ask(a, "test.echo", "hello") == "hello"
    await a.connected(b)
    assert await a.ask(b, "test.echo", "hello") == "hello"
    await cell.crash(b)
    await b.start(cell.nursery)
    await b.connected(a)
    assert b.membership.own.name == "b"


async def test_a_second_node_of_the_same_name_gets_another(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    b = await cell.node("b", key=key_of("someone"))
    b.name = "a"
    assert (await b.join(await a.invite())).member.name == "a-2"


async def test_of_many_who_join_with_one_ticket_one_gets_in(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    ticket = await a.invite()
    outcomes: list[object] = []

    async def join(node: MeshNode) -> None:
        try:
            outcomes.append((await node.join(ticket)).member.name)
        except KnodeError as error:
            outcomes.append(error.code)

    nodes = [await cell.node(f"n{n}") for n in range(5)]
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(join, node)
    assert outcomes.count(Code.TICKET_USED) == 4
    assert len(a.membership.roster.members) == 2
    assert sum(node.membership.in_cell for node in nodes) == 1


async def test_a_join_that_is_cut_off_changes_nothing_here_and_is_repeated(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    b = await cell.node("b")
    ticket = await a.invite()

    def cut_off(new: object) -> None:
        for link in list(cell.network._links.values()):
            link.vanish("cut by the test")

    a.membership.changed.append(cut_off)
    error = await refused(Code.UNAVAILABLE, b.join, ticket)
    assert "cut off" in error.message
    assert "nobody can say" not in error.message
    assert "same ticket" in error.next_step
    assert not b.membership.in_cell
    assert b.key.public.raw in a.membership.roster.members
    a.membership.changed.remove(cut_off)
    assert (await b.join(ticket)).member.name == "b"
    await refused(Code.TICKET_USED, (await cell.node("c")).join, ticket)


async def test_a_cancelled_join_leaves_nothing_behind(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    for n in range(8):
        b = await cell.node(f"b{n}")
        ticket = await a.invite()
        with trio.move_on_after(0.001 * n):
            await b.join(ticket)
        await trio.sleep(2)
        if not b.membership.in_cell:
            assert b.peers._peers == {}
            await b.join(ticket)
        assert b.membership.roster.members[b.key.public.raw].name == b.name


async def test_the_second_address_is_tried_when_the_first_is_dead(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    b = await cell.node("b")
    ticket = await a.invite()
    both = msgspec.structs.replace(ticket, addresses=("nowhere:1", *ticket.addresses))
    assert (await b.join(both)).member.name == "b"
    c = await cell.node("c")
    none = msgspec.structs.replace(await a.invite(), addresses=("nowhere:1", "nowhere:2"))
    error = await refused(Code.UNAVAILABLE, c.join, none)
    assert "nowhere:1" in error.message
    assert "nowhere:2" in error.message
    assert "knode status" in error.next_step


async def test_a_ticket_leads_to_its_inviter_and_nobody_else(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    ticket = await a.invite()
    other = await cell.node("other", founder=True)
    b = await cell.node("b")
    lured = msgspec.structs.replace(ticket, addresses=(other.address,))
    await refused(Code.WRONG_NETWORK, b.join, lured)
    in_its_cell = msgspec.structs.replace(lured, cell=other.membership.roster.cell_id)
    await refused(Code.TICKET_INVALID, b.join, in_its_cell)
    assert not b.membership.in_cell


async def test_a_member_joins_no_second_cell(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await refused(Code.HOME_EXISTS, b.join, await a.invite())


async def test_the_inviter_hears_of_a_node_only_once_it_has_joined(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    ticket = await a.invite()
    stranger = cell.stranger(key_of("stranger"))
    await stranger.shake_hands(a, ticket=ticket.key)
    await trio.sleep(1)
    assert a.peers._peers == {}
    assert a.peers.peer(stranger.key.public).state is PeerState.FAILED


async def test_a_joining_node_may_join_and_nothing_else(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    ticket = await a.invite()
    stranger = cell.stranger(key_of("stranger"))
    await stranger.shake_hands(a, ticket=ticket.key)
    heard: list[bytes] = []
    a.peers.on_event("test.offer", lambda key, body: heard.append(body))
    for counter, method in enumerate(a.methods._by_name, start=1):
        if method != "roster.join":
            answer = await stranger.ask(counter, method, b"\x90")
            assert isinstance(answer, Failure)
            assert answer.code == Code.NOT_ALLOWED
    answer = await stranger.ask(99, "no.such.method")
    assert isinstance(answer, Failure)
    assert answer.code == Code.NOT_ALLOWED  # it does not even learn which methods there are
    contact = encode(Objects((b.contact().data,)))
    for topic in ("test.offer", CONTACTS_TOPIC, STATEMENTS_TOPIC):
        await stranger.say(Event(topic, Context(), contact))
    await trio.sleep(0.5)
    assert heard == []
    assert a.ran == []


async def test_a_joining_node_speaks_for_its_own_address_alone(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    ticket = await a.invite()
    stranger = cell.stranger(key_of("stranger"))
    await stranger.shake_hands(a, ticket=ticket.key)
    for counter, contact in enumerate((b.contact("evil:1").data, bytes(100)), start=1):
        answer = await stranger.ask(counter, "roster.join", encode(Join("stranger", contact)))
        assert isinstance(answer, Failure)
    answer = await stranger.ask(3, "roster.join", encode(["Not A Name", b.contact().data]))
    assert isinstance(answer, Failure)
    assert len(a.membership.roster.members) == 2
    assert a.membership.invitations.check(ticket.key.public.raw, b"").used_by is None


async def test_who_holds_a_ticket_and_does_not_join_is_let_go(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    stranger = cell.stranger(key_of("stranger"))
    await stranger.shake_hands(a, ticket=(await a.invite()).key)
    begun = trio.current_time()
    await until(lambda: not stranger.link.peer.is_open)  # type: ignore[attr-defined]
    # It is silent, so it is taken for dead even earlier.
    assert trio.current_time() - begun <= JOIN_S + 1
    assert a.peers._conversations == 0


async def test_who_holds_a_ticket_and_only_says_that_it_is_there_is_told_that_its_time_is_over(
    cell: Cell,
) -> None:
    a = await cell.node("a", founder=True)
    stranger = cell.stranger(key_of("stranger"))
    await stranger.shake_hands(a, ticket=(await a.invite()).key)
    begun = trio.current_time()

    async def be_there() -> None:
        while True:
            await stranger.keep_alive(1)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_there)
        await refused(Code.TIMEOUT, stranger.answer, 1)
        nursery.cancel_scope.cancel()
    assert JOIN_S <= trio.current_time() - begun <= JOIN_S + 1
    assert a.peers.refusals == {Code.TIMEOUT: 1}


async def test_a_ticket_without_its_secret_opens_nothing(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    ticket: Ticket = await a.invite()
    stranger = cell.stranger(key_of("stranger"))
    await refused(Code.TICKET_INVALID, stranger.shake_hands, a, ticket=key_of("another ticket"))

    class Thief:
        """Saw the public key of a ticket on the wire, and has not its secret."""

        public = ticket.key.public
        sign = staticmethod(key_of("thief").sign)

    await stranger.shake_hands(a, ticket=Thief())  # type: ignore[arg-type]
    await refused(Code.BAD_SIGNATURE, stranger.ask, 1, "roster.join")
    assert a.peers.refusals == {Code.TICKET_INVALID: 1, Code.BAD_SIGNATURE: 1}


async def test_one_ticket_shown_by_many_keys_takes_only_a_few_places(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    ticket = await a.invite()
    strangers = [cell.stranger(key_of(f"stranger {number}")) for number in range(JOINING_AT_ONCE + 5)]
    for stranger in strangers:
        await stranger.shake_hands(a, ticket=ticket.key)
    await trio.sleep(0.5)
    assert a.peers._joining == JOINING_AT_ONCE
    with pytest.raises(KnodeError) as told:
        await strangers[-1].ask(1, "roster.join", encode(Join("stranger", b.contact().data)))
    assert told.value.code is Code.RATE_LIMITED
    assert a.peers.refusals == {Code.RATE_LIMITED: 5}
    await until(lambda: a.peers._joining == 0)
    assert (await (await cell.node("c")).join(ticket)).member.name == "c"
