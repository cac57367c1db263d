"""What waits for a quorum: kept through restarts, and submitted again unchanged until its fate is known."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from memory_cell import Inline, Seeded
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.home.logging import log_to
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedClock
from knode.storage import Database
from knode.tasks import outbox as module
from knode.tasks.commands import NewTask
from knode.tasks.messages import SubmitTask
from knode.tasks.outbox import MIGRATIONS, Outbox
from knode.world import World

DAY_MS = 86_400_000
_numbers = itertools.count(1)


class Desk:
    """A node's disk, and the cell's answer to whatever is submitted from there."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self.world = World(SimulatedClock(), Seeded("desk"), self.disk, Inline())
        self.answer: KnodeError | None = KnodeError(Code.UNAVAILABLE, "no quorum")
        self.takes_s = 0.0
        self.tasks: dict[str, bytes] = {}
        """By key: what the cell knows already."""
        self.submitted: list[tuple[SubmitTask, bool]] = []
        self.lines: list[str] = []

    async def open(self) -> Outbox:
        self.database = await Database.open(self.world, Path("/node.db"), MIGRATIONS)
        outbox = Outbox(self.world, self.database, log_to(self.world, self.lines.append).logger)
        await outbox.load()
        return outbox

    async def submit(self, request: SubmitTask, is_cancelled: bool) -> bytes:
        self.submitted.append((request, is_cancelled))
        await trio.sleep(self.takes_s)
        if self.answer is not None:
            raise self.answer
        return self.tasks.get(request.key, request.id)

    def request(self, key: str = "", lives_ms: int = DAY_MS, size: int = 3) -> SubmitTask:
        task = next(_numbers).to_bytes(16, "big")
        new = NewTask("kExecutor:text", b"x" * size, (), b"", 0, 3)
        return SubmitTask(task, key or task.hex(), self.world.clock.wall() + lives_ms, new, ())


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    yield desk
    await desk.database.aclose()


async def test_what_is_kept_survives_a_restart_and_is_submitted_again_unchanged(
    autojump_clock: MockClock, desk: Desk, nursery: trio.Nursery
) -> None:
    outbox = await desk.open()
    first, second = desk.request("a"), desk.request("b")
    for request in (first, second):
        await outbox.keep(request)
    await desk.database.aclose()

    outbox = await desk.open()
    assert [row.id for row in outbox.rows()] == [second.id, first.id]
    nursery.start_soon(outbox.run, desk.submit)
    await trio.sleep(20)
    assert len(desk.submitted) > 4
    assert {request for request, _ in desk.submitted} == {first, second}
    assert all(row.is_pending and row.code == Code.UNAVAILABLE for row in outbox.rows())

    desk.answer = None
    outbox.wake()
    await trio.sleep(0.01)
    assert outbox.rows() == []
    await desk.database.aclose()
    assert (await desk.open()).rows() == []


async def test_a_refusal_ends_it_and_is_shown(
    autojump_clock: MockClock, desk: Desk, nursery: trio.Nursery
) -> None:
    outbox = await desk.open()
    request = desk.request("k")
    nursery.start_soon(outbox.run, desk.submit)
    await outbox.keep(request)
    await trio.sleep(1)
    desk.answer = KnodeError(Code.KEY_CONFLICT, "the key is another task's")
    outbox.wake()
    await trio.sleep(0.01)
    submitted = len(desk.submitted)
    await trio.sleep(100)
    assert len(desk.submitted) == submitted
    row = outbox.get(request.id)
    assert row is not None
    assert (row.is_pending, row.code, row.message) == (False, "KEY_CONFLICT", "the key is another task's")
    assert outbox.with_key("k") is None
    await desk.database.aclose()
    assert (await desk.open()).rows() == [row]


@pytest.mark.parametrize("code", [Code.NO_ELIGIBLE_NODE, Code.RATE_LIMITED, Code.UNKNOWN, Code.TIMEOUT])
async def test_what_may_be_better_later_leaves_it_pending(
    autojump_clock: MockClock, desk: Desk, nursery: trio.Nursery, code: Code
) -> None:
    outbox = await desk.open()
    desk.answer = KnodeError(code, "not now")
    nursery.start_soon(outbox.run, desk.submit)
    row = await outbox.keep(desk.request())
    await trio.sleep(300)
    assert outbox.rows()[0].is_pending
    assert outbox.get(row.id).code == code  # type: ignore[union-attr]
    desk.answer = None
    await trio.sleep(30)
    assert outbox.rows() == []


