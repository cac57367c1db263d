"""What replicas say to each other, and what their logs hold. Values only.

Messages may be lost, and may overtake each other when they go over different links; every rule of
`knode.consensus.raft` holds whatever order they come in.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

MAX_COMMAND_BYTES = 248 * 1024
"""One entry's data; with it an `Append` fits one KLP message."""
MAX_ENTRIES = 1024
"""Entries in one `Append`."""

ReplicaId = Annotated[bytes, Meta(min_length=1, max_length=48)]
"""One replica for as long as its disk keeps its promises: the member's id (32 bytes), then 8 random
bytes that are drawn anew when the replica begins with an empty log. To the core it is opaque."""
MOST = 2**62
"""No term, index or number of a read is greater: with room above it, also in SQLite."""
Term = Annotated[int, Meta(ge=0, le=MOST)]
Index = Annotated[int, Meta(ge=0, le=MOST)]
"""Position in the log; the first entry has 1."""


class Kind(IntEnum):
    """What an entry is."""

    COMMAND = 0
    """`data` is the state machine's; empty: nothing, which a leader appends to begin its term."""
    CONFIGURATION = 1
    """`data` is an encoded `Configuration`, in force from the moment at which it is appended."""


class Entry(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """One place of the log."""

    term: Term
    index: Index
    kind: Kind
    data: Annotated[bytes, Meta(max_length=MAX_COMMAND_BYTES)]


Replicas = Annotated[tuple[ReplicaId, ...], Meta(max_length=64)]


class Configuration(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """Whose vote counts (dissertation, section 4.3). Each tuple is sorted and without repetition.

    Args:
        voters: of the configuration in force; during a joint one, of the one to come.
        outgoing: the voters of the one to leave; empty unless it is joint. Then a decision needs a
        majority of both.
        learners: get the log and have no vote. Nobody is in `voters` and here; an outgoing voter that is to
        become a learner is in both, and votes until the joint configuration is left.
    """

    voters: Replicas = ()
    outgoing: Replicas = ()
    learners: Replicas = ()


class HardState(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """What a replica must have made durable before it answers (Raft paper, figure 2), and how far it
    knows of commits."""

    term: Term = 0
    vote: Annotated[bytes, Meta(max_length=48)] = b""
    """For whom it voted in `term`; empty: for nobody."""
    commit: Index = 0
    """A hint, to apply after a restart what is known to be committed; it need not be synced."""


class Snapshot(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """Which log a state machine's state stands for; the state itself is not here."""

    index: Index = 0
    term: Term = 0
    configuration: Configuration = Configuration()


# Each message: the sender's term, who sends it, and to whom; then its own fields.


class PreVote(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=1):
    """Would you vote for me in `term`? (section 9.6). `term` is the one to come; nobody changes its own
    for it."""

    term: Term
    source: ReplicaId
    target: ReplicaId
    last_index: Index
    last_term: Term


class PreVoteReply(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=2):
    """`term`: when granted the one that was asked for, else the refuser's own."""

    term: Term
    source: ReplicaId
    target: ReplicaId
    granted: bool


class Vote(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=3):
    """Vote for me (figure 3.1, RequestVote). `transfer`: the leader wants it, so no lease stands
    against it."""

    term: Term
    source: ReplicaId
    target: ReplicaId
    last_index: Index
    last_term: Term
    transfer: bool


class VoteReply(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=4):
    """The vote, or not."""

    term: Term
    source: ReplicaId
    target: ReplicaId
    granted: bool


class Append(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=5):
    """Entries that follow `previous_index` (figure 3.1, AppendEntries); `commit` is the leader's."""

    term: Term
    source: ReplicaId
    target: ReplicaId
    previous_index: Index
    previous_term: Term
    entries: Annotated[tuple[Entry, ...], Meta(max_length=MAX_ENTRIES)]
    commit: Index


class AppendReply(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=6):
    """Accepted: the log is the leader's up to `index`. Refused: it is not at `index` (the
    `previous_index` that was sent); `hint_index` and `hint_term` say where to look next (the last entry
    here that can still agree)."""

    term: Term
    source: ReplicaId
    target: ReplicaId
    index: Index
    accepted: bool
    hint_index: Index
    hint_term: Term


class Heartbeat(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=7):
    """The leader is here. `commit` is at most what the target is known to have; `read` is the number of
    the latest read that waits for a quorum to answer (section 6.4), 0 for none."""

    term: Term
    source: ReplicaId
    target: ReplicaId
    commit: Index
    read: Annotated[int, Meta(ge=0, le=MOST)]


class HeartbeatReply(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=8):
    """`read` as it came."""

    term: Term
    source: ReplicaId
    target: ReplicaId
    read: Annotated[int, Meta(ge=0, le=MOST)]


class InstallSnapshot(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=9):
    """The log that the target lacks is gone: take this state instead. Its bytes come by a way of their
    own; the core of the target sees this message when they are all there. Answered by `AppendReply`."""

    term: Term
    source: ReplicaId
    target: ReplicaId
    snapshot: Snapshot


class TimeoutNow(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=10):
    """Stand for election at once (section 3.10, leadership transfer)."""

    term: Term
    source: ReplicaId
    target: ReplicaId


Message: TypeAlias = (
    PreVote
    | PreVoteReply
    | Vote
    | VoteReply
    | Append
    | AppendReply
    | Heartbeat
    | HeartbeatReply
    | InstallSnapshot
    | TimeoutNow
)
