"""The ledger's rules: what each committed command does, as a pure function of the command and the tables.

Every voter applies the same commands in the same order to the same tables and must come to the same
state. So nothing here asks for the time (an entry carries its leader's, and the greatest seen counts),
for chance, for the roster or for a grant: the leader checks those before it proposes. What apply checks
itself is what holds whoever leads: keys, fences, who was assigned, and the limits.

A command is done whole, or refused with a named error and changes nothing but the ledger's time. One that
raises, by a bug, changes nothing at all (`knode.tasks.applying`).
"""

from __future__ import annotations

from typing import assert_never

from msgspec.structs import replace

from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.tasks.commands import (
    LEVEL,
    MAX_BUNDLE_BYTES,
    Assign,
    Assignment,
    Begin,
    Bundle,
    Cancel,
    Command,
    Complete,
    Considered,
    Expire,
    Fail,
    Fence,
    Forget,
    NewTask,
    RaiseLevel,
    Release,
    Submit,
    follow_up_id,
    task_digest,
)
from knode.tasks.forgetting import count_kept, drop, forget
from knode.tasks.lifecycle import TRANSITIONS, Event, State
from knode.tasks.records import LedgerTask, Outcome, Tables, Totals

MAX_LIVE_TASKS = 10_000
"""Tasks that have not ended; half of them of one submitter."""
MAX_LIVE_BYTES = 64 * 1024 * 1024
"""What was asked for in them, encoded; half of it by one submitter."""
MAX_TASKS = 1_000_000
"""Tasks that are kept in all."""
KEPT_RESULT_BYTES = 128 * 1024 * 1024
MAX_STREAM_BYTES = 1024 * 1024 * 1024
"""Operations; a completion that brings more is refused. `forgetting` says when the oldest are dropped."""
MAX_DEPTH = 8
"""Generations of follow-up tasks."""
MAX_ATTEMPT = 1_000
"""Attempts in all, with those that are not charged."""
MAX_KEY_LIFE_MS = 31 * 86_400_000
"""How far `not_after` may lie ahead: 30 days, and a day for clocks that differ."""
FOLLOW_UP_LIFE_MS = 86_400_000
RETRY_DELAY_MS = 1_000
MAX_RETRY_DELAY_MS = 300_000
REFUSED_DELAY_MS = 100
MAX_REFUSED_DELAY_MS = 30_000


def apply(tables: Tables, command: Command) -> Outcome:
    """Do what a committed command says; return what came of it.

    Raises:
        KnodeError: HOME_TOO_NEW when the cell works on a level that this version does not know: it must
            stop, not skip.
    """
    totals = tables.totals
    totals.now = max(totals.now, command.now)
    match command:
        case Submit():
            return _submit(tables, command)
        case Complete():
            return _complete(tables, command)
        case Assign():
            return _assign(tables, command)
        case Release():
            return _release(tables, command)
        case Fail():
            return _fail(tables, command)
        case Cancel():
            return _cancel(tables, command)
        case Expire():
            return _expire(tables, command)
        case Forget():
            return Outcome(count=forget(tables))
        case Begin():
            return _begin(tables, command)
        case RaiseLevel():
            return _raise_level(totals, command)
    assert_never(command)


def retry_delay_ms(charged: int) -> int:
    """Return how long after its n-th failure, from 1 on, a task waits: 1 s, 2 s, 4 s … 5 min."""
    return min(RETRY_DELAY_MS << min(charged - 1, 20), MAX_RETRY_DELAY_MS)


def _submit(tables: Tables, command: Submit) -> Outcome:
    now = tables.totals.now
    digest = task_digest(command.task)
    known = tables.by_key(command.submitter, command.key)
    if known is not None and known.holds_key(now):
        if known.digest == digest:
            return _done(known)
        return _refused(
            Code.KEY_CONFLICT,
            f"the key {command.key!r} stands for task {known.id.hex()}, which asks for something else",
            "take another key, or ask for the same again: agent, input, files, --on and --deadline",
            known,
        )
    twin = tables.task(command.id)
    if twin is not None:
        if (twin.submitter, twin.key, twin.digest) == (command.submitter, command.key, digest):
            return _done(twin)
        return _refused(Code.KEY_CONFLICT, "this id is that of another task", "submit it with a new id", twin)
    if command.not_after <= now:
        return _refused(
            Code.EXPIRED, "it was to be submitted earlier than it could be", "submit it again, as a new task"
        )
    if command.key == command.id.hex() and command.not_after <= tables.totals.forgotten:
        return _refused(
            Code.EXPIRED,
            "it was dated so long ago that the ledger, which has had many tasks since, cannot say whether it"
            " was done",
            "look for what it should have done, then submit it again, as a new task",
        )
    if command.not_after > now + MAX_KEY_LIFE_MS:
        return _refused(Code.INVALID_ARGUMENT, "its key would live longer than 30 days", "give it less time")
    if command.assignment is not None and not _fits(command.task.on, command.assignment):
        return _refused(Code.INVALID_ARGUMENT, "it is assigned to another member than it asks for")
    full = _full(tables, command.submitter, 1, len(encode(command.task)))
    if full is not None:
        return full
    if known is not None:
        drop(tables, known)
    task = _new_task(
        tables, command.id, command.submitter, command.key, command.not_after, command.task, digest
    )
    task = replace(task, holders=command.holders)
    considered: tuple[Considered, ...] = ()
    if command.assignment is not None:
        task, considered = _attempt(tables, task, command.assignment), command.assignment.considered
    tables.add(task, command.task, considered)
    return _done(task, is_new=True)


