"""The rules of the ledger, one by one."""

from __future__ import annotations

import pytest
from ledger_commands import ANNA, BEN, CARL, DAY_MS, FIRST, SECOND, START, cell, given_to, id_of, new_task
from msgspec.structs import replace

from knode.consensus.messages import Entry, Kind
from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.tasks import forgetting, ledger
from knode.tasks.commands import LEVEL, MAX_BUNDLE_BYTES, MAX_OPERATION_BYTES, Expire, File, follow_up_id
from knode.tasks.lifecycle import State
from knode.tasks.records import KEY_GRACE_MS, NO_INCARNATION

# Submitting and keys.


async def test_a_submitted_task_waits_or_is_assigned_in_the_same_entry() -> None:
    async with cell() as c:
        queued, assigned = await c.do(c.submit(1), c.submit(2, to=BEN))
        assert (queued.code, queued.state, queued.attempt, queued.is_new) == (None, State.QUEUED, 0, True)
        assert (assigned.state, assigned.attempt, assigned.member) == (State.ASSIGNED, 1, BEN)
        assert list(c.store.live) == [id_of(1), id_of(2)]
        record = await c.store.task(id_of(2))
        assert record is not None
        assert record.task.fence == c.fence(2)
        assert record.asked == new_task()
        assert record.considered == given_to(BEN).considered
        assert record.task.deadline == START + DAY_MS


async def test_the_same_key_with_the_same_input_is_the_same_task_whatever_else_differs() -> None:
    async with cell() as c:
        await c.one(c.submit(1, key="k"))
        again = await c.one(c.submit(2, key="k", not_after=START + 5, to=BEN))
        assert (again.code, again.task, again.is_new, again.state) == (None, id_of(1), False, State.QUEUED)
        assert list(c.store.live) == [id_of(1)]
        await c.do(c.assign(1), c.complete(1))
        c.now = START + DAY_MS + KEY_GRACE_MS
        ended = await c.one(c.submit(3, key="k"))
        assert (ended.code, ended.task, ended.state) == (None, id_of(1), State.SUCCEEDED)


async def test_a_key_with_other_input_is_a_conflict_and_keys_are_per_submitter() -> None:
    async with cell() as c:
        await c.one(c.submit(1, key="k"))
        outcome = await c.one(c.submit(2, new_task(b"other"), key="k"))
        assert (outcome.code, outcome.task) == (Code.KEY_CONFLICT, id_of(1))
        with pytest.raises(KnodeError, match="asks for something else"):
            outcome.check()
        other = await c.one(c.submit(3, new_task(b"other"), key="k", by=BEN))
        assert (other.code, other.task) == (None, id_of(3))


async def test_a_submit_that_comes_after_its_time_is_refused_but_a_repeated_one_finds_its_task() -> None:
    async with cell() as c:
        late = c.submit(1, key="k", not_after=START)
        assert (await c.one(late)).code is Code.EXPIRED
        assert await c.store.task(id_of(1)) is None
        on_time = replace(late, not_after=START + 1)
        assert (await c.one(on_time)).is_new
        await c.do(c.assign(1), c.complete(1))
        c.now = START + 1000
        again = await c.one(replace(on_time, now=c.now))
        assert (again.code, again.task, again.state) == (None, id_of(1), State.SUCCEEDED)


async def test_a_key_is_free_again_after_its_time_and_the_grace_but_not_while_its_task_lives() -> None:
    async with cell() as c:
        await c.do(c.submit(1, key="k"), c.submit(2, new_task(deadline_ms=30 * DAY_MS), key="long"))
        await c.do(c.assign(1), c.complete(1))
        c.now = START + DAY_MS + KEY_GRACE_MS + 1
        fresh = await c.one(c.submit(3, new_task(b"other"), key="k"))
        assert (fresh.code, fresh.task, fresh.is_new) == (None, id_of(3), True)
        assert await c.store.task(id_of(1)) is None
        assert c.store.totals.kept == 0
        assert (await c.one(c.submit(4, new_task(b"other"), key="long"))).code is Code.KEY_CONFLICT


