"""One timer keeps all conversations alive and ends those whose peer has fallen silent."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import trio
from mesh_cell import (
    DEAD_AFTER_S,
    KEEPALIVE_S,
    Cell,
    MovableClock,
    SeededRandomness,
    key_of,
    until,
)
from trio.testing import MockClock

from knode.identity import KeyPair
from knode.klp.handshake import Established, Initiator, Introduction, Responder
from knode.klp.keepalive import Load
from knode.mesh.conversation import Conversation
from knode.mesh.heartbeat import Heartbeat
from knode.mesh.liveness import PeerState
from knode.transport.memory import MemoryLink, MemoryNetwork, MemorySettings

LOSSY = MemorySettings(delay_seconds=(0.2, 0.2), loss=0.02)


async def test_a_silent_peer_fails_three_seconds_after_its_last_word(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    for tenth in range(10):  # wherever in the beat it happens
        await trio.sleep(5 + tenth / 10)
        ended = a.conversation(b)
        cell.network.cut("a", "b")
        await ended.ended.wait()
        assert trio.current_time() - ended.liveness.heard_at == pytest.approx(DEAD_AFTER_S)
        assert a.peer(b).state is PeerState.FAILED
        assert a.peer(c).state is PeerState.ALIVE
        cell.network.heal("a", "b")
        await a.connected(b)


async def test_a_word_of_any_kind_is_a_sign_of_life(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    conversation = a.conversation(b)
    b.conversation(a).beat = lambda now, load: None  # type: ignore[method-assign]
    for _ in range(10):
        await b.ask(a, "test.echo", "I am here")
        await trio.sleep(DEAD_AFTER_S * 0.9)
    assert conversation.open
    await conversation.ended.wait()
    assert conversation.end_reason == "nothing heard for 3 s"


async def test_nodes_that_were_held_up_suspect_themselves_first(
    cell: Cell, autojump_clock: MockClock
) -> None:
    a, b = await cell.nodes("a", "b")
    conversation = a.conversation(b)
    for _ in range(3):
        await trio.sleep(KEEPALIVE_S * 2.5)
        autojump_clock.jump(60)  # the machine that both are on was suspended
    await trio.sleep(DEAD_AFTER_S * 2)
    assert a.conversation(b) is conversation


async def test_a_new_conversation_is_told_the_load_at_once(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    opened = trio.current_time()
    await until(lambda: a.peer(b).load is not None and b.peer(a).load is not None)
    assert trio.current_time() - opened < KEEPALIVE_S / 2


async def test_a_load_that_has_no_place_in_a_frame_ends_the_conversation_and_not_the_node(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    conversation = a.conversation(b)
    conversation.beat(trio.current_time(), Load(1 << 16, 0, 4, 0))
    await conversation.ended.wait()
    await a.connected(b)
    assert a.log.events("error") == []


async def fifty(network: MemoryNetwork, nursery: trio.Nursery) -> list[tuple[Conversation, Conversation]]:
    """A node with 49 peers: its conversations, each with the other end's."""
    pairs = []
    heartbeats = [
        Heartbeat(MovableClock(), KEEPALIVE_S, DEAD_AFTER_S, lambda: Load(0, 0, 1, 0)) for _ in range(2)
    ]

    async def keep(conversation: Conversation, heartbeat: Heartbeat) -> None:
        with heartbeat.keeping(conversation):
            await conversation.run()

    for heartbeat in heartbeats:  # the other ends' is one for all, and so as slow as that of a node with 49
        nursery.start_soon(heartbeat.run)
    for number in range(49):
        ends = await conversation_ends(network, nursery, f"peer{number}")
        for conversation, heartbeat in zip(ends, heartbeats, strict=True):
            nursery.start_soon(keep, conversation, heartbeat)
        pairs.append(ends)
    return pairs


async def conversation_ends(
    network: MemoryNetwork, nursery: trio.Nursery, host: str
) -> tuple[Conversation, Conversation]:
    """The two ends of a session between this node and `host`."""
    accepted, accepting = trio.open_memory_channel[MemoryLink](1)

    async def accept(link: MemoryLink) -> None:
        await accepted.send(link)
        await trio.sleep_forever()

    listener = await network.carrier(host).listen("", 0)
    nursery.start_soon(listener.serve, accept)
    near = await network.carrier("node").dial(listener.addresses[0])
    key, other, says = key_of("node"), key_of(host), Introduction(bytes(32), bytes(16), bytes(32))
    binding = near.channel_binding
    initiator = Initiator(key, says, expected_peer=other.public, channel_binding=binding, nonce=bytes(32))
    responder = Responder(other, says, admit=lambda hello: None, channel_binding=binding, nonce=bytes(32))
    proof, established = initiator.receive(responder.receive_hello(initiator.hello()))

    def conversation(link: MemoryLink, key: KeyPair, established: Established) -> Conversation:
        return Conversation(
            link,
            key,
            established,
            clock=MovableClock(),
            dead_after_s=DEAD_AFTER_S,
            admit=lambda established: None,
            deliver=lambda conversation, message: None,
        )

    far = conversation(await accepting.receive(), other, responder.receive_auth(proof))
    return conversation(near, key, established), far


async def test_of_49_peers_on_a_bad_network_the_dead_are_found_in_three_seconds_and_no_other(
    autojump_clock: MockClock,
) -> None:
    network = MemoryNetwork(SeededRandomness("network"), LOSSY)
    async with trio.open_nursery() as nursery:
        pairs = await fifty(network, nursery)
        states = set()
        for _ in range(1200):
            await trio.sleep(0.1)
            states |= {near.liveness.state(trio.current_time()) for near, _ in pairs}
        assert states == {PeerState.ALIVE}  # nobody was even suspected in two minutes
        assert all(near.open and far.open for near, far in pairs)
        for number, (near, far) in enumerate(pairs):
            network.cut("node", f"peer{number}")
            silent_since = trio.current_time()
            await near.ended.wait()
            assert trio.current_time() - near.liveness.heard_at == pytest.approx(DEAD_AFTER_S)
            assert near.liveness.heard_at <= silent_since
            await far.ended.wait()
            assert trio.current_time() <= silent_since + DEAD_AFTER_S
            assert all(near.open and far.open for near, far in pairs[number + 1 :])
        nursery.cancel_scope.cancel()


async def test_many_peers_hear_less_often_and_few_each_second(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        heartbeat = Heartbeat(MovableClock(), KEEPALIVE_S, DEAD_AFTER_S, lambda: Load(0, 0, 1, 0))
        network, intervals = MemoryNetwork(SeededRandomness("network")), []
        with ExitStack() as kept:
            for number in range(40):
                near, _ = await conversation_ends(network, nursery, f"peer{number}")
                kept.enter_context(heartbeat.keeping(near))
                intervals.append(heartbeat.interval_s)
        nursery.cancel_scope.cancel()
    assert set(intervals[:16]) == {KEEPALIVE_S}
    assert intervals == sorted(intervals)
    assert intervals[19] == 1.25
    assert set(intervals[23:]) == {DEAD_AFTER_S / 2}
