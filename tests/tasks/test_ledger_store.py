"""The ledger on disk: what it shows, what survives, dumps, and who is told."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from ledger_commands import BEN, FIRST, PATH, Cell, InPlace, cell, id_of, new_task
from trio.testing import MockClock

from knode.consensus.state_machine import StateMachine
from knode.errors import Code, KnodeError
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedBlocking, SimulatedClock, SimulatedRandomness
from knode.tasks.lifecycle import State
from knode.tasks.records import Change
from knode.tasks.store import LedgerStore
from knode.world import World
from knode.world.real import real_world

DUMP = Path("/state/dump")


async def test_it_is_a_state_machine() -> None:
    async with cell() as c:
        machine: StateMachine = c.store
        assert machine.applied == 0


async def some_tasks(c: Cell) -> None:
    await c.do(c.begin(0, FIRST), *(c.submit(n, holders=(BEN,)) for n in range(1, 5)))
    await c.do(c.assign(1), c.assign(2), c.complete(1, operations=(b"a",), follow_ups=(new_task(b"more"),)))
    await c.do(c.fail(2), c.cancel(3))


async def test_what_was_applied_is_there_after_closing_and_opening(tmp_path: Path) -> None:
    world = real_world()
    store = await LedgerStore.open(world, tmp_path / "ledger.db")
    c = Cell(store, world)
    await some_tasks(c)
    shown = [await store.list(10), dict(store.live), store.totals, store.counts]
    assert [record.task.state for record in shown[0]] == [
        State.QUEUED,
        State.QUEUED,
        State.CANCELLED,
        State.QUEUED,
        State.SUCCEEDED,
    ]
    await store.aclose()
    again = await LedgerStore.open(world, tmp_path / "ledger.db")
    assert [await again.list(10), dict(again.live), again.totals, again.counts] == shown
    assert list(again.live) == list(shown[1])
    assert again._held.usage == store._held.usage
    await again.aclose()


async def test_tasks_are_found_by_the_start_of_their_id() -> None:
    async with cell() as c:
        await c.do(*(c.submit(n) for n in range(40)))
        ids = sorted(id_of(n).hex() for n in range(40))
        for id in ids:
            assert (await c.store.find(id)).task.id.hex() == id
            assert (await c.store.find(id[:9])).task.id.hex() == id
        for wrong in ("", "zz", "0" * 32, "0" * 33, ids[0] + "0"):
            with pytest.raises(KnodeError) as error:
                await c.store.find(wrong)
            assert error.value.code is Code.NOT_FOUND, wrong
        twin = next(a[0] for a, b in itertools.pairwise(ids) if a[0] == b[0])
        with pytest.raises(KnodeError) as error:
            await c.store.find(twin)
        assert error.value.code is Code.INVALID_ARGUMENT
        assert await c.store.task(id_of(99)) is None


async def test_lists_are_newest_first_and_end_before_they_are_too_long() -> None:
    async with cell() as c:
        for n in range(1, 6):
            await c.do(c.submit(n, to=BEN), c.complete(n, result=b"x" * 100))
        pages = [await c.store.list(2), await c.store.list(2, before=4), await c.store.list(2, before=2)]
        assert [[record.task.number for record in page] for page in pages] == [[5, 4], [3, 2], [1]]
        assert [r.task.number for r in await c.store.list(10, most_bytes=250)] == [5, 4]
        assert [r.task.number for r in await c.store.list(10, most_bytes=1)] == [5], "one at least"


async def test_listeners_hear_each_change_once_it_is_durable_in_order() -> None:
    async with cell() as c:
        heard: list[tuple[bytes, State | None, State | None]] = []

        def hear(changes: Sequence[Change]) -> None:
            heard.extend((x.id, x.before, x.after.state if x.after else None) for x in changes)
            assert c.store.applied > 0

        c.store.on_change.append(hear)
        await c.do(c.submit(1, to=BEN), c.complete(1), c.submit(2))
        await c.do(c.assign(77))
        assert heard == [
            (id_of(1), None, State.ASSIGNED),
            (id_of(1), State.ASSIGNED, State.SUCCEEDED),
            (id_of(2), None, State.QUEUED),
        ]


async def test_time_goes_on_where_an_earlier_leaders_clock_was_ahead(autojump_clock: MockClock) -> None:
    disk = SimulatedDisk()
    disk.make_folder(PATH.parent)
    clock = SimulatedClock()
    world = World(clock, SimulatedRandomness(0, "node"), disk, InPlace())
    store = await LedgerStore.open(world, PATH)
    c = Cell(store, world)
    assert store.time() == clock.wall()
    c.now = clock.wall() + 3_600_000
    await c.one(c.submit(1, to=BEN))
    await c.one(c.fail(1))
    await trio.sleep(2)
    assert store.time() == c.now + 2000
    assert store.live[id_of(1)].not_before < store.time(), "its wait is over, though no clock here says so"
    clock.skew_s = 7200
    assert store.time() == clock.wall()
    await store.aclose()
    disk.close()


async def test_a_full_disk_applies_nothing_and_the_same_entries_apply_later() -> None:
    disk = SimulatedDisk()
    async with cell(disk) as c:
        await some_tasks(c)
        before = [c.store.totals, dict(c.store.live), dict(c.store._held.usage)]
        disk.fill()
        batch = [c.submit(50, new_task(b"x" * 100_000)), c.cancel(4)]
        with pytest.raises(KnodeError) as error:
            await c.do(*batch)
        assert error.value.code is Code.DISK_FULL
        assert [c.store.totals, c.store.live, c.store._held.usage] == before
        disk.free()
        outcomes = await c.do(*batch)
        assert [outcome.code for outcome in outcomes] == [None, None]
    disk.close()


async def test_a_cancelled_apply_that_had_begun_is_done_and_seen() -> None:
    async with cell() as c:
        at_work, go_on = trio.Event(), trio.Event()

        class Slow(InPlace):
            async def run(self, work):  # type: ignore[no-untyped-def]
                with trio.CancelScope(shield=True):
                    at_work.set()
                    await go_on.wait()
                return work()

        database = c.store._database
        database._world = World(c.world.clock, c.world.randomness, c.world.disk, Slow())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(c.do, c.submit(1))
            await at_work.wait()
            nursery.cancel_scope.cancel()
            go_on.set()
        assert c.store.applied == 1
        assert list(c.store.live) == [id_of(1)]


async def test_a_dump_restored_elsewhere_is_the_same_ledger() -> None:
    disk = SimulatedDisk()
    async with cell(disk) as c, cell() as other:
        await some_tasks(c)
        assert await c.store.dump(DUMP) == c.store.applied
        data = disk.read(DUMP, limit_bytes=2**20)
        other.world.disk.write(DUMP, data)
        heard: list[Change] = []
        await other.do(other.submit(4), other.submit(9))
        other.store.on_change.append(heard.extend)
        assert await other.store.restore(DUMP) == c.store.applied
        assert [other.store.totals, other.store.live, other.store.counts] == [
            c.store.totals,
            c.store.live,
            c.store.counts,
        ]
        assert await other.store.list(10) == await c.store.list(10)
        assert await other.store.operations() == await c.store.operations()
        assert {change.id: change.before for change in heard}[id_of(9)] is State.QUEUED
        await other.store.dump(DUMP)
        assert other.world.disk.read(DUMP, limit_bytes=2**20) == data
        await other.do(*(step for step in (other.assign(4), other.complete(4))))
    disk.close()


async def test_entries_are_applied_while_a_dump_of_one_moment_is_written(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knode.tasks.dump._CHUNK_BYTES", 1024)
    disk = SimulatedDisk()
    async with cell(disk) as c, cell() as other:
        await c.do(c.begin(0, FIRST), *(c.submit(n, to=BEN) for n in range(50)))
        blocking = SimulatedBlocking(SimulatedRandomness(1, "disk"), lambda: (0.01, 0.02))
        c.store._world = c.store._database._world = replace(c.world, blocking=blocking)
        totals_at = {c.store.applied: c.store.totals}
        dumped: list[int] = []

        async def dump() -> None:
            dumped.append(await c.store.dump(DUMP))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dump)
            number = 0
            while not dumped:
                await c.do(c.complete(number % 50, operations=(b"x" * 500,)), c.submit(100 + number))
                totals_at[c.store.applied] = c.store.totals
                number += 1
        assert number > 10
        # The first command may have had its turn before the view was opened.
        assert dumped[0] in list(totals_at)[:2]
        other.world.disk.write(DUMP, disk.read(DUMP, limit_bytes=2**20))
        assert await other.store.restore(DUMP) == dumped[0]
        assert other.store.totals == totals_at[dumped[0]]
        assert await c.store.sync() == max(totals_at)
    disk.close()


async def test_a_dump_that_is_cancelled_leaves_no_file_and_holds_nothing_up(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knode.tasks.dump._CHUNK_BYTES", 1024)
    disk = SimulatedDisk()
    async with cell(disk) as c:
        await c.do(c.begin(0, FIRST), *(c.submit(n, to=BEN) for n in range(50)))
        blocking = SimulatedBlocking(SimulatedRandomness(1, "disk"), lambda: (0.01, 0.02))
        c.store._world = c.store._database._world = replace(c.world, blocking=blocking)
        for after_s in (0.0, 0.02, 0.05, 0.1, 0.15):
            with trio.move_on_after(after_s) as scope:
                await c.store.dump(DUMP)
            assert scope.cancelled_caught
            assert not disk.exists(DUMP)
        assert await c.store.sync() == c.store.applied
        assert await c.store.dump(DUMP) == c.store.applied
    disk.close()


async def test_a_cleared_ledger_is_a_new_one_also_after_a_restart() -> None:
    disk = SimulatedDisk()
    async with cell(disk) as c, cell() as fresh:
        await some_tasks(c)
        heard: list[Change] = []
        c.store.on_change.append(heard.extend)
        before = dict(c.store.live)
        assert before
        await c.store.clear()
        assert (c.store.totals, c.store.live) == (fresh.store.totals, {})
        assert {change.id for change in heard} == set(before)
        await c.store.dump(DUMP)
        await fresh.store.dump(DUMP)
        assert disk.read(DUMP, limit_bytes=2**20) == fresh.world.disk.read(DUMP, limit_bytes=2**20)
    async with cell(SimulatedDisk.restored(disk.snapshot())) as again:
        assert again.store.applied == 0
        assert await again.store.list(10) == []


async def test_a_damaged_ledger_can_be_cleared_too() -> None:
    disk = SimulatedDisk()
    async with cell(disk) as c:
        await some_tasks(c)
        await c.store.sync()
        await c.store._database.read(lambda connection: connection.pragma("cache_size", 0))
        await c.store._database.read(lambda connection: connection.pragma("shrink_memory"))
        [path] = [
            p for p in (DUMP.parent / name for name in disk.list_folder(DUMP.parent)) if p.suffix == ".db"
        ]
        disk._volume.files[str(path)].content[:] = b"no database" * (disk.size(path) // 11)
        with pytest.raises(KnodeError) as caught:
            await c.store.list(10)
        assert caught.value.code is Code.HOME_DAMAGED
        await c.store.clear()
        assert (c.store.applied, await c.store.list(10), c.store.live) == (0, [], {})
        await c.do(c.submit(1))


async def test_a_dump_of_a_newer_knode_stops_and_one_of_an_older_is_to_be_sent_again() -> None:
    async with cell() as c:
        await some_tasks(c)
        await c.store.dump(DUMP)
        begin, version, rest = b"knode ledger ", 2, c.world.disk.read(DUMP, limit_bytes=2**20)[14:]
        for other, code in ((version - 1, Code.BAD_FRAME), (version + 1, Code.HOME_TOO_NEW)):
            c.world.disk.write(DUMP, begin + b"%d" % other + rest)
            with pytest.raises(KnodeError) as error:
                await c.store.restore(DUMP)
            assert error.value.code is code
        c.world.disk.write(DUMP, begin + b"%d" % version + rest)
        await c.store.restore(DUMP)


async def test_a_dump_that_is_damaged_anywhere_changes_nothing() -> None:
    async with cell() as c:
        await some_tasks(c)
        await c.store.dump(DUMP)
        good = c.world.disk.read(DUMP, limit_bytes=2**20)
        await c.one(c.submit(9))
        before = [c.store.totals, dict(c.store.live), await c.store.list(10)]
        step = max(1, len(good) // 60)
        bad = [good[:at] for at in range(0, len(good), step)]
        bad += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good), step)]
        bad += [good + b"x", good[:-1], b""]
        for data in bad:
            c.world.disk.write(DUMP, data)
            with pytest.raises(KnodeError) as error:
                await c.store.restore(DUMP)
            assert error.value.code in (Code.BAD_FRAME, Code.HOME_TOO_NEW)
            assert (error.value.code is Code.HOME_TOO_NEW) <= (data[:13] == b"knode ledger ")
            assert [c.store.totals, c.store.live, await c.store.list(10)] == before
        with pytest.raises(KnodeError) as error:
            await c.store.restore(Path("/state/none"))
        assert error.value.code is Code.NOT_FOUND


async def test_a_dump_that_does_not_fit_on_the_disk_leaves_no_file() -> None:
    disk = SimulatedDisk()
    async with cell(disk) as c:
        await some_tasks(c)
        disk.fill()
        with pytest.raises(KnodeError) as error:
            await c.store.dump(DUMP)
        assert error.value.code is Code.DISK_FULL
        assert not disk.exists(DUMP)
        disk.free()
    disk.close()