async def test_an_id_that_is_taken_is_refused() -> None:
    async with cell() as c:
        await c.one(c.submit(1, key="k"))
        assert (await c.one(c.submit(1, key="l"))).code is Code.KEY_CONFLICT
        assert (await c.one(c.submit(1, key="k", by=BEN))).code is Code.KEY_CONFLICT


async def test_a_late_repeat_by_id_finds_its_task_even_when_its_key_has_expired() -> None:
    async with cell() as c:
        submit = c.submit(1)
        await c.do(submit, c.assign(1), c.complete(1))
        c.now = START + 10 * DAY_MS
        again = await c.one(replace(submit, now=c.now))
        assert (again.code, again.state, again.is_new) == (None, State.SUCCEEDED, False)


async def test_a_key_cannot_be_held_longer_than_thirty_days() -> None:
    async with cell() as c:
        assert (await c.one(c.submit(1, not_after=START + 31 * DAY_MS))).code is None
        assert (await c.one(c.submit(2, not_after=START + 31 * DAY_MS + 1))).code is Code.INVALID_ARGUMENT


async def test_a_task_for_one_member_is_assigned_to_no_other() -> None:
    async with cell() as c:
        only = new_task(on=BEN)
        assert (await c.one(c.submit(1, only, to=CARL))).code is Code.INVALID_ARGUMENT
        await c.one(c.submit(1, only))
        assert (await c.one(c.assign(1, CARL))).code is Code.INVALID_ARGUMENT
        assert (await c.one(c.assign(1, BEN))).state is State.ASSIGNED


# Attempts and fences.


async def test_a_completion_takes_effect_once_and_is_acknowledged_as_often_as_it_is_repeated() -> None:
    async with cell() as c:
        await c.do(c.submit(1, to=BEN))
        complete = c.complete(1, operations=(b"a", b"b"), follow_ups=(new_task(b"next"),))
        for _ in range(3):
            outcome = await c.one(complete)
            assert (outcome.code, outcome.state) == (None, State.SUCCEEDED)
        assert [o.data for o in (await c.store.operations()).found] == [b"a", b"b"]
        assert [task.parent for task in c.store.live.values()] == [id_of(1)]
        record = await c.store.task(id_of(1))
        assert record is not None
        assert (record.result, record.asked) == (b"done", None)


async def test_a_stale_fence_changes_nothing() -> None:
    async with cell() as c:
        await c.do(c.submit(1, to=BEN), c.release(1), c.assign(1, CARL))
        before = c.store.live[id_of(1)]
        for stale in (
            c.complete(1, 1, operations=(b"x",)),
            c.complete(1, 3, by=CARL),
            c.complete(1, 2, by=CARL, incarnation=SECOND),
            c.complete(77),
            c.fail(1, 1),
            c.release(1, 1),
            c.release(77),
        ):
            outcome = await c.one(stale)
            assert outcome.code is Code.STALE_FENCE, stale
        assert c.store.live[id_of(1)] == before
        assert (await c.store.operations()).found == ()
        assert (await c.one(c.complete(1, 2, by=CARL))).code is None
        assert (await c.one(c.complete(1, 1))).code is Code.STALE_FENCE
        assert (await c.one(c.fail(1, 2, by=CARL))).code is Code.STALE_FENCE


async def test_who_was_not_assigned_can_neither_complete_nor_fail_it() -> None:
    async with cell() as c:
        await c.do(c.submit(1, to=BEN))
        assert (await c.one(c.complete(1, by=CARL))).code is Code.NOT_ALLOWED
        assert (await c.one(c.fail(1, by=CARL))).code is Code.NOT_ALLOWED
        assert c.store.live[id_of(1)].state is State.ASSIGNED
        await c.one(c.complete(1))
        assert (await c.one(c.complete(1, by=CARL))).code is Code.NOT_ALLOWED


