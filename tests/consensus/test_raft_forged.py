"""Whatever a peer sends, a core lives: it takes it, refuses it, or counts it as a contradiction."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from raft_replica import Replica, Sent

from knode.consensus import configuration as configurations
from knode.consensus.messages import (
    Append,
    AppendReply,
    Configuration,
    Entry,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Kind,
    Message,
    PreVote,
    PreVoteReply,
    Snapshot,
    TimeoutNow,
    Vote,
    VoteReply,
)
from knode.consensus.refusals import Refusal
from knode.consensus.settings import Settings

A, B, C, STRANGER = b"a", b"b", b"c", b"z"
STEPS = 600


class Liar:
    """Sends messages that no replica sends, mostly close to those that it could send."""

    def __init__(self, seed: int, replica: Replica) -> None:
        self.random = Random(seed)
        self.replica = replica

    def message(self) -> Message:
        random, core = self.random, self.replica.core
        term = max(0, core.term + random.choice((-1, 0, 0, 0, 0, 0, 1, 5)))
        ends = (term, random.choice((B, B, C, C, STRANGER, A)), random.choice((A, A, A, A, A, A, B)))
        kinds: tuple[Callable[[], Message], ...] = (
            lambda: PreVote(*ends, self.index(), self.term()),
            lambda: PreVoteReply(*ends, random.random() < 0.8),
            lambda: Vote(*ends, self.index(), self.term(), random.random() < 0.5),
            lambda: VoteReply(*ends, random.random() < 0.8),
            lambda: Append(*ends, self.index(), self.term(), self.entries(), self.index()),
            lambda: AppendReply(*ends, self.index(), random.random() < 0.5, self.index(), self.term()),
            lambda: Heartbeat(*ends, self.index(), random.randrange(5)),
            lambda: HeartbeatReply(*ends, random.randrange(50)),
            lambda: InstallSnapshot(*ends, Snapshot(self.index(), self.term(), self.configuration())),
            lambda: TimeoutNow(*ends),
        )
        return random.choice(kinds)()

    def index(self) -> int:
        core = self.replica.core
        around = self.random.choice((0, core.committed, core.last_index, core.first_index))
        return self.random.choice((max(0, around + self.random.randint(-2, 2)), 2**60))

    def term(self) -> int:
        return max(0, self.replica.core.term + self.random.randint(-2, 1))

    def configuration(self) -> Configuration:
        random = self.random
        some = [tuple(random.sample((A, B, C, STRANGER), random.randint(0, 4))) for _ in range(3)]
        return Configuration(*(tuple(sorted(ids)) if random.random() < 0.8 else ids for ids in some))

    def entries(self) -> tuple[Entry, ...]:
        random, first = self.random, self.index()
        return tuple(
            Entry(
                self.term(),
                first + at if random.random() < 0.9 else self.index(),
                random.choice((Kind.COMMAND, Kind.CONFIGURATION)),
                random.choice((b"", b"x", configurations.encoded(self.configuration()))),
            )
            for at in range(random.randrange(4))
        )


@pytest.mark.parametrize("first", range(0, 120, 30))
def test_no_message_of_a_peer_ends_a_core(first: int) -> None:
    contradictions = 0
    for seed in range(first, first + 30):
        random = Random(seed)
        founded = configurations.founded(Configuration((A, B, C)))
        replica = Replica(A, founded, choose=random.randrange, settings=Settings(election_ticks=4))
        liar = Liar(seed, replica)
        for _ in range(STEPS):
            match random.randrange(10):
                case 0:
                    replica.core.tick()
                case 1 | 2:
                    replica.take()
                case 3 | 4 if replica.waiting:
                    replica.persist()
                case 5:
                    try:
                        replica.core.propose(b"x")
                        replica.core.read()
                    except Refusal:
                        pass
                case _:
                    replica.receive(Sent(liar.message()))
        contradictions += replica.core.contradictions
    assert contradictions > 100
