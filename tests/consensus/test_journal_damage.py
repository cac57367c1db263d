"""A log that is not as it was written: what was durable is never served otherwise, what was not is cut."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knode.consensus import journal as journal_module
from knode.consensus.journal import Journal
from knode.consensus.messages import Configuration, Entry, HardState, Kind, Snapshot
from knode.consensus.ready import Recovered
from knode.errors import Code, KnodeError
from knode.simulation.disk import SimulatedDisk
from knode.simulation.volume import Snapshot as DiskSnapshot
from knode.simulation.world import SimulatedRandomness
from knode.world import Disk
from knode.world.real import RealDisk

FOLDER = Path("/home/state/raft")
FORMATS = Path(__file__).parent / "journal_formats"
"""A log of each format that there ever was, as the knode of its time wrote it."""

Files = Mapping[str, bytes]


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 350)


def write_log(disk: Disk, folder: Path, word: bytes = b"command") -> tuple[Journal, list[Recovered]]:
    """Write a log of several segments; return it with every state that it was in."""
    journal, state = Journal.open(disk, folder)
    states = [state]
    voters = Configuration(voters=(b"a", b"b", b"c"), learners=(b"d",))

    def append(hard_state: HardState | None, entries: list[Entry]) -> None:
        journal.append(hard_state, entries, sync=True)
        now = states[-1]
        kept = [entry for entry in now.entries if not entries or entry.index < entries[0].index]
        states.append(Recovered(hard_state or now.hard_state, now.snapshot, (*kept, *entries)))

    for index in range(1, 14):
        entry = Entry(1 + index // 6, index, Kind.COMMAND, b"%s %d" % (word, index) * (index % 4))
        append(HardState(1 + index // 6, b"a", index - 1) if index % 3 == 0 else None, [entry])
    append(HardState(4, b"b", 9), [Entry(4, 12, Kind.CONFIGURATION, b"new")])
    snapshot = Snapshot(4, 1, voters)
    journal.compact(snapshot)
    states.append(Recovered(states[-1].hard_state, snapshot, states[-1].entries[4:]))
    for index in range(13, 18):
        append(None, [Entry(4, index, Kind.COMMAND, b"more")])
    append(HardState(5, b"", 17), [])
    return journal, states


def new_disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_folder(FOLDER.parent)
    return disk


def log_files(*, closed: bool) -> tuple[dict[str, bytes], list[Recovered]]:
    """Return the files of the log, by their names, and every state that it was in."""
    disk = new_disk()
    journal, states = write_log(disk, FOLDER)
    if closed:
        journal.close()
    files = {Path(name).name: data for name, data in disk.snapshot().files.items()}
    disk.close()
    assert len(files) >= 4
    return files, states


def disk_with(files: Files) -> SimulatedDisk:
    folders = frozenset(map(str, (FOLDER, *FOLDER.parents)))
    return SimulatedDisk.restored(
        DiskSnapshot({str(FOLDER / name): data for name, data in files.items()}, folders)
    )


def opened(files: Files) -> Recovered | Code:
    """Return what an opening finds, or how it refuses."""
    disk = disk_with(files)
    try:
        return Journal.open(disk, FOLDER)[1]
    except KnodeError as error:
        return error.code
    finally:
        disk.close()


def changed(files: Files, name: str, at: int, new: bytes) -> dict[str, bytes]:
    data = files[name]
    return {**files, name: data[:at] + new + data[at + len(new) :]}


def test_a_flipped_bit_at_any_byte_of_a_closed_log_is_refused() -> None:
    files, states = log_files(closed=True)
    assert opened(files) == states[-1]
    last = max(files)
    mark_bytes = len(files[last]) - len(log_files(closed=False)[0][last])
    for name, data in files.items():
        for at in range(len(data)):
            for bit in (1 << at % 8, 128 >> at % 8):
                found = opened(changed(files, name, at, bytes([data[at] ^ bit])))
                if name == last and at >= len(data) - mark_bytes:
                    assert found == states[-1]  # only the mark itself was hit
                else:
                    assert found is Code.HOME_DAMAGED, (name, at)


def test_a_flipped_bit_beyond_the_durable_mark_is_cut_like_a_torn_write() -> None:
    files, states = log_files(closed=False)
    last = max(files)
    cut = set()
    for at in range(len(files[last])):
        found = opened(changed(files, last, at, bytes([files[last][at] ^ 1 << at % 8])))
        if found is not Code.HOME_DAMAGED:
            assert found == states[-2]
            cut.add(at)
    assert cut == set(range(min(cut), len(files[last])))
    assert len(cut) < 80


def test_zeros_below_the_mark_are_refused() -> None:
    files, states = log_files(closed=True)
    for name, data in files.items():
        for size in (1, 64, 4096):
            for at in range(0, len(data), 7):
                zeros = bytes(min(size, len(data) - at))
                found = opened(changed(files, name, at, zeros))
                whole = data[at : at + len(zeros)] == zeros
                if name != max(files) or at + len(zeros) < len(data) - 60:
                    assert found == (states[-1] if whole else Code.HOME_DAMAGED), (name, at, size)
                else:  # the end of the file, like a write that never came
                    assert found is Code.HOME_DAMAGED or found in states


def test_a_segment_that_is_missing_cut_or_empty_is_refused() -> None:
    files, _ = log_files(closed=True)
    for name, data in files.items():
        assert opened({other: files[other] for other in files if other != name}) is Code.HOME_DAMAGED, name
        assert opened({**files, name: b""}) is Code.HOME_DAMAGED, name
        if name != max(files):
            for size in range(len(data)):
                assert opened({**files, name: data[:size]}) is Code.HOME_DAMAGED, (name, size)


def test_segments_that_are_swapped_or_repeated_are_refused() -> None:
    files, _ = log_files(closed=True)
    following = f"{int(max(files)[:16]) + 1:016}.log"
    for one in files:
        assert opened({**files, following: files[one]}) is Code.HOME_DAMAGED
        for other in files:
            if one != other:
                assert opened({**files, one: files[other]}) is Code.HOME_DAMAGED
                assert opened({**files, one: files[other], other: files[one]}) is Code.HOME_DAMAGED


def test_a_segment_of_another_log_is_refused_however_like_it_is() -> None:
    files, _ = log_files(closed=True)
    disk = new_disk()
    write_log(disk, FOLDER, b"another")[0].close()
    for name, data in disk.snapshot().files.items():
        assert len(data) == len(files[Path(name).name])
        assert opened({**files, Path(name).name: data}) is Code.HOME_DAMAGED
    disk.close()


def test_what_was_durable_before_a_crash_is_watched_over_from_the_opening_on() -> None:
    files, states = log_files(closed=False)
    last = max(files)
    at = len(files[last]) - 20
    torn = changed(files, last, at, bytes([files[last][at] ^ 1]))
    assert opened(torn) == states[-2]
    disk = disk_with(files)
    assert Journal.open(disk, FOLDER)[1] == states[-1]
    files = {Path(name).name: data for name, data in disk.snapshot().files.items()}
    disk.close()
    assert opened(changed(files, last, at, bytes([files[last][at] ^ 1]))) is Code.HOME_DAMAGED


def test_what_a_killed_process_had_not_synced_is_durable_once_it_was_returned_even_on_a_full_disk() -> None:
    for seed in range(20):
        disk = new_disk()
        journal, states = write_log(disk, FOLDER)
        journal.append(None, [Entry(9, 18, Kind.COMMAND, b"unsynced")], sync=False)
        left = disk.after_kill()
        left.fill()
        _, found = Journal.open(left, FOLDER)
        assert found.entries[:-1] == states[-1].entries
        crashed = left.crash(SimulatedRandomness(seed, "dice"))
        assert Journal.open(crashed, FOLDER)[1] == found
        for each in (disk, left, crashed):
            each.close()


def test_a_record_within_an_entry_is_no_record() -> None:
    disk = new_disk()
    journal, states = write_log(disk, FOLDER)
    for index in range(18, 60):
        journal.append(None, [Entry(5, index, Kind.COMMAND, b"x" * 20)], sync=True)
    segments = [data for _, data in sorted(disk.snapshot().files.items())]
    disk.close()
    disk = new_disk()
    journal, states = write_log(disk, FOLDER)
    entry = Entry(9, 18, Kind.COMMAND, b"".join(segments))
    journal.append(None, [entry], sync=False)
    files = {Path(name).name: data for name, data in disk.snapshot().files.items()}
    disk.close()
    assert opened(files) == Recovered(
        states[-1].hard_state, states[-1].snapshot, (*states[-1].entries, entry)
    )
    torn = {**files, max(files): files[max(files)][:-1]}
    assert opened(torn) == states[-1]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.booleans())
def test_whatever_is_written_over_a_log_nothing_is_served_that_was_never_in_it(
    data: st.DataObject, closed: bool
) -> None:
    files, states = log_files(closed=closed)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(files)))
        at = data.draw(st.integers(0, len(files[name])))
        source = files[data.draw(st.sampled_from(sorted(files)))]
        start = data.draw(st.integers(0, len(source)))
        piece = source[start : start + data.draw(st.integers(0, 200))]
        new = data.draw(st.one_of(st.binary(max_size=100), st.just(piece)))
        files = changed(files, name, at, new)
    found = opened(files)
    assert found is Code.HOME_DAMAGED or found in states


def test_bits_that_a_simulated_disk_flips_are_always_noticed() -> None:
    outcomes = set()
    for seed in range(150):
        dice = SimulatedRandomness(seed, "flips")
        disk = new_disk()
        journal, _ = write_log(disk, FOLDER)
        if dice.happens(0.3):
            journal.close()
        if dice.happens(0.5):
            crashed = disk.crash(dice)
            disk.close()
            disk = crashed
            if dice.happens(0.5):
                Journal.open(disk, FOLDER)
        hit = disk.flip(dice, "*/raft/*.log")
        assert hit is not None
        with pytest.raises(KnodeError) as error:
            Journal.open(disk, FOLDER)
        outcomes.add((Path(hit).name, error.value.code))
        assert Path(hit).name in error.value.message
        disk.close()
    assert {code for _, code in outcomes} == {Code.HOME_DAMAGED}
    assert len(outcomes) >= 4


def test_a_read_only_disk_refuses_and_the_log_stays() -> None:
    disk = new_disk()
    journal, states = write_log(disk, FOLDER)
    disk.read_only = True
    entry = Entry(9, 18, Kind.COMMAND, b"")
    for refused in (
        lambda: journal.append(None, [entry], sync=True),
        lambda: journal.compact(Snapshot(10, 2)),
        lambda: journal.reset(Snapshot(100, 2), HardState()),
        lambda: Journal.open(disk, FOLDER),
    ):
        with pytest.raises(KnodeError) as error:
            refused()
        assert error.value.code is Code.DISK_READ_ONLY
    disk.read_only = False
    assert Journal.open(disk.after_kill(), FOLDER)[1] == states[-1]
    disk.close()


def test_a_full_disk_refuses_and_takes_the_same_again_once_there_is_room() -> None:
    refusals = sum(changes_on_a_disk_with(room) for room in range(0, 600, 3))
    assert refusals > 100


def changes_on_a_disk_with(room: int) -> int:
    """Append, compact and reset, each with `room` bytes left and again without limit; return how often
    there was too little."""
    disk = new_disk()
    journal, states = write_log(disk, FOLDER)
    entries = [Entry(9, index, Kind.COMMAND, b"x" * 30) for index in range(18, 24)]
    snapshot, state, expected = Snapshot(100, 9), HardState(9), states[-1]
    changes = (
        (
            lambda: journal.append(state, entries, sync=True),
            Recovered(state, expected.snapshot, (*expected.entries, *entries)),
        ),
        (lambda: journal.compact(Snapshot(23, 9)), Recovered(state, Snapshot(23, 9))),
        (lambda: journal.reset(snapshot, state), Recovered(state, snapshot)),
    )
    refusals = 0
    for change, following in changes:
        disk.free(sum(map(len, disk.snapshot().files.values())) + room)
        try:
            change()
        except KnodeError as error:
            if error.code is not Code.DISK_FULL:
                raise
            refusals += 1
            for left in (disk.after_kill(), disk.crash(SimulatedRandomness(room, "left"))):
                left.free()
                assert Journal.open(left, FOLDER)[1] == expected
                left.close()
            disk.free()
            change()
        disk.free()
        expected = following
        found = disk.crash(SimulatedRandomness(room, "found"))
        assert Journal.open(found, FOLDER)[1] == expected
        found.close()
    disk.close()
    return refusals


def test_a_reset_is_refused_and_tried_again_after_a_compaction_that_did_not_fit() -> None:
    refused = 0
    for room in range(0, 400, 5):
        disk = new_disk()
        journal, states = write_log(disk, FOLDER)
        disk.free(sum(map(len, disk.snapshot().files.values())) + room)
        try:
            journal.compact(Snapshot(10, 2))
        except KnodeError:
            refused += 1
            disk.free(0)
            with pytest.raises(KnodeError) as error:
                journal.reset(Snapshot(100, 9), HardState(9))
            assert error.value.code is Code.DISK_FULL
            disk.free()
            journal.append(HardState(6), (), sync=True)
            expected = Recovered(HardState(6), states[-1].snapshot, states[-1].entries)
            assert Journal.open(disk.after_kill(), FOLDER)[1] == expected
            journal.reset(Snapshot(100, 9), HardState(9))
            assert Journal.open(disk.after_kill(), FOLDER)[1] == Recovered(HardState(9), Snapshot(100, 9))
        disk.close()
    assert refused > 20


def test_what_a_failed_write_left_never_comes_back_behind_a_later_record() -> None:
    found: list[Recovered | Code] = []
    for seed in range(20):
        disk = new_disk()
        journal, states = write_log(disk, FOLDER)
        disk.free(sum(map(len, disk.snapshot().files.values())) + 150)
        with pytest.raises(KnodeError):
            journal.append(None, [Entry(9, 18, Kind.COMMAND, b"x" * 1000)], sync=True)
        disk.free()
        cuts: list[SimulatedDisk] = []
        disk.watch(
            lambda _, disk=disk, cuts=cuts, seed=seed: cuts.append(
                disk.crash(SimulatedRandomness(seed, f"cut {len(cuts)}"))
            )
        )
        journal.compact(Snapshot(10, 2))
        for cut in cuts:
            found.append(opened({Path(name).name: data for name, data in cut.snapshot().files.items()}))
            cut.close()
        disk.close()
    compacted = Recovered(states[-1].hard_state, Snapshot(10, 2), states[-1].entries[6:])
    assert [state for state in found if state not in (states[-1], compacted)] == []
    assert {state == compacted for state in found} == {True, False}


@pytest.mark.parametrize("format", sorted(path.name for path in FORMATS.iterdir()))
def test_a_log_of_every_format_can_be_read(format: str, tmp_path: Path) -> None:
    folder = tmp_path / "raft"
    folder.mkdir()
    for path in (FORMATS / format).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    _, states = write_log(RealDisk(), tmp_path / "again")
    journal, found = Journal.open(RealDisk(), folder)
    assert found == states[-1]
    journal.append(None, [Entry(9, 18, Kind.COMMAND, b"new")], sync=True)
    journal.close()


def test_the_present_format_is_written_as_it_was(tmp_path: Path) -> None:
    journal, _ = write_log(RealDisk(), tmp_path / "raft")
    journal.close()
    kept = {path.name: path.read_bytes() for path in (FORMATS / "1").iterdir()}
    assert {name: (tmp_path / "raft" / name).read_bytes() for name in os.listdir(tmp_path / "raft")} == kept
