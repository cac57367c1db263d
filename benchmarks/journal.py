"""What a durable log costs: batches beside bare synced writes, and three replicas that commit to theirs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from benchmarks.report import ROUNDS, Row
from knode.consensus.journal import Journal
from knode.consensus.messages import Configuration, Entry, Kind, Message, ReplicaId, Snapshot
from knode.consensus.raft import Raft
from knode.consensus.ready import Ready, Recovered, Role
from knode.consensus.settings import Settings
from knode.world.real import RealDisk

ENTRY = bytes(100)
BATCHES = (1, 64, 256)
APPENDS = 20
"""Of each size in each round."""
IN_FLIGHT = 256
COMMITS = 20 * IN_FLIGHT
TARGET_COMMITS = 10_000
MOST_RATIO = 2.0


def run() -> list[Row]:
    """Measure each figure and its floor in turn."""
    with tempfile.TemporaryDirectory(prefix="knode-bench-") as folder:
        return [*_appends(Path(folder)), _commits(Path(folder))]


def _appends(folder: Path) -> list[Row]:
    seconds: dict[tuple[str, int], list[float]] = {}
    journal, _ = Journal.open(RealDisk(), folder / "raft")
    with _bare_file(folder / "bare") as append_bare:
        last = 0
        for _ in range(ROUNDS):
            for count in BATCHES:
                for _ in range(APPENDS):
                    entries = [Entry(1, last + number, Kind.COMMAND, ENTRY) for number in range(1, count + 1)]
                    last += count
                    before = journal.size_bytes
                    began = time.perf_counter()
                    journal.append(None, entries, sync=True)
                    seconds.setdefault(("journal", count), []).append(time.perf_counter() - began)
                    data = bytes(journal.size_bytes - before)
                    began = time.perf_counter()
                    append_bare(data)
                    seconds.setdefault(("bare", count), []).append(time.perf_counter() - began)
    journal.close()
    rows = []
    for count in BATCHES:
        figure, floor = (median(seconds[who, count]) for who in ("journal", "bare"))
        rows.append(
            Row(
                name=f"log on disk: append and sync {count} of {len(ENTRY)} bytes",
                figure=f"{figure * 1e3:.2f} ms, {count / figure:.0f} entries/s",
                floor=f"{floor * 1e3:.2f} ms, write and fdatasync",
                ratio=figure / floor,
                target=f"at most {MOST_RATIO}",
                met=figure / floor <= MOST_RATIO,
            )
        )
    return rows


@contextmanager
def _bare_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def append(data: bytes) -> None:
        os.write(descriptor, data)
        os.fdatasync(descriptor)

    try:
        yield append
    finally:
        os.close(descriptor)


class _Replica:
    """A core and its log, without network."""

    def __init__(self, id: ReplicaId, voters: Configuration, folder: Path) -> None:
        self.journal, recovered = Journal.open(RealDisk(), folder)
        recovered = Recovered(recovered.hard_state, Snapshot(0, 0, voters), recovered.entries)
        self.core = Raft(id, recovered, applied=0, choose=lambda count: 0, settings=Settings())

    def persist(self, ready: Ready) -> None:
        if ready.hard_state is not None or ready.entries:
            self.journal.append(ready.hard_state, ready.entries, sync=ready.must_sync)


class _Cell:
    """Three replicas in one process; a round is one batch of each, their syncs side by side."""

    def __init__(self, folder: Path) -> None:
        ids = (b"a", b"b", b"c")
        voters = Configuration(voters=ids)
        self.replicas = {id: _Replica(id, voters, folder / id.decode()) for id in ids}
        self.leader = self.replicas[b"a"]
        self._threads = ThreadPoolExecutor(len(ids))
        while self.leader.core.role is not Role.LEADER:
            self.leader.core.tick()
            self.turn()

    def turn(self) -> None:
        """Do what all cores want done."""
        work: list[tuple[_Replica, Ready]] = []
        # The leader first: what it appends goes to the others' disks while its own works.
        for replica in self.replicas.values():
            if (ready := replica.core.ready()) is not None:
                self._send(ready.messages)
                work.append((replica, ready))
        for done in [self._threads.submit(replica.persist, ready) for replica, ready in work]:
            done.result()
        for replica, ready in work:
            replica.core.persisted(ready)
            self._send(ready.messages_after)
            if ready.committed:
                replica.core.applied_to(ready.committed[-1].index)

    def _send(self, messages: tuple[Message, ...]) -> None:
        for message in messages:
            self.replicas[message.target].core.receive(message)

    def commit(self, count: int) -> float:
        """Commit `count` entries, `IN_FLIGHT` of them under way at once; return the seconds that it took."""
        core = self.leader.core
        goal, proposed = core.committed + count, core.last_index
        began = time.perf_counter()
        while core.committed < goal:
            while proposed < min(goal, core.committed + IN_FLIGHT):
                proposed = core.propose(ENTRY).index
            self.turn()
        return time.perf_counter() - began

    def close(self) -> None:
        self._threads.shutdown()
        for replica in self.replicas.values():
            replica.journal.close()


def _commits(folder: Path) -> Row:
    cell = _Cell(folder / "cell")
    seconds: list[float] = []
    floors: list[float] = []
    with ExitStack() as stack:
        bare = [stack.enter_context(_bare_file(folder / name)) for name in ("1", "2", "3")]
        threads = stack.enter_context(ThreadPoolExecutor(len(bare)))
        for _ in range(ROUNDS):
            before = cell.leader.journal.size_bytes
            seconds.append(cell.commit(COMMITS))
            written = bytes((cell.leader.journal.size_bytes - before) * IN_FLIGHT // COMMITS)
            began = time.perf_counter()
            for _ in range(COMMITS // IN_FLIGHT):
                for done in [threads.submit(append, written) for append in bare]:
                    done.result()
            floors.append(time.perf_counter() - began)
    cell.close()
    figure, floor = COMMITS / median(seconds), COMMITS / median(floors)
    return Row(
        name=f"Raft: 3 logs on this disk, {len(ENTRY)} bytes, {IN_FLIGHT} in flight",
        figure=f"{figure:.0f} commits/s",
        floor=f"{floor:.0f}/s, 3 writes with fdatasync side by side for each {IN_FLIGHT}",
        ratio=figure / floor,
        target=f"at least {TARGET_COMMITS}/s",
        met=figure >= TARGET_COMMITS,
    )
