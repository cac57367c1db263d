"""What nodes say to each other about tasks: the bodies of requests, of their answers and of events."""

from __future__ import annotations

from typing import Annotated

import msgspec

from knode.tasks.commands import (
    MAX_CANDIDATES,
    MAX_OPERATION_BYTES,
    Bundle,
    CodeName,
    Considered,
    Fence,
    File,
    Hash,
    Key,
    MemberId,
    Milliseconds,
    NewTask,
    Reason,
)
from knode.tasks.lifecycle import State
from knode.tasks.values import MAX_FILES, MAX_INPUT_BYTES, AgentId, FileName, Size, TaskId

NO_FRACTION = 1001
MAX_HOLDERS = 8
MAX_VIEWS = 256
"""Tasks of one page."""
MAX_WAITED = 1024
"""Tasks that one request waits for."""
MAX_EFFECTS = 256
"""Operations of one page."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Selector = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{1,32}\Z")]
"""A task's id, or the beginning of it, in hexadecimal digits."""

# Direct tasks: to the node that runs the task.


class Stage(msgspec.Struct, frozen=True, array_like=True):
    """Keep the file that comes on this request's stream, for the task's attempt."""

    task: TaskId
    name: FileName
    size: Size


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Run an agent over the input and the files staged before, and answer with its output."""

    task: TaskId
    agent: AgentId
    input: Annotated[bytes, msgspec.Meta(max_length=MAX_INPUT_BYTES)]
    files: Annotated[tuple[FileName, ...], msgspec.Meta(max_length=MAX_FILES)]
    deadline_ms: Annotated[int, msgspec.Meta(ge=1, le=300_000)]


class Ran(msgspec.Struct, frozen=True, array_like=True):
    """The agent's output."""

    output: bytes


class Report(msgspec.Struct, frozen=True, array_like=True):
    """How far an attempt is: thousandths, or NO_FRACTION, and a line of text."""

    permille: Annotated[int, msgspec.Meta(ge=0, le=NO_FRACTION)]
    text: Annotated[str, msgspec.Meta(max_length=200)]


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """The agents that a node has running, announced to every member."""

    agents: Annotated[
        tuple[tuple[AgentId, Annotated[str, msgspec.Meta(max_length=32)]], ...], msgspec.Meta(max_length=1024)
    ]


# Durable tasks: to the leader, from any member.


class SubmitTask(msgspec.Struct, frozen=True, array_like=True):
    """Have this done once. Answered by a `TaskView` when it is committed; the same key with the same task
    is answered by the same task again."""

    id: TaskId
    key: Key
    not_after: Milliseconds
    task: NewTask
    holders: Annotated[tuple[MemberId, ...], msgspec.Meta(max_length=MAX_HOLDERS)]
    """Members that hold all of its files."""
    is_cancelled: bool = False
    """It is submitted to be cancelled, so nobody need be able to run it."""


class CancelTask(msgspec.Struct, frozen=True, array_like=True):
    """End a task that has not ended. Answered by its `TaskView`."""

    task: TaskId


class ShowTask(msgspec.Struct, frozen=True, array_like=True):
    """Answered by the `TaskView` of the one task that fits; of `task.explain` by an `Explanation`."""

    task: Selector


class ListTasks(msgspec.Struct, frozen=True, array_like=True):
    """The tasks of the cell, newest first. Answered by `Views`."""

    before: Count | None = None
    """`number` of the last one of the page before."""


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """A task as the asker knows it."""

    task: TaskId
    state: State | None
    """None: it knows nothing of it."""
    attempt: Count
    reports: Count


class WaitForTasks(msgspec.Struct, frozen=True, array_like=True):
    """Answered by the `Views` of those that are not as they were seen, once there is one; by none after 20
    seconds."""

    seen: Annotated[tuple[Seen, ...], msgspec.Meta(max_length=MAX_WAITED)]


class ListEffects(msgspec.Struct, frozen=True, array_like=True):
    """The operations that tasks have left, in their order. Answered by `Effects`."""

    after: Count
    """Place of the last one of the page before; 0 for the first page."""
    task: Selector | None = None
    """Only what this task left."""


class TaskView(msgspec.Struct, frozen=True, array_like=True):
    """A task of the ledger, as the leader shows it."""

    id: TaskId
    number: Count
    """In the order of submission."""
    agent: AgentId
    state: State
    attempt: Count
    member: Annotated[bytes, msgspec.Meta(max_length=32)]
    """Id of the member that runs it or ran it last; empty: none yet."""
    submitter: MemberId
    key: Key
    submitted: Milliseconds
    deadline: Milliseconds
    result: bytes | None
    """None while there is none, where it does not fit into a page, and once the ledger keeps it no more."""
    code: CodeName
    """Why it has not succeeded, or why its latest attempt was over."""
    message: Reason
    reports: Count
    """How many reports its present attempt has made."""
    report: Report | None
    """The latest."""


class Views(msgspec.Struct, frozen=True, array_like=True):
    """A page of tasks."""

    tasks: Annotated[tuple[TaskView, ...], msgspec.Meta(max_length=MAX_VIEWS)]
    more: bool
    """Whether there are others."""
    missing: Annotated[tuple[TaskId, ...], msgspec.Meta(max_length=MAX_WAITED)] = ()
    """Of those that were asked for, tasks that the ledger does not have."""


