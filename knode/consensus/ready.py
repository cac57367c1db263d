"""What the core wants done, as one value."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from knode.consensus.messages import Entry, HardState, Index, Message, Snapshot, Term


class Role(StrEnum):
    """What a replica is in its term."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


class Position(Struct, frozen=True, order=True):
    """Where a proposal stands in the log, if its leader keeps its term: at `index` with another term it
    is lost."""

    term: Term
    index: Index


class ReadReady(Struct, frozen=True):
    """The read with this number may be answered from a state in which `index` is applied (section 6.4)."""

    number: int
    index: Index


class Recovered(Struct, frozen=True):
    """What the disk holds when a replica starts; as it stands here, a replica that is new."""

    hard_state: HardState = HardState()
    snapshot: Snapshot = Snapshot()
    """Where the log begins; everything up to it is applied."""
    entries: tuple[Entry, ...] = ()
    """The first has the index after the snapshot's, and there is no gap."""


class Ready(Struct, frozen=True):
    """One batch of work for the shell, which does it in this order:

    1. `messages` may go out at once, while the disk works.
    2. `snapshot`, if any, is installed: state machine and log begin anew there. `entries` are appended,
       replacing whatever stood at their indexes and beyond; `hard_state` is kept. All of it durable
       with one sync.
    3. `Raft.persisted(ready)` is called, then `messages_after` go out.
    4. `committed` are applied in order; `Raft.applied_to` is told. `reads` are answered once their
       index is applied.

    Ready values are made durable one after the other; the core may be given messages meanwhile.
    """

    hard_state: HardState | None
    """None when it did not change."""
    must_sync: bool
    """False: nothing here needs a sync (a changed `commit` alone)."""
    snapshot: Snapshot | None
    entries: tuple[Entry, ...]
    messages: tuple[Message, ...]
    messages_after: tuple[Message, ...]
    committed: tuple[Entry, ...]
    """Durable here and on a majority."""
    reads: tuple[ReadReady, ...]
