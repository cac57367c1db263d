from __future__ import annotations

from contextlib import suppress

import pytest
import trio
from mesh_cell import RECOVERY, Cell, MeshNode, Text, key_of, refused, until

from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.klp.messages import Context, Event, Failure, Request, Response
from knode.mesh import gossip
from knode.mesh.contact import Contact, sign_contact
from knode.mesh.gossip import (
    CONTACTS_TOPIC,
    PULL_S,
    QUEUE_OF_A_PEER,
    SETTLE_S,
    STATEMENTS_TOPIC,
    Objects,
    telling_order,
)
from knode.mesh.statements import Add, Role, SignedStatement, sign_statement
from knode.transport import LinkClosed


def same_rosters(*nodes: MeshNode) -> bool:
    return len({node.membership.roster.digest for node in nodes}) == 1


def adds(node: MeshNode, count: int) -> list[SignedStatement]:
    """Statements of the owner about members that nobody has ever seen."""
    owner, cell_id = node.owner_key, node.membership.roster.cell_id
    assert owner is not None
    return [
        sign_statement(
            owner, Add(owner.public.raw, cell_id, key_of(f"m{n}").public.raw, f"m{n}", Role.WORKER, 1)
        )
        for n in range(count)
    ]


async def test_a_third_node_learns_of_a_new_member_and_its_address(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    c = await cell.node("c")
    await c.join(await a.invite())
    took_s = await until(lambda: b.peers.peer(c.key.public).conversation is not None)
    assert took_s < 1
    assert same_rosters(a, b, c)
    assert {key: contact.data for key, contact in a.membership.contacts.items()} == {
        key: contact.data for key, contact in b.membership.contacts.items()
    }
    assert len(b.membership.contacts) == 3


async def test_a_new_address_reaches_also_who_is_cut_off_from_its_owner(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    cell.network.cut("a", "c")
    await until(lambda: a.peer(c).conversation is None and c.peer(a).conversation is None)
    await c.tell_contact("elsewhere:1", c.address)
    await until(
        lambda: a.membership.contacts[c.key.public.raw].body.addresses[0] == "elsewhere:1", within_s=1
    )
    cell.network.heal("a", "c")
    await until(lambda: a.peer(c).conversation is not None)
    assert b.peer(c).conversation is not None


async def test_what_happened_apart_is_the_same_everywhere_after(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await a.membership.set_role(a.member(b), Role.ADMIN)
    await until(lambda: same_rosters(a, b, c))
    cell.network.cut("a", "b")
    cell.network.cut("a", "c")
    await until(lambda: a.peer(b).conversation is None and a.peer(c).conversation is None)
    await a.membership.set_role(a.member(c), Role.VOTER)
    b.clock.moved_ms += 1
    await b.membership.set_role(b.member(c), Role.OBSERVER)
    assert not same_rosters(a, b)
    cell.network.heal("a", "b")
    cell.network.heal("a", "c")
    await until(lambda: same_rosters(a, b, c))
    assert a.member(c).role is c.member(c).role is Role.OBSERVER


async def test_a_revocation_arrives_before_anything_else_on_a_node_that_was_away(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await c.stop()
    await a.membership.revoke(a.member(b))
    seen: list[bool] = []

    async def look(call: object, body: Text) -> None:
        seen.append(b.key.public.raw in c.membership.roster.revoked)

    await c.start(cell.nursery)
    c.methods.add("test.look", Text, look)
    while a.peer(c).conversation is None:
        await a.peer(c).changed.wait()
    await a.ask_nothing(c, "test.look")
    assert seen == [True]
    await trio.sleep(5)
    assert c.peers.peer(b.key.public).conversation is None


async def test_a_revoked_nodes_links_are_closed_everywhere_within_seconds(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    conversation = b.conversation(c)
    await a.membership.revoke(a.member(b))
    took_s = await until(lambda: not conversation.open and b.peer(a).conversation is None)
    assert took_s < 2
    await trio.sleep(60)
    assert b.peer(a).conversation is b.peer(c).conversation is None
    await refused(Code.UNAVAILABLE, b.ask, c, "test.echo")
    assert c.ran == []
    assert b.key.public.raw not in c.peers._peers  # nothing of it is kept


async def test_a_revoked_node_that_is_here_hears_of_it_and_one_that_was_away_is_told_nothing(
    cell: Cell,
) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    cell.network.cut("a", "c")
    cell.network.cut("b", "c")
    await until(lambda: c.peer(a).conversation is c.peer(b).conversation is None)
    for node in (b, c):
        await a.membership.revoke(a.member(node))
    await trio.sleep(10)
    with pytest.raises(KnodeError) as caught:
        _ = b.membership.own
    assert caught.value.code is Code.KEY_REVOKED
    cell.network.heal("a", "c")
    cell.network.heal("b", "c")
    await until(lambda: c.peer(a).shuts_out)
    assert c.membership.own.name == "c"


async def test_a_rotated_key_s_links_are_closed_everywhere_within_seconds_and_the_new_key_s_open(
    cell: Cell,
) -> None:
    a, b, c, d = await cell.nodes("a", "b", "c", "d")
    cell.network.cut("b", "d")  # it hears of it from the others
    await until(lambda: b.peer(d).conversation is None)
    old, new = b.key, key_of("b's new key")
    conversations = [node.conversation(b) for node in (a, c)]
    await b.membership.rotate(new)
    took_s = await until(lambda: not any(conversation.open for conversation in conversations))
    assert took_s < 3
    assert await until(lambda: same_rosters(a, b, c, d)) < 3
    stranger = cell.stranger(old)
    for node in (a, c, d):
        await refused(Code.KEY_REVOKED, stranger.shake_hands, node)
    await b.stop()
    b.key = new
    await b.start(cell.nursery)
    assert await until(lambda: all(node.peer(b).conversation is not None for node in (a, c))) < 3
    assert b.membership.own == a.membership.roster.find("b") == c.membership.roster.find("b")
    assert b.membership.own.id == old.public
    assert await a.ask(b, "test.echo", "new key") == "new key"
    assert old.public.raw not in a.peers._peers


async def test_the_lost_owner_s_machine_is_shut_out_everywhere_within_seconds(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await b.membership.recover(RECOVERY, key_of("new owner"), lost=[b.member(a)])
    assert await until(lambda: a.peer(b).conversation is a.peer(c).conversation is None) < 3
    await until(lambda: same_rosters(b, c))
    d = await cell.node("d")
    await d.join(await b.invite(Role.ADMIN))
    await until(lambda: d.peer(c).conversation is not None)
    assert [m.name for m in c.membership.roster.members.values()] == ["b", "c", "d"]
    # Whom the lost machine adds gets in nowhere.
    spy = key_of("spy")
    await a.membership.add(
        [
            sign_statement(
                key_of("owner of a"),
                Add(
                    key_of("owner of a").public.raw,
                    a.membership.roster.era,
                    spy.public.raw,
                    "spy",
                    Role.ADMIN,
                    1,
                ),
            )
        ]
    )
    await refused(Code.UNKNOWN_PEER, cell.stranger(spy).shake_hands, c)
    await trio.sleep(60)
    assert a.peer(c).conversation is None


async def test_a_node_that_was_away_serves_no_revoked_key_that_finds_it_before_the_others_do(
    cell: Cell,
) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await b.stop()
    await c.stop()
    before = c.membership.roster.digest
    await a.membership.revoke(a.member(b))
    cell.network.cut("a", "c")
    await c.start(cell.nursery)
    assert c.membership.roster.digest == before
    stranger = cell.stranger(b.key)
    await stranger.shake_hands(c)  # it is a member, as far as this node knows
    await stranger.say(stranger.request(1, "test.echo", encode(Text("before the others come"))))
    await trio.sleep(0.1)
    cell.network.heal("a", "c")
    with suppress(LinkClosed):  # the link may be closed before the answer is on it
        answer = await stranger.answer(1)
        assert isinstance(answer, Failure)
        assert answer.code == Code.KEY_REVOKED
    assert await until(lambda: a.peer(c).conversation is not None) < SETTLE_S
    assert c.ran == []


async def test_a_node_that_reaches_nobody_else_serves_a_revoked_key_until_it_does(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await b.stop()
    await c.stop()
    await a.membership.revoke(a.member(b))
    cell.network.cut("a", "c")
    await c.start(cell.nursery)
    begun = trio.current_time()
    stranger = cell.stranger(b.key)
    await stranger.shake_hands(c)
    await stranger.say(stranger.request(1, "test.echo", encode(Text("nobody told it"))))
    assert isinstance(await stranger.answer(1), Response)
    assert trio.current_time() - begun >= SETTLE_S
    cell.network.heal("a", "c")
    await a.connected(c)
    with pytest.raises((KnodeError, LinkClosed)):
        await stranger.answer(2)
    assert c.ran == ["nobody told it"]


async def test_a_node_whose_only_link_broke_for_a_moment_does_not_wait_for_who_is_away(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await c.stop()
    await trio.sleep(60)
    cell.network.break_links("a")
    await until(lambda: b.peer(a).conversation is None)
    begun = trio.current_time()
    assert await b.ask(a, "test.echo", "at once") == "at once"
    assert trio.current_time() - begun < SETTLE_S


async def test_what_a_revoked_node_still_says_is_refused(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    stranger = cell.stranger(b.key)
    await stranger.shake_hands(a)
    await a.membership.revoke(a.member(b))
    await stranger.say(stranger.request(1, "test.echo", encode(Text("too late"))))
    error = await refused(Code.KEY_REVOKED, stranger.answer, 1)
    assert error.message
    assert a.ran == []


async def test_revocations_are_told_first_and_what_an_admin_signed_last(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await a.membership.add(adds(a, 20))
    await a.membership.set_role(a.member(b), Role.ADMIN)
    await until(lambda: same_rosters(a, b))
    for member in list(b.membership.roster.members.values())[2:12]:
        await b.membership.set_role(member, Role.VOTER)
    await until(lambda: same_rosters(a, b))
    await a.membership.revoke(a.membership.roster.find("m7"))
    kinds = [
        "admin" if s.body.signer == b.key.public.raw else type(s.body).__name__
        for s in telling_order(a.membership.roster)
    ]
    assert kinds[:2] == ["Genesis", "Revoke"]
    assert kinds[-10:] == ["admin"] * 10
    assert "admin" not in kinds[:-10]


async def test_a_roster_that_is_larger_than_a_message_arrives_whole(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gossip, "ANSWER_BYTES", 4096)
    a, b = await cell.nodes("a", "b")
    await b.stop()
    await a.membership.add(adds(a, 100))
    await b.start(cell.nursery)
    await b.connected(a)
    assert same_rosters(a, b)
    assert len(b.membership.roster.members) == 102
    c = await cell.node("c")
    await c.join(await a.invite())
    await c.connected(a)
    assert len(gossip._packed([s.data for s in a.membership.roster.statements.values()])) > 3
    await until(lambda: same_rosters(a, c))


async def test_nothing_is_served_to_a_peer_that_keeps_its_news_to_itself(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    stranger = cell.stranger(b.key)
    await stranger.shake_hands(a, roster_digest=bytes(32))
    await stranger.say(stranger.request(1, "test.echo", encode(Text("before sync"))))
    with trio.move_on_after(PULL_S + 5):
        while True:
            pulls = [m for m in await stranger.hear_quietly() if isinstance(m, Request)]
            assert [pull.method for pull in pulls] in ([], ["roster.pull"])
    await trio.sleep(PULL_S)
    assert a.ran == []


async def test_a_flood_of_news_ends_its_session_and_nothing_else(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await b.stop()
    stranger = cell.stranger(b.key)
    await stranger.shake_hands(a)
    contacts = [
        sign_contact(b.key, Contact(b.key.public.raw, (f"h:{n}",), "0.1.0", n)).data for n in range(1, 200)
    ]
    flood = [Event(CONTACTS_TOPIC, Context(), encode(Objects((data,) * 20))) for data in contacts]
    assert len(flood) > QUEUE_OF_A_PEER * 2
    await stranger.say(*flood)
    await refused(Code.RATE_LIMITED, stranger.answer, 1)
    assert await c.ask(a, "test.echo", "fine") == "fine"
    assert a.gossip._waiting.total() == 0 or await until(lambda: a.gossip._waiting.total() == 0) < 5


async def test_statements_of_strangers_and_damaged_ones_change_nothing(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    before = a.membership.roster.digest
    stranger, spy = cell.stranger(b.key), key_of("spy")
    forged = Add(spy.public.raw, a.membership.roster.cell_id, spy.public.raw, "spy", Role.ADMIN, 1)
    damaged = next(iter(a.membership.roster.statements.values())).data[:-1] + b"\x00"
    await stranger.shake_hands(a)
    for data in (sign_statement(spy, forged).data, damaged, bytes(100)):
        await stranger.say(Event(STATEMENTS_TOPIC, Context(), encode(Objects((data,)))))
    await stranger.say(Event(STATEMENTS_TOPIC, Context(), b"no objects"))
    await trio.sleep(1)
    assert a.membership.roster.digest == before


@pytest.mark.parametrize("digest", [bytes(32), None])
async def test_both_sides_pull_at_once_without_waiting_for_each_other(
    cell: Cell, digest: bytes | None
) -> None:
    a, b = await cell.nodes("a", "b")
    cell.network.cut("a", "b")
    await until(lambda: a.peer(b).conversation is None and b.peer(a).conversation is None)
    await a.membership.add(adds(a, 3))
    if digest is not None:
        b.owner_key = a.owner_key
        await b.membership.add(adds(b, 5)[3:])
    cell.network.heal("a", "b")
    await until(lambda: a.peer(b).conversation is not None)
    begun = trio.current_time()
    await a.connected(b)
    await b.connected(a)
    assert trio.current_time() - begun < 1
    assert same_rosters(a, b)
