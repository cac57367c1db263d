"""Several cores in memory, whose messages and disks are as fast, slow or lost as a test wants."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from knode.consensus.configuration import founded
from knode.consensus.messages import Configuration, Entry, HardState, Kind, Message, ReplicaId, Snapshot
from knode.consensus.raft import Raft
from knode.consensus.ready import Ready, Recovered, Role
from knode.consensus.settings import Settings

A, B, C, D, E = (bytes([letter]) for letter in b"abcde")


def voters(*ids: ReplicaId, learners: Sequence[ReplicaId] = ()) -> Configuration:
    return Configuration(voters=tuple(sorted(ids)), learners=tuple(sorted(learners)))


class Node:
    """A core with its disk and its state machine, which is the list of what was applied."""

    def __init__(self, id: ReplicaId, recovered: Recovered, settings: Settings, seed: int) -> None:
        self.id = id
        self.settings = settings
        self.random = random.Random(seed)
        self.hard_state = recovered.hard_state
        self.snapshot = recovered.snapshot
        self.log = list(recovered.entries)
        self.applied: list[Entry] = []
        self.applied_index = recovered.snapshot.index
        self.reads: dict[int, int] = {}
        self.start()

    def start(self) -> None:
        """Begin, or begin again with what the disk holds."""
        recovered = Recovered(self.hard_state, self.snapshot, tuple(self.log))
        self.raft = Raft(
            self.id,
            recovered,
            applied=self.applied_index,
            choose=self.random.randrange,
            settings=self.settings,
        )

    def write(self, ready: Ready) -> None:
        """Make durable what is to be."""
        if ready.snapshot is not None:
            self.snapshot = ready.snapshot
            self.applied_index = ready.snapshot.index
            self.log = []
        for entry in ready.entries:
            del self.log[entry.index - self.snapshot.index - 1 :]
            self.log.append(entry)
        if ready.hard_state is not None:
            self.hard_state = ready.hard_state

    def apply(self, ready: Ready) -> None:
        for entry in ready.committed:
            assert entry.index == self.applied_index + 1, "in order, each once"
            self.applied.append(entry)
            self.applied_index = entry.index
        if ready.committed:
            self.raft.applied_to(self.applied_index)
        self.reads |= {read.number: read.index for read in ready.reads}

    def compact(self, index: int) -> None:
        snapshot = self.raft.snapshot_at(index)
        self.raft.compact(snapshot)
        self.log = [entry for entry in self.log if entry.index > index]
        self.snapshot = snapshot

    @property
    def commands(self) -> list[bytes]:
        return [entry.data for entry in self.applied if entry.kind is Kind.COMMAND and entry.data]


class Cell:
    """Nodes that are founded together, and others that come later."""

    def __init__(
        self,
        configuration: Configuration,
        *,
        others: Iterable[ReplicaId] = (),
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.nodes: dict[ReplicaId, Node] = {}
        self.network: list[Message] = []
        self.cut: Callable[[Message], bool] = lambda message: False
        self.sent: list[Message] = []
        self.committed: dict[int, Entry] = {}
        self.leaders: dict[int, ReplicaId] = {}
        for id in (*configuration.voters, *configuration.learners):
            self.add(id, founded(configuration))
        for id in others:
            self.add(id, Recovered())

    def add(self, id: ReplicaId, recovered: Recovered) -> Node:
        self.nodes[id] = Node(id, recovered, self.settings, seed=id[0])
        return self.nodes[id]

    def __getitem__(self, id: ReplicaId) -> Raft:
        return self.nodes[id].raft

    def step(self, id: ReplicaId) -> bool:
        """Do one node's work. Return whether there was any."""
        node = self.nodes[id]
        if (ready := node.raft.ready()) is None:
            return False
        self.send(ready.messages)
        node.write(ready)
        node.raft.persisted(ready)
        self.send(ready.messages_after)
        node.apply(ready)
        self.check(node, ready)
        return True

    def send(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self.sent.append(message)
            if not self.cut(message):
                self.network.append(message)

    def deliver(self) -> bool:
        """Deliver all that is under way."""
        messages, self.network = self.network, []
        for message in messages:
            if message.target in self.nodes and not self.cut(message):
                self.nodes[message.target].raft.receive(message)
        return bool(messages)

    def settle(self) -> None:
        """Let everything happen that happens without time."""
        for _ in range(10_000):
            worked = [self.step(id) for id in self.nodes]
            if not self.deliver() and not any(worked):
                return
        raise AssertionError("it never comes to rest")

    def tick(self, count: int = 1, *ids: ReplicaId) -> None:
        for _ in range(count):
            for id in ids or tuple(self.nodes):
                self.nodes[id].raft.tick()
            self.settle()

    def elect(self, id: ReplicaId) -> Raft:
        """Let one node win an election: the others hear no leader for long enough, and it asks first."""
        for node in self.nodes.values():
            if node.id != id and node.raft.role is not Role.LEADER:
                for _ in range(self.settings.election_ticks):
                    if node.raft.role is Role.FOLLOWER and node.raft._elapsed < self.settings.election_ticks:
                        node.raft._elapsed += 1
        for _ in range(3 * self.settings.election_ticks):
            if self[id].role is Role.LEADER:
                break
            self[id].tick()
            self.settle()
        assert self[id].role is Role.LEADER
        return self[id]

    def isolate(self, *ids: ReplicaId) -> None:
        """Cut these off from all others, not from each other."""
        apart = set(ids)
        self.cut = lambda message: (message.source in apart) != (message.target in apart)

    def heal(self) -> None:
        self.cut = lambda message: False

    def check(self, node: Node, ready: Ready) -> None:
        """What must hold whatever happens: one leader a term, one entry at each committed index."""
        raft = node.raft
        if raft.role is Role.LEADER:
            assert self.leaders.setdefault(raft.term, node.id) == node.id, "two leaders in one term"
        for entry in ready.committed:
            assert self.committed.setdefault(entry.index, entry) == entry, "two entries at one place"


def recovered(
    term: int, entries: Iterable[tuple[int, bytes]] = (), *, configuration: Configuration, vote: bytes = b""
) -> Recovered:
    """A log of commands after the founding configuration, as (term, data)."""
    first = founded(configuration).entries
    later = [Entry(t, index, Kind.COMMAND, data) for index, (t, data) in enumerate(entries, start=2)]
    return Recovered(HardState(term=term, vote=vote, commit=1), Snapshot(), (*first, *later))