async def test_a_failure_is_tried_again_after_a_growing_wait_until_attempts_are_used_up() -> None:
    async with cell() as c:
        await c.do(c.submit(1, new_task(attempts=3), to=BEN), c.fail(1))
        for attempt, wait in ((2, 1000), (3, 2000)):
            task = c.store.live[id_of(1)]
            assert (task.state, task.code, task.message) == (State.QUEUED, "AGENT_FAILED", "it broke")
            assert task.not_before == c.now + wait
            c.now += wait - 1
            assert (await c.one(c.assign(1))).code is Code.UNAVAILABLE
            c.now += 1
            outcome, _ = await c.do(c.assign(1), c.fail(1, attempt))
            assert outcome.attempt == attempt
        record = await c.store.task(id_of(1))
        assert record is not None
        assert (record.task.state, record.task.charged, record.task.code) == (State.FAILED, 3, "AGENT_FAILED")
        assert (await c.one(c.fail(1, 3))).code is None, "the acknowledgement may have been lost"


async def test_a_failure_that_is_not_retryable_ends_it() -> None:
    async with cell() as c:
        await c.do(c.submit(1, to=BEN))
        outcome = await c.one(c.fail(1, retryable=False))
        assert (outcome.code, outcome.state) == (None, State.FAILED)


async def test_a_wait_before_the_next_attempt_is_bounded() -> None:
    assert [ledger.retry_delay_ms(n) for n in (1, 2, 9, 10, 100)] == [1000, 2000, 256_000, 300_000, 300_000]


async def test_lost_attempts_are_charged_and_refused_ones_are_not() -> None:
    async with cell() as c:
        await c.do(c.submit(1, new_task(attempts=2), to=BEN))
        for attempt in (1, 2, 3, 4):
            outcome = await c.one(c.release(1, attempt, charged=False))
            assert outcome.state is State.QUEUED
            c.now = c.store.live[id_of(1)].not_before
            await c.one(c.assign(1))
        assert c.store.live[id_of(1)].charged == 0
        await c.do(c.release(1, 5), c.assign(1))
        outcome = await c.one(c.release(1, 6))
        assert outcome.state is State.FAILED
        record = await c.store.task(id_of(1))
        assert record is not None
        assert (record.task.code, record.task.charged) == (Code.UNAVAILABLE, 2)
        assert record.task.message == "the last of 2 attempts was lost: its node is gone"


async def test_attempts_that_nobody_takes_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_ATTEMPT", 4)
    async with cell() as c:
        await c.do(c.submit(1, new_task(attempts=2)))
        for attempt in (1, 2, 3, 4):
            c.now = c.store.live[id_of(1)].not_before
            _, outcome = await c.do(c.assign(1), c.release(1, attempt, charged=False))
        assert outcome.state is State.FAILED


async def test_only_a_queued_task_is_assigned() -> None:
    async with cell() as c:
        assert (await c.one(c.assign(1))).code is Code.NOT_FOUND
        await c.do(c.submit(1, to=BEN))
        assert (await c.one(c.assign(1, CARL))).code is Code.INVALID_ARGUMENT
        await c.one(c.complete(1))
        assert (await c.one(c.assign(1))).code is Code.INVALID_ARGUMENT


# Ends that no node reports.


@pytest.mark.parametrize("to", [None, BEN])
async def test_a_task_is_cancelled_once(to: bytes | None) -> None:
    async with cell() as c:
        assert (await c.one(c.cancel(1))).code is Code.NOT_FOUND
        await c.do(c.submit(1, to=to))
        assert (await c.one(c.cancel(1))).state is State.CANCELLED
        again = await c.one(c.cancel(1))
        assert (again.code, again.state) == (Code.INVALID_ARGUMENT, State.CANCELLED)
        assert (await c.one(c.complete(1))).code is Code.STALE_FENCE
        assert not c.store.live


