"""The ledger on disk: applies what was committed, and says what stands there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import apsw
import trio

from knode.consensus.messages import Entry, Index
from knode.errors import Code, KnodeError
from knode.storage import Database
from knode.tasks import dump, tables
from knode.tasks.applying import Fault, Met, apply_all, apply_each
from knode.tasks.commands import decode_command
from knode.tasks.lifecycle import State
from knode.tasks.records import Change, LedgerTask, Operations, Outcome, TaskRecord, Totals
from knode.tasks.tables import MIGRATIONS, Held
from knode.world import Log, SilentLog, World

Outcomes: TypeAlias = list[Outcome | None]
"""Of one batch, an entry each; None of an entry that holds no command."""

MAX_LISTED = 1_000
MAX_LISTED_BYTES = 4 * 1024 * 1024
MAX_OPERATIONS_READ = 1_000
CHECKPOINT_PAGES = 4_000
"""16 MiB of SQLite's log. Moving it into the file takes two syncs, during which nothing is applied."""


class LedgerStore:
    """The cell's ledger; a `knode.consensus.state_machine.StateMachine`. Make one with `open`.

    Derived from the Raft log, so a power cut may take its last transactions, state and applied index
    together: the log is kept until `sync` says how far the ledger itself is durable.

    `live`, `totals` and what follows from them are of the last batch that was committed; they change
    between two steps of the loop only.
    """

    def __init__(self, world: World, path: Path, database: Database, held: Held, log: Log) -> None:
        self.faults = 0
        """How many commands met a fault of knode itself since this process began."""
        self._world = world
        self._path = path
        self._database = database
        self._held = held
        self._log = log
        self._logged: set[str] = set()
        """Kinds of command of which a fault was logged."""
        self._seen_at = world.clock.monotonic()
        """When the ledger's time was last put forward here."""
        self.wall: Callable[[], int] = world.clock.wall
        """What counts for the time of day here; `knode.consensus.clocks` holds back what is far ahead."""
        self.on_change: list[Callable[[Sequence[Change]], None]] = []
        """Called after each batch with what it changed, in order; must not raise. After `restore` and
        `clear`: with the tasks that had not ended before or have not ended now."""

    @classmethod
    async def open(cls, world: World, path: Path, log: Log | None = None) -> LedgerStore:
        """Open or make the ledger.

        Raises:
            KnodeError: as `Database.open`.
        """
        database = await Database.open(
            world, path, MIGRATIONS, synchronous="NORMAL", checkpoint_pages=CHECKPOINT_PAGES
        )
        try:
            return cls(world, path, database, await database.read(Held.load), log or SilentLog())
        except BaseException:
            await database.aclose()
            raise

    @classmethod
    async def open_anew(cls, world: World, path: Path, log: Log | None = None) -> LedgerStore:
        """Remove what is there, and open an empty ledger. Raises as `open`."""
        for suffix in ("", "-wal", "-journal"):
            await world.blocking.run(partial(world.disk.remove, path.with_name(path.name + suffix)))
        return await cls.open(world, path, log)

    async def aclose(self) -> None:
        """Close the file; twice is no error."""
        await self._database.aclose()

    # What stands there.

    @property
    def applied(self) -> Index:
        """Index of the last entry that is in it."""
        return self._held.totals.applied

    @property
    def totals(self) -> Totals:
        """Where the ledger stands; not to be changed."""
        return self._held.totals

    @property
    def incarnation(self) -> bytes:
        """Hash of the cell's incarnation; 32 zero bytes before the first began."""
        return self._held.totals.incarnation

    @property
    def now(self) -> int:
        """The ledger's time: the greatest that any entry had, milliseconds."""
        return self._held.totals.now

    def time(self) -> int:
        """Return the time that a command proposed now should carry, milliseconds.

        That of `wall`, but never before the ledger's; and where an earlier leader's clock was ahead, the
        ledger's time goes on from there instead of standing still, so that waits and deadlines still pass.
        """
        since_ms = int((self._world.clock.monotonic() - self._seen_at) * 1000)
        return max(self.wall(), self.now + since_ms)

    @property
    def level(self) -> int:
        """The feature level of the cell."""
        return self._held.totals.level

    @property
    def live(self) -> Mapping[bytes, LedgerTask]:
        """Every task that has not ended, by id, in order of submission."""
        return self._held.live

    @property
    def counts(self) -> dict[State, int]:
        """How many tasks are kept in each state."""
        totals = self._held.totals
        counts = dict.fromkeys((State.QUEUED, State.ASSIGNED), 0)
        for task in self._held.live.values():
            counts[task.state] += 1
        return counts | {
            State.SUCCEEDED: totals.succeeded,
            State.FAILED: totals.failed,
            State.CANCELLED: totals.cancelled,
            State.EXPIRED: totals.expired,
        }

    async def task(self, id: bytes) -> TaskRecord | None:
        """Return a task with what was asked for or what came of it; None when it is not kept."""
        return await self._database.read(lambda connection: tables.read_task(connection, id))

    async def tasks(self, ids: Sequence[bytes], *, most_bytes: int) -> Sequence[TaskRecord | None]:
        """Return these tasks as `task` does, in their order; it ends before their results are over
        `most_bytes`, but for the first task's."""
        return await self._database.read(partial(tables.read_tasks_of, ids=ids, most_bytes=most_bytes))

    async def find(self, prefix: str) -> TaskRecord:
        """Return the task whose id in hexadecimal begins with `prefix`.

        Raises:
            KnodeError: NOT_FOUND, or INVALID_ARGUMENT when several do.
        """

        def find(connection: apsw.Connection) -> TaskRecord | None:
            ids = _ids_with(connection, prefix)
            if len(ids) > 1:
                raise KnodeError(
                    Code.INVALID_ARGUMENT, f"{prefix!r} fits several tasks", "give more of the id"
                )
            return tables.read_task(connection, ids[0]) if ids else None

        found = await self._database.read(find)
        if found is None:
            raise KnodeError(
                Code.NOT_FOUND,
                f"the cell has no task {prefix[:64]!r}",
                "'knode task list' shows those that it keeps",
            )
        return found

    async def list(
        self, limit: int, *, before: int | None = None, most_bytes: int = MAX_LISTED_BYTES
    ) -> list[TaskRecord]:
        """Return the newest tasks, newest first, without what was asked for and who was considered.

        Args:
            limit: at most MAX_LISTED.
            before: only tasks with a smaller `number`: where the list before ended.
            most_bytes: of results together, but for the first task's; the list ends before it is over.
        """
        return await self._database.read(
            partial(
                tables.read_tasks,
                before=2**62 if before is None else before,
                limit=min(limit, MAX_LISTED),
                most_bytes=most_bytes,
            )
        )

    async def operations(
        self,
        after: int = 0,
        limit: int = MAX_OPERATIONS_READ,
        *,
        task: bytes | None = None,
        most_bytes: int = MAX_LISTED_BYTES,
    ) -> Operations:
        """Return operations of all incarnations in their order, or those of one task.

        Args:
            after: `place` of the last one of the page before; 0: from the first on.
            limit: at most MAX_OPERATIONS_READ.
            task: whose alone.
            most_bytes: of their data, but for the first's; the page ends before it is over.
        """
        most = min(limit, MAX_OPERATIONS_READ)
        return await self._database.read(
            partial(tables.read_operations, after=after, limit=most, most_bytes=most_bytes, task=task)
        )

    async def has_operations_before(self, time: int) -> bool:
        """Tell whether there are operations older than this time of the ledger."""
        return await self._database.read(partial(tables.is_operation_before, time=time))

    # The state machine.

    async def apply(self, entries: Sequence[Entry]) -> Outcomes:
        """Apply committed entries in one transaction; see `StateMachine.apply`, `knode.tasks.applying`.

        Raises:
            KnodeError: HOME_TOO_NEW for a command of a newer version, DISK_FULL, DISK_READ_ONLY,
                HOME_DAMAGED: nothing was applied.

        Cancelled before the transaction begins, nothing was applied; after that it is applied and seen.
        """
        try:
            work = partial(apply_all, held=self._held, entries=entries)
            batch, outcomes, faults = await self._database.write(work)
        except Fault:
            work = partial(apply_each, held=self._held, entries=entries)
            batch, outcomes, faults = await self._database.write(work)
        before = self.now
        batch.publish()
        self._note(faults)
        if self.now > before:
            self._seen_at = self._world.clock.monotonic()
        self._tell(batch.changes)
        return outcomes

    def _note(self, faults: Sequence[Met]) -> None:
        for entry, cause in faults:
            self.faults += 1
            kind = type(decode_command(entry.data)).__name__
            if kind not in self._logged:  # whoever can cause one can cause many
                self._logged.add(kind)
                self._log.error(
                    "a command met a fault of knode itself", command=kind, index=entry.index, exc_info=cause
                )

    async def sync(self) -> Index:
        """Make all that is applied survive a power cut; return its index. Waits for a dump to end."""
        applied = self.applied
        await self._database.sync()
        return applied

    async def dump(self, path: Path) -> Index:
        """Write the whole ledger of this moment to a new file, synced; return its index.

        Entries are applied meanwhile.

        Raises:
            KnodeError: DISK_FULL and the like; then there is no file.

        Cancelling leaves no file.
        """
        run = self._world.blocking.run
        async with self._database.view() as view:
            try:
                with await run(partial(self._world.disk.create, path)) as file:
                    chunks = dump.chunks_of(view.connection)
                    while (chunk := await view.read(partial(next, chunks, None))) is not None:
                        await run(partial(file.write, chunk))
                    await run(file.sync)
                return (await view.read(partial(tables.read_totals, view.connection))).applied
            except BaseException:
                with trio.CancelScope(shield=True):
                    await run(partial(self._world.disk.remove, path))
                raise

    async def restore(self, path: Path) -> Index:
        """Replace the ledger by that of a file, durably; return its index.

        Raises:
            KnodeError: BAD_FRAME for a file that is no whole dump, HOME_TOO_NEW, NOT_FOUND, DISK_FULL and
                the like: nothing has changed.
        """

        await self._replace(lambda connection: dump.read_dump(connection, self._world.disk, path))
        return await self.sync()

    async def clear(self) -> None:
        """Forget everything, durably, as if nothing had ever been applied; a damaged file too.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY; HOME_DAMAGED when not even a new file can be made.
        """
        try:
            await self._replace(dump.read_nothing)
            await self.sync()
        except KnodeError as error:
            if error.code is not Code.HOME_DAMAGED:
                raise
            await self._database.aclose()
            before, fresh = self._held, await self.open_anew(self._world, self._path, self._log)
            self._database, self._held = fresh._database, fresh._held
            self._tell([Change(id, task.state, None) for id, task in before.live.items()])

    async def _replace(self, write: Callable[[apsw.Connection], None]) -> None:
        """Replace all rows, and tell what became of the tasks that had not ended."""

        def take(connection: apsw.Connection) -> Held:
            write(connection)
            return Held.load(connection)

        before, self._held = self._held, await self._database.write(take)
        self._tell(
            [
                Change(id, task.state if (task := before.live.get(id)) else None, self._held.live.get(id))
                for id in dict.fromkeys((*before.live, *self._held.live))
            ]
        )

    def _tell(self, changes: Sequence[Change]) -> None:
        if changes:
            for listener in self.on_change:
                listener(changes)


def _ids_with(connection: apsw.Connection, prefix: str) -> list[bytes]:
    try:
        low, high = bytes.fromhex(prefix.ljust(32, "0")), bytes.fromhex(prefix.ljust(32, "f"))
    except ValueError:
        return []
    if not prefix or len(low) != 16:
        return []
    return tables.read_ids(connection, low, high, 2)
