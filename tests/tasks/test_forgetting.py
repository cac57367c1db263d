"""What the ledger forgets when it has too much, and that nothing is done twice for it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from ledger_commands import BEN, DAY_MS, FIRST, PATH, SECOND, START, Cell, cell, id_of
from msgspec.structs import replace

from knode.errors import Code
from knode.storage import Database
from knode.tasks import forgetting, ledger, tables
from knode.tasks.commands import Bundle, Complete, Fence, Submit
from knode.tasks.forgetting import REMEMBERED_MS
from knode.tasks.records import KEY_GRACE_MS
from knode.tasks.store import LedgerStore

DUMP = Path("/state/dump")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that soon has too much: more than four tasks, or ten bytes of operations."""
    monkeypatch.setattr(forgetting, "KEPT_TASKS", 2)
    monkeypatch.setattr(forgetting, "CROWDED_TASKS", 4)
    monkeypatch.setattr(forgetting, "KEPT_OPERATION_BYTES", 10)


async def done(c: Cell, number: int, *, key: str | None = None, operations: tuple[bytes, ...] = ()) -> None:
    await c.do(c.submit(number, key=key), c.assign(number), c.complete(number, operations=operations))
    c.now += 1000


async def kept(c: Cell) -> list[int]:
    ids = {id_of(number): number for number in range(100)}
    return sorted(ids[record.task.id] for record in await c.store.list(100))


async def places(c: Cell) -> list[int]:
    return [operation.place for operation in (await c.store.operations()).found]


