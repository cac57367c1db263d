"""The ledger's tables in SQLite, as one batch of commands sees and changes them.

The tasks that have not ended are in memory too, so that a batch reads few rows. What a batch changes of
that lies apart until its transaction is durable; when it fails, nothing has changed anywhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

import apsw
from msgspec.structs import astuple, fields

from knode.errors import Code, LocalError
from knode.klp.codec import Decoder, encode
from knode.tasks.commands import Considered, Fence, NewTask
from knode.tasks.lifecycle import State
from knode.tasks.records import Change, LedgerTask, Operation, Operations, TaskRecord, Totals, Usage

MIGRATIONS = (
    """
CREATE TABLE totals (only_one INTEGER PRIMARY KEY CHECK (only_one = 1),
    applied INTEGER NOT NULL, now INTEGER NOT NULL, level INTEGER NOT NULL,
    incarnation_number INTEGER NOT NULL, incarnation BLOB NOT NULL, first_operation INTEGER NOT NULL,
    tasks INTEGER NOT NULL, operations INTEGER NOT NULL, ends INTEGER NOT NULL,
    succeeded INTEGER NOT NULL, failed INTEGER NOT NULL, cancelled INTEGER NOT NULL, expired INTEGER NOT NULL,
    results INTEGER NOT NULL, result_bytes INTEGER NOT NULL, operation_bytes INTEGER NOT NULL) STRICT;
CREATE TABLE task (number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE,
    submitter BLOB NOT NULL, key TEXT NOT NULL, digest BLOB NOT NULL, not_after INTEGER NOT NULL,
    agent TEXT NOT NULL, "on" BLOB NOT NULL, attempts INTEGER NOT NULL, deadline INTEGER NOT NULL,
    submitted INTEGER NOT NULL, parent BLOB NOT NULL, depth INTEGER NOT NULL, holders BLOB NOT NULL,
    size INTEGER NOT NULL, file_bytes INTEGER NOT NULL,
    state TEXT NOT NULL, attempt INTEGER NOT NULL, charged INTEGER NOT NULL, member BLOB NOT NULL,
    incarnation BLOB NOT NULL, not_before INTEGER NOT NULL, changed INTEGER NOT NULL,
    ended INTEGER NOT NULL, code TEXT NOT NULL, message TEXT NOT NULL,
    considered BLOB NOT NULL, asked BLOB NOT NULL, UNIQUE (submitter, key)) STRICT;
