"""What the segments of a log say together. Pure: bytes in, the log out, or why it cannot be believed.

A segment is made whole (file and name durable) before anything says that it exists; then the one before is
sealed, and only then is anything written behind its head. So a segment that nothing but its head is in counts
only when the one before is sealed, every other but the last must be sealed, and a sealed one has a successor.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from knode.consensus.messages import Entry, HardState, Index
from knode.consensus.records import (
    FORMAT_BYTES,
    NO_DIGEST,
    VERSION,
    Batch,
    Damaged,
    Head,
    RecordKind,
    decode_batch,
    decode_head,
    format_version,
    marks_from,
    read_record,
)


class TooNew(Exception):
    """A newer knode wrote it."""

    def __init__(self, version: int) -> None:
        super().__init__(f"it is in format {version}, and this knode knows formats up to {VERSION}")


class Segment(Struct, frozen=True):
    """A segment as it was read."""

    head: Head
    position: int
    """Of its first byte."""
    head_size: int
    size: int
    """How much of it counts, in bytes, without a seal; what is behind that was never durable."""
    has_more: bool
    """Whether anything stands behind its head, be it readable or not."""
    chain: bytes
    """Digest of the last record that counts, but for the seal."""
    batches: tuple[Batch, ...]
    is_sealed: bool
    is_marked: bool
    """Whether the last record does nothing but mark."""

    @property
    def end(self) -> int:
        """Position behind what counts."""
        return self.position + self.size


def read_segment(number: int, data: bytes) -> Segment:
    """Return what a segment says, up to what a crash left unfinished.

    Raises:
        Damaged: its head is not right, or something below a durable mark of its own is not.
        TooNew: it is in a newer format.
    """
    version = format_version(data)
    if version is None:
        raise Damaged("its first bytes are not those of a log")
    if version > VERSION:
        raise TooNew(version)
    record = read_record(data, FORMAT_BYTES, NO_DIGEST)
    if record is None or record.kind is not RecordKind.HEAD:
        raise Damaged("its head cannot be read")
    head = decode_head(record)
    if head.number != number:
        raise Damaged(f"it is segment {head.number}")
    position, head_size = record.position - FORMAT_BYTES, record.end
    batches: list[Batch] = []
    at, chain, is_sealed, is_marked = record.end, record.digest, False, False
    while not is_sealed:
        record = read_record(data, at, chain)
        if record is None:
            break
        if record.position != position + at:
            raise Damaged(f"the record at byte {at} belongs elsewhere")
        if record.kind is RecordKind.BATCH:
            batch = decode_batch(record)
            is_marked = batch.hard_state is None and not batch.entries
            batches.append(batch)
            at, chain = record.end, record.digest
        elif record.kind is RecordKind.SEAL and record.end == len(data):
            is_sealed = True
        else:
            raise Damaged(f"the record at byte {at} belongs elsewhere")
    if not is_sealed and any(mark > position + at for mark in marks_from(data, at, position)):
        raise Damaged(f"what stood at byte {at} was durable and cannot be read")
    return Segment(
        head=head,
        position=position,
        head_size=head_size,
        size=at,
        has_more=len(data) > head_size,
        chain=chain,
        batches=tuple(batches),
        is_sealed=is_sealed,
        is_marked=is_marked,
    )


def must_follow(before: Segment, after: Segment) -> None:
    """Raise Damaged unless `after` was begun where `before` was left."""
    if not before.is_sealed:
        raise Damaged(f"segment {before.head.number} was left before its end")
    if after.position != before.end or after.head.chain != before.chain:
        raise Damaged(f"segment {after.head.number} does not follow the one before")


class Content(Struct, frozen=True):
    """What the segments of a log hold together."""

    hard_state: HardState
    entries: tuple[Entry, ...]
    """Those behind the snapshot."""
    last_index: Index


def replay(segments: Sequence[Segment]) -> Content:
    """Return what the log holds: everything that was appended, in order, with what was replaced replaced.

    Raises:
        Damaged: entries are missing.
    """
    snapshot = segments[-1].head.snapshot
    hard_state, last = segments[0].head.hard_state, segments[0].head.last_index
    # Of what was replaced, only what lies beyond the new last one stays here; it is not looked at.
    entries: dict[Index, Entry] = {}
    for segment in segments:
        if segment.head.last_index != last or segment.head.hard_state != hard_state:
            raise Damaged(f"segment {segment.head.number} does not follow the one before")
        for batch in segment.batches:
            hard_state = batch.hard_state or hard_state
            if batch.entries:
                first = batch.entries[0].index
                if first > last + 1:
                    raise Damaged(f"entries {last + 1} to {first - 1} are missing")
                for index, entry in enumerate(batch.entries, first):
                    if entry.index != index:
                        raise Damaged(f"entry {index} says that it is {entry.index}")
                    if index > snapshot.index:
                        entries[index] = entry
                last = batch.entries[-1].index
    behind = range(snapshot.index + 1, last + 1)
    missing = next((index for index in behind if index not in entries), None)
    if missing is not None or last < snapshot.index:
        raise Damaged(f"entry {missing or snapshot.index} is missing")
    return Content(hard_state, tuple(entries[index] for index in behind), last)
