"""The bytes of the log on disk: segments of records. Pure.

A segment is its format (magic and version, in every version of these 28 bytes), then records; the first says
what the log was when the segment was begun. A record is

    header  magic 4, kind 1, size of body 4, position 8, durable mark 8, CRC-32 of these 25 bytes 4
    body    MessagePack
    digest  the first 16 bytes of SHA-256 over (digest of the record before, header, body)

**Position** counts bytes from the beginning of the log's life, over all segments. The **durable mark** is the
position up to which all was known to be synced when the record was written: whatever is unreadable below any
mark that is found was durable once, and is damage; beyond all marks it is what a crash left of writes that
nobody was promised.

The digests are a chain, so a record counts only after the very records that it was written after: what an
older end of the file left behind, a segment of another log or of another place in this one never fits. Hence
SHA-256 instead of a CRC-32C: entries come from others, who could choose bytes that a CRC takes; and no wheel
is needed for it. It costs about 1 µs a KiB, beside an fsync of milliseconds. The header has a CRC of its own,
to be readable, with its mark, though the record before it is not.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from hashlib import sha256

import msgspec
from msgspec import Struct

from knode.consensus.messages import Entry, HardState, Index, Snapshot
from knode.klp.codec import encode

VERSION = 1
"""Of the format; raised with every change of it that an older knode cannot read."""
MAX_BODY_BYTES = 32 * 1024 * 1024
"""One record's body: more than a leader has uncommitted at once, or a follower is sent."""

_FORMAT = struct.Struct("<8sI")
_FORMAT_MAGIC = b"knodelog"
_HEADER = struct.Struct("<4sBIQQ")
_CHECK = struct.Struct("<I")
_MAGIC = b"kRec"
DIGEST_BYTES = 16
FORMAT_BYTES = _FORMAT.size + DIGEST_BYTES
HEADER_BYTES = _HEADER.size + _CHECK.size
NO_DIGEST = bytes(DIGEST_BYTES)
"""Stands before the first record of a segment."""


class Damaged(Exception):
    """Something that was durable is not there as it was written. The text says what, without a path."""


class RecordKind(IntEnum):
    """What a record's body is."""

    HEAD = 1
    """A `Head`: begins every segment."""
    BATCH = 2
    """A `Batch`."""
    SEAL = 3
    """Nothing: the log goes on in the next segment, which is durable."""


class Head(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """What the log was when the segment was begun: earlier ones are needed only for their entries."""

    number: int
    """The segment's own."""
    first: int
    """The first segment that is needed; its own number when the log begins anew with it."""
    chain: bytes
    """Digest of the last record before, but for the seal; `NO_DIGEST` when the log begins anew."""
    hard_state: HardState
    snapshot: Snapshot
    last_index: Index
    """Of the last entry before; of the snapshot when there is none."""

    @property
    def begins_anew(self) -> bool:
        """Whether nothing before this segment counts any more."""
        return self.chain == NO_DIGEST


class Batch(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """What was appended at once. Entries replace what stood at their indexes and beyond. With neither, it
    says with its mark alone how far the log is durable."""

    hard_state: HardState | None
    entries: tuple[Entry, ...]


class Record(Struct, frozen=True, gc=False):
    """A record that was read."""

    kind: RecordKind
    position: int
    body: bytes
    digest: bytes
    end: int
    """Offset in the segment behind it."""


_KINDS = frozenset(map(int, RecordKind))
_heads = msgspec.msgpack.Decoder(Head)
_batches = msgspec.msgpack.Decoder(Batch)


def format_bytes(version: int = VERSION) -> bytes:
    """Return what every segment begins with."""
    data = _FORMAT.pack(_FORMAT_MAGIC, version)
    return data + sha256(data).digest()[:DIGEST_BYTES]


def format_version(data: bytes) -> int | None:
    """Return the version of the format that a segment is in; None when its first bytes are damaged."""
    if len(data) < FORMAT_BYTES:
        return None
    magic, version = _FORMAT.unpack_from(data)
    known = magic == _FORMAT_MAGIC and data[:FORMAT_BYTES] == format_bytes(version)
    return int(version) if known else None


def encode_record(kind: RecordKind, body: bytes, *, position: int, mark: int, after: bytes) -> bytes:
    """Return a record; `after` is the digest of the one before."""
    fields = _HEADER.pack(_MAGIC, kind, len(body), position, mark)
    record = b"".join((fields, _CHECK.pack(zlib.crc32(fields)), body))
    return record + _digest(after, record)


def encode_segment(head: Head, position: int) -> bytes:
    """Return a new segment, which begins at `position`: format and head. All before it counts as durable."""
    at = position + FORMAT_BYTES
    record = encode_record(RecordKind.HEAD, encode(head), position=at, mark=position, after=NO_DIGEST)
    return format_bytes() + record


def encode_batch(batch: Batch, *, position: int, mark: int, after: bytes) -> bytes:
    """Return a batch's record."""
    return encode_record(RecordKind.BATCH, encode(batch), position=position, mark=mark, after=after)


def decode_head(record: Record) -> Head:
    """Return what a head says; raise Damaged."""
    try:
        return _heads.decode(record.body)
    except msgspec.MsgspecError as error:
        raise Damaged(f"a whole record says nothing: {error}") from error


def decode_batch(record: Record) -> Batch:
    """Return what a batch says; raise Damaged."""
    try:
        return _batches.decode(record.body)
    except msgspec.MsgspecError as error:
        raise Damaged(f"a whole record says nothing: {error}") from error


def read_record(data: bytes, offset: int, after: bytes) -> Record | None:
    """Return the record at `offset`, behind the one with digest `after`.

    None when there is none that is whole and follows it. Its position is the caller's to check.
    """
    header = _header(data, offset)
    if header is None:
        return None
    kind, size, position, _ = header
    body_end = offset + HEADER_BYTES + size
    end = body_end + DIGEST_BYTES
    if end > len(data) or size > MAX_BODY_BYTES or kind not in _KINDS:
        return None
    digest = data[body_end:end]
    if digest != _digest(after, memoryview(data)[offset:body_end]):
        return None
    return Record(RecordKind(kind), position, data[offset + HEADER_BYTES : body_end], digest, end)


def marks_from(data: bytes, offset: int, position: int) -> Iterator[int]:
    """Return the durable marks of all headers from `offset` on, whatever is broken among them.

    Args:
        position: of the segment's first byte. A header counts only in its own place.
    """
    at = data.find(_MAGIC, offset)
    while at >= 0:
        header = _header(data, at)
        if header is not None and header[2] == position + at:
            yield header[3]
        at = data.find(_MAGIC, at + 1)


def _header(data: bytes, offset: int) -> tuple[int, int, int, int] | None:
    """Return kind, size, position and mark of the header at `offset`, if one is there."""
    if offset + HEADER_BYTES > len(data):
        return None
    magic, kind, size, position, mark = _HEADER.unpack_from(data, offset)
    (check,) = _CHECK.unpack_from(data, offset + _HEADER.size)
    if magic != _MAGIC or check != zlib.crc32(data[offset : offset + _HEADER.size]):
        return None
    return kind, size, position, mark


def _digest(after: bytes, record: bytes | memoryview) -> bytes:
    digest = sha256(after)
    digest.update(record)
    return digest.digest()[:DIGEST_BYTES]
