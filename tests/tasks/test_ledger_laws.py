"""Laws of the ledger, over histories that nobody thought of: a simple model says what must come out.

Each history is applied three times: one entry after the other, compared with the model; in other batches; and
with the whole ledger moved to another disk on the way. All three must be the same, byte for byte.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_commands import (
    ANNA,
    BEN,
    CARL,
    DAY_MS,
    FIRST,
    SECOND,
    START,
    Cell,
    cell,
    given_to,
    id_of,
    new_task,
)
from msgspec.structs import replace

from knode.consensus.messages import Entry, Kind
from knode.errors import Code
from knode.klp.codec import encode
from knode.tasks import forgetting, ledger
from knode.tasks.commands import (
    Assign,
    Begin,
    Bundle,
    Cancel,
    Command,
    Complete,
    Expire,
    Fail,
    Fence,
    FollowUp,
    Forget,
    NewTask,
    RaiseLevel,
    Release,
    Submit,
    follow_up_id,
)
from knode.tasks.lifecycle import State
from knode.tasks.records import KEY_GRACE_MS, NO_INCARNATION, Operation, Outcome

DUMP = Path("/state/dump")
LIVE, KEPT, CROWDED = 8, 3, 4
STREAM_BYTES = 6
KINDS = (
    *("submit",) * 4,
    *("assign",) * 3,
    *("end",) * 5,
    *("release", "cancel", "expire", "forget", "begin"),
)
STEPS_MS = (*(0, 1, 500, 2000, -300) * 6, *(1_000_000,) * 3, DAY_MS, 3 * DAY_MS, 31 * DAY_MS)
ASKED = (new_task(b"one", attempts=2), new_task(b"two", deadline_ms=5_000), new_task(b"three", on=BEN))
ANY = 0
OVER = {State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED}


@dataclass
class Thing:
    """A task, as simply as it can be said."""

    submitter: bytes
    key: str
    asked: NewTask
    not_after: int
    deadline: int
    depth: int = 0
    state: State = State.QUEUED
    fence: Fence | None = None
    member: bytes = b""
    attempt: int = 0
    charged: int = 0
    not_before: int = 0
    completions: int = 0


@dataclass
class Model:
    """What the ledger should be."""

    now: int = 0
    incarnation: bytes = NO_INCARNATION
    number: int = -1
    begun: set[bytes] = field(default_factory=lambda: {NO_INCARNATION})
    things: dict[bytes, Thing] = field(default_factory=dict)
    operations: list[tuple[bytes, bytes, int, bytes]] = field(default_factory=list)
    """Incarnation, task, time, data."""
    dropped: int = 0
    """How many of the first operations are kept no longer."""
    level: int = 1
    forgotten: int = 0

    def live(self, submitter: bytes | None = None) -> list[bytes]:
        return [
            id
            for id, thing in self.things.items()
            if thing.state not in OVER and submitter in (None, thing.submitter)
        ]

    def has_room(self, submitter: bytes, more: int) -> bool:
        return len(self.live()) + more <= LIVE and len(self.live(submitter)) + more <= LIVE // 2

    def apply(self, command: Command) -> tuple[Code | None, bytes]:
        """Return the code and the task that this command must give."""
        self.now = max(self.now, command.now)
        match command:
            case Submit():
                return self.submit(command)
            case Assign(task=id, assignment=assignment):
                thing = self.things.get(id)
                if thing is None:
                    return Code.NOT_FOUND, b""
                if thing.state is not State.QUEUED or thing.asked.on not in (b"", assignment.member):
                    return Code.INVALID_ARGUMENT, id
                if self.now >= thing.deadline:
                    return Code.EXPIRED, id
                if self.now < thing.not_before:
                    return Code.UNAVAILABLE, id
                self.give(id, assignment.member)
                return None, id
            case Release(fence=fence, charged=charged):
                thing = self.things.get(fence.task)
                if thing is None or thing.state is not State.ASSIGNED or thing.fence != fence:
                    return Code.STALE_FENCE, fence.task
                thing.charged += charged
                thing.not_before = self.now
                if not charged:
                    refused = thing.attempt - thing.charged
                    thing.not_before += min(100 * 2 ** (refused - 1), 30_000)
                thing.state = State.FAILED if thing.charged == thing.asked.attempts else State.QUEUED
                return None, fence.task
            case Complete(fence=fence, member=member, bundle=bundle):
                thing = self.things.get(fence.task)
                if (
                    thing is None
                    or thing.fence != fence
                    or thing.state not in (State.ASSIGNED, State.SUCCEEDED)
                ):
                    return Code.STALE_FENCE, fence.task
                if member != thing.member:
                    return Code.NOT_ALLOWED, fence.task
                if thing.state is State.SUCCEEDED:
                    return None, fence.task
                if bundle.follow_ups and thing.depth == ledger.MAX_DEPTH:
                    return Code.TOO_LARGE, fence.task
                if bundle.follow_ups and not self.has_room(thing.submitter, len(bundle.follow_ups) - 1):
                    return Code.RATE_LIMITED, fence.task
                thing.state = State.SUCCEEDED
                thing.completions += 1
                stream = (self.incarnation, fence.task, self.now)
                self.operations += [(*stream, data) for data in bundle.operations]
                for place, wanted in enumerate(bundle.follow_ups):
                    id = follow_up_id(fence.task, place)
                    self.add(id, thing.submitter, id.hex(), self.now + DAY_MS, wanted.task, thing.depth + 1)
                return None, fence.task
            case Fail(fence=fence, member=member, retryable=retryable):
                thing = self.things.get(fence.task)
                if thing is None or thing.fence != fence or thing.state not in (State.ASSIGNED, State.FAILED):
                    return Code.STALE_FENCE, fence.task
                if member != thing.member:
                    return Code.NOT_ALLOWED, fence.task
                if thing.state is State.ASSIGNED:
                    thing.charged += 1
                    again = retryable and thing.charged < thing.asked.attempts
                    thing.state = State.QUEUED if again else State.FAILED
                    thing.not_before = self.now + 1000 * 2 ** (thing.charged - 1)
                return None, fence.task
            case Cancel(task=id):
                thing = self.things.get(id)
                if thing is None:
                    return Code.NOT_FOUND, b""
                if thing.state in OVER:
                    return Code.INVALID_ARGUMENT, id
                thing.state = State.CANCELLED
                return None, id
            case Expire(tasks=ids):
                for id in ids:
                    thing = self.things.get(id)
                    if thing is not None and thing.state not in OVER and thing.deadline <= self.now:
                        thing.state = State.EXPIRED
                return None, b""
            case Forget():
                over = [id for id, thing in self.things.items() if thing.state in OVER]
                old = [id for id in over if self.things[id].not_after + KEY_GRACE_MS < self.now]
                old.sort(key=lambda id: self.things[id].not_after)
                for id in old[: max(0, len(over) - KEPT)]:
                    del self.things[id]
                if self.level > 1:
                    early = [id for id in over if id in self.things and self.may_go_early(id)]
                    early.sort(key=lambda id: self.things[id].not_after)
                    kept = sum(thing.state in OVER for thing in self.things.values())
                    for id in early[: max(0, kept - CROWDED)]:
                        self.forget_early(id)
                    self.trim()
                return None, b""
            case RaiseLevel(level=level):
                self.level = max(self.level, level)
                return None, b""
            case Begin(number=number, incarnation=incarnation):
                if (number, incarnation) == (self.number, self.incarnation):
                    return None, b""
                if number <= self.number or incarnation in self.begun:
                    return Code.STALE_FENCE, b""
                self.number, self.incarnation = number, incarnation
                self.begun.add(incarnation)
                for thing in self.things.values():
                    if thing.state is State.ASSIGNED:
                        thing.state, thing.not_before = State.QUEUED, self.now
                return None, b""
        raise AssertionError(command)

    def may_go_early(self, id: bytes) -> bool:
        thing = self.things[id]
        early = self.now + DAY_MS - forgetting.REMEMBERED_MS
        return thing.state in OVER and thing.key == id.hex() and thing.not_after < early

    def forget_early(self, id: bytes) -> None:
        self.forgotten = max(self.forgotten, self.things.pop(id).not_after)

    def trim(self) -> None:
        for _, id, time, _ in self.operations[self.dropped :]:
            is_over = sum(len(data) for *_, data in self.operations[self.dropped :]) > STREAM_BYTES
            thing = self.things.get(id)
            if thing is not None and is_over and thing.state in OVER:
                if self.now > thing.not_after + KEY_GRACE_MS:
                    del self.things[id]
                elif self.may_go_early(id):
                    self.forget_early(id)
            is_old = time < self.now - forgetting.KEPT_OPERATIONS_MS
            if id in self.things or not (is_over or is_old):
                return
            self.dropped += 1

    def submit(self, command: Submit) -> tuple[Code | None, bytes]:
        mine = (command.submitter, command.key, command.task)
        for id, thing in self.things.items():
            if (thing.submitter, thing.key) == mine[:2]:
                stands = thing.state not in OVER or self.now <= thing.not_after + KEY_GRACE_MS
                if stands:
                    return (None if thing.asked == command.task else Code.KEY_CONFLICT), id
        twin = self.things.get(command.id)
        if twin is not None:
            same = (twin.submitter, twin.key, twin.asked) == mine
            return (None if same else Code.KEY_CONFLICT), command.id
        if command.not_after <= self.now:
            return Code.EXPIRED, b""
        if command.key == command.id.hex() and command.not_after <= self.forgotten:
            return Code.EXPIRED, b""
        if command.assignment is not None and command.task.on not in (b"", command.assignment.member):
            return Code.INVALID_ARGUMENT, b""
        if not self.has_room(command.submitter, 1):
            return Code.RATE_LIMITED, b""
        for id, thing in list(self.things.items()):
            if (thing.submitter, thing.key) == mine[:2]:
                del self.things[id]
        self.add(command.id, command.submitter, command.key, command.not_after, command.task, 0)
        if command.assignment is not None:
            self.give(command.id, command.assignment.member)
        return None, command.id

    def add(self, id: bytes, submitter: bytes, key: str, not_after: int, asked: NewTask, depth: int) -> None:
        deadline = self.now + asked.deadline_ms if asked.deadline_ms else not_after
        self.things[id] = Thing(submitter, key, asked, not_after, deadline, depth, not_before=self.now)

    def give(self, id: bytes, member: bytes) -> None:
        thing = self.things[id]
        thing.state, thing.member, thing.attempt = State.ASSIGNED, member, thing.attempt + 1
        thing.fence = Fence(self.incarnation, id, thing.attempt)


def draw_command(draw: st.DataObject, model: Model, now: int) -> Command:
    """Draw a command; most are ones that may be done now."""

    def some(values: object) -> object:
        return draw.draw(st.sampled_from(values))  # type: ignore[call-overload]

    ids = [*list(model.things) * 2, *(id_of(n) for n in range(6))]
    assigned = [thing for thing in model.things.values() if thing.state is State.ASSIGNED]
    kind = some(KINDS)
    if kind == "submit":
        n = draw.draw(st.integers(0, 19))
        key = some([id_of(n).hex()] * 4 + ["k", "l"])
        to = some([None, BEN])
        life = some([DAY_MS] * 4 + [3 * DAY_MS, 1, 0])
        asked, holders = some(ASKED), some([(), (BEN, CARL)])
        assignment = None if to is None else given_to(to)  # type: ignore[arg-type]
        who = some([ANNA, ANNA, CARL])
        return Submit(now, id_of(n), who, key, now + life, asked, holders, assignment)  # type: ignore[arg-type,operator]
    if kind == "assign":
        queued = [id for id, thing in model.things.items() if thing.state is State.QUEUED]
        return Assign(now, some(queued or ids), given_to(some([BEN, BEN, CARL])))  # type: ignore[arg-type]
    if kind in ("end", "release"):
        fences = [thing.fence for thing in (assigned or model.things.values()) if thing.fence is not None]
        if not fences or draw.draw(st.integers(0, 5)) == 0:
            fences = [Fence(FIRST, id, n) for id in ids[:3] for n in (1, 2)]
        fence: Fence = some(fences)  # type: ignore[assignment]
        holder = model.things[fence.task].member if fence.task in model.things else b""
        member: bytes = some([holder or BEN] * 6 + [CARL])  # type: ignore[assignment]
        if kind == "release":
            return Release(now, fence, draw.draw(st.booleans()), "gone")
        if draw.draw(st.integers(0, 3)) == 0:
            return Fail(now, fence, member, "AGENT_FAILED", "broken", draw.draw(st.booleans()))
        operations = tuple(b"%d" % n for n in range(draw.draw(st.integers(0, 3))))
        follow_ups = tuple(
            FollowUp(asked) for asked in draw.draw(st.lists(st.sampled_from(ASKED), max_size=2))
        )
        return Complete(
            now, fence, member, Bundle(b"result" * draw.draw(st.integers(0, 3)), operations, follow_ups)
        )
    if kind == "cancel":
        return Cancel(now, some(ids), ANNA)  # type: ignore[arg-type]
    if kind == "expire":
        return Expire(now, tuple(ids))
    if kind == "forget":
        return some([Forget(now)] * 5 + [RaiseLevel(now, 2)])  # type: ignore[return-value]
    return Begin(now, *some([(0, FIRST), (0, FIRST), (0, SECOND), (1, SECOND), (2, FIRST[::-1])]))  # type: ignore[misc]


async def check_against(c: Cell, model: Model, outcome: Outcome, expected: tuple[Code | None, bytes]) -> None:
    assert (outcome.code, outcome.task) == expected, outcome
    thing = model.things.get(outcome.task)
    if thing is not None:
        assert (outcome.state, outcome.attempt, outcome.member) == (thing.state, thing.attempt, thing.member)
    assert list(c.store.live) == model.live()
    for id, task in c.store.live.items():
        thing = model.things[id]
        assert (task.state, task.attempt, task.charged) == (thing.state, thing.attempt, thing.charged)
        assert (task.deadline, task.key, task.depth) == (thing.deadline, thing.key, thing.depth)
        if task.state is State.QUEUED:
            assert task.not_before == thing.not_before
        else:
            assert task.fence == thing.fence
    assert c.store.now == model.now


async def check_whole(c: Cell, model: Model) -> None:
    """What is on disk is the model's, too; and nothing took effect twice."""
    records = {record.task.id: record.task for record in await c.store.list(1000)}
    assert {id: (task.state, task.submitter, task.key) for id, task in records.items()} == {
        id: (thing.state, thing.submitter, thing.key) for id, thing in model.things.items()
    }
    states = Counter(thing.state for thing in model.things.values())
    assert {state: count for state, count in c.store.counts.items() if count} == dict(states)
    assert all(thing.completions == (thing.state is State.SUCCEEDED) for thing in model.things.values())
    numbers, wanted = Counter[bytes](), []
    for place, (incarnation, task, time, data) in enumerate(model.operations, 1):
        numbers[incarnation] += 1
        wanted.append(Operation(place, incarnation, numbers[incarnation], time, task, ANY, data))
    page = await c.store.operations()
    kept = wanted[model.dropped :]
    assert [replace(one, attempt=ANY) for one in page.found] == kept
    assert (page.next, page.first, page.since) == (None, model.dropped + 1, kept[0].time if kept else 0)
    assert c.store.totals.operation_bytes == sum(len(one.data) for one in kept)
    for task in {one.task for one in kept}:
        of_task = (await c.store.operations(task=task)).found
        assert [replace(one, attempt=ANY) for one in of_task] == [one for one in kept if one.task == task]
    assert {one.task for one in wanted[: model.dropped]}.isdisjoint(model.things), "younger than its task"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(st.data())
