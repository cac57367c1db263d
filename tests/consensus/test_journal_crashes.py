"""The log when the power goes at every write, sync and removal, when disks fill up and syncs fail.

Each run goes along a model: the states that a crash may leave. Before each of the disk's events, and
again within the opening that follows, the disk is taken as a power cut may leave it, and what is found there
must be one of them, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from knode.consensus import journal as journal_module
from knode.consensus.journal import Journal, SyncFailed
from knode.consensus.messages import Entry, HardState, Kind, Snapshot
from knode.consensus.ready import Recovered
from knode.errors import Code, LocalError
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedRandomness

FOLDER = Path("/home/state/raft")

LOOKS = 3
"""How often a disk is taken at each event, each time with another chance for what was not synced."""

APPEND = st.tuples(st.just("append"), st.integers(1, 4), st.integers(0, 3), st.booleans())
STEPS = st.one_of(
    APPEND,
    APPEND,
    APPEND,
    st.tuples(st.just("vote")),
    st.tuples(st.just("compact"), st.integers(0, 3)),
    st.tuples(st.just("reset"), st.integers(0, 5)),
    st.tuples(st.just("reopen")),
    st.tuples(st.just("kill")),
    st.tuples(st.just("full"), st.integers(0, 200)),
    st.tuples(st.just("failed sync")),
)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 350)


class Machine:
    """A journal on a disk that is looked at as often as anything happens to it."""

    def __init__(self, seed: int) -> None:
        self.allowed: list[Recovered] = [Recovered()]
        """What a crash may leave: what was synced last, and what was done since, one after the other."""
        self.looks = 0
        self._seed = seed
        self.term = 1
        self.disk = SimulatedDisk()
        self.disk.make_folder(FOLDER.parent)
        self.disk.watch(lambda _: self.look())
        self.journal = self.open()

    @property
    def now(self) -> Recovered:
        return self.allowed[-1]

    def look(self) -> None:
        """Take the disk as a power cut at this moment may leave it, and see what an opening finds."""
        for _ in range(LOOKS):
            self.looks += 1
            dice = SimulatedRandomness(self._seed, f"look {self.looks}")
            with closed(self.disk.crash(dice)) as found:
                # One look in four is looked into again: the power goes while the log is opened.
                if dice.happens(0.25):
                    found.watch(lambda _, found=found, dice=dice: self.look_again(found.crash(dice)))
                self.check(found)

    def look_again(self, disk: SimulatedDisk) -> None:
        with closed(disk) as found:
            self.check(found)

    def check(self, disk: SimulatedDisk) -> None:
        journal, recovered = Journal.open(disk, FOLDER)
        assert recovered in self.allowed
        # What was returned once is durable, and the log can be gone on with.
        disk.watch(lambda _: None)
        last = recovered.snapshot.index + len(recovered.entries)
        entry = Entry(99, last + 1, Kind.COMMAND, b"more")
        journal.append(None, [entry], sync=False)
        crashed = disk.crash(SimulatedRandomness(self._seed, "after"))
        journal.append(HardState(99), (), sync=True)
        with closed(crashed) as again:
            found = Journal.open(again, FOLDER)[1]
            assert found in (recovered, with_entries(recovered, [entry]))
        with closed(disk.crash(SimulatedRandomness(self._seed, "end"))) as again:
            found = Journal.open(again, FOLDER)[1]
            assert found == Recovered(HardState(99), recovered.snapshot, (*recovered.entries, entry))

    def open(self) -> Journal:
        journal, recovered = Journal.open(self.disk, FOLDER)
        assert recovered == self.now
        self.allowed = [recovered]
        return journal

    def go_on_with(self, disk: SimulatedDisk) -> None:
        self.disk.close()
        self.disk = disk
        self.disk.watch(lambda _: self.look())

    def step(self, step: tuple[object, ...]) -> None:
        match step:
            case ("append", int(count), int(back), bool(sync)):
                self.append(count, back, sync=sync)
            case ("vote",):
                self.term += 1
                state = HardState(self.term, b"someone", self.now.snapshot.index)
                self.do(
                    [Recovered(state, self.now.snapshot, self.now.entries)],
                    lambda: self.journal.append(state, (), sync=True),
                )
            case ("compact", int(back)):
                entries = self.now.entries[: max(0, len(self.now.entries) - back)]
                if entries:
                    snapshot = Snapshot(entries[-1].index, entries[-1].term)
                    rest = self.now.entries[len(entries) :]
                    self.do(
                        [Recovered(self.now.hard_state, snapshot, rest)],
                        lambda: self.journal.compact(snapshot),
                    )
            case ("reset", int(ahead)):
                self.term += 1
                snapshot = Snapshot(self.now.snapshot.index + len(self.now.entries) + ahead, self.term)
                state = HardState(self.term, b"", snapshot.index)
                self.do([Recovered(state, snapshot)], lambda: self.journal.reset(snapshot, state))
            case ("reopen",):
                self.disk.mend_sync()
                self.journal.close()
                self.allowed = [self.now]
                self.journal = self.open()
            case ("kill",):
                self.go_on_with(self.disk.after_kill())
                self.journal = self.open()
            case ("full", int(room)):
                used = sum(map(len, self.disk.snapshot().files.values()))
                self.disk.free(used + room)
            case ("failed sync",):
                self.disk.fail_sync("*")

    def append(self, count: int, back: int, *, sync: bool) -> None:
        """Append `count` entries, of which the first replaces the one that is `back` before the end."""
        kept = self.now.entries[: max(0, len(self.now.entries) - back)]
        first = self.now.snapshot.index + len(kept) + 1
        self.term += 1
        new = [
            Entry(self.term, index, Kind.COMMAND, b"%d" % self.term * 7)
            for index in range(first, first + count)
        ]
        if new:
            state = HardState(self.term, b"x", self.now.snapshot.index) if self.term % 2 else None
            after = Recovered(state or self.now.hard_state, self.now.snapshot, (*kept, *new))
            self.do([after], lambda: self.journal.append(state, new, sync=sync), durable=sync)

    def do(self, after: list[Recovered], work: Callable[[], None], *, durable: bool = True) -> None:
        before = list(self.allowed)
        self.allowed = before + after
        try:
            work()
        except SyncFailed:
            event("sync failed")
            self.is_unfit()
        except LocalError as error:
            if error.code is not Code.DISK_FULL:
                raise
            event("disk full")
            self.allowed = before
            self.look()
            if len(before) % 2:
                self.disk.free()
        else:
            self.allowed = after if durable else before + after

    def is_unfit(self) -> None:
        """After a failed sync everything is refused; what was acknowledged before is still there."""
        files = self.disk.snapshot().files
        for refused in (
            lambda: self.journal.append(None, (), sync=True),
            lambda: self.journal.compact(Snapshot()),
            lambda: self.journal.reset(Snapshot(), HardState()),
        ):
            with pytest.raises(SyncFailed):
                refused()
        self.journal.close()
        assert self.disk.snapshot().files == files
        self.look()
        disk = self.disk.crash(SimulatedRandomness(self._seed, "unfit"))
        disk.free()
        self.go_on_with(disk)
        self.disk.watch(lambda _: None)
        journal, recovered = Journal.open(self.disk, FOLDER)
        assert recovered in self.allowed
        self.allowed = [recovered]
        self.journal = journal
        self.disk.watch(lambda _: self.look())


def with_entries(recovered: Recovered, more: Sequence[Entry]) -> Recovered:
    return Recovered(recovered.hard_state, recovered.snapshot, (*recovered.entries, *more))


class closed:
    def __init__(self, disk: SimulatedDisk) -> None:
        self.disk = disk

    def __enter__(self) -> SimulatedDisk:
        self.disk.free()
        return self.disk

    def __exit__(self, *_: object) -> None:
        self.disk.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEPS, min_size=8, max_size=30), st.integers(0, 1_000_000))
def test_a_crash_at_any_point_leaves_what_was_synced_and_a_first_part_of_the_rest(
    steps: list[tuple[object, ...]], seed: int
) -> None:
    machine = Machine(seed)
    for step in steps:
        machine.step(step)
    machine.disk.close()
