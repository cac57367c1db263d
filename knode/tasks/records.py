"""What the ledger holds, what it says of a command, and what it asks of its tables: values only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Protocol

from msgspec import Meta, Struct

from knode.errors import Code, KnodeError
from knode.tasks.commands import CodeName, Considered, Fence, Hash, Key, MemberId, NewTask
from knode.tasks.lifecycle import State
from knode.tasks.values import AgentId, TaskId

KEY_GRACE_MS = 24 * 3_600_000
"""How long a key stands beyond its `not_after`: a repeated submit that is late, or was dated by another
clock, still finds its task."""
NO_INCARNATION = bytes(32)

Number = Annotated[int, Meta(ge=0, le=2**62)]
MaybeMember = Annotated[bytes, Meta(max_length=32)]


class LedgerTask(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A task as the ledger has it, without its input and its result. Times are the ledger's, in ms."""

    number: Number
    """In order of submission, from 1 on."""
    id: TaskId
    submitter: MemberId
    key: Key
    digest: Hash
    """Of the `NewTask`."""
    not_after: Number
    agent: AgentId
    on: MaybeMember
    """The member that must run it; empty: any."""
    attempts: Number
    """That may be charged to it."""
    deadline: Number
    submitted: Number
    parent: MaybeMember
    """The task that asked for it; empty: none did."""
    depth: Number
    """How many tasks stand above it."""
    holders: Annotated[tuple[MemberId, ...], Meta(max_length=8)]
    """Members that hold all of its files."""
    size: Number
    """Bytes of the encoded `NewTask`."""
    file_bytes: Number
    state: State
    attempt: Number = 0
    """Number of the latest attempt, 0 before the first."""
    charged: Number = 0
    """Attempts that were lost or failed."""
    member: MaybeMember = b""
    """Who has, or had, the latest attempt."""
    incarnation: MaybeMember = b""
    """In which the latest attempt was assigned."""
    not_before: Number = 0
    """While queued: when the next attempt may begin."""
    changed: Number = 0
    ended: Number = 0
    """In order of ending, from 1 on; 0 for a task that has not."""
    code: CodeName = ""
    """Why it failed, or why the latest attempt was over."""
    message: Annotated[str, Meta(max_length=1200)] = ""

    @property
    def fence(self) -> Fence:
        """Of the latest attempt; there is one."""
        return Fence(self.incarnation, self.id, self.attempt)

    def holds_key(self, now: int) -> bool:
        """Tell whether its key still stands for it."""
        return not self.state.final or now <= self.not_after + KEY_GRACE_MS


class TaskRecord(Struct, frozen=True):
    """A task with what only its row on disk has."""

    task: LedgerTask
    asked: NewTask | None
    """None once it has ended."""
    result: bytes | None
    """Of a task that succeeded; None when it was dropped, too (`is_result_dropped`)."""
    considered: tuple[Considered, ...]
    """When the latest attempt was assigned."""

    @property
    def is_result_dropped(self) -> bool:
        """Whether there was a result that the ledger keeps no longer."""
        return self.task.state is State.SUCCEEDED and self.result is None


class Operation(Struct, frozen=True):
    """An operation of the cell's stream."""

    place: int
    """Among those of all incarnations, from 1 on, without gap."""
    incarnation: bytes
    number: int
    """In the stream of that incarnation, from 1 on, without gap."""
    time: int
    task: bytes
    attempt: int
    data: bytes


class Operations(Struct, frozen=True):
    """Operations in their order, a page of them."""

    found: tuple[Operation, ...]
    next: int | None
    """The place after which the next page begins; None: there is none."""
    first: int
    """Place of the oldest that is kept, or of the next to come: those before it were dropped."""
    since: int
    """Time of the oldest that is kept; 0 when none is."""


