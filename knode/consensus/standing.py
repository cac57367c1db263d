"""What this node must remember to be a replica that others may count, beside its log.

A replica's vote or acknowledgement is a promise about its disk. When the disk was set back (a home restored
from an old copy), or lost what it had promised (damage, a failed fsync), the promise is void, and a majority
that counts it may forget what was acknowledged. So:

- Each start raises a counter, durably, before anything is sent. Who receives a message first makes durable
  which (start, boot) its sender has shown, then counts it. A lower start, or the same with another boot, is
  an old copy: it is refused, and told so, with its member's own signature over what it showed before. So no
  other member can make a replica unfit, and one that was shown suffices: perhaps only one was.
- A replica that is unfit never speaks again. Its node removes log and ledger, draws another replica id and
  begins with nothing, as a learner. A full disk must not keep that from being remembered: where the database
  takes it not, a file that says that the replica is fit is removed, which needs no space.

What this cannot notice: a copy that was taken since the latest start, when nothing but that copy is started
afterwards: its counter goes on as if nothing had happened. No backup that knode makes has a replica's log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import trio

from knode.consensus.envelope import Started
from knode.consensus.messages import ReplicaId
from knode.consensus.voters import MEMBER_BYTES, member_of
from knode.errors import KnodeError
from knode.identity import KeyPair
from knode.mesh.incarnations import Incarnation
from knode.storage import Database
from knode.world import Disk, World

RANDOM_BYTES = 8
MAX_REPLICAS_OF_A_MEMBER = 8
"""How many replica ids of one member are remembered, the latest; older ones are in no configuration."""

MIGRATIONS = (
    """
