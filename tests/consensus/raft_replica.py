"""One replica as the tests see it: a pure core, its disk, and the state that committed entries made.

It stands for the shell, and does what `Ready` asks for in its order; but each step is taken by the test:
`take` hands out what may be sent at once, `persist` is the sync of one batch, and a crash may come between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from knode.consensus import configuration as configurations
from knode.consensus.messages import (
    Configuration,
    Entry,
    HardState,
    Index,
    InstallSnapshot,
    Kind,
    Message,
    Snapshot,
    Term,
)
from knode.consensus.raft import Raft
from knode.consensus.ready import ReadReady, Ready, Recovered
from knode.consensus.settings import Settings


@dataclass
class Log:
    """Hard state, snapshot and entries as Readies change them."""

    hard_state: HardState
    snapshot: Snapshot
    entries: list[Entry]

    @property
    def last_index(self) -> Index:
        return self.snapshot.index + len(self.entries)

    def entry(self, index: Index) -> Entry | None:
        """The entry at an index; None outside of what is kept."""
        at = index - self.snapshot.index - 1
        return self.entries[at] if 0 <= at < len(self.entries) else None

    def term(self, index: Index) -> Term | None:
        """The term at an index; None when it is not known."""
        if index == self.snapshot.index:
            return self.snapshot.term
        entry = self.entry(index)
        return None if entry is None else entry.term

    def write(self, ready: Ready) -> None:
        """Do what a Ready asks of the disk."""
        if ready.snapshot is not None:
            self.snapshot, self.entries = ready.snapshot, []
        if ready.entries:
            keep = ready.entries[0].index - self.snapshot.index - 1
            assert 0 <= keep <= len(self.entries), "entries leave a gap, or replace what is compacted"
            self.entries[keep:] = ready.entries
            assert [e.index for e in self.entries[keep:]] == list(
                range(self.snapshot.index + keep + 1, self.last_index + 1)
            ), "entries are not numbered one by one"
        if ready.hard_state is not None:
            self.hard_state = ready.hard_state

    def compact(self, snapshot: Snapshot) -> None:
        """Forget what the snapshot stands for, unless a later one took its place."""
        if snapshot.index <= self.snapshot.index:
            return
        del self.entries[: snapshot.index - self.snapshot.index]
        self.snapshot = snapshot

    def copy(self) -> Log:
        return Log(self.hard_state, self.snapshot, self.entries.copy())


@dataclass(frozen=True)
class Sent:
    """A message under way; with an `InstallSnapshot` goes the state that it stands for."""

    message: Message
    state: tuple[bytes, ...] = ()


class Replica:
    """A core with its disk.

    Args:
        recovered: what the disk holds at first.
    """

    def __init__(
        self,
        id: bytes,
        recovered: Recovered,
        *,
        choose: Callable[[int], int],
        settings: Settings,
    ) -> None:
        self.id = id
        self.choose = choose
        self.settings = settings
        self.disk = Log(recovered.hard_state, recovered.snapshot, list(recovered.entries))
        self.state: list[bytes] = []
        """The data of every command applied: what the replicated log is for."""
        self.saved: tuple[bytes, ...] = ()
        """The state at the disk's snapshot."""
        self.applied: Index = 0
        self.synced = recovered.hard_state
        self.start()

    def start(self) -> None:
        """Begin, or begin again, with what the disk has."""
        self.log = self.disk.copy()
        """What the core holds: the disk's, and what waits for it."""
        self.waiting: deque[Ready] = deque()
        """Taken from the core, and not durable."""
        self._arrived: dict[Snapshot, tuple[bytes, ...]] = {}
        self.unanswered: list[ReadReady] = []
        self.answered: list[ReadReady] = []
        recovered = Recovered(self.disk.hard_state, self.disk.snapshot, tuple(self.disk.entries))
        self.raft: Raft | None = Raft(
            self.id, recovered, applied=self.applied, choose=self.choose, settings=self.settings
        )

    @property
    def core(self) -> Raft:
        """The running core."""
        assert self.raft is not None, f"{self.id.decode()} does not run"
        return self.raft

    def take(self) -> tuple[Ready | None, list[Sent]]:
        """Take what the core wants; return it with what may be sent at once."""
        ready = self.core.ready()
        if ready is None:
            return None, []
        self.waiting.append(ready)
        self.log.write(ready)
        return ready, [self._sent(message) for message in ready.messages]

    def persist(self) -> tuple[Ready, list[Sent]]:
        """Make the oldest batch durable and apply what it committed; return what may be sent after."""
        ready = self.waiting.popleft()
        self._write(ready)
        self.core.persisted(ready)
        for entry in ready.committed:
            self._apply(entry)
        if ready.committed or ready.snapshot is not None:
            self.core.applied_to(self.applied)
        self.unanswered += ready.reads
        self.answered += [read for read in self.unanswered if read.index <= self.applied]
        self.unanswered = [read for read in self.unanswered if read.index > self.applied]
        return ready, [self._sent(message) for message in ready.messages_after]

    def receive(self, sent: Sent) -> None:
        """Give the core a message; the state that comes with a snapshot is kept until it is installed."""
        if isinstance(sent.message, InstallSnapshot):
            self._arrived[sent.message.snapshot] = sent.state
        self.core.receive(sent.message)

    def compact(self, index: Index) -> None:
        """Save the state at an applied index, and forget the log up to it."""
        assert self.disk.snapshot.index < index <= self.applied
        term = self.disk.term(index)
        assert term is not None
        snapshot = Snapshot(index, term, self.configuration_at(index))
        commands = sum(is_command(e) for e in self.disk.entries if e.index <= index)
        self.saved = tuple(self.state[: len(self.saved) + commands])
        self.disk.compact(snapshot)
        self.log.compact(snapshot)
        self.core.compact(snapshot)

    def configuration_at(self, index: Index) -> Configuration:
        """The configuration in force at an index that the disk still knows."""
        found = self.disk.snapshot.configuration
        for entry in self.disk.entries[: index - self.disk.snapshot.index]:
            if entry.kind is Kind.CONFIGURATION:
                decoded = configurations.decoded(entry.data)
                assert decoded is not None
                found = decoded
        return found

    def crash(self, *, durable: int = 0, applied: Index | None = None) -> None:
        """Die. Of what waits for the disk, the oldest `durable` batches reached it; a hard state that needed
        no sync did not.

        Args:
            applied: how far the state machine's own file got; None: as far as it was.
        """
        for ready in list(self.waiting)[:durable]:
            self._write(ready)
        self.disk.hard_state = self.synced
        if applied is not None:
            self._unapply(max(applied, self.disk.snapshot.index))
        self.raft = None

    def _write(self, ready: Ready) -> None:
        self.disk.write(ready)
        if ready.must_sync:
            self.synced = self.disk.hard_state
        if ready.snapshot is not None:
            self.saved = self._arrived[ready.snapshot]
            self.state = list(self.saved)
            self.applied = ready.snapshot.index

    def _apply(self, entry: Entry) -> None:
        assert entry.index == self.applied + 1, "entries are applied one by one"
        self.applied = entry.index
        if is_command(entry):
            self.state.append(entry.data)

    def _unapply(self, index: Index) -> None:
        lost = [e for e in self.disk.entries if index < e.index <= self.applied and is_command(e)]
        del self.state[len(self.state) - len(lost) :]
        self.applied = min(self.applied, index)

    def _sent(self, message: Message) -> Sent:
        """Put a message on its way; a state goes as it is now, which may be later than the core asked for."""
        if not isinstance(message, InstallSnapshot):
            return Sent(message)
        snapshot = self.core.snapshot_at(self.applied)
        assert snapshot.index >= message.snapshot.index, "what a leader forgot it has applied"
        return Sent(replace(message, snapshot=snapshot), tuple(self.state))


def is_command(entry: Entry) -> bool:
    """Whether the state machine sees it."""
    return entry.kind is Kind.COMMAND and entry.data != b""