@pytest.mark.parametrize("to", [None, BEN])
async def test_a_deadline_is_the_ledgers_and_not_that_of_who_says_so(to: bytes | None) -> None:
    async with cell() as c:
        await c.do(c.submit(1, new_task(deadline_ms=1000), to=to), c.submit(2, to=to))
        c.now = START + 999
        assert (await c.one(c.expire(1, 2, 3))).count == 0
        if to is not None:
            await c.do(c.release(1, charged=False))
        c.now = START + 1000
        assert (await c.one(c.expire(1, 2, 3))).count == 1
        assert (await c.one(c.expire(1, 2, 3))).count == 0
        assert list(c.store.live) == [id_of(2)]
        record = await c.store.task(id_of(1))
        assert record is not None
        assert (record.task.state, record.task.code) == (State.EXPIRED, Code.EXPIRED)
        last = "" if to is None else "; before that: its node is gone"
        assert record.task.message == f"its deadline passed{last}"


async def test_a_task_is_not_assigned_after_its_deadline() -> None:
    async with cell() as c:
        await c.do(c.submit(1, new_task(deadline_ms=1000)))
        c.now = START + 1000
        assert (await c.one(c.assign(1))).code is Code.EXPIRED


async def test_time_never_goes_back() -> None:
    async with cell() as c:
        c.now = START + 5000
        await c.one(c.submit(1, new_task(deadline_ms=1000)))
        c.now = START
        await c.one(c.submit(2, new_task(deadline_ms=1000)))
        assert c.store.now == START + 5000
        assert {task.deadline for task in c.store.live.values()} == {START + 6000}
        assert (await c.one(Expire(START, (id_of(1),)))).count == 0


# Bundles.


async def test_operations_are_numbered_without_gap_with_the_entrys_time() -> None:
    async with cell() as c:
        await c.do(c.begin(0, FIRST), c.submit(1, to=BEN), c.submit(2, to=BEN))
        await c.do(c.complete(1, operations=(b"a", b"b")))
        c.now += 7
        await c.do(c.complete(2, operations=(b"c",)))
        operations = (await c.store.operations()).found
        assert [(o.number, o.time - START, o.data) for o in operations] == [
            (1, 0, b"a"),
            (2, 0, b"b"),
            (3, 7, b"c"),
        ]
        assert {o.incarnation for o in operations} == {FIRST}
        assert [(o.task, o.attempt) for o in operations] == [(id_of(1), 1), (id_of(1), 1), (id_of(2), 1)]
        assert [o.number for o in (await c.store.operations(1, 1)).found] == [2]


async def test_follow_ups_are_the_parents_submitters_with_ids_that_follow_from_the_parent() -> None:
    async with cell() as c:
        await c.do(c.submit(1, to=BEN))
        wanted = (new_task(b"left", deadline_ms=5), new_task(b"right", on=CARL))
        await c.one(c.complete(1, follow_ups=wanted))
        ids = [follow_up_id(id_of(1), place) for place in (0, 1)]
        assert list(c.store.live) == ids
        left, right = c.store.live.values()
        assert (left.submitter, left.parent, left.depth, left.key) == (ANNA, id_of(1), 1, ids[0].hex())
        assert (left.deadline, right.deadline) == (START + 5, START + DAY_MS)
        record = await c.store.task(ids[1])
        assert record is not None
        assert record.asked == wanted[1]


async def test_a_follow_up_whose_id_someone_has_taken_gets_the_next() -> None:
    async with cell() as c:
        taken = follow_up_id(id_of(1), 0)
        await c.do(c.submit(1, to=BEN), replace(c.submit(2, by=CARL), id=taken))
        assert (await c.one(c.complete(1, follow_ups=(new_task(),)))).code is None
        assert list(c.store.live) == [taken, follow_up_id(id_of(1), 0, 1)]


async def test_a_follow_up_whose_key_its_submitter_has_used_gets_the_next() -> None:
    async with cell() as c:
        key = follow_up_id(id_of(1), 0).hex()
        await c.do(c.submit(1, to=BEN), c.submit(2, new_task(b"other"), key=key))
        assert (await c.one(c.complete(1, follow_ups=(new_task(),)))).code is None
        assert list(c.store.live) == [id_of(2), follow_up_id(id_of(1), 0, 1)]