class Totals(Struct, array_like=True, forbid_unknown_fields=True):
    """One row: where the ledger stands, and counts of what it keeps."""

    applied: int = 0
    now: int = 0
    """The greatest time that any entry had."""
    level: int = 1
    incarnation_number: int = -1
    incarnation: bytes = NO_INCARNATION
    first_operation: int = 1
    """Place of the first operation of this incarnation's stream among all."""
    tasks: int = 0
    """The number of the last task."""
    operations: int = 0
    """Place of the last operation."""
    ends: int = 0
    """`ended` of the last task that has."""
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    """How many of each are kept."""
    results: int = 1
    """`ended` of the oldest whose result is kept, or of the next."""
    result_bytes: int = 0
    operation_bytes: int = 0
    forgotten: int = 0
    """The greatest `not_after` of a task that was forgotten before; see `knode.tasks.forgetting`."""

    @property
    def kept(self) -> int:
        """How many tasks are kept that have ended."""
        return self.succeeded + self.failed + self.cancelled + self.expired


class Usage(Struct, frozen=True):
    """What tasks that have not ended take."""

    tasks: int = 0
    bytes: int = 0


class Change(Struct, frozen=True):
    """A task changed; `after` is None when it was forgotten, `before` when it is new."""

    id: bytes
    before: State | None
    after: LedgerTask | None
    asked: NewTask | None = None
    """What is asked for, of a task that is new; None where it must be looked up."""
    result: bytes | None = None
    """Of a task that has just succeeded; None where it must be looked up."""


class Outcome(Struct, frozen=True):
    """What a command did."""

    code: Code | None = None
    """None: done. Else nothing but the ledger's time has changed."""
    why: str = ""
    next_step: str = ""
    task: bytes = b""
    """Which task this is about: for a submit with a known key, the task that the key stands for."""
    state: State | None = None
    """Of that task, after the command; None when there is no such task."""
    attempt: int = 0
    member: bytes = b""
    is_new: bool = False
    """Whether a submit made this task now."""
    count: int = 0
    """How many tasks an Expire or a Begin changed; how many tasks and operations a Forget dropped."""

    def check(self) -> None:
        """Return when it was done; else raise the KnodeError that says why not."""
        if self.code is not None:
            raise KnodeError(self.code, self.why, self.next_step)


class Tables(Protocol):
    """Where the ledger stands. What was changed is seen at once by who reads."""

    totals: Totals

    def task(self, id: bytes) -> LedgerTask | None:
        """Return a task, ended or not."""
        ...

    def by_key(self, submitter: bytes, key: str) -> LedgerTask | None:
        """Return the task that has the key."""
        ...

    def usage(self, submitter: bytes) -> Usage:
        """Return what a submitter's tasks take that have not ended; all submitters' for an empty one."""
        ...

    def assigned(self) -> Iterable[LedgerTask]:
        """Return the tasks that are assigned, in order of submission; they may be changed meanwhile."""
        ...

    def add(self, task: LedgerTask, asked: NewTask, considered: tuple[Considered, ...]) -> None:
        """Add a task; `considered` when it is assigned."""
        ...

    def assign(self, task: LedgerTask, considered: tuple[Considered, ...]) -> None:
        """Keep a task's new attempt."""
        ...

    def requeue(self, task: LedgerTask) -> None:
        """Keep a task that is queued again."""
        ...

    def end(self, task: LedgerTask, result: bytes | None) -> None:
        """Keep a task that has ended; what was asked for is dropped."""
        ...

    def drop_result(self, ended: int) -> int:
        """Drop the result of the task that ended at this place; return its bytes, 0 when there is none."""
        ...

    def with_old_keys(self, before: int, limit: int) -> Iterable[LedgerTask]:
        """Return up to `limit` tasks that have ended and whose `not_after` is less, the least first."""
        ...

    def without_keys(self, before: int, limit: int) -> Iterable[LedgerTask]:
        """Return as `with_old_keys` tasks whose key is their own id."""
        ...

    def oldest_operations(self, limit: int) -> Iterable[tuple[int, int, bytes, int]]:
        """Return up to `limit` operations, the oldest first: place of all, time, task, bytes."""
        ...

    def drop_operations(self, last: int) -> None:
        """Drop all operations up to this place."""
        ...

    def forget(self, task: LedgerTask) -> None:
        """Drop all of a task that has ended."""
        ...

    def append(self, place: int, time: int, fence: Fence, data: bytes) -> None:
        """Append an operation at the next place of all."""
        ...

    def has_begun(self, incarnation: bytes) -> bool:
        """Tell whether this incarnation is, or was, the cell's."""
        ...

    def begin(self, number: int, incarnation: bytes, first_operation: int) -> None:
        """Keep where an incarnation's stream begins."""
        ...
