"""The log on disk: what is appended is there again, whatever is cut, compacted, full or damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from knode.consensus import journal as journal_module
from knode.consensus import records
from knode.consensus.journal import Journal
from knode.consensus.messages import Configuration, Entry, HardState, Kind, Snapshot
from knode.consensus.ready import Recovered
from knode.errors import Code, KnodeError
from knode.simulation.disk import SimulatedDisk
from knode.world import Disk
from knode.world.real import RealDisk


def refused(code: Code) -> pytest.RaisesExc[KnodeError]:
    return pytest.RaisesExc(KnodeError, check=lambda error: error.code is code)


@pytest.fixture(params=[RealDisk, SimulatedDisk])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    disk: Disk = request.param()
    disk.make_folder(tmp_path)
    yield disk
    if isinstance(disk, SimulatedDisk):
        disk.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "raft"


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 400)


def entries(first: int, last: int, term: int = 1) -> list[Entry]:
    return [Entry(term, index, Kind.COMMAND, b"%d/%d" % (term, index)) for index in range(first, last + 1)]


def found(disk: Disk, folder: Path) -> Recovered:
    journal, recovered = Journal.open(disk, folder)
    journal.close()
    return recovered


STATE = HardState(term=3, vote=b"someone", commit=2)
SNAPSHOT = Snapshot(5, 1, Configuration(voters=(b"a", b"b"), learners=(b"c",)))


def test_a_new_log_is_empty_and_stays_so(disk: Disk, folder: Path) -> None:
    assert found(disk, folder) == Recovered()
    assert found(disk, folder) == Recovered()


def test_what_was_appended_is_there_again_in_order(disk: Disk, folder: Path) -> None:
    journal, _ = Journal.open(disk, folder)
    journal.append(STATE, entries(1, 3), sync=True)
    journal.append(None, entries(4, 5), sync=False)
    journal.append(STATE, (), sync=True)
    journal.close()
    journal.close()
    for _ in range(3):
        assert found(disk, folder) == Recovered(STATE, Snapshot(), tuple(entries(1, 5)))


def test_entries_replace_those_at_their_indexes_and_beyond(disk: Disk, folder: Path) -> None:
    journal, _ = Journal.open(disk, folder)
    journal.append(None, entries(1, 9), sync=True)
    journal.append(None, entries(4, 5, term=2), sync=True)
    journal.append(None, entries(6, 6, term=3), sync=True)
    expected = (*entries(1, 3), *entries(4, 5, term=2), *entries(6, 6, term=3))
    journal.close()
    assert found(disk, folder).entries == expected


@pytest.mark.usefixtures("short_segments")
def test_a_log_of_many_segments_is_read_whole(disk: Disk, folder: Path) -> None:
    journal, _ = Journal.open(disk, folder)
    for index in range(1, 100):
        state = HardState(index // 10, b"x", index)
        journal.append(state, entries(index, index, term=index // 10), sync=index % 3 == 0)
    journal.close()
    assert len(disk.list_folder(folder)) > 5
    recovered = found(disk, folder)
    assert recovered.hard_state == HardState(9, b"x", 99)
    assert [entry.data for entry in recovered.entries] == [b"%d/%d" % (n // 10, n) for n in range(1, 100)]


@pytest.mark.usefixtures("short_segments")
def test_compaction_deletes_the_segments_that_only_lead_up_to_the_snapshot(disk: Disk, folder: Path) -> None:
    journal, _ = Journal.open(disk, folder)
    journal.append(STATE, (), sync=True)
    for index in range(1, 100):
        journal.append(None, entries(index, index), sync=False)
    before = disk.list_folder(folder)
    snapshot = Snapshot(50, 1, SNAPSHOT.configuration)
    journal.compact(snapshot)
    assert 1 < len(disk.list_folder(folder)) < len(before)
    assert before[0] not in disk.list_folder(folder)
    journal.append(None, entries(100, 101), sync=True)
    expected = Recovered(STATE, snapshot, tuple(entries(51, 101)))
    journal.close()
    assert found(disk, folder) == expected
    journal, _ = Journal.open(disk, folder)
    journal.compact(Snapshot(101, 1))
    assert len(disk.list_folder(folder)) == 1
    assert journal.size_bytes == disk.size(folder / disk.list_folder(folder)[0])
    journal.append(None, entries(102, 102), sync=True)
    journal.close()
    assert found(disk, folder) == Recovered(STATE, Snapshot(101, 1), tuple(entries(102, 102)))


@pytest.mark.usefixtures("short_segments")
def test_a_segment_whose_last_entries_were_replaced_is_not_kept_for_them(disk: Disk, folder: Path) -> None:
    journal, _ = Journal.open(disk, folder)
    journal.append(None, entries(1, 40), sync=True)
    journal.append(None, entries(3, 40, term=2), sync=True)
    journal.append(None, entries(3, 4, term=3), sync=True)
    journal.compact(Snapshot(2, 1))
    assert disk.list_folder(folder) == ["0000000000000003.log", "0000000000000004.log"]
    journal.close()
    assert found(disk, folder) == Recovered(HardState(), Snapshot(2, 1), tuple(entries(3, 4, term=3)))


def test_a_reset_log_begins_anew_behind_the_snapshot(disk: Disk, folder: Path) -> None:
    journal, _ = Journal.open(disk, folder)
    journal.append(STATE, entries(1, 3), sync=True)
    snapshot, state = Snapshot(1000, 7, SNAPSHOT.configuration), HardState(8, b"", 1000)
    journal.reset(snapshot, state)
    assert len(disk.list_folder(folder)) == 1
    assert found(disk, folder) == Recovered(state, snapshot)
    journal.append(None, entries(1001, 1002, term=8), sync=True)
    journal.close()
    assert found(disk, folder) == Recovered(state, snapshot, tuple(entries(1001, 1002, term=8)))


def test_a_batch_over_the_limit_is_refused_and_the_log_stays(
    disk: Disk, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MAX_BODY_BYTES", 50)
    journal, _ = Journal.open(disk, folder)
    with refused(Code.TOO_LARGE):
        journal.append(None, entries(1, 10), sync=True)
    journal.append(None, entries(1, 2), sync=True)
    journal.close()
    assert found(disk, folder).entries == tuple(entries(1, 2))


@pytest.mark.usefixtures("short_segments")
def test_a_log_that_nobody_compacts_stops_growing(
    disk: Disk, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MAX_LOG_BYTES", 2000)
    journal, _ = Journal.open(disk, folder)
    count = 0
    with refused(Code.RATE_LIMITED):
        while True:
            journal.append(None, entries(count + 1, count + 1), sync=False)
            count += 1
    assert journal.size_bytes < 3000
    journal.compact(Snapshot(count, 1))
    journal.append(None, entries(count + 1, count + 1), sync=True)
    journal.close()
    assert found(disk, folder).entries == tuple(entries(count + 1, count + 1))


def test_a_newer_log_is_refused_by_name(disk: Disk, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = records.format_bytes(records.VERSION + 1)
    disk.make_folder(folder)
    disk.write(folder / "0000000000000001.log", newer + b"what this version cannot know")
    with refused(Code.HOME_TOO_NEW):
        Journal.open(disk, folder)


def test_files_of_others_in_the_folder_stay(disk: Disk, folder: Path) -> None:
    disk.make_folder(folder)
    disk.write(folder / "snapshot", b"someone else's")
    disk.write(folder / ".0000000000000001.log.77.new", b"left by a crash")
    found(disk, folder)
    assert disk.list_folder(folder) == ["0000000000000001.log", "snapshot"]
