"""The log on disk: what a replica has promised, for as long as its disk keeps it.

A folder of segments, `0000000000000001.log` and so on; `records` has their bytes, `segments` what they say.
What can happen to it, and what comes of it:

- **Crash at any point**: what was appended with a sync is there, in order; of what was appended since, a
  first part. A new segment is written whole under another name and renamed, so it is there or not; it counts
  once the one before is sealed. Segments that are no longer needed go after that, and one that a crash
  brings back is removed again.
- **Damage**: whatever is unreadable below a durable mark, a segment that is missing or not in its place:
  HOME_DAMAGED, and nothing is served. Not noticed: damage to the very last batch, when nothing was written
  after it, for it looks like a write that a crash tore. `open` and `close` write a mark behind it, so that
  takes a crash and a damaged byte at once.
- **Full disk**: the log is as it was before the call, and the call can be tried again.
- **Failed sync**: `SyncFailed`. The system has forgotten what it could not write, and a second sync would
  succeed without it, so from then on everything is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from knode.consensus.messages import Entry, HardState, Index, Snapshot
from knode.consensus.ready import Recovered
from knode.consensus.records import (
    DIGEST_BYTES,
    HEADER_BYTES,
    MAX_BODY_BYTES,
    NO_DIGEST,
    Batch,
    Damaged,
    Head,
    RecordKind,
    encode_record,
    encode_segment,
)
from knode.consensus.segments import Content, Segment, TooNew, must_follow, read_segment, replay
from knode.errors import Code, KnodeError, LocalError
from knode.klp.codec import encode
from knode.world import Disk

SEGMENT_BYTES = 16 * 1024 * 1024
"""A segment that has reached this is followed by another."""
MAX_LOG_BYTES = 512 * 1024 * 1024
"""All segments together. Whoever compacts keeps far below."""
MAX_SEGMENT_BYTES = SEGMENT_BYTES + MAX_BODY_BYTES + 4096

_NAME = re.compile(r"[0-9]{16}\.log")
_OURS = re.compile(r"\.?[0-9]{16}\.log(\.[0-9]+\.new)?")
"""A segment, or what a crash left of one that was being made."""
_RECOVERY = "check the disk; a node that has lost its log must not vote as the one that it was"


class SyncFailed(LocalError):
    """Nobody can say what of the log is on the disk: the replica must neither vote nor acknowledge again."""

    def __init__(self, folder: Path, why: KnodeError) -> None:
        super().__init__(Code.HOME_DAMAGED, f"the log in {folder} could not be made durable ({why.message})")


@dataclass
class _Kept:
    """A segment that is on the disk."""

    number: int
    size: int
    lowest: Index | None = None
    """Lowest index that its entries begin at: there it replaces what came before. None: it has no entries."""
    highest: Index = 0


class Journal:
    """One replica's log on one disk. Calls block, one at a time; make one with `open`."""

    def __init__(self, disk: Disk, folder: Path, segments: Sequence[Segment], content: Content) -> None:
        self._disk = disk
        self._folder = folder
        last = segments[-1]
        self._segments = [_kept(segment) for segment in segments]
        self._base = last.position
        self._chain = last.chain
        self._hard_state = content.hard_state
        self._snapshot = last.head.snapshot
        self._last_index = content.last_index
        self._is_marked = last.is_marked or not last.batches
        self._is_closed = self._is_torn = False
        self._failure: SyncFailed | None = None
        self._file = disk.append(self._path(last.head.number), last.size)
        self._mark = -1

    @classmethod
    def open(cls, disk: Disk, folder: Path) -> tuple[Journal, Recovered]:
        """Open the log, or make an empty one when the folder holds none; return it with what it holds.

        What it returns is durable. Whether an empty log may be there is the caller's to know: a replica
        whose folder is gone must not take part as if it were new.

        Raises:
            KnodeError: HOME_DAMAGED when anything that was durable is not there as it was written;
                HOME_TOO_NEW; DISK_FULL, DISK_READ_ONLY; SyncFailed.
        """
        disk.make_folder(folder)
        disk.sync_folder(folder.parent)
        numbers = [int(name[:16]) for name in disk.list_folder(folder) if _NAME.fullmatch(name)]
        if not numbers:
            head = Head(1, 1, NO_DIGEST, HardState(), Snapshot(), 0)
            disk.write(_path(folder, 1), encode_segment(head, 0))
            numbers = [1]
        segments = _read(disk, folder, numbers)
        try:
            content = replay(segments)
        except Damaged as error:
            raise _damaged(folder, error) from error
        journal = cls(disk, folder, segments, content)
        try:
            # Whoever was here before may have written this and not synced it.
            journal._sync()
            wanted = {_path(folder, segment.head.number).name for segment in segments}
            for name in disk.list_folder(folder):
                if _OURS.fullmatch(name) and name not in wanted:
                    disk.remove(folder / name)
            journal._mark_the_end()
        except BaseException:
            journal._file.close()
            raise
        return journal, Recovered(content.hard_state, segments[-1].head.snapshot, content.entries)

    def append(self, hard_state: HardState | None, entries: Sequence[Entry], *, sync: bool) -> None:
        """Append one batch: a hard state, entries, or both.

        Args:
            hard_state: None: it stays what it was.
            entries: they follow each other, replace what stood at their indexes and beyond, and begin
                behind the snapshot, at most one behind the last.
            sync: whether all that was appended is durable when this returns.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY: the log is as it was; TOO_LARGE for a batch over
                32 MiB; RATE_LIMITED when the log is longer than 512 MiB and must be compacted first;
                SyncFailed.
        """
        self._must_be_sound()
        if entries:
            first, last = entries[0].index, entries[-1].index
            assert self._snapshot.index < first <= self._last_index + 1, "a gap in the log"
            assert last == first + len(entries) - 1, "entries that do not follow each other"
        body = encode(Batch(hard_state, tuple(entries)))
        if len(body) > MAX_BODY_BYTES:
            raise KnodeError(Code.TOO_LARGE, f"{len(body)} bytes to append at once, {MAX_BODY_BYTES} allowed")
        if self._current.size >= SEGMENT_BYTES:
            if self.size_bytes >= MAX_LOG_BYTES:
                raise KnodeError(Code.RATE_LIMITED, f"the log has grown to {self.size_bytes} bytes")
            self._roll(self._snapshot)
        self._write(RecordKind.BATCH, body)
        self._is_marked = False
        if hard_state is not None:
            self._hard_state = hard_state
        if entries:
            self._last_index = last
            current = self._current
            current.lowest = first if current.lowest is None else min(first, current.lowest)
            current.highest = max(last, current.highest)
        if sync:
            self._sync()

    def compact(self, snapshot: Snapshot) -> None:
        """Let the log begin behind `snapshot`, durably, and delete the segments that only lead up to it.

        Args:
            snapshot: its index is that of an entry of the log; the state machine has synced that far.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY: the log is as it was, or compacted with segments left
                over, which the next compaction or opening deletes; SyncFailed.
        """
        self._must_be_sound()
        assert self._snapshot.index <= snapshot.index <= self._last_index, "a snapshot of no entry here"
        self._roll(snapshot)
        self._snapshot = snapshot
        self._remove_before(self._first_needed(snapshot.index, otherwise=self._current.number))

    def reset(self, snapshot: Snapshot, hard_state: HardState) -> None:
        """Let the log begin anew behind an installed snapshot, without entries: durably, and at once.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY: the log is as it was, or new with segments left over;
                SyncFailed.
        """
        self._must_be_sound()
        number = self._current.number + 1
        head = Head(number, number, NO_DIGEST, hard_state, snapshot, snapshot.index)
        segment = encode_segment(head, self._end)
        # One that was left over from a seal that did not fit; from here on its name says that all is done.
        self._disk.remove(self._path(number))
        try:
            self._create(number, segment)
        except KnodeError as error:
            if self._failure is None and self._disk.exists(self._path(number)):
                raise self._fail(error) from error
            raise
        self._go_on_in(number, segment)
        self._hard_state, self._snapshot, self._last_index = hard_state, snapshot, snapshot.index
        self._remove_before(number)

    def close(self) -> None:
        """Make durable what is not, with a mark behind it, and close the file; twice is no error.

        Raises:
            KnodeError: DISK_READ_ONLY, SyncFailed; the file is closed all the same.
        """
        try:
            if self._failure is None and not self._is_closed:
                self._sync()
                self._mark_the_end()
        finally:
            self._is_closed = True
            self._file.close()

    @property
    def size_bytes(self) -> int:
        """How much the log takes on the disk."""
        return sum(segment.size for segment in self._segments)

    @property
    def _current(self) -> _Kept:
        return self._segments[-1]

    @property
    def _end(self) -> int:
        """Position behind all that was written."""
        return self._base + self._current.size

    def _path(self, number: int) -> Path:
        return _path(self._folder, number)

    def _must_be_sound(self) -> None:
        assert not self._is_closed, "a closed journal"
        if self._failure is not None:
            raise self._failure

    def _write(self, kind: RecordKind, body: bytes) -> None:
        if self._is_torn:
            self._cut_back()
        record = encode_record(kind, body, position=self._end, mark=self._mark, after=self._chain)
        self._is_torn = True
        self._file.write(record)
        self._is_torn = False
        self._current.size += len(record)
        self._chain = record[-DIGEST_BYTES:]

    def _cut_back(self) -> None:
        """Take away what a failed write left, durably: it must not come back behind what is written next."""
        file = self._disk.append(self._path(self._current.number), self._current.size)
        self._file.close()
        self._file, self._mark = file, -1
        self._sync()
        self._is_torn = False

    def _sync(self) -> None:
        if self._mark == self._end:
            return
        try:
            self._file.sync()
        except KnodeError as error:
            raise self._fail(error) from error
        self._mark = self._end

    def _fail(self, why: KnodeError) -> SyncFailed:
        self._failure = SyncFailed(self._folder, why)
        return self._failure

    def _mark_the_end(self) -> None:
        """Write a mark behind the last batch, unless one is there, so that damage to it is noticed."""
        if self._is_marked:
            return
        try:
            self._write(RecordKind.BATCH, encode(Batch(None, ())))
        except KnodeError as error:
            if error.code is not Code.DISK_FULL:
                raise
            return  # then the mark comes with the next batch
        self._is_marked = True
        self._sync()

    def _roll(self, snapshot: Snapshot) -> None:
        """Go on in a new segment, whose head says that the log begins behind `snapshot`."""
        number = self._current.number + 1
        first = self._first_needed(snapshot.index, otherwise=number)
        head = Head(number, first, self._chain, self._hard_state, snapshot, self._last_index)
        segment = encode_segment(head, self._end)
        self._create(number, segment)
        sealed = self._end
        # When the seal does not fit, the new segment counts for nothing and the next one takes its place.
        self._write(RecordKind.SEAL, b"")
        self._sync()
        self._current.size -= HEADER_BYTES + DIGEST_BYTES
        assert self._end == sealed
        self._go_on_in(number, segment)

    def _create(self, number: int, segment: bytes) -> None:
        try:
            self._disk.write(self._path(number), segment)
        except KnodeError as error:
            if error.code in (Code.DISK_FULL, Code.DISK_READ_ONLY):
                raise
            raise self._fail(error) from error

    def _go_on_in(self, number: int, segment: bytes) -> None:
        self._base, self._is_torn = self._end, False
        self._file.close()
        try:
            self._file = self._disk.append(self._path(number), len(segment))
        except KnodeError as error:
            raise self._fail(error) from error
        self._segments.append(_Kept(number, len(segment)))
        self._chain = segment[-DIGEST_BYTES:]
        self._mark = self._end
        self._is_marked = True

    def _first_needed(self, index: Index, *, otherwise: int) -> int:
        """Return the first segment with an entry behind `index` that nothing replaced."""
        first, replaced_from = otherwise, None
        for segment in reversed(self._segments):
            live = segment.highest if replaced_from is None else min(segment.highest, replaced_from - 1)
            if live > index:
                first = segment.number
            if segment.lowest is not None:
                replaced_from = min(segment.lowest, replaced_from or segment.lowest)
        return first

    def _remove_before(self, number: int) -> None:
        while self._segments[0].number < number:
            self._disk.remove(self._path(self._segments[0].number))
            del self._segments[0]


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:016}.log"