class Explanation(msgspec.Struct, frozen=True, array_like=True):
    """Why a task is where it is."""

    task: TaskView
    considered: Annotated[tuple[Considered, ...], msgspec.Meta(max_length=MAX_CANDIDATES)]
    """When it was assigned last."""
    now: Annotated[tuple[Considered, ...], msgspec.Meta(max_length=MAX_CANDIDATES)]
    """If it were assigned now; empty when it has ended."""
    waits_for: Reason
    """What a queued task waits for."""


class Effect(msgspec.Struct, frozen=True, array_like=True):
    """An operation that a task left."""

    place: Count
    """Among all that are or were kept, from 1 on."""
    incarnation: Hash
    """In whose stream it stands."""
    sequence: Count
    """Its number there, from 1 on."""
    time: Count
    """When it took effect, by the ledger's time: milliseconds."""
    task: TaskId
    attempt: Count
    operation: Annotated[bytes, msgspec.Meta(max_length=MAX_OPERATION_BYTES)]


class Effects(msgspec.Struct, frozen=True, array_like=True):
    """A page of operations."""

    effects: Annotated[tuple[Effect, ...], msgspec.Meta(max_length=MAX_EFFECTS)]
    next: Count | None
    """`after` of the next page; None: there is none."""
    first: Count
    """Place of the oldest that is kept, or of the next to come: those before it were dropped."""
    since: Count
    """When that took effect; 0 when none is kept."""


# Durable tasks: between the leader and the members that run attempts.


class AssignAttempt(msgspec.Struct, frozen=True, array_like=True):
    """`task.assign`, leader to worker: run this attempt. Answered with nothing once it is accepted, and
    kept for the worker's next start; the same fence again is the same attempt.

    Refused with RATE_LIMITED, NO_AGENT, NO_SANDBOX, NOT_ALLOWED (by this node's role, or whoever asks does
    not lead), DISK_FULL, and with STALE_FENCE once the attempt is over there or a newer one of its task was
    accepted. Then nothing of it runs.
    """

    fence: Fence
    agent: AgentId
    input: Annotated[bytes, msgspec.Meta(max_length=MAX_INPUT_BYTES)]
    files: Annotated[tuple[File, ...], msgspec.Meta(max_length=MAX_FILES)]
    holders: Annotated[tuple[MemberId, ...], msgspec.Meta(max_length=MAX_HOLDERS)]
    """Whom to ask for the files that are not there."""
    remaining_ms: Annotated[int, msgspec.Meta(ge=1, le=2**42)]
    """Until the task's deadline."""
    token: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    """The same for every attempt of the task: what the agent passes to the world outside."""


class StopAttempt(msgspec.Struct, frozen=True, array_like=True):
    """`task.stop`, leader to worker: it is not wanted any more. Answered with nothing once nothing of it
    runs; stopping what is not there is no error."""

    fence: Fence


class CompleteAttempt(msgspec.Struct, frozen=True, array_like=True):
    """`task.complete`, worker to leader: it is done. Repeated until it is answered by a `Settled`."""

    fence: Fence
    bundle: Bundle


class FailAttempt(msgspec.Struct, frozen=True, array_like=True):
    """`task.fail`, worker to leader: it failed. Repeated until it is answered by a `Settled`."""

    fence: Fence
    code: CodeName
    message: Reason
    retryable: bool
    """Whether another attempt, here or elsewhere, may do better."""


class Settled(msgspec.Struct, frozen=True, array_like=True):
    """The ledger knows how the attempt ended; its worker forgets it."""

    is_current: bool
    """False: the fence was stale, and nothing of it took effect."""


class AskFates(msgspec.Struct, frozen=True, array_like=True):
    """`task.fates`, from members that hold files: which of these tasks live, and which have ended? Answered
    by `Fates`; of those that are in neither the ledger knows nothing."""

    tasks: Annotated[tuple[TaskId, ...], msgspec.Meta(max_length=MAX_VIEWS)]


class Fates(msgspec.Struct, frozen=True, array_like=True):
    """What became of tasks."""

    live: Annotated[tuple[TaskId, ...], msgspec.Meta(max_length=MAX_VIEWS)]
    over: Annotated[tuple[TaskId, ...], msgspec.Meta(max_length=MAX_VIEWS)]


class AskAttempt(msgspec.Struct, frozen=True, array_like=True):
    """`task.current`, worker to leader, of an attempt that outlived its worker's process: does the ledger
    still wait for it? Answered by a `Settled`."""

    fence: Fence


class AttemptReport(msgspec.Struct, frozen=True, array_like=True):
    """`task.progress`, an event, worker to leader: how far an attempt is. At most two a second."""

    fence: Fence
    report: Report


# Durable tasks: their files, between any two members.


class HoldFile(msgspec.Struct, frozen=True, array_like=True):
    """`task.hold`: keep the file that comes on this request's stream, until its task has ended. Answered
    with nothing once it is whole, right and durable there."""

    task: TaskId
    file: File


class SendFile(msgspec.Struct, frozen=True, array_like=True):
    """`task.send`: give the asker a file of a task, by a `task.hold`. Answered with nothing once it has it.

    NOT_FOUND when it is not there.
    """

    task: TaskId
    file: File
