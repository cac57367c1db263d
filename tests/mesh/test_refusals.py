"""Who is not let in, by which name, and that nothing else is told or served."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest
import trio
from mesh_cell import Cell, MeshNode, Text, key_of, refused, until

from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.codec import encode
from knode.klp.frames import Kind
from knode.klp.keepalive import Keepalive, Load
from knode.klp.messages import Cancel, Context, Event, Failure
from knode.mesh import peers
from knode.mesh.gossip import CONTACTS_TOPIC
from knode.mesh.handshakes import ANSWERED_AT_ONCE, FAREWELLS_AT_ONCE, HANDSHAKE_S
from knode.mesh.member_log import LINES_A_MINUTE
from knode.mesh.peers import CONVERSATIONS_A_PEER
from knode.mesh.ticket import LIFETIME_MS
from knode.transport import LinkClosed


async def used(a: MeshNode, cell: Cell) -> KeyPair:
    ticket = await a.invite()
    await (await cell.node("friend")).join(ticket)
    return ticket.key


async def expired(a: MeshNode, cell: Cell) -> KeyPair:
    ticket = await a.invite()
    a.clock.moved_ms += LIFETIME_MS + 1
    return ticket.key


async def unknown(a: MeshNode, cell: Cell) -> KeyPair:
    return key_of("a ticket of nobody")


@pytest.fixture
def signatures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was signed and verified by anybody."""
    done: list[str] = []
    sign, verifies = KeyPair.sign, PublicKey.verifies
    monkeypatch.setattr(KeyPair, "sign", lambda key, data: done.append("sign") or sign(key, data))  # type: ignore[func-returns-value]
    monkeypatch.setattr(
        PublicKey,
        "verifies",
        lambda key, signature, data: done.append("verify") or verifies(key, signature, data),  # type: ignore[func-returns-value]
    )
    return done


async def test_a_node_that_is_no_member_is_refused_before_any_signature(
    cell: Cell, signatures: list[str]
) -> None:
    a = await cell.node("a", founder=True)
    signatures.clear()
    stranger = cell.stranger(key_of("stranger"))
    await refused(Code.UNKNOWN_PEER, stranger.shake_hands, a)
    assert signatures == []
    await refused_link_is_over(stranger)
    assert a.peers.refusals == {Code.UNKNOWN_PEER: 1}
    assert a.peers._peers == {}


async def refused_link_is_over(stranger: object) -> None:
    """Nothing but the one REFUSE frame came, and the link is closed."""
    link = stranger.link  # type: ignore[attr-defined]
    assert link.statistics.frames_received == 1
    with trio.fail_after(5), pytest.raises(LinkClosed):
        await link.receive_frame()


@pytest.mark.parametrize(
    ("make", "code"),
    [(used, Code.TICKET_USED), (expired, Code.TICKET_EXPIRED), (unknown, Code.TICKET_INVALID)],
)
async def test_a_ticket_that_is_no_good_is_refused_by_name(
    cell: Cell, make: Callable[..., KeyPair], code: Code
) -> None:
    a = await cell.node("a", founder=True)
    ticket = await make(a, cell)  # type: ignore[misc]
    stranger = cell.stranger(key_of("stranger"))
    error = await refused(code, stranger.shake_hands, a, ticket=ticket)
    assert "knode invite" in error.next_step
    await refused_link_is_over(stranger)
    assert a.peers.refusals[code] == 1


async def test_a_node_of_another_cell_is_refused(cell: Cell) -> None:
    a, other = await cell.node("a", founder=True), await cell.node("other", founder=True)
    stranger = cell.stranger(other.key)
    await refused(Code.WRONG_NETWORK, stranger.shake_hands, a, cell_id=other.membership.roster.cell_id)
    await refused_link_is_over(stranger)


async def test_a_revoked_member_is_refused_before_any_signature(cell: Cell, signatures: list[str]) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    await a.membership.revoke(a.member(b))
    await trio.sleep(5)
    signatures.clear()
    stranger = cell.stranger(b.key)
    await refused(Code.KEY_REVOKED, stranger.shake_hands, a)
    assert signatures == []
    await refused_link_is_over(stranger)