def _assign(tables: Tables, command: Assign) -> Outcome:
    task = tables.task(command.task)
    if task is None:
        return _not_found(command.task)
    now = tables.totals.now
    if (task.state, Event.ASSIGNED) not in TRANSITIONS:
        return _refused(Code.INVALID_ARGUMENT, f"the task is not queued, it is {task.state}", "", task)
    if not _fits(task.on, command.assignment):
        return _refused(Code.INVALID_ARGUMENT, "another member must run this task", "", task)
    if now >= task.deadline:
        return _refused(Code.EXPIRED, "the task's deadline has passed", "", task)
    if now < task.not_before:
        return _refused(Code.UNAVAILABLE, "the task waits before its next attempt", "", task)
    task = _attempt(tables, task, command.assignment)
    tables.assign(task, command.assignment.considered)
    return _done(task)


def _release(tables: Tables, command: Release) -> Outcome:
    task = tables.task(command.fence.task)
    if task is None or not _is_current(task, command.fence):
        return _stale(task, command.fence)
    if not command.charged:
        refusals = task.attempt - task.charged - 1
        delay = min(REFUSED_DELAY_MS << min(refusals, 20), MAX_REFUSED_DELAY_MS)
        return _done(_again(tables, task, Event.RELEASED, Code.UNAVAILABLE, command.why, delay_ms=delay))
    if task.charged + 1 >= task.attempts:
        why = f"the last of {task.attempts} attempts was lost: {command.why}"
        return _done(_end(tables, task, Event.FAILED, code=Code.UNAVAILABLE, message=why, charge=1))
    return _done(_again(tables, task, Event.RELEASED, Code.UNAVAILABLE, command.why, charge=1))


def _complete(tables: Tables, command: Complete) -> Outcome:
    fence, bundle = command.fence, command.bundle
    task = tables.task(fence.task)
    if task is None or task.fence != fence or task.state not in (State.ASSIGNED, State.SUCCEEDED):
        return _stale(task, fence)
    if task.member != command.member:
        return _not_assigned(task)
    if task.state is State.SUCCEEDED:
        # The acknowledgement was lost; the bundle has taken effect, once.
        return _done(task)
    return _refusal_of(tables, task, bundle) or _take_effect(tables, task, bundle)


def _refusal_of(tables: Tables, task: LedgerTask, bundle: Bundle) -> Outcome | None:
    """Return why a bundle cannot take effect; None when it can."""
    if len(encode(bundle)) > MAX_BUNDLE_BYTES:
        return _refused(
            Code.TOO_LARGE, f"what the attempt leaves has more than {MAX_BUNDLE_BYTES} bytes", "", task
        )
    added = sum(map(len, bundle.operations))
    if tables.totals.operation_bytes + added > MAX_STREAM_BYTES:
        return _refused(
            Code.RATE_LIMITED,
            "the cell's stream of operations is full",
            "wait: the oldest are dropped once their tasks are forgotten",
            task,
        )
    if not bundle.follow_ups:
        return None
    if task.depth >= MAX_DEPTH:
        return _refused(
            Code.TOO_LARGE, f"follow-up tasks would go deeper than {MAX_DEPTH} generations", "", task
        )
    if any(follow_up.task.files for follow_up in bundle.follow_ups):
        return _refused(Code.INVALID_ARGUMENT, "a follow-up task brings no files", "", task)
    size = sum(len(encode(follow_up.task)) for follow_up in bundle.follow_ups)
    # Its own place becomes free.
    return _full(tables, task.submitter, len(bundle.follow_ups) - 1, size - task.size, task)


