"""One core alone: the test says what the others send, and sees what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from knode.consensus.messages import (
    AppendReply,
    Configuration,
    Entry,
    HardState,
    Heartbeat,
    HeartbeatReply,
    Index,
    Kind,
    Message,
    PreVote,
    PreVoteReply,
    ReplicaId,
    Snapshot,
    Vote,
    VoteReply,
)
from knode.consensus.raft import Raft
from knode.consensus.ready import ReadReady, Ready, Recovered, Role
from knode.consensus.settings import Settings

A, B, C, D, E = (bytes([letter]) for letter in b"abcde")

M = TypeVar("M", bound=Message)


def voters(*ids: ReplicaId, learners: Sequence[ReplicaId] = ()) -> Configuration:
    return Configuration(voters=tuple(sorted(ids)), learners=tuple(sorted(learners)))


def commands(*terms: int, first: Index = 1) -> tuple[Entry, ...]:
    """Entries of these terms, from an index on."""
    return tuple(Entry(term, index, Kind.COMMAND, b"x") for index, term in enumerate(terms, start=first))


class Lone:
    """The core `a`, which begins with a snapshot at index 0 that holds its configuration.

    Args:
        log: the terms of the entries that its disk holds.
    """

    def __init__(
        self,
        configuration: Configuration,
        *,
        log: Sequence[int] = (),
        term: int = 0,
        vote: bytes = b"",
        commit: Index = 0,
        settings: Settings | None = None,
    ) -> None:
        self.recovered = Recovered(
            HardState(max([term, *log]), vote, commit), Snapshot(0, 0, configuration), commands(*log)
        )
        self.raft = Raft(
            A, self.recovered, applied=0, choose=lambda n: n - 1, settings=settings or Settings()
        )
        self.committed: list[Entry] = []
        self.reads: list[ReadReady] = []

    def persist(self, ready: Ready) -> None:
        """Make one batch durable, and apply what it holds."""
        self.raft.persisted(ready)
        self.committed += ready.committed
        if ready.committed:
            self.raft.applied_to(ready.committed[-1].index)
        self.reads += ready.reads

    def work(self) -> list[Message]:
        """Do all that is to be done; return what is sent."""
        sent: list[Message] = []
        while (ready := self.raft.ready()) is not None:
            self.persist(ready)
            sent += [*ready.messages, *ready.messages_after]
        return sent

    def take(self) -> Ready:
        """Take what is to be done, which is something, and leave it undone."""
        ready = self.raft.ready()
        assert ready is not None
        return ready

    def hear(self, *messages: Message) -> list[Message]:
        """Receive messages and do all that follows; return what is sent."""
        for message in messages:
            self.raft.receive(message)
        return self.work()

    def tick(self, count: int = 1) -> list[Message]:
        sent = []
        for _ in range(count):
            self.raft.tick()
            sent += self.work()
        return sent

    def stand(self) -> None:
        """Stand for election, with a pre-vote of everyone who is asked."""
        for _ in range(40):
            for message in self.tick():
                if isinstance(message, PreVote):
                    self.raft.receive(PreVoteReply(message.term, message.target, A, True))
            if self.raft.role is Role.CANDIDATE:
                self.sent = self.work()
                return
        raise AssertionError("it does not stand")

    def lead(self) -> Raft:
        """Win an election with everyone's vote; nobody has answered an append yet."""
        self.stand()
        for message in self.sent:
            if isinstance(message, Vote):
                self.raft.receive(VoteReply(message.term, message.target, A, True))
        assert self.raft.role is Role.LEADER
        self.sent = self.work()
        return self.raft

    def follow(self, leader: ReplicaId = B, *, term: int | None = None) -> Raft:
        """Hear a leader."""
        self.hear(Heartbeat(self.raft.term if term is None else term, leader, A, 0, 0))
        assert self.raft.leader == leader
        return self.raft

    def accept(self, *sources: ReplicaId, index: Index | None = None) -> list[Message]:
        """Others have the log up to an index, or all of it."""
        last = self.raft.last_index if index is None else index
        term = self.raft.term
        return self.hear(*(AppendReply(term, source, A, last, True, 0, 0) for source in sources))

    def refuse(self, source: ReplicaId, index: Index, hint: Index, hint_term: int) -> list[Message]:
        return self.hear(AppendReply(self.raft.term, source, A, index, False, hint, hint_term))

    def beat(self, *sources: ReplicaId, read: int = 0) -> list[Message]:
        """Others answer a heartbeat."""
        return self.hear(*(HeartbeatReply(self.raft.term, source, A, read) for source in sources))


def only(kind: type[M], messages: Iterable[Message]) -> list[M]:
    return [message for message in messages if isinstance(message, kind)]
