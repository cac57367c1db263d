"""The commands of the cell's ledger, as they stand in the log. Each carries the leader's time.

What a command does depends on itself and on the ledger alone. Its bytes are checked when they are
proposed and again when they are applied.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from knode.errors import Code, KnodeError
from knode.klp.codec import Decoder, encode
from knode.tasks.values import MAX_FILES, MAX_INPUT_BYTES, AgentId, FileName, Size, TaskId

LEVEL = 2
"""The feature level that this version knows. 1: all commands below, with these fields. 2: a Forget drops
operations, and tasks without keys of their own earlier (`knode.tasks.forgetting`)."""
MAX_BUNDLE_BYTES = 240 * 1024
"""Result, operations and follow-up tasks of one attempt, encoded; with it a command fits one entry."""
MAX_OPERATIONS = 256
MAX_OPERATION_BYTES = 16 * 1024
MAX_FOLLOW_UPS = 32
ATTEMPTS = 3
"""How many a task has at most, unless it says else."""
MAX_KEY = 128
MAX_CANDIDATES = 64

MemberId = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""A member's first key: its id for ever."""
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Milliseconds = Annotated[int, Meta(ge=0, le=2**53)]
"""Wall time."""
Key = Annotated[str, Meta(min_length=1, max_length=MAX_KEY)]
MAX_REASON = 1024
Reason = Annotated[str, Meta(max_length=MAX_REASON)]
CodeName = Annotated[str, Meta(max_length=32)]


class Fence(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Which attempt: of a task, under an incarnation of the cell. Only the current one may end the task."""

    incarnation: Hash
    task: TaskId
    attempt: Annotated[int, Meta(ge=1, le=1000)]


class File(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A file that goes with a task. Members that hold its bytes: see `knode.tasks.inputs`."""

    name: FileName
    size: Size
    hash: Hash
    """SHA-256 of its content."""


class Considered(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A member that was considered when the task was assigned: its score by `knode.tasks.routing`, lower is
    better, or why it could not be."""

    member: MemberId
    score: Annotated[int, Meta(ge=0, le=2**31)] | None
    why: Annotated[str, Meta(max_length=120)]


class Assignment(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Who runs an attempt, and who else was considered."""

    member: MemberId
    considered: Annotated[tuple[Considered, ...], Meta(max_length=MAX_CANDIDATES)]


class NewTask(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What is asked for. Its digest (SHA-256 of these fields' encoding) is what the same key must come
    with again."""

    agent: AgentId
    input: Annotated[bytes, Meta(max_length=MAX_INPUT_BYTES)]
    files: Annotated[tuple[File, ...], Meta(max_length=MAX_FILES)]
    on: Annotated[bytes, Meta(max_length=32)]
    """Raw id of the member that must run it; empty: whoever is best."""
    deadline_ms: Annotated[int, Meta(ge=0, le=30 * 86_400_000)]
    """How long after the commit of its submit it may take; 0: as long as its key lives."""
    attempts: Annotated[int, Meta(ge=1, le=100)]
    """How many at most."""


class Submit(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """A member asks for a task; the same key with the same task is the same task."""

    now: Milliseconds
    id: TaskId
    submitter: MemberId
    key: Key
    """Per submitter; the task's id in hexadecimal when none was given."""
    not_after: Milliseconds
    """Until when the key stands for this task, fixed by the first submit of it. A submit of a new task
    that is applied later is refused."""
    task: NewTask
    holders: Annotated[tuple[MemberId, ...], Meta(max_length=8)]
    """Members that hold all of its files."""
    assignment: Assignment | None
    """When a node is free at once."""


class Assign(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=2):
    """A queued task gets its next attempt."""

    now: Milliseconds
    task: TaskId
    assignment: Assignment


class Release(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=3):
    """An attempt is over without an end: its lease was lost, its node is gone or refused it. `charged`:
    it counts against the task's attempts."""

    now: Milliseconds
    fence: Fence
    charged: bool
    why: Reason


class FollowUp(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A task that an attempt asks for, without files. Its id is made from the parent's and its place (so it
    is the same whichever attempt asked), its submitter is the parent's."""

    task: NewTask


class Bundle(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What an attempt leaves: all of it takes effect with the completion, or nothing."""

    result: Annotated[bytes, Meta(max_length=MAX_BUNDLE_BYTES)]
    operations: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_OPERATION_BYTES)], ...], Meta(max_length=MAX_OPERATIONS)
    ] = ()
    """Appended to the cell's stream, each with the next number."""
    follow_ups: Annotated[tuple[FollowUp, ...], Meta(max_length=MAX_FOLLOW_UPS)] = ()


class Complete(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=4):
    """The attempt's node has done it."""

    now: Milliseconds
    fence: Fence
    member: MemberId
    """Who says so: the leader has checked that it is who asks; apply, that it is who was assigned."""
    bundle: Bundle


class Fail(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=5):
    """The attempt failed."""

    now: Milliseconds
    fence: Fence
    member: MemberId
    code: CodeName
    message: Reason
    retryable: bool


class Cancel(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=6):
    """Someone who may wants it no longer."""

    now: Milliseconds
    task: TaskId
    by: MemberId


class Expire(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=7):
    """These tasks' deadlines have passed; those whose deadline lies after the ledger's time stay."""

    now: Milliseconds
    tasks: Annotated[tuple[TaskId, ...], Meta(max_length=1024)]


class Forget(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=8):
    """Forget ended tasks and old operations, the oldest first, beyond what is kept."""

    now: Milliseconds


class Begin(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=9):
    """An incarnation of the cell begins: what was assigned is queued again, old fences are stale."""

    now: Milliseconds
    number: Annotated[int, Meta(ge=0, le=2**31)]
    incarnation: Hash


class RaiseLevel(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=10):
    """Every voter supports commands up to this feature level."""

    now: Milliseconds
    level: Annotated[int, Meta(ge=1, le=2**31)]


Command: TypeAlias = (
    Submit | Assign | Release | Complete | Fail | Cancel | Expire | Forget | Begin | RaiseLevel
)

_LAST_KIND = 10
_decoder: Decoder[Command] = Decoder(Command)


def decode_command(data: bytes) -> Command:
    """Return the command that an entry holds.

    Raises:
        KnodeError: HOME_TOO_NEW for a kind that a newer knode has; BAD_FRAME, NON_CANONICAL.
    """
    # A command is an array whose first item is its kind, a small number.
    if len(data) > 1 and data[0] & 0xF0 == 0x90 and _LAST_KIND < data[1] < 0x80:
        raise KnodeError(
            Code.HOME_TOO_NEW,
            f"the cell's log has a command of kind {data[1]}, and this knode knows kinds up to {_LAST_KIND}",
            "install the newer knode that the other voters run",
        )
    return _decoder.decode(data)


def task_digest(task: NewTask) -> bytes:
    """Return what a repeated key must come with again: SHA-256 over the task's encoding."""
    return sha256(encode(task)).digest()


def follow_up_id(parent: bytes, place: int, turn: int = 0) -> bytes:
    """Return the id of the follow-up task at `place`; `turn` counts on when an id is taken."""
    return sha256(b"knode follow-up" + parent + bytes([place]) + turn.to_bytes(4, "big")).digest()[:16]