async def test_follow_ups_go_so_deep_and_no_deeper() -> None:
    async with cell() as c:
        await c.one(c.submit(1))
        id = id_of(1)
        for depth in range(ledger.MAX_DEPTH + 1):
            assert c.store.live[id].depth == depth
            await c.one(replace(c.assign(1), task=id))
            complete = replace(c.complete(1, follow_ups=(new_task(),)), fence=c.store.live[id].fence)
            outcome = await c.one(complete)
            id = follow_up_id(id, 0)
        assert outcome.code is Code.TOO_LARGE
        assert (outcome.state, len(c.store.live)) == (State.ASSIGNED, 1), "nothing has changed"


async def test_a_bundle_takes_effect_whole_or_not_at_all() -> None:
    operations = (b"x" * MAX_OPERATION_BYTES,) * 2
    many = (b"x" * MAX_OPERATION_BYTES,) * (MAX_BUNDLE_BYTES // MAX_OPERATION_BYTES)
    with_file = new_task(files=(File("a.txt", 1, bytes(32)),))
    async with cell() as c:
        await c.do(c.submit(1, to=BEN))
        for refused, code in (
            (c.complete(1, operations=many), Code.TOO_LARGE),
            (c.complete(1, operations=operations, follow_ups=(with_file,)), Code.INVALID_ARGUMENT),
        ):
            assert (await c.one(refused)).code is code
            assert list(c.store.live) == [id_of(1)]
            assert (await c.store.operations()).found == ()
        assert (await c.one(c.complete(1, operations=many[1:]))).code is None


async def test_a_full_stream_of_operations_refuses_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_STREAM_BYTES", 10)
    async with cell() as c:
        await c.do(c.submit(1, to=BEN), c.submit(2, to=BEN), c.complete(1, operations=(b"12345678",)))
        assert (await c.one(c.complete(2, operations=(b"123",)))).code is Code.RATE_LIMITED
        assert (await c.one(c.complete(2, operations=(b"12",)))).code is None


# Limits and retention.


async def test_half_of_the_room_is_for_one_submitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_LIVE_TASKS", 6)
    async with cell() as c:
        assert [o.code for o in await c.do(*(c.submit(n) for n in range(4)))] == [
            None,
            None,
            None,
            Code.RATE_LIMITED,
        ]
        assert [o.code for o in await c.do(*(c.submit(n, by=BEN) for n in range(4, 8)))][-1] is (
            Code.RATE_LIMITED
        )
        assert (await c.one(c.submit(8, by=CARL))).code is Code.RATE_LIMITED
        assert (await c.one(c.submit(0))).code is None, "a known key takes no room"
        await c.one(c.cancel(0))
        assert (await c.one(c.submit(8, by=CARL))).code is None


async def test_the_bytes_of_inputs_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_LIVE_BYTES", 4000)
    async with cell() as c:
        assert (await c.one(c.submit(1, new_task(b"x" * 1900)))).code is None
        assert (await c.one(c.submit(2, new_task(b"x" * 100)))).code is Code.RATE_LIMITED
        await c.do(c.assign(1), c.complete(1))
        assert (await c.one(c.submit(2, new_task(b"x" * 100)))).code is None


async def test_follow_ups_need_room_but_for_the_parents_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_LIVE_TASKS", 4)
    async with cell() as c:
        await c.do(c.submit(1, to=BEN), c.submit(2))
        assert (await c.one(c.complete(1, follow_ups=(new_task(),) * 2))).code is Code.RATE_LIMITED
        assert c.store.live[id_of(1)].state is State.ASSIGNED
        assert (await c.one(c.complete(1, follow_ups=(new_task(),)))).code is None


async def test_only_so_many_tasks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_TASKS", 2)
    async with cell() as c:
        await c.do(c.submit(1), c.cancel(1), c.submit(2))
        assert (await c.one(c.submit(3))).code is Code.RATE_LIMITED


async def test_ended_tasks_are_forgotten_when_they_are_many_and_their_keys_have_expired(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forgetting, "KEPT_TASKS", 2)
    async with cell() as c:
        for number in range(5):
            await c.do(c.submit(number, not_after=START + DAY_MS + number, to=BEN), c.complete(number))
        await c.one(c.submit(5))
        c.now = START + DAY_MS + KEY_GRACE_MS + 1
        assert (await c.one(c.forget())).count == 1, "the keys of others still stand"
        c.now += 10
        assert (await c.one(c.forget())).count == 2
        assert (await c.one(c.forget())).count == 0, "two are kept"
        assert [record.task.id for record in await c.store.list(10)] == [id_of(5), id_of(4), id_of(3)]
        assert c.store.counts[State.SUCCEEDED] == 2
        assert c.store.totals.result_bytes == 2 * len(b"done")


async def test_the_oldest_results_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "KEPT_RESULT_BYTES", 10)
    async with cell() as c:
        for number in (1, 2, 3):
            await c.do(c.submit(number, to=BEN), c.complete(number, result=b"1234"))
        records = await c.store.list(10)
        assert [(r.result, r.is_result_dropped) for r in records] == [
            (b"1234", False),
            (b"1234", False),
            (None, True),
        ]
        assert c.store.totals.result_bytes == 8