async def test_a_protocol_that_is_not_ours_is_refused(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    await refused(Code.UNSUPPORTED_VERSION, cell.stranger(b.key).shake_hands, a, versions=(2, 3))


async def test_a_key_without_its_private_half_gets_no_session(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    await trio.sleep(5)

    class Impostor:
        public = b.key.public
        sign = staticmethod(key_of("impostor").sign)

    stranger = cell.stranger(Impostor())  # type: ignore[arg-type]
    await stranger.shake_hands(a)
    await refused(Code.BAD_SIGNATURE, stranger.ask, 1, "test.echo", encode(Text("x")))
    assert a.ran == []
    assert a.peer(b).conversation is None


async def test_a_node_without_a_cell_lets_nobody_in(cell: Cell) -> None:
    a, lone = await cell.node("a", founder=True), await cell.node("lone")
    link = await cell.network.carrier("a").dial(lone.address)
    await refused(Code.UNAVAILABLE, a.peers.handshakes.with_member, link, lone.key.public)


async def test_two_hundred_handshakes_at_once_stay_bounded_and_shut_nobody_out(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    silent = []
    most = 0
    for n in range(200):
        silent.append(await cell.network.carrier(f"flood{n}").dial(a.address))
        most = max(most, len(a.peers.handshakes._answering))
    await trio.sleep(0.1)
    assert most <= ANSWERED_AT_ONCE
    assert len(a.peers.handshakes._answering) == ANSWERED_AT_ONCE
    assert a.peers.refusals[Code.RATE_LIMITED] == 200 - ANSWERED_AT_ONCE
    told = await silent[0].receive_frame()
    assert told[0] == Kind.REFUSE
    await b.start(cell.nursery)
    await b.connected(a)
    assert await b.ask(a, "test.echo", "let in") == "let in"
    await trio.sleep(HANDSHAKE_S + 5)
    assert a.peers.handshakes._answering == {}
    assert a.log.events("error") == []


async def test_a_handshake_of_noise_is_refused_and_the_node_lives(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    noise = random.Random(7)
    for n in range(60):
        link = await cell.network.carrier(f"noise{n}").dial(a.address)
        frame = bytes([noise.choice([1, 1, 1, 2, 3, 4, 5, 6, 0, 255])]) + noise.randbytes(
            noise.randrange(1200)
        )
        await link.send_frame(frame)
        await link.send_frame(b"\x03" + noise.randbytes(64))
    await trio.sleep(5)
    assert a.log.events("error") == []
    assert set(a.peers.refusals) <= {Code.BAD_FRAME, Code.NON_CANONICAL, Code.TOO_LARGE, Code.UNAVAILABLE}
    assert await b.ask(a, "test.echo", "lives") == "lives"


def anything(noise: random.Random, depth: int = 0) -> object:
    match noise.randrange(9 if depth < 3 else 6):
        case 0:
            return noise.randrange(-(2**63), 2**64)
        case 1:
            return noise.randbytes(noise.choice([0, 1, 16, 32, 64, 200]))
        case 2:
            return noise.choice(["", "a", "roster", "\u0000", "\U0001f600" * 9])
        case 3:
            return noise.choice([None, True, 1.5, float("nan")])
        case 4 | 5:
            return bytes(32)
        case _:
            return [anything(noise, depth + 1) for _ in range(noise.randrange(6))]


async def test_no_body_of_a_request_or_event_ends_the_node(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    noise, counter = random.Random(11), 0
    stranger = cell.stranger(b.key)
    await stranger.shake_hands(a)
    methods = [*a.methods._by_name, "", "no.such.method", "x" * 64]
    topics = [*a.peers._event_handlers, "progress", "", "no.such.topic"]
    for round_ in range(25):
        for name in methods:
            body = (
                noise.randbytes(noise.randrange(40))
                if round_ % 2
                else msgspec.msgpack.encode(anything(noise))
            )
            counter += 1
            stranger.say_later(stranger.request(counter, name, body, ttl_ms=noise.randrange(1, 2000)))
            stranger.say_later(Cancel(noise.randrange(1, counter + 9)))
        await stranger.say()
        stranger = await stranger.shake_again_if_refused(a)
        for name in topics:
            body = (
                noise.randbytes(noise.randrange(40))
                if round_ % 2
                else msgspec.msgpack.encode(anything(noise))
            )
            context = Context(correlation=noise.choice([b"", noise.randbytes(16)]))
            stranger.say_later(Event(name, context, body))
        stranger.say_later(Failure(noise.randrange(1, 2**64), "NO_SUCH_CODE", "\u001b[2J", "x" * 512))
        stranger.session.keep_alive(
            Keepalive(2**64 - 1, noise.choice([0, 2**64 - 1]), 2**64 - 1, Load(65535, 65535, 0, 100))
        )
        await stranger.say()
        stranger = await stranger.shake_again_if_refused(a)
    await trio.sleep(5)
    assert [line for line in a.log.lines if line[0] == "error" and line[2]["method"] != "test.fault"] == []
    c = await cell.node("c")
    await c.join(await a.invite())
    await c.connected(a)
    assert await c.ask(a, "test.echo", "lives") == "lives"


async def test_no_frame_of_a_session_ends_the_node(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    noise = random.Random(13)
    for _ in range(40):
        stranger = cell.stranger(b.key)
        await stranger.shake_hands(a)
        stranger.session.send(stranger.request(1, "test.echo", encode(Text("x"))))
        frame = bytearray(stranger.session.next_frame() or b"")
        if noise.random() < 0.5:
            frame[noise.randrange(len(frame))] ^= 1 << noise.randrange(8)
        else:
            frame = bytearray(noise.randbytes(noise.randrange(1, 400)))
        await stranger.link.send_frame(bytes(frame))
        await stranger.link.aclose()
    await trio.sleep(5)
    assert a.log.events("error") == []
    assert a.ran == []
    await b.start(cell.nursery)
    await b.connected(a)
    assert await b.ask(a, "test.echo", "lives") == "lives"


async def test_only_what_both_ends_share_is_told_in_a_refusal(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    stranger = cell.stranger(key_of("stranger"))
    with pytest.raises(KnodeError) as caught:
        await stranger.shake_hands(a)
    told = f"{caught.value.message} {caught.value.next_step}"
    for secret in (a.key.node_id, b.key.node_id, a.membership.roster.cell_id.hex(), a.member(b).name + "\n"):
        assert secret not in told


async def test_who_is_refused_again_and_again_does_not_set_the_logs_pace(cell: Cell) -> None:
    a = await cell.node("a", founder=True)
    for _ in range(40):
        await refused(Code.UNKNOWN_PEER, cell.stranger(key_of("stranger")).shake_hands, a)
    assert a.log.events("warning") == ["handshake refused"]
    assert a.peers.refusals == {Code.UNKNOWN_PEER: 40}
    await trio.sleep(61)
    await refused(Code.UNKNOWN_PEER, cell.stranger(key_of("stranger")).shake_hands, a)
    assert a.log.lines[-1][2]["left_out"] == 39


async def test_a_revoked_node_that_nobody_told_soon_dials_seldom(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    await a.membership.revoke(a.member(b))
    await b.start(cell.nursery)
    await trio.sleep(600)
    early = a.peers.refusals[Code.KEY_REVOKED]
    assert 5 < early < 20
    await trio.sleep(6000)
    assert a.peers.refusals[Code.KEY_REVOKED] - early < 45


async def test_who_never_closes_a_refused_link_holds_few_of_them(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    links = []
    for _ in range(200):
        links.append(await cell.network.carrier("stranger").dial(a.address))
        await links[-1].send_frame(b"no frame of the protocol")
    await trio.sleep(0.01)
    assert sum(not link.peer._is_gone for link in links) <= FAREWELLS_AT_ONCE
    assert await b.ask(a, "test.echo", "lives") == "lives"


async def test_a_session_that_an_error_ended_is_counted_at_both_ends(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.conversation(a).link.send_frame(b"no frame of the protocol")
    await until(lambda: a.peers.refusals[Code.BAD_FRAME] == 1)
    await until(lambda: b.peers.refusals[Code.BAD_FRAME] == 1)


async def test_links_over_the_limit_are_refused_by_name_and_counted(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    first = [cell.stranger(b.key, f"host{n}") for n in range(CONVERSATIONS_A_PEER + 2)]
    for stranger in first:
        await stranger.shake_hands(a)
        await trio.sleep(0.01)
    await refused(Code.RATE_LIMITED, first[0].answer, 1)
    assert a.peers.refusals == {Code.RATE_LIMITED: 2}
    monkeypatch.setattr(peers, "CONVERSATIONS_AT_ONCE", CONVERSATIONS_A_PEER)
    late = cell.stranger(b.key)
    await refused(Code.RATE_LIMITED, late.shake_hands, a)
    assert a.peers.refusals == {Code.RATE_LIMITED: 3}


async def test_requests_that_are_answered_with_an_error_are_counted(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    stranger = cell.stranger(b.key)
    await stranger.shake_hands(a)
    counted = {
        "test.admin": Code.NOT_ALLOWED,
        "no.such.method": Code.NOT_FOUND,
        "test.fault": Code.INTERNAL,
    }
    for counter, (method, code) in enumerate(counted.items(), start=1):
        answer = await stranger.ask(counter, method, encode(Text("x")))
        assert isinstance(answer, Failure)
        assert answer.code == code
    await stranger.ask(4, "test.echo", b"no body")
    old = await stranger.ask(4, "test.echo", encode(Text("x")))  # the same answer again: no new failure
    assert isinstance(old, Failure)
    assert a.peers.failures == dict.fromkeys(counted.values(), 1) | {Code.BAD_FRAME: 1}
    assert a.peers.refusals == {}


async def test_a_member_that_comes_and_goes_does_not_set_the_logs_pace(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await b.stop()
    for _ in range(100):
        stranger = cell.stranger(b.key)
        await stranger.shake_hands(a)
        await stranger.say(Event(CONTACTS_TOPIC, Context(), b"no contacts"))
        await stranger.link.aclose()
    await trio.sleep(5)

    def about_b() -> list[tuple[str, str, dict[str, object]]]:
        return [each for each in a.log.lines if each[0] != "debug" and each[2].get("peer") == b.key.node_id]

    assert LINES_A_MINUTE <= len(about_b()) <= 4 * LINES_A_MINUTE  # two rooms, at most two minutes
    await trio.sleep(61)
    await b.start(cell.nursery)
    await a.connected(b)
    assert about_b()[-1][1] == "peer connected"
    assert about_b()[-1][2]["left_out"] > 0
