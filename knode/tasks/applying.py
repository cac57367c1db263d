"""Committed entries on the ledger's tables: a batch in one transaction, and what a fault of a rule does.

A fault is an exception that only a bug of the rules (`knode.tasks.ledger`) can raise, so each replica of this
version meets it at the same entry. The entry then ends as INTERNAL with nothing of it kept: else it would end
every voter, and again at each start. What can differ between replicas (the disk, memory, the depth of a
stack) is never made an outcome: it goes on, and stops the one that meets it. So does a fault on a damaged
database. To mend a rule that had a fault changes what an entry does: it takes a new feature level, as every
change of the rules.

Batches are applied without savepoints. Only a batch that met a fault is rolled back and applied once more,
each command in a savepoint of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import apsw

from knode.consensus.messages import Entry, Kind
from knode.errors import Code, KnodeError, LocalError
from knode.tasks.commands import decode_command
from knode.tasks.ledger import apply
from knode.tasks.records import Outcome
from knode.tasks.tables import Batch, Held

FAULT = Outcome(
    Code.INTERNAL,
    "a fault of knode itself: nothing was done",
    "the log of any voter says more; please report it",
)
"""The same on every replica: what an exception says may differ."""

# Nothing else: RuntimeError, say, may come from outside, and MemoryError is the machine's.
_OF_RULES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
    # A table refuses a value, or the same key twice.
    apsw.ConstraintError,
    apsw.MismatchError,
)


class Fault(Exception):
    """A rule has a bug, which its cause shows; nothing was applied."""


class Met(NamedTuple):
    """A fault that is an outcome now."""

    entry: Entry
    cause: BaseException | None


class Applied(NamedTuple):
    """What became of a batch."""

    batch: Batch
    outcomes: list[Outcome | None]
    faults: Sequence[Met] = ()


def apply_all(connection: apsw.Connection, *, held: Held, entries: Sequence[Entry]) -> Applied:
    """Apply entries within a transaction.

    Raises:
        Fault: one of them met a bug; `apply_each` finds which.
        KnodeError: HOME_TOO_NEW, HOME_DAMAGED.
    """
    batch = Batch(connection, held)
    outcomes = [_apply_one(batch, entry) for entry in entries]
    _save(batch)
    return Applied(batch, outcomes)


def apply_each(connection: apsw.Connection, *, held: Held, entries: Sequence[Entry]) -> Applied:
    """Apply entries within a transaction, those that meet a fault as if they were empty.

    Raises:
        KnodeError: HOME_TOO_NEW, HOME_DAMAGED.
    """
    batch = Batch(connection, held)
    outcomes: list[Outcome | None] = []
    faults: list[Met] = []
    for entry in entries:
        before = batch.copy()
        connection.execute("SAVEPOINT entry")
        try:
            outcome = _apply_one(batch, entry)
            _save(batch)
        except Fault as fault:
            connection.execute("ROLLBACK TO entry")
            _check_whole(connection)
            batch, outcome = before, FAULT
            batch.totals.applied = entry.index
            faults.append(Met(entry, fault.__cause__))
        connection.execute("RELEASE entry")
        outcomes.append(outcome)
    batch.save()
    return Applied(batch, outcomes, faults)


def _apply_one(batch: Batch, entry: Entry) -> Outcome | None:
    assert entry.index == batch.totals.applied + 1, "entries are applied one after the other"
    batch.totals.applied = entry.index
    if entry.kind is not Kind.COMMAND or not entry.data:
        return None
    try:
        command = decode_command(entry.data)
    except KnodeError as error:
        if error.code is Code.HOME_TOO_NEW:
            raise
        # The same bytes are refused everywhere.
        return Outcome(error.code, error.message)
    try:
        return apply(batch, command)
    except _OF_RULES as error:
        raise Fault from error


def _save(batch: Batch) -> None:
    try:
        batch.save()
    except _OF_RULES as error:
        raise Fault from error


def _check_whole(connection: apsw.Connection) -> None:
    """Raise HOME_DAMAGED when damage may have caused a fault. It reads the whole file; faults are rare."""
    found = connection.execute("PRAGMA integrity_check(1)").fetchall()
    if found != [("ok",)]:
        raise LocalError(
            Code.HOME_DAMAGED,
            f"the ledger of this node is damaged ({found[0][0]})",
            "check the disk, then start the node again",
        )
