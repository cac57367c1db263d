"""The log in memory: all entries since the last snapshot, and how far each promise about them reaches.

    snapshot.index <= applied <= handed <= committed <= last_index,   handed <= durable <= taken <= last_index

(`durable` is behind the snapshot's index while a snapshot that replaced the log is being written.) An entry
at or below `committed` is never replaced. What the shell is writing may be replaced in memory meanwhile: then
the write promises only what still stands.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from knode.consensus import configuration as configurations
from knode.consensus.messages import (
    MAX_ENTRIES,
    Configuration,
    Entry,
    Index,
    Kind,
    Snapshot,
    Term,
)
from knode.consensus.ready import Recovered

ENTRY_OVERHEAD_BYTES = 32
"""Counted for each entry beside its data: so entries without data have a limit as well."""

_term = attrgetter("term")


def size_of(entry: Entry) -> int:
    """Return what an entry counts against the limits in bytes."""
    return len(entry.data) + ENTRY_OVERHEAD_BYTES


class Log:
    """One replica's log.

    Args:
        recovered: what the disk held.
        applied: up to where the state machine has it; known to be committed.
    """

    def __init__(self, recovered: Recovered, applied: Index) -> None:
        snapshot = recovered.snapshot
        self.snapshot = snapshot
        self._entries: list[Entry] = []
        self._configurations: list[tuple[Index, Configuration]] = [(snapshot.index, snapshot.configuration)]
        self.last_index: Index = snapshot.index
        self.committed: Index = snapshot.index
        self.append(recovered.entries)
        self.durable: Index = self.last_index
        self._taken: Index = self.last_index
        self._writing: deque[Index] = deque()  # up to where each batch that is being written still stands
        self._snapshot_taken = True
        assert snapshot.index <= applied <= self.last_index, "only what lies in the log is applied"
        self.committed = max(applied, min(recovered.hard_state.commit, self.last_index))
        self.handed: Index = applied
        self.applied: Index = applied

    # What is in it

    @property
    def first_index(self) -> Index:
        """Index of the first entry that is still here; it need not have come yet."""
        return self.snapshot.index + 1

    @property
    def last_term(self) -> Term:
        """Term of the last entry."""
        return self._entries[-1].term if self._entries else self.snapshot.term

    @property
    def configuration(self) -> Configuration:
        """The configuration in force: the latest in the log, committed or not (section 4.1)."""
        return self._configurations[-1][1]

    @property
    def configuration_index(self) -> Index:
        """Where that stands."""
        return self._configurations[-1][0]

    @property
    def possible_configurations(self) -> list[Configuration]:
        """Return those that may turn out to be in force: the last that is committed, and all after it."""
        place = len(self._configurations) - 1
        while place and self._configurations[place][0] > self.committed:
            place -= 1
        return [configuration for _, configuration in self._configurations[place:]]

    def term_at(self, index: Index) -> Term | None:
        """Return the term of the entry at an index; None when that is not known here."""
        offset = index - self.snapshot.index - 1
        if 0 <= offset < len(self._entries):
            return self._entries[offset].term
        return self.snapshot.term if offset == -1 else None

    def matches(self, index: Index, term: Term) -> bool:
        """Whether the entry at an index is the one of this term (figure 3.1, AppendEntries, rule 2)."""
        return self.term_at(index) == term

    def between(self, first: Index, max_bytes: int) -> tuple[Entry, ...]:
        """Return entries from an index on: at least one if there is one, else as many as the limits of an
        `Append` allow."""
        start = first - self.snapshot.index - 1
        assert start >= 0, "what is asked for is in memory"
        found = self._entries[start : start + MAX_ENTRIES]
        total = 0
        for count, entry in enumerate(found):
            total += len(entry.data) + ENTRY_OVERHEAD_BYTES
            if total > max_bytes and count:
                return tuple(found[:count])
        return tuple(found)

    def size_between(self, after: Index, last: Index) -> int:
        """Return the size of the entries after one index, up to another."""
        base = self.snapshot.index
        return sum(map(size_of, self._entries[after - base : last - base]))

    def last_agreeing(self, index: Index, term: Term) -> tuple[Index, Term]:
        """Return the last place at or before an index whose term is at most this one, with its term: no
        later one can agree with a log that has this term at this index.

        It is one before the log's snapshot, with term 0, when all that is known here is of later terms.
        """
        end = min(index, self.last_index) - self.snapshot.index
        place = bisect_right(self._entries, term, 0, max(end, 0), key=_term) if end > 0 else 0
        if place:
            return self.snapshot.index + place, self._entries[place - 1].term
        if end >= 0 and self.snapshot.term <= term:
            return self.snapshot.index, self.snapshot.term
        return max(min(index, self.snapshot.index - 1), 0), 0

    def snapshot_at(self, index: Index) -> Snapshot:
        """Return what a state machine's state stands for that has applied everything up to an index, which
        must be in memory (or the snapshot's) and committed."""
        term = self.term_at(index)
        assert term is not None, "a snapshot is of what is known"
        assert index <= self.committed, "and of what is committed"
        place = bisect_right(self._configurations, index, key=lambda item: item[0])
        return Snapshot(index, term, self._configurations[place - 1][1])

    # How it changes

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries at the end."""
        if not entries:
            return
        assert entries[0].index == self.last_index + 1, "no gap"
        assert entries[0].term >= self.last_term, "terms never go back along the log"
        self._entries.extend(entries)
        self.last_index = entries[-1].index
        assert len(self._entries) == self.last_index - self.snapshot.index
        for entry in entries:
            if entry.kind is not Kind.COMMAND:
                configuration = configurations.decoded(entry.data)
                assert configuration is not None, "it was checked when it came"
                self._configurations.append((entry.index, configuration))

    def merge(self, entries: Sequence[Entry]) -> None:
        """Take a leader's entries, which follow a place at which both logs agree. What is here already
        stays, also beyond them: an old message must not undo a newer one (figure 3.1, rules 3 and 4)."""
        for position, entry in enumerate(entries):
            if entry.index > self.last_index:
                self.append(entries[position:])
                return
            if not self.matches(entry.index, entry.term):
                self._truncate_conflict(entry.index)
                self.append(entries[position:])
                return

    def _truncate_conflict(self, index: Index) -> None:
        """Forget everything from an index on: the leader has something else there (figure 3.1, rule 3)."""
        assert index > self.committed, "what is committed is never replaced"
        del self._entries[index - self.snapshot.index - 1 :]
        while self._configurations[-1][0] >= index:
            self._configurations.pop()
        self.last_index = index - 1
        self._taken = min(self._taken, index - 1)
        self._void_writes(index - 1)

    def _void_writes(self, last: Index) -> None:
        """What is being written, or was written, counts no further than `last`: beyond it something else
        will be written over it, even if the same entries should come back in between."""
        self.durable = min(self.durable, last)
        self._writing = deque(min(end, last) for end in self._writing)

    def commit_to(self, index: Index) -> None:
        """Everything up to an index is committed."""
        assert self.committed <= index <= self.last_index, "commits never go back, nor beyond the log"
        self.committed = index

    def reset(self, snapshot: Snapshot) -> None:
        """Begin anew after a snapshot from the leader, which goes further than what is committed here."""
        assert snapshot.index > self.committed, "a snapshot never takes back what is committed"
        self._void_writes(self.committed)
        self.snapshot = snapshot
        self._snapshot_taken = False
        self._entries.clear()
        self._configurations = [(snapshot.index, snapshot.configuration)]
        self.last_index = self.committed = self.handed = self._taken = snapshot.index

    def compact(self, snapshot: Snapshot) -> None:
        """Forget the entries up to an applied index."""
        if snapshot.index <= self.snapshot.index:
            return
        assert snapshot.index <= self.applied, "only what is applied may be forgotten"
        assert snapshot == self.snapshot_at(snapshot.index), "the snapshot is of this log"
        del self._entries[: snapshot.index - self.snapshot.index]
        later = [item for item in self._configurations if item[0] > snapshot.index]
        self._configurations = [(snapshot.index, snapshot.configuration), *later]
        self.snapshot = snapshot

    # What the shell does with it

    def take(self) -> tuple[Snapshot | None, tuple[Entry, ...]]:
        """Return what must be written now, each once: first the snapshot, then the entries."""
        snapshot = None if self._snapshot_taken else self.snapshot
        self._snapshot_taken = True
        entries = tuple(self._entries[self._taken - self.snapshot.index :])
        self._taken = self.last_index
        self._writing.append(self.last_index)
        return snapshot, entries

    @property
    def has_untaken(self) -> bool:
        """Whether there is something to write."""
        return self._taken < self.last_index or not self._snapshot_taken

    def written(self, snapshot: Snapshot | None) -> None:
        """The oldest batch that was taken is durable."""
        self.durable = max(self.durable, self._writing.popleft())
        if snapshot is not None:
            self.applied = max(self.applied, snapshot.index)

    def hand_committed(self) -> tuple[Entry, ...]:
        """Return what is to be applied now, each once: it is committed, and durable here."""
        end = min(self.committed, self.durable)
        if end <= self.handed:
            return ()
        base = self.snapshot.index
        committed = tuple(self._entries[self.handed - base : end - base])
        self.handed = end
        return committed

    def applied_to(self, index: Index) -> None:
        """The state machine has everything up to an index."""
        assert index <= self.handed, "only what was handed out is applied"
        self.applied = max(self.applied, index)
