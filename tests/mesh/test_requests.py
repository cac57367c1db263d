from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator
from hashlib import sha256

import pytest
import trio
from mesh_cell import Cell, MeshNode, Text, refused, until

from knode.errors import Code, KnodeError, LocalError
from knode.klp import limits
from knode.klp.codec import encode
from knode.klp.messages import Cancel, Failure
from knode.mesh import peer as peer_module
from knode.mesh.methods import Call
from knode.mesh.peer import LOST_GRACE_S
from knode.mesh.serving import SERVED_A_PEER
from knode.mesh.ways import Way
from knode.world import Monotonic


def break_links(cell: Cell) -> None:
    for link in list(cell.network._links.values()):
        link.vanish("cut by the test")


async def chunks(count: int, size: int = 100_000) -> AsyncIterator[bytes]:
    for n in range(count):
        yield bytes([n % 256]) * size


def digest_of(count: int, size: int = 100_000) -> str:
    return sha256(b"".join(bytes([n % 256]) * size for n in range(count))).hexdigest()


class Asking:
    """A request in the background."""

    def __init__(
        self, cell: Cell, node: MeshNode, other: MeshNode, method: str, text: str = "", **more: object
    ) -> None:
        self.outcome: object = None
        self.scope = trio.CancelScope()
        cell.nursery.start_soon(self._ask, node, other, method, text, more)

    async def _ask(
        self, node: MeshNode, other: MeshNode, method: str, text: str, more: dict[str, object]
    ) -> None:
        try:
            with self.scope:
                self.outcome = await node.ask(other, method, text, **more)  # type: ignore[arg-type]
        except KnodeError as error:
            self.outcome = error.code

    async def ended(self) -> object:
        await until(lambda: self.outcome is not None)
        return self.outcome