async def test_any_history_does_what_the_model_says_however_it_is_cut_into_batches(
    draw: st.DataObject,
) -> None:
    model, now = Model(), START
    entries: list[Entry] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "MAX_LIVE_TASKS", LIVE)
        patch.setattr(forgetting, "KEPT_TASKS", KEPT)
        patch.setattr(forgetting, "CROWDED_TASKS", CROWDED)
        patch.setattr(forgetting, "KEPT_OPERATION_BYTES", STREAM_BYTES)
        patch.setattr(ledger, "KEPT_RESULT_BYTES", 30)
        async with cell() as one, cell() as other, cell() as moved:
            for _ in range(draw.draw(st.integers(1, 50))):
                now += draw.draw(st.sampled_from(STEPS_MS))
                command = draw_command(draw, model, now)
                expected = model.apply(command)
                entries.append(Entry(1, len(entries) + 1, Kind.COMMAND, encode(command)))
                await check_against(one, model, await one.one(command), expected)
            await check_whole(one, model)
            cuts = sorted(draw.draw(st.sets(st.integers(0, len(entries)))))
            move = draw.draw(st.integers(0, len(cuts)))
            here = other
            for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(entries)], strict=True)):
                if number == move:
                    await other.store.dump(DUMP)
                    moved.world.disk.write(DUMP, other.world.disk.read(DUMP, limit_bytes=2**24))
                    await moved.store.restore(DUMP)
                    here = moved
                if start < end:
                    await here.store.apply(entries[start:end])
            dumps = []
            for where in (one, moved):
                await where.store.dump(DUMP)
                dumps.append(where.world.disk.read(DUMP, limit_bytes=2**24))
            assert dumps[0] == dumps[1]