CREATE INDEX task_by_not_after ON task (not_after);
CREATE TABLE result (ended INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT;
CREATE TABLE incarnation (number INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE,
    first_operation INTEGER NOT NULL) STRICT;
CREATE TABLE operation (place INTEGER PRIMARY KEY, time INTEGER NOT NULL, task BLOB NOT NULL,
    attempt INTEGER NOT NULL, data BLOB NOT NULL) STRICT;
INSERT INTO incarnation (number, hash, first_operation) VALUES (-1, zeroblob(32), 1);
""",
    """
ALTER TABLE totals ADD COLUMN forgotten INTEGER NOT NULL DEFAULT 0;
CREATE INDEX task_without_key ON task (not_after) WHERE ended > 0 AND key = lower(hex(id));
CREATE INDEX operation_by_task ON operation (task);
""",
)

Row = tuple[Any, ...]

TASK_COLUMNS = tuple(field.name for field in fields(LedgerTask))
_HOLDERS = TASK_COLUMNS.index("holders")
_STATE = TASK_COLUMNS.index("state")
_CHANGING = TASK_COLUMNS[_STATE:]
_TOTALS_COLUMNS = tuple(field.name for field in fields(Totals))


def names(columns: Iterable[str]) -> str:
    """Return column names as SQL wants them."""
    return ", ".join(f'"{column}"' for column in columns)


def _settings(columns: Iterable[str]) -> str:
    return ", ".join(f'"{column}" = ?' for column in columns)


_SELECT = f"SELECT {names(TASK_COLUMNS)} FROM task"
_WHOLE = f"SELECT {names(TASK_COLUMNS)}, considered, asked FROM task WHERE id = ?"
_BY_ID = f"{_SELECT} WHERE id = ?"
_BY_KEY = f"{_SELECT} WHERE submitter = ? AND key = ?"
_OLD_KEYS = (
    f"{_SELECT} INDEXED BY task_by_not_after WHERE not_after < ? AND ended > 0"
    " ORDER BY not_after, number LIMIT ?"
)
_WITHOUT_KEYS = (
    f"{_SELECT} INDEXED BY task_without_key WHERE ended > 0 AND key = lower(hex(id)) AND not_after < ?"
    " ORDER BY not_after, number LIMIT ?"
)
_OLDEST = "SELECT not_after FROM task INDEXED BY task_by_not_after WHERE ended > 0 ORDER BY not_after LIMIT 1"
_LIVE = f"{_SELECT} WHERE ended = 0 ORDER BY number"
INSERT_TASK = (
    f"INSERT INTO task ({names(TASK_COLUMNS)}, considered, asked)"
    f" VALUES ({', '.join('?' * len(TASK_COLUMNS))}, ?, ?)"
)
_UPDATE = f"UPDATE task SET {_settings(_CHANGING)} WHERE number = ?"
_END = f"UPDATE task SET {_settings(_CHANGING)}, asked = x'' WHERE number = ?"
_ASSIGN = f"UPDATE task SET {_settings(_CHANGING)}, considered = ? WHERE number = ?"
SAVE_TOTALS = (
    f"INSERT OR REPLACE INTO totals (only_one, {names(_TOTALS_COLUMNS)})"
    f" VALUES (1, {', '.join('?' * len(_TOTALS_COLUMNS))})"
)
_LOAD_TOTALS = f"SELECT {names(_TOTALS_COLUMNS)} FROM totals"

_OPERATIONS = "SELECT place, time, task, attempt, data FROM operation WHERE place > ? ORDER BY place LIMIT ?"
# The rows of one task lie in the index in the order of their places.
_OPERATIONS_OF = (
    "SELECT place, time, task, attempt, data FROM operation INDEXED BY operation_by_task"
    " WHERE task = ? AND place > ? ORDER BY place LIMIT ?"
)
_STREAMS = "SELECT first_operation, hash FROM incarnation ORDER BY first_operation, number"

_asked: Decoder[NewTask] = Decoder(NewTask)
_considered: Decoder[tuple[Considered, ...]] = Decoder(tuple[Considered, ...])


class Held:
    """What the ledger holds in memory: the totals, and every task that has not ended."""

    def __init__(self, totals: Totals, live: dict[bytes, LedgerTask]) -> None:
        self.totals = totals
        self.live = live
        """By id, in order of submission."""
        self.usage: dict[bytes, Usage] = {}
        for task in live.values():
            _use(self.usage, task, 1)

    @classmethod
    def load(cls, connection: apsw.Connection) -> Held:
        """Return what the tables say."""
        live = {task.id: task for task in map(task_of, connection.execute(_LIVE))}
        return cls(read_totals(connection), live)


class Batch:
    """The tables within one transaction; implements `records.Tables`."""

    def __init__(self, connection: apsw.Connection, held: Held) -> None:
        self._execute = connection.execute
        self._held = held
        self.totals = Totals(*astuple(held.totals))
        self.changes: list[Change] = []
        self._usage = dict(held.usage)
        self._live: dict[bytes, LedgerTask | None] = {}
        """What became of tasks that had not ended; None: they have."""

    def copy(self) -> Batch:
        """Return one as this is now: to go on with when what is written next is rolled back."""
        twin = copy(self)
        twin.totals = Totals(*astuple(self.totals))
        twin.changes, twin._usage, twin._live = [*self.changes], dict(self._usage), dict(self._live)
        return twin

    def save(self) -> None:
        """Write the totals; the last thing before the commit."""
        self._execute(SAVE_TOTALS, astuple(self.totals))

    def publish(self) -> None:
        """Let what this batch changed be seen; once its transaction is committed."""
        held = self._held
        held.totals, held.usage = self.totals, self._usage
        for id, task in self._live.items():
            if task is None:
                held.live.pop(id, None)
            else:
                held.live[id] = task

    # Reading.

    def task(self, id: bytes) -> LedgerTask | None:
        """Return a task; for this and all below see `records.Tables`."""
        task = self._live[id] if id in self._live else self._held.live.get(id)
        return task or self._one(_BY_ID, (id,))

    def by_key(self, submitter: bytes, key: str) -> LedgerTask | None:
        """Return the task that has the key."""
        return self._one(_BY_KEY, (submitter, key))

    def usage(self, submitter: bytes) -> Usage:
        """Return what tasks that have not ended take."""
        return self._usage.get(submitter, Usage())

    def assigned(self) -> list[LedgerTask]:
        """Return the tasks that are assigned."""
        live = {**self._held.live, **self._live}
        return [task for task in live.values() if task is not None and task.state is State.ASSIGNED]

    def with_old_keys(self, before: int, limit: int) -> list[LedgerTask]:
        """Return tasks whose keys have expired."""
        return [task_of(row) for row in self._execute(_OLD_KEYS, (before, limit))]

    def without_keys(self, before: int, limit: int) -> list[LedgerTask]:
        """Return tasks that have no key of their own."""
        return [task_of(row) for row in self._execute(_WITHOUT_KEYS, (before, limit))]

    def oldest_operations(self, limit: int) -> list[tuple[int, int, bytes, int]]:
        """Return the oldest operations."""
        query = "SELECT place, time, task, length(data) FROM operation ORDER BY place LIMIT ?"
        rows: list[Row] = self._execute(query, (limit,)).fetchall()
        return [(place, time, task, size) for place, time, task, size in rows]

    # Writing.

    def add(self, task: LedgerTask, asked: NewTask, considered: tuple[Considered, ...]) -> None:
        """Add a task."""
        self._execute(INSERT_TASK, (*columns_of(task), encode(considered), encode(asked)))
        _use(self._usage, task, 1)
        self._note(None, task, asked)

    def assign(self, task: LedgerTask, considered: tuple[Considered, ...]) -> None:
        """Keep a new attempt."""
        self._execute(_ASSIGN, (*columns_of(task)[_STATE:], encode(considered), task.number))
        self._note(State.QUEUED, task)

    def requeue(self, task: LedgerTask) -> None:
        """Keep a task that is queued again."""
        self._execute(_UPDATE, (*columns_of(task)[_STATE:], task.number))
        self._note(State.ASSIGNED, task)

    def end(self, task: LedgerTask, result: bytes | None) -> None:
        """Keep a task that has ended."""
        before = self.task(task.id)
        assert before is not None
        self._execute(_END, (*columns_of(task)[_STATE:], task.number))
        if result is not None:
            self._execute("INSERT INTO result (ended, data) VALUES (?, ?)", (task.ended, result))
        _use(self._usage, task, -1)
        self._live[task.id] = None
        self.changes.append(Change(task.id, before.state, task, result=result))

    def drop_result(self, ended: int) -> int:
        """Drop a result; return its bytes."""
        row = self._execute("DELETE FROM result WHERE ended = ? RETURNING length(data)", (ended,)).fetchone()
        return 0 if row is None else int(row[0])

    def forget(self, task: LedgerTask) -> None:
        """Drop a task."""
        self._execute("DELETE FROM task WHERE number = ?", (task.number,))
        self.changes.append(Change(task.id, task.state, None))

    def append(self, place: int, time: int, fence: Fence, data: bytes) -> None:
        """Append an operation."""
        self._execute(
            "INSERT INTO operation (place, time, task, attempt, data) VALUES (?, ?, ?, ?, ?)",
            (place, time, fence.task, fence.attempt, data),
        )

    def drop_operations(self, last: int) -> None:
        """Drop the oldest operations."""
        self._execute("DELETE FROM operation WHERE place <= ?", (last,))

    def has_begun(self, incarnation: bytes) -> bool:
        """Tell whether an incarnation is known."""
        return (
            self._execute("SELECT 1 FROM incarnation WHERE hash = ?", (incarnation,)).fetchone() is not None
        )

    def begin(self, number: int, incarnation: bytes, first_operation: int) -> None:
        """Keep where a stream begins."""
        self._execute(
            "INSERT INTO incarnation (number, hash, first_operation) VALUES (?, ?, ?)",
            (number, incarnation, first_operation),
        )

    def _note(self, before: State | None, task: LedgerTask, asked: NewTask | None = None) -> None:
        self._live[task.id] = task
        self.changes.append(Change(task.id, before, task, asked))

    def _one(self, query: str, parameters: tuple[Any, ...]) -> LedgerTask | None:
        row = self._execute(query, parameters).fetchone()
        return None if row is None else task_of(row)


# Queries of one state, outside a batch.


def read_totals(connection: apsw.Connection) -> Totals:
    """Return where the ledger stands."""
    row = connection.execute(_LOAD_TOTALS).fetchone()
    return Totals() if row is None else Totals(*row)


def read_task(connection: apsw.Connection, id: bytes) -> TaskRecord | None:
    """Return a task with all that is kept of it."""
    row = connection.execute(_WHOLE, (id,)).fetchone()
    if row is None:
        return None
    *columns, considered, asked = row
    task = task_of(columns)
    return TaskRecord(
        task=task,
        asked=_asked.decode(asked) if asked else None,
        result=read_result(connection, task),
        considered=_considered.decode(considered),
    )


def read_tasks_of(
    connection: apsw.Connection, ids: Sequence[bytes], most_bytes: int
) -> list[TaskRecord | None]:
    """Return tasks with all that is kept of them; `LedgerStore.tasks` says how many."""
    found: list[TaskRecord | None] = []
    for id in ids:
        record = read_task(connection, id)
        if record is not None:
            most_bytes -= len(record.result or b"")
        if found and most_bytes < 0:
            break
        found.append(record)
    return found


def read_result(connection: apsw.Connection, task: LedgerTask) -> bytes | None:
    """Return the result of a task, when it has one that is kept."""
    row = connection.execute("SELECT data FROM result WHERE ended = ?", (task.ended,)).fetchone()
    return None if row is None else row[0]


def read_ids(connection: apsw.Connection, low: bytes, high: bytes, limit: int) -> list[bytes]:
    """Return up to `limit` ids of tasks that lie between two ids, both included."""
    query = "SELECT id FROM task WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?"
    return [id for (id,) in connection.execute(query, (low, high, limit))]


def read_tasks(connection: apsw.Connection, before: int, limit: int, most_bytes: int) -> list[TaskRecord]:
    """Return tasks with numbers less than `before`, newest first; `LedgerStore.list` says how many."""
    query = f"{_SELECT} WHERE number < ? ORDER BY number DESC LIMIT ?"
    found: list[TaskRecord] = []
    for row in connection.execute(query, (before, limit)):
        task = task_of(row)
        result = read_result(connection, task)
        most_bytes -= len(result or b"")
        if found and most_bytes < 0:
            break
        found.append(TaskRecord(task, None, result, ()))
    return found


def read_operations(
    connection: apsw.Connection, after: int, limit: int, most_bytes: int, task: bytes | None
) -> Operations:
    """Return operations of all incarnations, or what is left of one task's; see `LedgerStore.operations`."""
    firsts, streams = zip(*connection.execute(_STREAMS), strict=True)
    query, parameters = (_OPERATIONS, ()) if task is None else (_OPERATIONS_OF, (task,))
    found: list[Operation] = []
    next: int | None = None
    for place, time, whose, attempt, data in connection.execute(query, (*parameters, after, limit + 1)):
        most_bytes -= len(data)
        if found and (most_bytes < 0 or len(found) == limit):
            next = found[-1].place
            break
        # Of several that begin here all but the last are empty.
        at = bisect_right(firsts, place) - 1
        number = place - firsts[at] + 1
        found.append(Operation(place, streams[at], number, time, whose, attempt, data))
    oldest = connection.execute("SELECT place, time FROM operation ORDER BY place LIMIT 1").fetchone()
    first, since = oldest or (read_totals(connection).operations + 1, 0)
    return Operations(tuple(found), next, first, since)


def is_operation_before(connection: apsw.Connection, time: int) -> bool:
    """Tell whether the oldest operation is older than this."""
    oldest = connection.execute("SELECT time FROM operation ORDER BY place LIMIT 1").fetchone()
    return oldest is not None and oldest[0] < time


def _use(usage: dict[bytes, Usage], task: LedgerTask, sign: int) -> None:
    for whose in (b"", task.submitter):
        held = usage.get(whose, Usage())
        now = Usage(held.tasks + sign, held.bytes + sign * task.size)
        if now.tasks:
            usage[whose] = now
        else:
            del usage[whose]


def columns_of(task: LedgerTask) -> Row:
    """Return a task's columns."""
    values = list(astuple(task))
    values[_HOLDERS] = b"".join(task.holders)
    return tuple(values)


def task_of(row: Sequence[Any]) -> LedgerTask:
    """Return the task of a row's columns.

    Raises:
        KnodeError: HOME_DAMAGED for what no version writes.
    """
    values = list(row)
    joined = values[_HOLDERS]
    values[_HOLDERS] = tuple(joined[at : at + 32] for at in range(0, len(joined), 32))
    try:
        values[_STATE] = State(values[_STATE])
    except ValueError as error:
        raise LocalError(
            Code.HOME_DAMAGED,
            f"the ledger of this node is damaged: a task cannot be {values[_STATE]!r}",
            "check the disk, then start the node again",
        ) from error
    return LedgerTask(*values)