async def test_a_request_survives_its_link_and_runs_once(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    asking = Asking(cell, a, b, "test.wait", "slow")
    await until(lambda: b.ran == ["slow"])
    for _ in range(3):
        break_links(cell)
        await trio.sleep(0.01)
        await until(lambda: a.peer(b).conversation is not None and b.peer(a).conversation is not None)
        await trio.sleep(1.1)
    b.release.set()
    assert await asking.ended() == "slow"
    assert b.ran == ["slow"]


async def test_an_answer_goes_to_the_link_that_asked_last_and_not_to_a_dead_one(cell: Cell) -> None:
    # The link of the smaller key is the one that both use.
    a, b = sorted(await cell.nodes("a", "b"), key=lambda node: node.key.public.raw)
    asking = Asking(cell, a, b, "test.wait", "slow")
    await until(lambda: b.ran == ["slow"])
    # For b the link lives on, half-open; a has lost it and asks again over another.
    dead = b.conversation(a)
    lost = a.conversation(b)
    lost.link.aclose = trio.lowlevel.checkpoint  # type: ignore[method-assign]
    lost.close("by the test")
    await lost.ended.wait()
    await a.peers._open(a.peer(b), Way("memory", b.address))
    await trio.sleep(0.1)
    assert dead.open
    b.release.set()
    begun = trio.current_time()
    assert await asking.ended() == "slow"
    assert trio.current_time() - begun < 0.1
    assert b.ran == ["slow"]


async def test_a_restarted_peer_leaves_the_fate_unknown_and_runs_nothing_twice(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    asking = Asking(cell, a, b, "test.wait", "slow")
    await until(lambda: b.ran == ["slow"])
    await cell.crash(b)
    await b.start(cell.nursery)
    assert await asking.ended() is Code.UNKNOWN
    await trio.sleep(5)
    assert b.ran == ["slow"]


async def test_a_lost_peer_leaves_the_fate_unknown_after_the_grace(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    asking = Asking(cell, a, b, "test.wait", "slow", within_s=200)
    await until(lambda: b.ran == ["slow"])
    await cell.crash(b)
    begun = trio.current_time()
    assert await asking.ended() is Code.UNKNOWN
    assert LOST_GRACE_S - 0.1 <= trio.current_time() - begun <= LOST_GRACE_S + 3.5


async def test_a_failed_request_holds_nothing_of_the_link_that_it_went_over(cell: Cell) -> None:
    # Each restart of a peer fails what it was asked: were the dead links kept by those errors, memory would
    # grow until a collection of all cycles, which comes seldom in a process that holds much.
    a, b = await cell.nodes("a", "b")
    asking = Asking(cell, a, b, "test.wait")
    await until(lambda: len(b.ran) == 1)
    gc.collect()
    gc.disable()
    try:
        used = weakref.ref(a.conversation(b))
        await cell.crash(b)
        await b.start(cell.nursery)
        assert await asking.ended() is Code.UNKNOWN
        await until(lambda: used() is None)
    finally:
        gc.enable()


async def test_a_peer_that_says_good_bye_leaves_the_fate_unknown_at_once(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    asking = Asking(cell, a, b, "test.wait", "slow", within_s=200)
    await until(lambda: b.ran == ["slow"])
    begun = trio.current_time()
    await b.peers.leave()
    assert await asking.ended() is Code.UNKNOWN
    assert trio.current_time() - begun <= 2


async def test_an_absent_peer_is_unavailable_at_once(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await cell.crash(b)
    await trio.sleep(10)
    begun = trio.current_time()
    await refused(Code.UNAVAILABLE, a.ask, b, "test.echo")
    assert trio.current_time() == begun


async def test_a_peer_that_was_lost_a_moment_ago_is_waited_for(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    break_links(cell)
    await until(lambda: a.peer(b).conversation is None)
    assert await a.ask(b, "test.echo", "back") == "back"


async def test_no_answer_in_time_is_a_timeout_and_stops_the_handler(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    begun = trio.current_time()
    await refused(Code.TIMEOUT, a.ask, b, "test.wait", "slow", within_s=2)
    assert trio.current_time() - begun == pytest.approx(2)
    await until(lambda: b.stopped == ["slow"])


async def test_what_has_no_time_left_is_not_sent(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    error = await refused(Code.TIMEOUT, a.ask, b, "test.echo", "late", within_s=0)
    assert "nothing was sent" in error.message
    await trio.sleep(1)
    assert b.ran == []


async def test_a_request_waits_no_longer_than_the_protocol_lets_it(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    begun = trio.current_time()
    await refused(Code.TIMEOUT, a.ask, b, "test.wait", within_s=1000)
    assert trio.current_time() - begun == pytest.approx(limits.MAX_TTL_MS / 1000, abs=0.1)


async def test_cancelling_reaches_the_other_side_and_stops_the_handler(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    asking = Asking(cell, a, b, "test.wait", "slow")
    await until(lambda: b.ran == ["slow"])
    asking.scope.cancel()
    await until(lambda: b.stopped == ["slow"], within_s=1)
    assert await a.ask(b, "test.echo", "the link is fine") == "the link is fine"


async def test_a_cancel_that_comes_right_behind_its_request_stops_it(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    stranger = cell.stranger(b.key)
    await b.stop()
    await stranger.shake_hands(a)
    await stranger.say(stranger.request(1, "test.wait", encode(Text("x"))), Cancel(1))
    with trio.fail_after(2):
        answer = await stranger.answer(1)
    assert isinstance(answer, Failure)
    assert answer.code == Code.CANCELLED


async def test_progress_arrives_before_the_answer(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    heard: list[bytes] = []
    assert await a.ask(b, "test.echo", "hello", on_progress=heard.append) == "hello"
    assert heard == [b"hello"]


async def test_progress_goes_on_over_the_next_link(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    heard: list[bytes] = []
    asking = Asking(cell, a, b, "test.wait", "slow", on_progress=heard.append)
    await until(lambda: heard == [b"begun"])
    break_links(cell)
    b.release.set()
    assert await asking.ended() == "slow"


async def test_too_many_requests_are_refused_by_name_and_leave_the_link_alone(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await cell.nodes("a", "b")
    conversation = a.conversation(b)
    monkeypatch.setattr(peer_module, "PENDING_AT_ONCE", 5)
    asked = [Asking(cell, a, b, "test.wait", str(n)) for n in range(5)]
    await until(lambda: len(b.ran) == 5)
    await refused(Code.RATE_LIMITED, a.ask, b, "test.echo")
    b.release.set()
    assert [await each.ended() for each in asked] == ["0", "1", "2", "3", "4"]
    assert a.conversation(b) is conversation


async def test_a_full_outbox_refuses_by_name_and_leaves_the_link_alone(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await cell.nodes("a", "b")
    conversation = a.conversation(b)
    monkeypatch.setattr(limits, "OUTBOX_MESSAGES", 0)
    await refused(Code.RATE_LIMITED, a.ask, b, "test.echo")
    monkeypatch.undo()
    assert a.conversation(b) is conversation
    assert await a.ask(b, "test.echo", "fine") == "fine"


async def test_one_peer_takes_only_its_share_of_a_node(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    asked = [Asking(cell, a, b, "test.wait", str(n)) for n in range(SERVED_A_PEER + 10)]
    await until(lambda: len(b.ran) == SERVED_A_PEER)
    await trio.sleep(0.5)
    assert [each.outcome for each in asked].count(Code.RATE_LIMITED) == 10
    assert await c.ask(b, "test.echo", "mine") == "mine"
    b.release.set()


async def test_a_request_that_is_too_large_is_not_sent(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await refused(Code.TOO_LARGE, a.ask, b, "test.echo", "x" * (limits.MAX_BODY_BYTES + 1))
    assert len(await a.ask(b, "test.echo", "x" * (limits.MAX_BODY_BYTES - 10))) == limits.MAX_BODY_BYTES - 10


async def test_an_answer_that_is_too_large_is_an_error_and_not_the_end_of_the_link(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    conversation = a.conversation(b)
    await refused(Code.TOO_LARGE, a.ask, b, "test.large", str(limits.MAX_BODY_BYTES))
    assert a.conversation(b) is conversation


async def test_a_method_that_fails_says_so_and_the_node_goes_on(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    error = await refused(Code.INTERNAL, a.ask, b, "test.fault")
    assert "ZeroDivisionError" not in error.message
    assert b.log.events("error") == ["a method failed"]
    assert await a.ask(b, "test.echo", "fine") == "fine"


async def test_data_come_with_a_request_and_arrive_whole(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    assert await a.ask(b, "test.stream", chunks=chunks(100)) == digest_of(100)
    assert await a.ask(b, "test.stream", chunks=chunks(0)) == digest_of(0)
    many = [Asking(cell, a, b, "test.stream", chunks=chunks(n)) for n in range(1, 9)]
    assert [await each.ended() for each in many] == [digest_of(n) for n in range(1, 9)]


async def test_a_request_whose_data_are_all_sent_waits_on_for_its_answer_when_a_better_link_comes(
    cell: Cell,
) -> None:
    a, b = await cell.nodes("a", "b")
    for asks, answers in ((a, b), (b, a)):
        asking = Asking(cell, asks, answers, "test.stream", "wait", chunks=chunks(3))
        await until(lambda answers=answers: bool(answers.ran))  # type: ignore[misc]
        former = asks.conversation(answers)
        await former_retired(asks, answers)
        await trio.sleep(5)
        assert asking.outcome is None
        answers.release.set()
        assert await asking.ended() == digest_of(3)
        await until(lambda former=former: not former.open)  # type: ignore[misc]


async def former_retired(asks: MeshNode, answers: MeshNode) -> None:
    """Open a link that both sides prefer to the one in use."""
    former = asks.conversation(answers)
    first, other = (asks, answers) if asks.key.public.raw < answers.key.public.raw else (answers, asks)
    await first.peers._open(first.peer(other), Way("memory", other.address))
    await until(lambda: asks.peer(answers).conversation is not former)


async def test_data_that_were_cut_off_are_unavailable_and_those_that_were_all_sent_unknown(
    cell: Cell,
) -> None:
    a, b = await cell.nodes("a", "b")

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000
            await trio.sleep(0.01)

    cut_off = Asking(cell, a, b, "test.stream", chunks=endless())
    all_sent = Asking(cell, a, b, "test.stream", "wait", chunks=chunks(1))
    await until(lambda: len(b.ran) == 1)
    begun = trio.current_time()
    break_links(cell)
    assert await cut_off.ended() is Code.UNAVAILABLE
    assert await all_sent.ended() is Code.UNKNOWN
    assert trio.current_time() - begun < 1


async def test_cancelling_an_upload_stops_both_sides_and_leaves_the_link(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    asking = Asking(cell, a, b, "test.stream", chunks=chunks(1000))
    await trio.sleep(0.001)
    asking.scope.cancel()
    await trio.sleep(1)
    assert b.ran == []
    assert await a.ask(b, "test.stream", chunks=chunks(3)) == digest_of(3)


async def test_an_error_of_the_data_is_the_askers_own(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")

    async def failing(error: Exception) -> AsyncIterator[bytes]:
        yield b"x"
        raise error

    await refused(Code.DISK_FULL, a.ask, b, "test.stream", chunks=failing(KnodeError(Code.DISK_FULL, "full")))
    with pytest.raises(OSError, match="broken disk"):
        await a.ask(b, "test.stream", chunks=failing(OSError("broken disk")))
    assert await a.ask(b, "test.stream", chunks=chunks(3)) == digest_of(3)


async def test_an_answer_of_a_former_boot_is_not_taken_for_one_of_this(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    asking = Asking(cell, a, b, "test.wait", "of the former boot")
    await until(lambda: len(b.ran) == 1)
    await cell.crash(a)
    await a.start(cell.nursery)
    await a.connected(b)
    heard: list[bytes] = []
    asking = Asking(cell, a, b, "test.wait", "of this boot", on_progress=heard.append)
    await until(lambda: len(b.ran) == 2)
    b.release.set()
    assert await asking.ended() == "of this boot"
    assert heard == [b"begun"]


async def test_a_method_that_fails_while_it_is_cancelled_does_not_end_the_node(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")

    async def stumble() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ZeroDivisionError("a bug in cleaning up")

    async def fault(call: Call, body: Text) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stumble)
            await trio.sleep_forever()

    b.methods.add("test.stumble", Text, fault)
    cancelled = Asking(cell, a, b, "test.stumble")
    await trio.sleep(1)
    cancelled.scope.cancel()
    await refused(Code.TIMEOUT, a.ask, b, "test.stumble", within_s=1)
    await trio.sleep(1)
    assert b.log.events("error") == ["a method failed"] * 2
    assert await a.ask(b, "test.echo", "lives") == "lives"


async def test_the_words_of_a_local_error_stay_here(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")

    async def fail(call: Call, body: Text) -> None:
        raise LocalError(Code.DISK_FULL, "no space left for /home/b/secret", "look into /home/b")

    b.methods.add("test.full", Text, fail)
    error = await refused(Code.DISK_FULL, a.ask, b, "test.full")
    assert "/home/b" not in str(error)
    [why] = [fields["why"] for _, event, fields in b.log.lines if event == "a request failed here"]
    assert "/home/b/secret" in why


async def test_only_the_roles_of_a_method_may_call_it(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    assert await a.ask(b, "test.admin", "by the founder") == "by the founder"
    await refused(Code.NOT_ALLOWED, b.ask, a, "test.admin")
    await refused(Code.NOT_FOUND, a.ask, b, "test.nothing")
    await refused(Code.NOT_ALLOWED, a.ask, b, "roster.join")


async def test_deadlines_are_the_callers(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    seen: list[Monotonic] = []

    async def note(call, body: Text) -> None:  # type: ignore[no-untyped-def]
        seen.append(call.deadline)

    b.methods.add("test.note", Text, note)
    await a.peer(b).request("test.note", Text(), deadline=Monotonic(trio.current_time() + 7))
    assert seen[0] - trio.current_time() == pytest.approx(7, abs=0.1)