CREATE TABLE standing (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    replica BLOB NOT NULL,
    start INTEGER NOT NULL,
    incarnation_number INTEGER NOT NULL,
    incarnation_hash BLOB NOT NULL,
    founds INTEGER NOT NULL,
    begun INTEGER NOT NULL,
    unfit TEXT
);
CREATE TABLE shown (
    turn INTEGER PRIMARY KEY,
    replica BLOB NOT NULL UNIQUE,
    start INTEGER NOT NULL,
    boot BLOB NOT NULL
);
""",
)
LATER_MIGRATIONS = (
    "ALTER TABLE shown ADD COLUMN proof BLOB NOT NULL DEFAULT x'';",
    "ALTER TABLE standing ADD COLUMN marked INTEGER NOT NULL DEFAULT 0;",
)
"""They have their own place among those of the node."""


@dataclass(frozen=True, slots=True)
class _Row:
    replica: ReplicaId
    start: int
    incarnation: Incarnation
    founds: bool
    begun: bool
    unfit: str | None
    marked: bool = False
    """Whether there is a file that says that it is fit."""


class Shown(NamedTuple):
    """What a replica has shown here."""

    start: int
    boot: bytes
    proof: bytes


class Standing:
    """This node's replica, and what every other has shown. Make one with `open`."""

    def __init__(
        self,
        world: World,
        database: Database,
        boot: bytes,
        row: _Row,
        shown: dict[ReplicaId, Shown],
        key: KeyPair,
        mark: Path,
    ) -> None:
        self.boot = boot
        self._key = key
        self._mark = mark
        self._world = world
        self._database = database
        self._row = row
        self._shown = shown
        self._turn = trio.Lock()
        self._unfit: str | None = row.unfit
        self._is_known_to_disk = row.unfit is not None
        self.proof = self._prove()
        """That this replica speaks from this start, for whoever takes a message of it."""

    @classmethod
    async def open(
        cls,
        world: World,
        database: Database,
        *,
        member: bytes,
        key: KeyPair,
        boot: bytes,
        incarnation: Incarnation,
        founds: bool,
        mark: Path,
    ) -> Standing:
        """Read it and raise the start counter, durably; the first time, draw a replica id.

        Args:
            world: its randomness is used.
            database: the node's, with `MIGRATIONS` and `LATER_MIGRATIONS`.
            member: raw id of this node as a member, 32 bytes.
            key: its present key.
            boot: 16 bytes that no other start of this node has.
            incarnation: of the cell, now; counts the first time.
            founds: whether this member founded the cell, so that its first replica begins the log; counts
                the first time.
            mark: a file, for the mark that it is fit; `begin` makes it, in a folder that is there then.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY, HOME_DAMAGED. Then this node must not speak as a replica.
        """
        fresh = _new_row(world, member, incarnation, founds=founds)

        def write(connection: apsw.Connection) -> tuple[_Row, list[Any]]:
            found = _read(connection) or fresh
            row = replace(found, start=found.start + 1)
            if row.marked and row.unfit is None and _marked(world.disk, mark) != row.replica:
                row = replace(
                    row, unfit="an earlier start found that it is unfit, and a full disk took no more"
                )
            _write(connection, row)
            return row, connection.execute("SELECT replica, start, boot, proof FROM shown").fetchall()

        row, shown = await database.write(write)
        return cls(world, database, boot, row, {replica: Shown(*rest) for replica, *rest in shown}, key, mark)

    @property
    def replica_id(self) -> ReplicaId:
        """Who this replica is, until it is replaced."""
        return self._row.replica

    @property
    def start(self) -> int:
        """How often this home was opened; every message shows it."""
        return self._row.start

    @property
    def incarnation(self) -> Incarnation:
        """Of which incarnation this replica's log is."""
        return self._row.incarnation

    @property
    def founds(self) -> bool:
        """Whether this replica, while it has not begun, begins the cell's log as its only voter."""
        return self._row.founds

    @property
    def begun(self) -> bool:
        """Whether this replica has had a log: an empty one now is damage."""
        return self._row.begun

    @property
    def unfit(self) -> str | None:
        """Why this replica neither votes nor acknowledges; None: it may."""
        return self._unfit

    def shown(self, source: ReplicaId) -> Shown | None:
        """Return the highest start of another replica that is recorded."""
        return self._shown.get(source)

    def admits(self, source: ReplicaId, start: int, boot: bytes) -> bool | None:
        """Tell whether a message of this replica counts; None: `note` must record first what it shows."""
        shown = self._shown.get(source)
        if shown is None or start > shown.start:
            return None
        return (shown.start, shown.boot) == (start, boot)

    async def note(self, source: ReplicaId, start: int, boot: bytes, proof: bytes) -> bool:
        """Record durably what a replica shows and has proved, then tell whether its messages count.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY, HOME_DAMAGED; nothing was recorded: drop the message.
        """
        async with self._turn:
            verdict = self.admits(source, start, boot)
            if verdict is not None:
                return verdict
            others = [r for r in self._shown if r != source and member_of(r) == member_of(source)]
            surplus = others[: max(0, len(others) + 1 - MAX_REPLICAS_OF_A_MEMBER)]

            def write(connection: apsw.Connection) -> None:
                connection.executemany("DELETE FROM shown WHERE replica = ?", [(r,) for r in surplus])
                connection.execute("DELETE FROM shown WHERE replica = ?", (source,))
                connection.execute(
                    "INSERT INTO shown (replica, start, boot, proof) VALUES (?, ?, ?, ?)",
                    (source, start, boot, proof),
                )

            await self._database.write(write)
            for replica in (*surplus, source):
                self._shown.pop(replica, None)
            self._shown[source] = Shown(start, boot, proof)
            return True

    async def told(self, start: int, boot: bytes) -> bool:
        """Take in that this replica is refused, since it has shown, as it proved, (`start`, `boot`).

        Returns:
            Whether that makes it unfit: this home is an old copy. Otherwise the word is old.
        """
        if start < self.start or (start, boot) == (self.start, self.boot):
            return False
        await self.mark_unfit(
            f"this home was restored from an old copy: others have seen its start {start}, and this is "
            f"start {self.start}"
        )
        return True

    async def mark_unfit(self, why: str) -> None:
        """Never vote or acknowledge again as this replica: at once, and durably when this returns.

        Raises:
            KnodeError: the disk does not even remove a file. It holds as long as the process does: ask again.
                A disk that takes nothing lets no replica start, for `open` must raise its counter.
        """
        self._unfit = self._unfit or why
        if self._is_known_to_disk:
            return
        try:
            await self._change(lambda row: replace(row, unfit=row.unfit or why))
        except KnodeError:
            if not self._row.marked:
                raise
            await self._world.blocking.run(self._remove_mark)
        self._is_known_to_disk = True

    async def begin(self) -> None:
        """Note durably that this replica has a log, and is fit, before it first speaks. Raises as `note`."""
        if not self._row.marked:
            await self._world.blocking.run(partial(self._world.disk.write, self._mark, self.replica_id))
        await self._change(lambda row: replace(row, begun=True, marked=True))

    async def replace(self, incarnation: Incarnation) -> None:
        """Become another replica, which has nothing, of `incarnation`, durably.

        The log and the ledger of the old one are removed before: after a crash in between it is still
        unfit, or of an incarnation that is over. Raises as `note`.
        """
        fresh = _new_row(self._world, member_of(self.replica_id), incarnation, founds=False)
        await self._change(lambda row: replace(fresh, start=row.start))
        self._unfit, self._is_known_to_disk = None, False
        self.proof = self._prove()

    async def survive(self, incarnation: Incarnation) -> None:
        """Be of `incarnation` from now on, as the replica whose log it goes on with. Raises as `note`."""
        await self._change(lambda row: replace(row, incarnation=incarnation))

    def _remove_mark(self) -> None:
        self._world.disk.remove(self._mark)
        self._world.disk.sync_folder(self._mark.parent)

    def _prove(self) -> bytes:
        return Started(self.replica_id, self.start, self.boot).prove(self._key)

    async def _change(self, change: Callable[[_Row], _Row]) -> None:
        async with self._turn:
            row = change(self._row)
            await self._database.write(lambda connection: _write(connection, row))
            self._row = row


def _new_row(world: World, member: bytes, incarnation: Incarnation, *, founds: bool) -> _Row:
    assert len(member) == MEMBER_BYTES
    replica = member + world.randomness.token(RANDOM_BYTES)
    return _Row(replica, start=0, incarnation=incarnation, founds=founds, begun=False, unfit=None)


def _marked(disk: Disk, mark: Path) -> ReplicaId | None:
    """Return which replica is marked as fit."""
    if not disk.exists(mark):
        return None
    return disk.read(mark, limit_bytes=MEMBER_BYTES + RANDOM_BYTES)


def _read(connection: apsw.Connection) -> _Row | None:
    columns = "replica, start, incarnation_number, incarnation_hash, founds, begun, unfit, marked"
    for row in connection.execute(f"SELECT {columns} FROM standing"):
        replica, start, number, hash_, founds, begun, unfit, marked = row
        incarnation = Incarnation(number, hash_)
        return _Row(replica, start, incarnation, bool(founds), bool(begun), unfit, bool(marked))
    return None


def _write(connection: apsw.Connection, row: _Row) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO standing VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            row.replica,
            row.start,
            row.incarnation.number,
            row.incarnation.hash,
            row.founds,
            row.begun,
            row.unfit,
            row.marked,
        ),
    )