async def test_not_after_ends_it_and_a_day_later_it_is_forgotten(
    autojump_clock: MockClock, desk: Desk, nursery: trio.Nursery
) -> None:
    outbox = await desk.open()
    row = await outbox.keep(desk.request(lives_ms=60_000))
    nursery.start_soon(outbox.run, desk.submit)
    await trio.sleep(59)
    assert outbox.rows()[0].is_pending
    await trio.sleep(20)
    ended = outbox.get(row.id)
    assert ended is not None
    assert (ended.is_pending, ended.code) == (False, "EXPIRED")
    assert all(request.not_after == row.not_after for request, _ in desk.submitted)
    await trio.sleep(DAY_MS / 1000)
    outbox.wake()
    await trio.sleep(0.01)
    assert outbox.rows() == []


async def test_what_is_to_be_cancelled_says_so_when_it_is_submitted_again(
    autojump_clock: MockClock, desk: Desk, nursery: trio.Nursery
) -> None:
    outbox = await desk.open()
    request = desk.request()
    await outbox.keep(request)
    await outbox.cancel(request.id)
    await desk.database.aclose()
    outbox = await desk.open()
    desk.answer = None
    nursery.start_soon(outbox.run, desk.submit)
    await trio.sleep(1)
    assert desk.submitted == [(request, True)]


async def test_what_is_cancelled_while_it_is_submitted_is_cancelled(
    autojump_clock: MockClock, desk: Desk, nursery: trio.Nursery
) -> None:
    outbox = await desk.open()
    request = desk.request()
    desk.answer, desk.takes_s = None, 1.0
    await outbox.keep(request)
    nursery.start_soon(outbox.run, desk.submit)
    await trio.sleep(0.5)
    await outbox.cancel(request.id)
    await trio.sleep(5)
    assert desk.submitted == [(request, False), (request, True)]
    assert outbox.rows() == []
    with pytest.raises(KnodeError) as gone:
        await outbox.read(request.id)
    assert gone.value.code is Code.NOT_FOUND


async def test_what_the_cell_knew_by_another_id_is_found_by_this_one_as_long_as_its_key_lives(
    autojump_clock: MockClock, desk: Desk, nursery: trio.Nursery
) -> None:
    outbox = await desk.open()
    request, known = desk.request("a", lives_ms=60_000), bytes(range(16))
    await outbox.keep(request)
    assert outbox.task_of(request.id) == request.id
    desk.answer, desk.tasks["a"] = None, known
    nursery.start_soon(outbox.run, desk.submit)
    await trio.sleep(1)
    assert outbox.rows() == []
    await desk.database.aclose()
    outbox = await desk.open()
    assert outbox.task_of(request.id) == known
    assert outbox.settled_as(request.id.hex()[:31]) == {known}
    assert outbox.settled_as("ff") == frozenset()
    await trio.sleep(60)
    nursery.start_soon(outbox.run, desk.submit)
    await trio.sleep(1)
    assert outbox.task_of(request.id) == request.id
    await desk.database.aclose()
    assert (await desk.open()).settled_as("") == frozenset()


async def test_a_full_outbox_refuses(
    autojump_clock: MockClock, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = await desk.open()
    monkeypatch.setattr(module, "MAX_PENDING", 2)
    for _ in range(2):
        await outbox.keep(desk.request())
    with pytest.raises(KnodeError, match="2 tasks wait") as refused:
        await outbox.keep(desk.request())
    assert refused.value.code is Code.RATE_LIMITED
    monkeypatch.setattr(module, "MAX_PENDING", 9)
    monkeypatch.setattr(module, "MAX_PENDING_BYTES", 1000)
    with pytest.raises(KnodeError) as refused:
        await outbox.keep(desk.request(size=1000))
    assert refused.value.code is Code.RATE_LIMITED
    assert len(outbox.rows()) == 2


async def test_a_full_disk_keeps_nothing_and_loses_nothing(
    autojump_clock: MockClock, desk: Desk, nursery: trio.Nursery
) -> None:
    outbox = await desk.open()
    kept = await outbox.keep(desk.request())
    desk.disk.fill()
    with pytest.raises(KnodeError) as refused:
        await outbox.keep(desk.request(size=50_000))
    assert refused.value.code is Code.DISK_FULL
    nursery.start_soon(outbox.run, desk.submit)
    desk.answer = None
    await trio.sleep(5)
    assert [row.id for row in outbox.rows()] == [kept.id]
    desk.disk.free()
    await trio.sleep(60)
    assert outbox.rows() == []
