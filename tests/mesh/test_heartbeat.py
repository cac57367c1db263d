"""One timer keeps all conversations alive and ends those whose peer has fallen silent."""

from __future__ import annotations

import pytest
import trio
from mesh_cell import DEAD_AFTER_S, KEEPALIVE_S, Cell, until
from trio.testing import MockClock

from knode.klp.keepalive import Load
from knode.mesh.liveness import PeerState


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
