"""The worker's limits, seen from a peer that keeps to no rule but the protocol's."""

from __future__ import annotations

import msgspec
import pytest
import trio
from memory_cell import COMMAND, Cell, Host
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.klp.codec import Decoder, encode
from knode.klp.messages import Context, Event
from knode.mesh.serving import PROGRESS_TOPIC
from knode.tasks.lifecycle import State
from knode.tasks.messages import Ran, Run, Stage
from knode.tasks.offers import OFFER_TOPIC
from knode.world import Monotonic


async def ask(caller: Host, other: Host, method: str, body: msgspec.Struct) -> bytes:
    peer = caller.node.peers.peer(other.node.key.public)
    return await peer.request(method, body, deadline=Monotonic(trio.current_time() + 250))


def run(number: int, line: str, *files: str, deadline_ms: int = 200_000) -> Run:
    return Run(number.to_bytes(16, "big"), COMMAND, line.encode(), files, deadline_ms)


async def test_more_than_fit_wait_in_their_order_and_more_than_may_wait_are_refused(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    attic = await cell.add("attic", tasks_running="2", tasks_queued="3")
    ended: list[int] = []
    refused: list[tuple[int, Code]] = []

    async def submit(number: int) -> None:
        try:
            await ask(desk, attic, "task.run", run(number, "sleep 10"))
            ended.append(number)
        except KnodeError as error:
            refused.append((number, error.code))

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(submit, number)
            await trio.sleep(0.1)
        load = attic.node.places.load
        assert (load.running, load.queued, load.capacity) == (2, 3, 2)
        await trio.sleep(3)
        seen = desk.node.peers.peer(attic.node.key.public).load
        assert seen is not None
        assert (seen.running, seen.queued, seen.capacity) == (2, 3, 2)
    assert (ended, refused) == ([0, 1, 2, 3, 4], [(5, Code.RATE_LIMITED)])
    assert attic.sandbox.most_at_once == 2
    assert attic.node.places.load.running == attic.node.places.load.queued == 0
    assert attic.attempts == []


async def test_a_task_whose_deadline_comes_in_the_queue_expires_without_running(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic", tasks_running="1")
    first = await desk.submit("sleep 20", on="attic")
    await cell.until(lambda: len(attic.sandbox.running) == 1)
    late = await desk.settle("say x", on="attic", deadline_s=5.0)
    assert late.state is State.EXPIRED
    await first.ended()
    assert first.state is State.SUCCEEDED
    assert attic.sandbox.most_at_once == 1


async def test_a_task_cancelled_in_the_queue_gives_its_place_back(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic", tasks_running="1", tasks_queued="1")
    first = await desk.submit("sleep 20", on="attic")
    await cell.until(lambda: len(attic.sandbox.running) == 1)
    second = await desk.submit("sleep 20", on="attic")
    await cell.until(lambda: attic.node.places.load.queued == 1)
    await desk.node.tasks.cancel(second)
    await cell.until(lambda: attic.node.places.load.queued == 0)
    third = await desk.submit("say third", on="attic")
    await third.ended()
    assert (first.state, third.output) == (State.SUCCEEDED, b"third")


async def test_one_task_asked_for_twice_at_once_runs_once(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    outcomes: list[object] = []

    async def submit() -> None:
        try:
            outcomes.append(
                Decoder[Ran](Ran).decode(await ask(desk, attic, "task.run", run(1, "sleep 5\nsay x")))
            )
        except KnodeError as error:
            outcomes.append(error.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(submit)
        nursery.start_soon(submit)
    assert outcomes == [Code.INVALID_ARGUMENT, Ran(b"x")]
    assert attic.sandbox.most_at_once == 1


async def test_files_that_were_never_sent_or_came_without_a_stream_are_refused(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    for method, body, code in (
        ("task.run", run(1, "list", "a"), Code.NOT_FOUND),
        ("task.stage", Stage(bytes(16), "a", 1), Code.INVALID_ARGUMENT),
        ("task.stage", Stage(bytes(16), "../a", 1), Code.BAD_FRAME),
        ("task.run", run(1, "list", "../../identity/node.key"), Code.BAD_FRAME),
        ("task.run", run(1, "list", deadline_ms=300_001), Code.BAD_FRAME),
    ):
        with pytest.raises(KnodeError) as caught:
            await ask(desk, attic, method, body)
        assert caught.value.code is code
    assert attic.attempts == []
    assert (await desk.settle("say x", on="attic")).output == b"x"


async def test_nonsense_in_offers_and_reports_costs_the_liar_its_link_at_most(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    task = await desk.submit("sleep 5\nsay x", on="attic")
    await cell.until(lambda: attic.sandbox.running != [])
    liar = attic.node.peers.peer(desk.node.key.public)
    for body in (b"", b"\xc1", b"\x91\xff", encode(["x"]), encode([2000, "text"])):
        for counter in range(1, 4):
            correlation = counter.to_bytes(16, "big")
            assert liar.conversation is not None
            liar.conversation.send(Event(PROGRESS_TOPIC, Context(correlation, b"", b""), body))
    await trio.sleep(1)
    liar.send_event(OFFER_TOPIC, b"\xc1", Context())
    await task.ended()
    assert (task.state, task.output) == (State.SUCCEEDED, b"x")
    await cell.until_whole()
    assert (await desk.settle("say again", on="attic")).output == b"again"


async def test_many_tasks_leave_no_trace_in_memory_or_on_disk(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    file = desk.file("a", b"x")

    async def one(number: int) -> None:
        lines = ["say x", "die 1", "break", "sleep 99"]
        task = await desk.submit(lines[number % 4], artifacts=(file,), on="attic", deadline_s=20.0)
        if number % 8 == 3:
            await trio.sleep(number % 5)
            await desk.node.tasks.cancel(task)
        await task.ended()

    for _ in range(3):
        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(one, number)
    await cell.until(lambda: attic.attempts == [])
    for host in (desk, attic):
        assert host.node.worker._folders._folders == {}
        assert not host.node.worker._watched
        assert host.node.tasks._scopes == {}
        assert host.node.places.load.running == host.node.places.load.queued == 0
    assert {task.state for task in desk.node.tasks.list()} == {
        State.SUCCEEDED,
        State.FAILED,
        State.EXPIRED,
        State.CANCELLED,
    }