def _take_effect(tables: Tables, task: LedgerTask, bundle: Bundle) -> Outcome:
    totals = tables.totals
    for data in bundle.operations:
        totals.operations += 1
        totals.operation_bytes += len(data)
        tables.append(totals.operations, totals.now, task.fence, data)
    ended = _end(tables, task, Event.COMPLETED, result=bundle.result)
    for place, follow_up in enumerate(bundle.follow_ups):
        turn = 0
        while _is_taken(tables, id := follow_up_id(task.id, place, turn), task.submitter):
            turn += 1
        child = _new_task(
            tables,
            id,
            task.submitter,
            id.hex(),
            totals.now + FOLLOW_UP_LIFE_MS,
            follow_up.task,
            task_digest(follow_up.task),
        )
        tables.add(replace(child, parent=task.id, depth=task.depth + 1), follow_up.task, ())
    return _done(ended)


def _fail(tables: Tables, command: Fail) -> Outcome:
    fence = command.fence
    task = tables.task(fence.task)
    if task is None or task.fence != fence or task.state not in (State.ASSIGNED, State.FAILED):
        return _stale(task, fence)
    if task.member != command.member:
        return _not_assigned(task)
    if task.state is State.FAILED:
        return _done(task)
    charged = task.charged + 1
    if command.retryable and charged < task.attempts:
        delay = retry_delay_ms(charged)
        return _done(
            _again(tables, task, Event.RETRIED, command.code, command.message, charge=1, delay_ms=delay)
        )
    return _done(_end(tables, task, Event.FAILED, code=command.code, message=command.message, charge=1))


def _cancel(tables: Tables, command: Cancel) -> Outcome:
    task = tables.task(command.task)
    if task is None:
        return _not_found(command.task)
    if task.state.final:
        return _refused(
            Code.INVALID_ARGUMENT,
            f"the task has ended already: it is {task.state}",
            f"'knode task show {task.id.hex()[:8]}'",
            task,
        )
    return _done(_end(tables, task, Event.CANCELLED, code=Code.CANCELLED, message="the task was cancelled"))


def _expire(tables: Tables, command: Expire) -> Outcome:
    count = 0
    for id in command.tasks:
        task = tables.task(id)
        if task is not None and not task.state.final and task.deadline <= tables.totals.now:
            before = f"; before that: {task.message}" if task.message else ""
            why = f"its deadline passed{before}"
            _end(tables, task, Event.DEADLINE, code=Code.EXPIRED, message=why)
            count += 1
    return Outcome(count=count)


def _begin(tables: Tables, command: Begin) -> Outcome:
    totals = tables.totals
    present = (totals.incarnation_number, totals.incarnation)
    if (command.number, command.incarnation) == present:
        return Outcome()
    if command.number <= totals.incarnation_number or tables.has_begun(command.incarnation):
        return _refused(
            Code.STALE_FENCE,
            f"incarnation {command.number} of the cell cannot follow {totals.incarnation_number}",
        )
    totals.incarnation_number, totals.incarnation = command.number, command.incarnation
    totals.first_operation = totals.operations + 1
    tables.begin(command.number, command.incarnation, totals.first_operation)
    count = 0
    for task in tables.assigned():
        _again(tables, task, Event.RELEASED, Code.UNAVAILABLE, "the cell began a new incarnation")
        count += 1
    return Outcome(count=count)


def _raise_level(totals: Totals, command: RaiseLevel) -> Outcome:
    if command.level > LEVEL:
        raise KnodeError(
            Code.HOME_TOO_NEW,
            f"the cell works on feature level {command.level}, and this knode knows {LEVEL}",
            "install the newer knode that the other voters run",
        )
    totals.level = max(totals.level, command.level)
    return Outcome()


# What the rules are made of.


def _new_task(
    tables: Tables, id: bytes, submitter: bytes, key: str, not_after: int, asked: NewTask, digest: bytes
) -> LedgerTask:
    totals = tables.totals
    totals.tasks += 1
    return LedgerTask(
        number=totals.tasks,
        id=id,
        submitter=submitter,
        key=key,
        digest=digest,
        not_after=not_after,
        agent=asked.agent,
        on=asked.on,
        attempts=asked.attempts,
        deadline=totals.now + asked.deadline_ms if asked.deadline_ms else not_after,
        submitted=totals.now,
        parent=b"",
        depth=0,
        holders=(),
        size=len(encode(asked)),
        file_bytes=sum(file.size for file in asked.files),
        state=TRANSITIONS[None, Event.SUBMITTED],
        not_before=totals.now,
        changed=totals.now,
    )


