"""What must be true of a cell of cores at every moment, whatever happens to it.

One `Invariants` watches all replicas of a cell from the outside: what they want written, what they send and
what they say is committed. Each rule names its place in the dissertation; figure 3.2 has the first five.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from raft_replica import Log, Replica, Sent, is_command

from knode.consensus import configuration as configurations
from knode.consensus import quorum
from knode.consensus.messages import (
    AppendReply,
    Configuration,
    Entry,
    Index,
    Kind,
    ReplicaId,
    Snapshot,
    Term,
    VoteReply,
)
from knode.consensus.ready import Position, ReadReady, Ready, Role


class Violation(AssertionError):
    """A rule did not hold."""


def require(holds: bool, rule: str, *what: object) -> None:
    """Demand that a rule holds."""
    if not holds:
        raise Violation(f"{rule}: " + " ".join(map(str, what)))


class Invariants:
    """The rules of one cell.

    Args:
        replicas: all that ever take part.
    """

    def __init__(self, replicas: Mapping[ReplicaId, Replica]) -> None:
        self.replicas = replicas
        self.committed: list[Entry] = []
        """All that anybody ever said is committed, in order."""
        self.committed_in: list[Term] = []
        """The term of who said it first."""
        self.leaders: dict[Term, ReplicaId] = {}
        self.votes: dict[tuple[ReplicaId, Term], ReplicaId] = {}
        self.entries: dict[tuple[Term, Index], tuple[Entry, Term | None]] = {}
        """Every entry that was ever in a log, and the term of the one before it."""
        self.proposed: dict[Position, bytes] = {}
        self.reads: dict[tuple[ReplicaId, int], Index] = {}
        """The reads that wait, and what had been committed when each began."""
        self.answered = 0
        self.seen = {id: _Seen(replica) for id, replica in replicas.items()}
        for replica in replicas.values():
            self._note_entries(replica.log, tuple(replica.log.entries))
            self._note_committed(replica)

    # What the one who drives the cell tells.

    def taken(self, replica: Replica, ready: Ready, messages: Iterable[Sent]) -> None:
        """A replica gave a Ready, and `messages` go out before it is durable."""
        seen, core, log = self.seen[replica.id], replica.core, replica.log
        if not ready.must_sync:
            require(ready.snapshot is None and not ready.entries, "what is written is synced")
            hard_state = ready.hard_state
            if hard_state is not None:
                same = (hard_state.term, hard_state.vote) == (seen.term, seen.vote)
                require(same, "term and vote are synced")
        if ready.hard_state is not None:
            seen.term, seen.vote = ready.hard_state.term, ready.hard_state.vote
        if ready.snapshot is not None:
            self._snapshot_stands_for_commits(ready.snapshot)
        if ready.entries:
            self._note_entries(log, ready.entries)
        self._note_committed(replica)
        if ready.snapshot is not None or ready.entries or seen.configuration != core.configuration:
            self._configuration(replica, ready.entries)
        for entry in ready.committed:
            require(replica.disk.term(entry.index) == entry.term, "what is applied is durable", entry)
        if core.role is Role.LEADER:
            self._leader(replica)
        seen.leads = core.term if core.role is Role.LEADER else None
        require(core.committed >= seen.committed, "commits never go back", replica.id)
        seen.committed = core.committed
        seen.configuration = core.configuration
        self.say(replica, messages)

    def persisted(self, replica: Replica, ready: Ready, messages: Iterable[Sent]) -> None:
        """A Ready became durable and was applied; `messages` go out now."""
        for entry in ready.committed:
            right = self.committed[entry.index - 1]
            require(entry == right, "state machine safety (figure 3.2)", replica.id, entry, right)
        for read in replica.answered:
            self._read(replica, read)
        replica.answered.clear()
        self.say(replica, messages)

    def say(self, replica: Replica, messages: Iterable[Sent]) -> None:
        """Messages go out: what they promise is on the sender's disk by now (section 3.8)."""
        disk = replica.disk
        for sent in messages:
            message = sent.message
            require(message.source == replica.id, "nobody speaks for another")
            match message:
                case AppendReply(accepted=True, index=index, term=term):
                    require(disk.last_index >= index, "what is acknowledged is durable", message)
                    require(
                        disk.hard_state.term >= term, "what is acknowledged is of a durable term", message
                    )
                case VoteReply(granted=True, term=term, target=target):
                    hard_state = disk.hard_state
                    durable = hard_state.term > term or (hard_state.term, hard_state.vote) == (term, target)
                    require(durable, "a vote is durable before it is sent", message)
                    given = self.votes.setdefault((replica.id, term), target)
                    require(given == target, "one vote a term (section 3.4)", message, given)
                case _:
                    pass

    def proposes(self, position: Position, data: bytes) -> None:
        """A leader took a proposal."""
        self.proposed[position] = data

    def asks(self, replica: Replica, number: int) -> None:
        """A leader took a read."""
        self.reads[replica.id, number] = len(self.committed)

    def restarted(self, replica: Replica) -> None:
        """A replica began again: what it had not made durable is forgotten."""
        self.seen[replica.id] = _Seen(replica)
        self.reads = {key: start for key, start in self.reads.items() if key[0] != replica.id}
        self._note_committed(replica)

    def finish(self) -> None:
        """Compare every state machine's whole state with what was committed."""
        for replica in self.replicas.values():
            right = [entry.data for entry in self.committed[: replica.applied] if is_command(entry)]
            require(replica.state == right, "each state is that of the committed entries", replica.id)

    # The rules.

    def _note_entries(self, log: Log, entries: tuple[Entry, ...]) -> None:
        for entry in entries:
            before = log.term(entry.index - 1)
            known = self.entries.setdefault((entry.term, entry.index), (entry, before))
            require(known[0] == entry, "log matching: an entry of a term is one", entry, known[0])
            same = before == known[1] or before is None or known[1] is None
            require(same, "log matching: and so is all before it (section 3.5)", entry, before, known[1])

    def _note_committed(self, replica: Replica) -> None:
        core, log = replica.core, replica.log
        for index in range(len(self.committed) + 1, core.committed + 1):
            entry = log.entry(index)
            require(entry is not None, "what is committed is in the log", replica.id, index)
            assert entry is not None
            self.committed.append(entry)
            self.committed_in.append(core.term)
            data = self.proposed.get(Position(entry.term, entry.index))
            require(data in (None, entry.data), "a proposal's position holds it", entry)
        if 0 < core.committed <= log.last_index:
            right = self.committed[core.committed - 1].term
            known = log.term(core.committed)
            require(known in (None, right), "what is committed is one", replica.id, core.committed)

    def _snapshot_stands_for_commits(self, snapshot: Snapshot) -> None:
        require(snapshot.index <= len(self.committed), "a snapshot is of what is committed", snapshot)
        require(self.committed[snapshot.index - 1].term == snapshot.term, "and has its term", snapshot)

    def _leader(self, replica: Replica) -> None:
        seen, core, log = self.seen[replica.id], replica.core, replica.log
        first = self.leaders.setdefault(core.term, replica.id)
        require(first == replica.id, "one leader a term (section 3.4)", core.term, first, replica.id)
        if seen.leads != core.term:
            index = len(self.committed)
            while index and self.committed_in[index - 1] >= core.term:
                index -= 1
            has = index <= log.snapshot.index or log.term(index) == self.committed[index - 1].term
            require(has, "leader completeness (section 3.6.3)", replica.id, core.term, index)
        elif core.committed > seen.committed:
            own = log.term(core.committed) == core.term
            require(
                own, "a leader counts entries of its own term (section 3.6.2)", replica.id, core.committed
            )
            durable = {id for id, one in self.replicas.items() if _has(one.disk, core.committed, core.term)}
            decides = any(quorum.is_quorum(c, durable) for c in (seen.configuration, core.configuration))
            require(decides, "what is committed is durable on a majority", replica.id, core.committed)

    def _configuration(self, replica: Replica, entries: tuple[Entry, ...]) -> None:
        core, log = replica.core, replica.log
        chain = [(log.snapshot.index, log.snapshot.configuration)]
        for entry in log.entries:
            if entry.kind is Kind.CONFIGURATION:
                decoded = configurations.decoded(entry.data)
                require(decoded is not None, "a configuration is one", entry)
                assert decoded is not None
                chain.append((entry.index, decoded))
        require(
            core.configuration == chain[-1][1], "the last in the log is in force (section 4.1)", replica.id
        )
        fresh = {entry.index for entry in entries}
        for (index, old), (at, new) in pairwise(chain):
            if at not in fresh or not old.voters:
                continue
            if old.outgoing:
                right = (new.voters, new.outgoing) == (old.voters, ())
            else:
                right = new.outgoing == old.voters or (new.voters, new.outgoing) == (old.voters, ())
            require(right, "from one configuration to another by a joint one (section 4.3)", old, new)
            if core.role is Role.LEADER and log.term(at) == core.term:
                require(index <= core.committed, "one change at a time (section 4.1)", replica.id, index, at)

    def _read(self, replica: Replica, read: ReadReady) -> None:
        start = self.reads.pop((replica.id, read.number), None)
        require(start is not None, "a read is answered once, by whom it was asked", replica.id, read)
        assert start is not None
        require(read.index >= start, "reads are linearizable (section 6.4)", replica.id, read, start)
        self.answered += 1


class _Seen:
    """A replica as it was when it last gave a Ready."""

    def __init__(self, replica: Replica) -> None:
        hard_state = replica.disk.hard_state
        self.term: Term = hard_state.term
        self.vote: ReplicaId = hard_state.vote
        self.committed: Index = 0
        self.leads: Term | None = None
        self.configuration: Configuration = replica.core.configuration


def _has(disk: Log, index: Index, term: Term) -> bool:
    return disk.snapshot.index >= index or disk.term(index) == term
