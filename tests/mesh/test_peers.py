from __future__ import annotations

import itertools

import trio
from mesh_cell import DEAD_AFTER_S, Cell, MeshNode, refused, until

from knode.errors import Code
from knode.klp.messages import Context, Event
from knode.mesh.bulletins import Bulletins
from knode.mesh.dialling import BACKOFF_FIRST_S, BACKOFF_LONGEST_S
from knode.mesh.liveness import PeerState
from knode.mesh.ways import Way
from knode.transport import Link


def links(node: MeshNode, other: MeshNode) -> int:
    return len(node.peer(other).conversations)


async def test_members_find_each_other_and_answer_requests(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    assert await a.ask(b, "test.echo", "hello") == "hello"
    assert await b.ask(c, "test.echo", "hello") == "hello"
    assert [m.name for m in c.membership.roster.members.values()] == ["a", "b", "c"]


async def test_each_side_knows_the_others_load_and_round_trip(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await a.ask(b, "test.echo", "one")
    await trio.sleep(3)
    load = a.peer(b).load
    assert load is not None
    assert (load.running, load.capacity) == (1, 4)
    rtt_s = a.conversation(b).rtt_s
    assert rtt_s is not None
    assert 0 < rtt_s < 0.01
    assert 0 < (await a.pinging.ping(a.peer(b)) or 0) < 0.01


async def test_both_dial_at_once_and_one_conversation_is_left_on_both_sides(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    for _ in range(5):
        cell.network.break_links("a")
        cell.network.break_links("b")
        await a.stop()
        await b.stop()
        async with trio.open_nursery() as starting:
            starting.start_soon(a.start, cell.nursery)
            starting.start_soon(b.start, cell.nursery)
        a.peers.dial_now(b.key.public)
        await a.connected(b)
        await b.connected(a)
        await a.peers._open(a.peer(b), Way("memory", b.address))
        await trio.sleep(3)
        assert links(a, b) == links(b, a) == 1
        assert a.conversation(b).established.session_id == b.conversation(a).established.session_id
        assert await a.ask(b, "test.echo", "once") == "once"
        assert await b.ask(a, "test.echo", "once") == "once"


async def test_two_links_opened_in_the_same_moment_become_one(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    before = a.log.events("info").count("peer connected")
    for conversation in (a.conversation(b), b.conversation(a)):
        conversation.close("by the test")
    await until(lambda: a.peer(b).conversation is None and b.peer(a).conversation is None)
    async with trio.open_nursery() as dialling:
        dialling.start_soon(a.peers._open, a.peer(b), Way("memory", b.address))
        dialling.start_soon(b.peers._open, b.peer(a), Way("memory", a.address))
    await trio.sleep(3)
    assert a.log.events("info").count("peer connected") == before + 2  # the test is about something
    assert links(a, b) == links(b, a) == 1
    assert a.conversation(b).established.session_id == b.conversation(a).established.session_id


async def test_a_lost_link_is_opened_again(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    for link in list(cell.network._links.values()):
        link.vanish("cut by the test")
    took_s = await until(lambda: a.peer(b).conversation is None) + await until(
        lambda: a.peer(b).conversation is not None
    )
    assert took_s < 1
    assert await a.ask(b, "test.echo", "again") == "again"


async def test_dials_back_off_with_jitter_and_reach_the_peer_when_it_is_back(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await cell.crash(b)
    dials: list[float] = []
    carrier = a.peers._carriers["memory"]
    dial = carrier.dial

    async def counted(address: str) -> Link:
        dials.append(trio.current_time())
        return await dial(address)

    carrier.dial = counted  # type: ignore[method-assign]
    await trio.sleep(300)
    pauses = [later - earlier for earlier, later in itertools.pairwise(dials)]
    assert min(pauses) >= BACKOFF_FIRST_S / 2
    assert max(pauses) <= BACKOFF_LONGEST_S * 1.5 + 0.1
    assert len(dials) < 45
    assert len({round(pause, 2) for pause in pauses[8:]}) > 5  # jitter
    await b.start(cell.nursery)
    assert await until(lambda: a.peer(b).state is PeerState.ALIVE, within_s=60) < BACKOFF_LONGEST_S * 1.5 + 1


async def test_an_address_that_is_told_while_others_do_not_answer_is_dialled_at_once(cell: Cell) -> None:
    a, b, _ = await cell.nodes("a", "b", "c")
    await trio.sleep(1)  # what is told later counts
    for node in (a, b):
        cell.network.cut(node.name, "nowhere")
        await node.tell_contact("nowhere:1")
    for node, other in ((a, b), (b, a)):
        key, known = other.key.public.raw, node.membership
        await until(lambda key=key, known=known: known.contacts[key].body.addresses == ("nowhere:1",))
    a.conversation(b).close("for the test")
    await trio.sleep(2)
    assert a.peer(b).conversation is None
    b.peers.discovered(a.key.node_id, ["nowhere:2"])
    await b.tell_contact()
    begun = trio.current_time()
    await a.connected(b)
    assert trio.current_time() - begun < 1, "a dial that nobody answers takes ten seconds"


async def test_a_link_that_ends_at_once_is_not_opened_in_a_hot_loop(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")

    def refuse(peer: object, conversation: object) -> None:
        conversation.close("by the test")  # type: ignore[attr-defined]

    a.peers.on_conversation.append(refuse)
    b.peers.on_conversation.append(refuse)
    opened = [event for event in a.log.events("info") if event == "peer connected"]
    a.conversation(b).close("by the test")
    await trio.sleep(60)
    again = [event for event in a.log.events("info") if event == "peer connected"]
    assert len(again) - len(opened) < 40


async def test_a_dead_peer_is_found_within_three_seconds_on_a_half_open_link(cell: Cell) -> None:
    for n in range(6):
        a, b = await cell.nodes(f"a{n}", f"b{n}")
        await trio.sleep(0.15 * n)
        cell.network.cut(a.name, b.name)
        begun = trio.current_time()
        peer = a.peer(b)
        await until(lambda peer=peer: peer.conversation is None)  # type: ignore[misc]
        assert trio.current_time() - begun <= DEAD_AFTER_S + 0.05
        assert peer.state is PeerState.FAILED
        assert "nothing heard for 3 s" in str(a.log.lines)
        await a.stop()
        await b.stop()


async def test_a_short_silence_makes_a_peer_suspect_and_then_alive_again(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    conversation = a.conversation(b)
    cell.network.cut("a", "b")
    await until(lambda: a.peer(b).state is PeerState.SUSPECT)
    cell.network.heal("a", "b")
    await until(lambda: a.peer(b).state is PeerState.ALIVE)
    assert a.conversation(b) is conversation


async def test_a_peer_that_says_good_bye_has_left_and_comes_back(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await b.peers.leave()
    for _ in range(20):  # for as long as it goes down, nobody dials it or is dialled by it
        assert a.peer(b).state in (PeerState.LEFT, PeerState.ALIVE)
        await trio.sleep(0.05)
    assert b.peer(a).conversation is None
    await b.stop()
    await trio.sleep(10)
    assert (a.peer(b).state, c.peer(b).state) == (PeerState.LEFT, PeerState.LEFT)
    await b.start(cell.nursery)
    await until(lambda: a.peer(b).state is PeerState.ALIVE)


async def test_leaving_survives_a_peer_whose_outbox_is_full(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    cell.network.cut("a", "b")
    for _ in range(2000):
        if a.peer(b).conversation is not None:
            a.conversation(b).send_or_close(Event("test", Context(), b"x" * 1000))
    await a.peers.leave()
    assert a.log.events("error") == []


async def test_a_restarted_peer_takes_over_from_its_former_link(cell: Cell) -> None:
    a, b = sorted(await cell.nodes("a", "b"), key=lambda node: node.key.public.raw)
    for early, late in ((b, a), (a, b)):  # the second time the former link is the one that both prefer
        for conversation in late.peer(early).conversations:  # nobody learns of the crash
            conversation.link.aclose = trio.lowlevel.checkpoint  # type: ignore[method-assign]
        cell.network.cut("a", "b")
        await late.stop()
        for listener in [each for each in cell.network._listeners.values() if each.host == late.name]:
            listener.close()
        cell.network.heal("a", "b")
        former, begun = early.conversation(late), trio.current_time()
        await late.start(cell.nursery)
        await late.connected(early)
        assert former.liveness.state(trio.current_time()) is PeerState.ALIVE  # the test is about something
        assert await late.ask(early, "test.echo", "new") == "new"
        assert await early.ask(late, "test.echo", "new", within_s=0.5) == "new"
        assert trio.current_time() - begun < 1


async def test_a_clock_that_jumps_by_an_hour_changes_nothing_between_members(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    session = a.conversation(b).established.session_id
    for jump_ms in (3_600_000, -7_200_000):
        a.clock.moved_ms += jump_ms
        await trio.sleep(10)
        assert await a.ask(b, "test.echo", "same") == await b.ask(a, "test.echo", "same")
        await a.tell_contact(f"moved:{a.clock.moved_ms % 1000 + 1}")
        c = await cell.node(f"c{jump_ms}")
        await c.join(await a.invite())  # its ticket is counted by the clock that jumped
        await until(lambda c=c: c.key.public.raw in b.membership.roster.members)  # type: ignore[misc]
    assert a.conversation(b).established.session_id == session
    ticket = await a.invite()
    a.clock.moved_ms += 3_600_000
    await refused(Code.TICKET_EXPIRED, (await cell.node("late")).join, ticket)


async def test_what_is_announced_reaches_those_who_are_here_and_those_who_come(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    heard: list[tuple[str, bytes]] = []
    b.peers.on_bulletin("test.offer", lambda key, body: heard.append(("b", body)))
    a.peers.announce("test.offer", b"one")
    a.peers.announce("test.offer", b"two")
    a.peers.announce("test.offer", b"two")
    await until(lambda: len(heard) == 2)
    c = await cell.node("c")
    c.peers.on_bulletin("test.offer", lambda key, body: heard.append(("c", body)))
    await c.join(await a.invite())
    await until(lambda: len(heard) == 3)
    assert heard == [("b", b"one"), ("b", b"two"), ("c", b"two")]


async def test_of_what_is_announced_nothing_counts_that_comes_after_what_is_later(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    heard: list[bytes] = []
    b.peers.on_bulletin("test.offer", lambda key, body: heard.append(body))
    told = Bulletins()
    one, two = told.replace("test.offer", b"one"), told.replace("test.offer", b"two")
    assert one is not None
    assert two is not None
    for message in (two, one):
        a.conversation(b).send(message)
    await trio.sleep(1)
    assert heard == [b"two"]
    await cell.crash(a)
    await a.start(cell.nursery)
    await a.connected(b)
    a.peers.announce("test.offer", b"of the next start")
    await trio.sleep(1)
    assert heard == [b"two", b"of the next start"]


async def test_what_is_announced_over_a_link_that_breaks_is_told_over_the_one_that_is_left(
    cell: Cell,
) -> None:
    a, b = await cell.nodes("a", "b")
    heard: list[bytes] = []
    b.peers.on_bulletin("test.offer", lambda key, body: heard.append(body))
    link = await cell.network.carrier("a").dial(b.listeners[0].addresses[0])
    a.peers._converse(link, await a.peers.handshakes.with_member(link, b.key.public))
    used = a.conversation(b)
    assert len(a.peer(b).conversations) == 2
    used.close("its line is dead")
    a.peers.announce("test.offer", b"one")
    await until(lambda: heard == [b"one"])


async def test_an_event_handler_that_fails_ends_the_session_and_not_the_node(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")

    def fail(key: object, body: bytes) -> None:
        raise ZeroDivisionError("a bug of a handler")

    b.peers.on_event("test.offer", fail)
    session = a.conversation(b).established.session_id
    a.peers.broadcast("test.offer", b"one")
    await until(lambda: a.peer(b).conversation is None)
    await a.connected(b)
    assert a.conversation(b).established.session_id != session
    assert b.log.events("error") == ["a message could not be taken"]
    assert await a.ask(b, "test.echo", "alive") == "alive"


async def test_links_to_one_peer_are_limited(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    strangers = [cell.stranger(b.key, f"host{n}") for n in range(12)]
    for stranger in strangers:
        await stranger.shake_hands(a)
        await trio.sleep(0.01)
        assert links(a, b) <= 5
    await trio.sleep(0.1)
    assert links(a, b) <= 4


async def test_a_node_that_is_not_running_can_open_nothing(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    b = await cell.node("b")
    ticket = await a.invite()
    await b.stop()
    await refused(Code.UNAVAILABLE, b.joining.join, ticket, "b", b.contact())