def _attempt(tables: Tables, task: LedgerTask, assignment: Assignment) -> LedgerTask:
    totals = tables.totals
    return replace(
        task,
        state=TRANSITIONS[task.state, Event.ASSIGNED],
        attempt=task.attempt + 1,
        member=assignment.member,
        incarnation=totals.incarnation,
        changed=totals.now,
        code="",
        message="",
    )


def _again(
    tables: Tables,
    task: LedgerTask,
    event: Event,
    code: str,
    message: str,
    *,
    charge: int = 0,
    delay_ms: int = 0,
) -> LedgerTask:
    """Queue a task for its next attempt, unless it had the most that a fence can count."""
    now = tables.totals.now
    if task.attempt >= MAX_ATTEMPT:
        why = f"no end after {MAX_ATTEMPT} attempts: {message}"
        return _end(tables, task, Event.FAILED, code=code, message=why, charge=charge)
    task = replace(
        task,
        state=TRANSITIONS[task.state, event],
        charged=task.charged + charge,
        not_before=now + delay_ms,
        changed=now,
        code=code,
        message=message,
    )
    tables.requeue(task)
    return task


def _end(
    tables: Tables,
    task: LedgerTask,
    event: Event,
    *,
    result: bytes | None = None,
    code: str = "",
    message: str = "",
    charge: int = 0,
) -> LedgerTask:
    totals = tables.totals
    totals.ends += 1
    task = replace(
        task,
        state=TRANSITIONS[task.state, event],
        charged=task.charged + charge,
        changed=totals.now,
        ended=totals.ends,
        code=code,
        message=message,
    )
    count_kept(totals, task.state, 1)
    tables.end(task, result)
    if result is not None:
        totals.result_bytes += len(result)
        while totals.result_bytes > KEPT_RESULT_BYTES:
            totals.result_bytes -= tables.drop_result(totals.results)
            totals.results += 1
    return task


def _is_taken(tables: Tables, id: bytes, submitter: bytes) -> bool:
    # Its id is its key, which whoever submitted the parent can know beforehand.
    return tables.task(id) is not None or tables.by_key(submitter, id.hex()) is not None


def _is_current(task: LedgerTask, fence: Fence) -> bool:
    # When an incarnation begins, nothing stays assigned; so this one is the present one's.
    return task.state is State.ASSIGNED and task.fence == fence


def _fits(on: bytes, assignment: Assignment) -> bool:
    return not on or on == assignment.member


def _full(
    tables: Tables, submitter: bytes, tasks: int, size: int, task: LedgerTask | None = None
) -> Outcome | None:
    for whose, usage, part in (
        ("the cell", tables.usage(b""), 1),
        ("this submitter", tables.usage(submitter), 2),
    ):
        if usage.tasks + tasks > MAX_LIVE_TASKS // part or usage.bytes + size > MAX_LIVE_BYTES // part:
            why = f"{whose} has {usage.tasks} tasks with {usage.bytes} bytes that have not ended"
            return _refused(Code.RATE_LIMITED, why, "wait for some to end", task)
    if tables.totals.kept + tables.usage(b"").tasks + tasks > MAX_TASKS:
        why = f"the ledger keeps {tables.totals.kept} tasks that have ended, until their keys expire"
        return _refused(
            Code.RATE_LIMITED, why, "wait, or submit without --key: those are forgotten earlier", task
        )
    return None


def _done(task: LedgerTask, *, is_new: bool = False) -> Outcome:
    return Outcome(task=task.id, state=task.state, attempt=task.attempt, member=task.member, is_new=is_new)


def _refused(code: Code, why: str, next_step: str = "", task: LedgerTask | None = None) -> Outcome:
    if task is None:
        return Outcome(code, why, next_step)
    return Outcome(code, why, next_step, task.id, task.state, task.attempt, task.member)


def _not_found(id: bytes) -> Outcome:
    return _refused(
        Code.NOT_FOUND, f"the cell has no task {id.hex()}", "'knode task list' shows those that it keeps"
    )


def _stale(task: LedgerTask | None, fence: Fence) -> Outcome:
    if task is None:
        return Outcome(Code.STALE_FENCE, f"the cell has no task {fence.task.hex()} any more", task=fence.task)
    why = f"attempt {fence.attempt} is over: the task is {task.state}, at attempt {task.attempt}"
    return _refused(Code.STALE_FENCE, why, "", task)


def _not_assigned(task: LedgerTask) -> Outcome:
    return _refused(
        Code.NOT_ALLOWED, "who says this is not the member that the attempt was given to", "", task
    )
