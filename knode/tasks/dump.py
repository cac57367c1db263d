"""The whole ledger of one moment as a file: how a voter that lacks too much of the log gets it.

    "knode ledger 2\\n", then records: length, CRC-32 (4 bytes each, big-endian), MessagePack.

The first record has the totals, the last one the count of all between and the SHA-256 of all bytes before
it. Rows come in the order of their keys, so two ledgers that are equal have equal files.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from struct import unpack
from typing import Annotated, TypeAlias
from zlib import crc32

import apsw
from msgspec import Meta, Struct
from msgspec.structs import astuple

from knode.errors import Code, KnodeError
from knode.klp.codec import Decoder, encode
from knode.tasks.commands import MAX_BUNDLE_BYTES, MAX_OPERATION_BYTES, Hash
from knode.tasks.records import LedgerTask, Number, Totals
from knode.tasks.tables import INSERT_TASK, SAVE_TOTALS, TASK_COLUMNS, columns_of, names, read_totals, task_of
from knode.tasks.values import TaskId
from knode.world import Disk

VERSION = 2
MAX_RECORD_BYTES = 512 * 1024
_MAGIC = b"knode ledger "
_HEADER = _MAGIC + b"%d\n" % VERSION
_FRAME_BYTES = 8
_CHUNK_BYTES = 1024 * 1024


class Begin(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """The first record."""

    totals: Totals


class TaskRow(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=2):
    """A row of `task`."""

    task: LedgerTask
    considered: Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]
    asked: Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]


class ResultRow(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=3):
    """A row of `result`."""

    ended: Number
    data: Annotated[bytes, Meta(max_length=MAX_BUNDLE_BYTES)]


class IncarnationRow(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=4):
    """A row of `incarnation`."""

    number: Annotated[int, Meta(ge=-1, le=2**31)]
    hash: Hash
    first_operation: Number


class OperationRow(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=5):
    """A row of `operation`."""

    place: Number
    time: Number
    task: TaskId
    attempt: Number
    data: Annotated[bytes, Meta(max_length=MAX_OPERATION_BYTES)]


class End(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=6):
    """The last record."""

    rows: Number
    digest: Hash


Record: TypeAlias = Begin | TaskRow | ResultRow | IncarnationRow | OperationRow | End

_record: Decoder[Record] = Decoder(Record)

_READ: dict[type[Record], str] = {
    TaskRow: f"SELECT {names(TASK_COLUMNS)}, considered, asked FROM task ORDER BY number",
    ResultRow: "SELECT ended, data FROM result ORDER BY ended",
    IncarnationRow: "SELECT number, hash, first_operation FROM incarnation ORDER BY number",
    OperationRow: "SELECT place, time, task, attempt, data FROM operation ORDER BY place",
}
_WRITE: dict[type[Record], str] = {
    TaskRow: INSERT_TASK,
    ResultRow: "INSERT INTO result (ended, data) VALUES (?, ?)",
    IncarnationRow: "INSERT INTO incarnation (number, hash, first_operation) VALUES (?, ?, ?)",
    OperationRow: "INSERT INTO operation (place, time, task, attempt, data) VALUES (?, ?, ?, ?, ?)",
}


def chunks_of(connection: apsw.Connection) -> Iterator[bytes]:
    """Give the file for what a connection sees, about a MiB at a time; meanwhile it must see one state."""
    digest, waiting, rows = sha256(), bytearray(_HEADER), -1
    for record in _records(connection):
        waiting += _framed(record)
        rows += 1
        if len(waiting) >= _CHUNK_BYTES:
            digest.update(waiting)
            yield bytes(waiting)
            waiting.clear()
    digest.update(waiting)
    yield bytes(waiting) + _framed(End(rows, digest.digest()))


def _records(connection: apsw.Connection) -> Iterator[Record]:
    yield Begin(read_totals(connection))
    for kind, query in _READ.items():
        for row in connection.execute(query):
            yield TaskRow(task_of(row[:-2]), *row[-2:]) if kind is TaskRow else kind(*row)


def _framed(record: Record) -> bytes:
    data = encode(record)
    return len(data).to_bytes(4, "big") + crc32(data).to_bytes(4, "big") + data


def read_dump(connection: apsw.Connection, disk: Disk, path: Path) -> None:
    """Replace all rows by those of a file, within the transaction of the caller.

    Raises:
        KnodeError: BAD_FRAME for a file that is no whole dump, HOME_TOO_NEW for one of a newer knode; the
            caller rolls back.
    """
    _clear(connection)
    records = _read(disk, path)
    first = next(records, None)
    if not isinstance(first, Begin):
        raise _damaged("it does not begin with the totals")
    try:
        for record in records:
            values = astuple(record)
            if isinstance(record, TaskRow):
                values = (*columns_of(record.task), record.considered, record.asked)
            connection.execute(_WRITE[type(record)], values)
    except (apsw.ConstraintError, KeyError) as error:
        raise _damaged(f"records that do not fit together: {error}") from error
    connection.execute(SAVE_TOTALS, astuple(first.totals))


def read_nothing(connection: apsw.Connection) -> None:
    """Replace all rows by those of a new ledger, within the transaction of the caller."""
    _clear(connection)
    connection.execute("INSERT INTO incarnation (number, hash, first_operation) VALUES (-1, zeroblob(32), 1)")
    connection.execute(SAVE_TOTALS, astuple(Totals()))


def _clear(connection: apsw.Connection) -> None:
    for table in ("task", "result", "incarnation", "operation"):
        connection.execute(f"DELETE FROM {table}")


def _read(disk: Disk, path: Path) -> Iterator[Record]:
    """Give the records but for the last, which is checked: what came before it was whole."""
    reader = _Reader(disk, path)
    header = reader.take(len(_HEADER))
    if header != _HEADER:
        if header.startswith(_MAGIC) and header > _HEADER:
            raise KnodeError(
                Code.HOME_TOO_NEW,
                "the ledger's dump was written by a newer knode",
                "install the version that the other voters run",
            )
        # An older one comes anew once its leader runs a newer knode: that must not stop this node for good.
        raise _damaged("it is no dump that this knode reads")
    rows = -1
    while True:
        digest = reader.digest.digest()
        size, checksum = unpack(">II", reader.take(_FRAME_BYTES))
        if size > MAX_RECORD_BYTES:
            raise _damaged("a record over its limit")
        data = reader.take(size)
        if crc32(data) != checksum:
            raise _damaged("a checksum that does not fit")
        record = _record.decode(data)
        if isinstance(record, End):
            if (record.rows, record.digest) != (rows, digest) or reader.take_rest():
                raise _damaged("its end does not fit what comes before")
            return
        yield record
        rows += 1


class _Reader:
    """A file from start to end, a chunk at a time."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._path = path
        self._offset = 0
        self._waiting = b""
        self.digest = sha256()

    def take(self, size: int) -> bytes:
        """Return the next bytes; BAD_FRAME when the file ends before."""
        while len(self._waiting) < size:
            if not self._fill():
                raise _damaged("it ends too early")
        taken, self._waiting = self._waiting[:size], self._waiting[size:]
        self.digest.update(taken)
        return taken

    def take_rest(self) -> bool:
        """Tell whether anything is left."""
        return bool(self._waiting) or self._fill()

    def _fill(self) -> bool:
        chunk = self._disk.read_at(self._path, self._offset, _CHUNK_BYTES)
        self._offset += len(chunk)
        self._waiting += chunk
        return bool(chunk)


def _damaged(why: str) -> KnodeError:
    return KnodeError(Code.BAD_FRAME, f"the ledger's dump cannot be used: {why}", "let it be sent again")