# Incarnations and levels.


async def test_a_new_incarnation_queues_what_was_assigned_and_makes_old_fences_stale() -> None:
    async with cell() as c:
        await c.do(c.begin(0, FIRST), c.submit(1, to=BEN), c.submit(2, to=BEN), c.submit(3))
        await c.do(c.complete(2, operations=(b"a",)))
        assert (await c.one(c.begin(1, SECOND))).count == 1
        assert {task.state for task in c.store.live.values()} == {State.QUEUED}
        assert (await c.one(c.complete(1, incarnation=FIRST))).code is Code.STALE_FENCE
        assert (await c.one(c.complete(2, incarnation=FIRST))).code is None, "it had succeeded"
        await c.one(c.assign(1, CARL))
        assert c.store.live[id_of(1)].fence == c.fence(1, 2)
        assert (await c.one(c.complete(1, 2, by=CARL, operations=(b"b",)))).code is None
        shown = [(o.place, o.incarnation, o.number, o.data) for o in (await c.store.operations()).found]
        assert shown == [(1, FIRST, 1, b"a"), (2, SECOND, 1, b"b")]


async def test_an_incarnation_begins_once_and_never_goes_back() -> None:
    async with cell() as c:
        await c.do(c.begin(1, SECOND), c.submit(1, to=BEN))
        assert (await c.one(c.begin(1, SECOND))).count == 0
        assert c.store.live[id_of(1)].state is State.ASSIGNED
        assert (await c.one(c.begin(1, FIRST))).code is Code.STALE_FENCE
        assert (await c.one(c.begin(0, FIRST))).code is Code.STALE_FENCE
        assert (await c.one(c.begin(2, SECOND))).code is Code.STALE_FENCE
        assert (await c.one(c.begin(2, NO_INCARNATION))).code is Code.STALE_FENCE
        assert c.store.incarnation == SECOND


async def test_a_newer_level_or_command_stops_this_version_before_anything_of_the_batch() -> None:
    async with cell() as c:
        assert (await c.one(c.raise_level(1))).code is None
        newer = Entry(1, c.store.applied + 2, Kind.COMMAND, bytes([0x91, 11]))
        known = Entry(1, c.store.applied + 1, Kind.COMMAND, encode(c.submit(1)))
        for batch in ([known, newer], [known, replace(newer, data=encode(c.raise_level(LEVEL + 1)))]):
            with pytest.raises(KnodeError) as error:
                await c.store.apply(batch)
            assert error.value.code is Code.HOME_TOO_NEW
            assert (c.store.applied, len(c.store.live)) == (1, 0)


async def test_bytes_that_are_no_command_are_refused_alike_everywhere_and_applied_as_nothing() -> None:
    async with cell() as c:
        empty = Entry(1, 1, Kind.COMMAND, b"")
        configuration = Entry(1, 2, Kind.CONFIGURATION, b"voters")
        garbage = Entry(1, 3, Kind.COMMAND, b"\x93\x01")
        first, second, third = await c.store.apply([empty, configuration, garbage])
        assert (first, second) == (None, None)
        assert third is not None
        assert third.code is Code.BAD_FRAME
        assert c.store.applied == 3
