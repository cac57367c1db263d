"""What a leader knows of one follower, and how it feeds it.

PROBE: one `Append` at a time, until one is accepted: where the logs agree is not known. REPLICATE: appends
go out without waiting, within limits. SNAPSHOT: what it needs is forgotten here; its state is on its way.
The states are those of etcd's raft.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from msgspec import Struct

from knode.consensus.messages import Index, Snapshot


class Feeding(StrEnum):
    """How a follower gets the log."""

    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


class FollowerStatus(Struct, frozen=True):
    """What a shell may want to know of a follower."""

    match: Index
    """Its log is the leader's up to here, durably."""
    active: bool
    """It was heard within the election timeout."""
    feeding: Feeding


class Progress:
    """One follower.

    Args:
        next_index: which entry to try first.
        tick: the present one; a follower counts as heard when it is added.
    """

    __slots__ = (
        "_in_flight",
        "_in_flight_bytes",
        "feeding",
        "heard",
        "match",
        "next",
        "paused",
        "read",
        "snapshot",
        "stalled_at",
    )

    def __init__(self, next_index: Index, tick: int) -> None:
        self.match: Index = 0
        """Known to be durable there; never goes back."""
        self.next: Index = next_index
        """The first entry that was not sent."""
        self.feeding = Feeding.PROBE
        self.paused = False
        """PROBE: one is out; the next answer or heartbeat lets another go."""
        self.snapshot = Snapshot()
        """SNAPSHOT: what is on its way."""
        self.heard = tick
        """The tick of its last answer."""
        self.read = 0
        """The latest read whose heartbeat it answered."""
        self.stalled_at: Index = 0
        """`match` at its last heartbeat: the same again, with something sent, may mean that it was lost."""
        self._in_flight: deque[tuple[Index, int]] = deque()  # last index and bytes of each
        self._in_flight_bytes = 0

    def probe(self, next_index: Index) -> None:
        """Look for the place where the logs agree."""
        assert next_index > self.match, "what it has is not sent again"
        self._enter(Feeding.PROBE, next_index)

    def replicate(self) -> None:
        """The logs agree up to `match`."""
        self._enter(Feeding.REPLICATE, self.match + 1)

    def await_snapshot(self, snapshot: Snapshot) -> None:
        """A snapshot goes out; nothing else until it is there."""
        self._enter(Feeding.SNAPSHOT, snapshot.index + 1)
        self.snapshot = snapshot

    def _enter(self, feeding: Feeding, next_index: Index) -> None:
        self.feeding = feeding
        self.next = next_index
        self.paused = False
        self._in_flight.clear()
        self._in_flight_bytes = 0

    def sent(self, last: Index, size_bytes: int) -> None:
        """An `Append` with entries up to `last` went out while replicating."""
        self.next = last + 1
        self._in_flight.append((last, size_bytes))
        self._in_flight_bytes += size_bytes

    def is_full(self, max_appends: int, max_bytes: int) -> bool:
        """Whether as much is in flight as may be."""
        return len(self._in_flight) >= max_appends or self._in_flight_bytes >= max_bytes

    def accepted(self, index: Index) -> bool:
        """It has the log up to `index`. Return whether that is news."""
        in_flight = self._in_flight
        while in_flight and in_flight[0][0] <= index:
            self._in_flight_bytes -= in_flight.popleft()[1]
        if index <= self.match:
            return False
        self.match = index
        self.next = max(self.next, index + 1)
        return True