def _kept(segment: Segment) -> _Kept:
    kept = _Kept(segment.head.number, segment.size)
    for batch in segment.batches:
        if batch.entries:
            first = batch.entries[0].index
            kept.lowest = first if kept.lowest is None else min(first, kept.lowest)
            kept.highest = max(batch.entries[-1].index, kept.highest)
    return kept


def _read(disk: Disk, folder: Path, numbers: Sequence[int]) -> list[Segment]:
    """Return the segments that count, in order; raise HOME_DAMAGED or HOME_TOO_NEW."""
    last = _read_one(disk, folder, numbers[-1])
    before = numbers[-1] - 1
    if not last.has_more and not last.head.begins_anew and before in numbers:
        predecessor = _read_one(disk, folder, before)
        if not predecessor.is_sealed:
            last = predecessor
    segments = [_read_one(disk, folder, number) for number in range(last.head.first, last.head.number)]
    segments.append(last)
    try:
        for one, following in pairwise(segments):
            must_follow(one, following)
        if last.is_sealed:
            raise Damaged(f"segment {last.head.number + 1} is missing")
    except Damaged as error:
        raise _damaged(folder, error) from error
    return segments


def _read_one(disk: Disk, folder: Path, number: int) -> Segment:
    path = _path(folder, number)
    try:
        return read_segment(number, disk.read(path, limit_bytes=MAX_SEGMENT_BYTES))
    except Damaged as error:
        raise _damaged(path, error) from error
    except TooNew as error:
        raise LocalError(
            Code.HOME_TOO_NEW, f"{path} cannot be read: {error}", "install the newer knode that wrote it"
        ) from error
    except KnodeError as error:
        if error.code in (Code.NOT_FOUND, Code.TOO_LARGE):
            raise _damaged(path, error) from error
        raise


def _damaged(path: Path, why: Exception) -> LocalError:
    return LocalError(Code.HOME_DAMAGED, f"{path} is damaged: {why}", _RECOVERY)
