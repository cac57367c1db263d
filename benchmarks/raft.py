"""How fast three cores agree, in memory: what consensus costs without disk, network and signatures."""

from __future__ import annotations

import random
import time
from statistics import median

from benchmarks.report import ROUNDS, Row
from knode.consensus.configuration import founded
from knode.consensus.messages import Configuration, Message, ReplicaId
from knode.consensus.raft import Raft
from knode.consensus.ready import Role
from knode.consensus.settings import Settings

ENTRY = bytes(100)
COMMITS = {1: 4_000, 64: 40_000, 256: 80_000}
"""How many are committed in one round, by how many are in flight."""
COMPACTED_EVERY = 10_000
TARGET_PER_S = {1: 8_000, 64: 40_000, 256: 50_000}


def run() -> list[Row]:
    """Measure each number in flight, in turn."""
    rates: dict[int, list[float]] = {in_flight: [] for in_flight in COMMITS}
    for _ in range(ROUNDS):
        for in_flight, commits in COMMITS.items():
            rates[in_flight].append(_rate(in_flight, commits))
    return [
        Row(
            name=f"Raft: three cores in memory, 100-byte entries, {in_flight} in flight",
            figure=f"{median(rates[in_flight]):,.0f} commits/s, best {max(rates[in_flight]):,.0f}",
            floor="",
            ratio=median(rates[in_flight]) / target,
            target=f"at least {target:,}",
            met=median(rates[in_flight]) >= target,
        )
        for in_flight, target in TARGET_PER_S.items()
    ]


def _rate(in_flight: int, commits: int) -> float:
    cell = _Cell()
    begun = time.perf_counter()
    cell.commit(commits, in_flight)
    return commits / (time.perf_counter() - begun)


class _Cell:
    """Three voters whose disks and network take no time; the first leads."""

    def __init__(self) -> None:
        ids = [bytes([number]) * 40 for number in range(3)]
        recovered = founded(Configuration(voters=tuple(ids)))
        choose = random.Random(1).randrange
        self._rafts: dict[ReplicaId, Raft] = {
            id: Raft(id, recovered, applied=0, choose=choose, settings=Settings()) for id in ids
        }
        self._leader = self._rafts[ids[0]]
        self._network: list[Message] = []
        self._applied = 0
        while self._leader.role is not Role.LEADER:
            self._leader.tick()
            self._turn()
        while self._turn():
            pass

    def commit(self, count: int, in_flight: int) -> None:
        """Commit and apply `count` entries on the leader, with at most so many under way."""
        leader = self._leader
        begun = self._applied
        proposed = 0
        while (done := self._applied - begun) < count:
            while proposed < count and proposed - done < in_flight:
                leader.propose(ENTRY)
                proposed += 1
            self._turn()

    def _turn(self) -> bool:
        """Let every core do what it has to, then deliver what that sent. Return whether it was anything."""
        messages, self._network = self._network, []
        rafts = self._rafts
        for message in messages:
            rafts[message.target].receive(message)
        busy = bool(messages)
        for raft in rafts.values():
            ready = raft.ready()
            if ready is None:
                continue
            busy = True
            self._network += ready.messages
            raft.persisted(ready)
            self._network += ready.messages_after
            if ready.committed:
                last = ready.committed[-1].index
                raft.applied_to(last)
                if raft is self._leader:
                    self._applied = last
                if last - raft.first_index > COMPACTED_EVERY:
                    raft.compact(raft.snapshot_at(last))
        return busy