async def test_of_too_many_tasks_the_oldest_without_keys_are_forgotten_and_none_is_done_again(
    small: None,
) -> None:
    async with cell() as c:
        await c.do(c.begin(0, FIRST), c.raise_level(2))
        first = c.submit(0)
        await done(c, 0)
        for number in range(1, 8):
            await done(c, number, key="mine" if number == 1 else None)
        assert (await c.one(c.forget())).count == 0, "each may be submitted again"
        c.now = START + REMEMBERED_MS + 3500
        assert (await c.one(c.forget())).count == 3
        assert await kept(c) == [1, 4, 5, 6, 7], "what has a key of its own stays"
        late = await c.one(first)
        assert late.code is Code.EXPIRED
        assert await kept(c) == [1, 4, 5, 6, 7]
        assert (await c.one(c.submit(1, key="mine"))).is_new is False
        assert (await c.one(c.submit(2, key="mine"))).task == id_of(1)
        assert (await c.one(c.submit(8))).is_new
        late_by_others = c.submit(9, not_after=first.not_after + 10_000)
        assert (await c.one(late_by_others)).is_new, "that it was done and forgotten is ruled out"
        assert (await c.one(c.forget())).count == 0
        c.now += 1000
        assert (await c.one(c.forget())).count == 1
        assert (await c.one(c.forget())).count == 0


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_is_submitted_again_whenever_is_one_task(small: None, seed: int) -> None:
    """Submits as nodes and their outboxes date them, late and repeated, while much is forgotten."""
    dice = random.Random(seed)
    async with cell() as c:
        await c.do(c.begin(0, FIRST), c.raise_level(2))
        sent: list[Submit] = []
        made = Counter[bytes]()
        forgotten = 0
        for number in range(120):
            c.now += dice.choice((0, 1_000, 60_000, REMEMBERED_MS // 2, REMEMBERED_MS, DAY_MS // 3))
            if dice.random() < 0.5 or not sent:
                wrong_ms = dice.choice((0, 0, -60_000, 60_000))  # the submitter's clock
                sent.append(c.submit(number, to=BEN, not_after=c.now + DAY_MS + wrong_ms))
                if dice.random() < 0.3:
                    continue  # its first try is lost, or very late
                submit = sent[-1]
            else:
                submit = dice.choice(sent[-6:])
            outcome = await c.one(replace(submit, now=c.now))
            made[submit.id] += outcome.is_new
            assert outcome.code in (None, Code.EXPIRED)
            if outcome.is_new:
                fence = Fence(FIRST, submit.id, 1)
                await c.one(Complete(c.now, fence, BEN, Bundle(b"", (b"1234",) * dice.randrange(3))))
            forgotten += (await c.one(c.forget())).count
        assert forgotten > 10
        assert max(made.values()) == 1
        assert sum(made.values()) > len(sent) // 2


async def test_what_was_refused_as_forgotten_stays_so_wherever_the_ledger_is_moved(small: None) -> None:
    async with cell() as c, cell() as other:
        await c.one(c.raise_level(2))
        first = c.submit(0)
        for number in range(6):
            await done(c, number)
        c.now += REMEMBERED_MS
        await c.one(c.forget())
        await c.store.dump(DUMP)
        other.world.disk.write(DUMP, c.world.disk.read(DUMP, limit_bytes=2**20))
        await other.store.restore(DUMP)
        assert other.store.totals == c.store.totals
        assert (await other.one(first)).code is Code.EXPIRED


async def test_a_new_task_is_never_taken_for_a_forgotten_one_whatever_its_submitter_gave_it() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forgetting, "CROWDED_TASKS", 0)
        patch.setattr(forgetting, "KEPT_TASKS", 0)
        async with cell() as c:
            await c.one(c.raise_level(2))
            await c.do(c.submit(1, not_after=c.now + 30 * DAY_MS), c.cancel(1))
            await c.do(c.submit(2, not_after=c.now + 1), c.cancel(2))
            assert (await c.one(c.forget())).count == 1
            assert await kept(c) == [1], "were it forgotten, no new task could be told from it"
            c.now += 30 * DAY_MS
            assert (await c.one(c.forget())).count == 1
            assert (await c.one(c.submit(3))).is_new


async def test_the_oldest_operations_make_room_with_their_tasks(small: None) -> None:
    async with cell() as c:
        await c.do(c.begin(0, FIRST), c.raise_level(2))
        for number in range(4):
            await done(c, number, operations=(b"1234",))
        assert (await c.one(c.forget())).count == 0, "their tasks may be submitted again"
        c.now += REMEMBERED_MS
        assert (await c.one(c.forget())).count == 2
        assert (await places(c), await kept(c)) == ([3, 4], [2, 3])
        page = await c.store.operations()
        assert (page.first, page.since) == (3, START + 2000)
        assert c.store.totals.operation_bytes == 8
        await c.one(c.begin(1, SECOND))
        await done(c, 5, key="mine", operations=(b"12",))
        await done(c, 6, operations=(b"123456",))
        found = (await c.store.operations()).found
        assert [(o.place, o.incarnation, o.number) for o in found] == [
            (3, FIRST, 3),
            (4, FIRST, 4),
            (5, SECOND, 1),
            (6, SECOND, 2),
        ]
        c.now += REMEMBERED_MS
        assert (await c.one(c.forget())).count == 2
        await done(c, 7, operations=(b"1234567890",))
        c.now += REMEMBERED_MS
        assert (await c.one(c.forget())).count == 0, "the oldest one's task has a key that stands"
        c.now += DAY_MS + KEY_GRACE_MS
        assert (await c.one(c.forget())).count == 1 + 2
        assert (await places(c), await kept(c)) == ([7], [7])


async def test_old_operations_go_when_their_task_is_forgotten_and_not_before() -> None:
    async with cell() as c:
        await c.one(c.raise_level(2))
        await done(c, 1, operations=(b"a",))
        await done(c, 2, operations=(b"b",))
        c.now += forgetting.KEPT_OPERATIONS_MS - 1500
        with pytest.MonkeyPatch.context() as patch:
            assert not await c.store.has_operations_before(c.now - forgetting.KEPT_OPERATIONS_MS - 1000)
            assert await c.store.has_operations_before(c.now - forgetting.KEPT_OPERATIONS_MS + 1000)
            assert (await c.one(c.forget())).count == 0, "no task is forgotten for it"
            patch.setattr(forgetting, "KEPT_TASKS", 0)
            assert (await c.one(c.forget())).count == 2 + 1
            assert await places(c) == [2]
            c.now += 2000
            assert (await c.one(c.forget())).count == 1
        page = await c.store.operations()
        assert (page.found, page.first, page.since) == ((), 3, 0)


async def test_one_command_forgets_a_bounded_part(small: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forgetting, "KEPT_OPERATION_BYTES", 0)
        patch.setattr(forgetting, "TRIMMED_AT_ONCE", 3)
        patch.setattr(forgetting, "TRIMMED_BYTES_AT_ONCE", 10)
        async with cell() as c:
            await c.one(c.raise_level(2))
            await done(c, 1, operations=(b"x",) * 5)
            await done(c, 2, operations=(b"x" * 6,) * 3)
            c.now += REMEMBERED_MS
            counts = [(await c.one(c.forget())).count for _ in range(6)]
            assert counts == [3, 3, 1, 1, 0, 0]
            assert await places(c) == []
            patch.setattr(forgetting, "FORGOTTEN_AT_ONCE", 2)
            for number in range(3, 6):
                await done(c, number, operations=(b"x",))
            c.now += REMEMBERED_MS
            counts = [(await c.one(c.forget())).count for _ in range(3)]
            assert counts == [2, 1, 0]


async def test_on_the_first_feature_level_only_expired_keys_are_forgotten(small: None) -> None:
    async with cell() as c:
        for number in range(6):
            await done(c, number, operations=(b"1234",))
        c.now += REMEMBERED_MS
        assert (await c.one(c.forget())).count == 0
        await c.one(c.raise_level(2))
        assert (await c.one(c.forget())).count == 2 + 4


async def test_a_ledger_full_of_keys_says_so(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_TASKS", 6)
    async with cell() as c:
        await c.one(c.raise_level(2))
        for number in range(6):
            await done(c, number, key=f"key {number}" if number else None)
        refused = await c.one(c.submit(7))
        assert refused.code is Code.RATE_LIMITED
        assert "--key" in refused.next_step
        c.now += REMEMBERED_MS
        assert (await c.one(c.forget())).count == 1
        assert (await c.one(c.submit(7))).is_new


async def test_operations_are_read_in_pages_also_those_of_one_task_without_reading_all() -> None:
    async with cell() as c:
        await c.one(c.begin(0, FIRST))
        for number in range(4):
            await done(c, number, operations=(b"a" * 10, b"b" * 10))
        await c.one(c.begin(1, SECOND))
        await done(c, 5, operations=(b"c" * 10,))
        shown, after = list[int](), 0
        while True:
            page = await c.store.operations(after, most_bytes=25)
            assert len(page.found) <= 2
            shown += [operation.place for operation in page.found]
            if page.next is None:
                break
            after = page.next
        assert shown == list(range(1, 10))
        first = await c.store.operations(0, 1, task=id_of(2))
        assert ([o.place for o in first.found], first.next) == ([5], 5)
        rest = await c.store.operations(5, 1, task=id_of(2))
        assert ([o.place for o in rest.found], rest.next) == ([6], None)
        plan = await c.store._database.read(
            lambda connection: list(
                connection.execute(f"EXPLAIN QUERY PLAN {tables._OPERATIONS_OF}", (id_of(2), 0, 9))
            )
        )
        assert [line[-1] for line in plan] == [
            "SEARCH operation USING INDEX operation_by_task (task=? AND rowid>?)"
        ]


async def test_a_ledger_of_the_version_before_is_read() -> None:
    async with cell() as c:
        path = PATH.with_name("old.db")
        database = await Database.open(c.world, path, tables.MIGRATIONS[:1])
        await database.write(
            lambda connection: connection.execute(
                "INSERT INTO totals VALUES (1, 7, 8, 1, 0, zeroblob(32), 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0)"
            )
        )
        await database.aclose()
        opened = await LedgerStore.open(c.world, path)
        assert (opened.totals.applied, opened.totals.now, opened.totals.forgotten) == (7, 8, 0)
        await opened.aclose()
