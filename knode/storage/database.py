"""A SQLite database file: how it is opened, migrated, written and read."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import apsw
import trio

from knode.errors import Code, KnodeError, LocalError
from knode.world import Turns, World

T = TypeVar("T")
Synchronous = Literal["FULL", "NORMAL"]

BUSY_TIMEOUT_MS = 1_000
CACHE_KIB = 8 * 1024
CHECKPOINT_PAGES = 1_000
JOURNAL_LIMIT_BYTES = 16 * 1024 * 1024
VIEW_LOG_PAGES = 16 * 1024
"""64 MiB: so long the log grows while a view is open; then whoever writes waits for its end."""

# Exclusive locking comes before the journal mode: SQLite then needs no shared memory beside the file.
_SETUP = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = {synchronous};
PRAGMA foreign_keys = ON;
PRAGMA trusted_schema = OFF;
PRAGMA temp_store = MEMORY;
PRAGMA cache_size = -{cache_kib};
PRAGMA journal_size_limit = {journal_limit};
"""


class Database:
    """One SQLite file, held by this process alone.

    Transactions run one at a time, each as a blocking function in `World.blocking`, so the loop
    never waits for the disk. Make one with `open`.
    """

    def __init__(
        self,
        world: World,
        path: Path,
        connection: apsw.Connection,
        log: _WriteAheadLog,
        migrations: tuple[str, ...],
    ) -> None:
        self._world = world
        self._path = path
        self._migrations = migrations
        self._connection: apsw.Connection | None = connection
        self._write_ahead = log
        self._turn = Turns()
        self._view_turn = Turns()
        """Held while a view is open; taken before `_turn`."""
        self.waited_for_views = 0
        """How many writes have waited, since the log had grown too long while a view was open."""

    @classmethod
    async def open(
        cls,
        world: World,
        path: Path,
        migrations: Sequence[str],
        *,
        synchronous: Synchronous = "FULL",
        checkpoint_pages: int | None = None,
    ) -> Database:
        """Open or make the database, and bring its schema up to date.

        Args:
            world: its disk and its threads are used.
            path: the file; its folder is there already.
            migrations: SQL scripts. Script number n leads from schema version n to n + 1; each runs in
                a transaction of its own, and the version stands in `PRAGMA user_version`.
            synchronous: FULL: what `write` returned survives a power cut. NORMAL: it survives the end
                of the process, and a power cut takes whole transactions from the end.
            checkpoint_pages: length of the log, in pages of 4 KiB, beyond which a commit moves it into the
                file; None: CHECKPOINT_PAGES.

        Raises:
            KnodeError: LOCKED when another process has it open, HOME_TOO_NEW when a newer knode wrote
                it, HOME_DAMAGED, DISK_FULL, DISK_READ_ONLY.

        Cancelling leaves the file closed or open in the returned database, each migration whole or
        not begun.
        """

        log = _WriteAheadLog(CHECKPOINT_PAGES if checkpoint_pages is None else checkpoint_pages)

        def connect() -> apsw.Connection:
            if not world.disk.exists(path):
                # SQLite would make it readable for all; its journal takes the mode of the file
                world.disk.write(path, b"")
            return _connect(path, world.disk.sqlite_vfs, tuple(migrations), synchronous, log)

        return cls(world, path, await world.blocking.run(connect), log, tuple(migrations))

    async def write(self, work: Callable[[apsw.Connection], T]) -> T:
        """Run `work` in one transaction and return its result, once it is durable.

        `work` runs outside the loop: it touches nothing but the connection and its own values. When it
        raises, the transaction is rolled back and the error goes on to the caller.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY, HOME_DAMAGED; nothing was written.
            trio.ClosedResourceError: the database is closed.

        Cancelling before the transaction begins leaves nothing; after that the call ends as if it were
        not cancelled.
        """
        if self._write_ahead.is_kept and self._write_ahead.pages >= VIEW_LOG_PAGES:
            self.waited_for_views += 1
            async with self._view_turn:
                pass
        return await self._run(_transact, work)

    async def read(self, work: Callable[[apsw.Connection], T]) -> T:
        """Run `work`, which sees one state of the database and must not change it; return its result.

        Raises:
            KnodeError: HOME_DAMAGED.
            RuntimeError: `work` tried to write; nothing was written.
            trio.ClosedResourceError: the database is closed.
        """
        return await self._run(_look, work)

    async def sync(self) -> None:
        """Make every transaction so far survive a power cut, where `synchronous` is NORMAL.

        SQLite's checkpoint does it: it syncs the log, moves all of it into the file, and syncs that. So it
        waits while a view is open.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY, HOME_DAMAGED; asking again can help.
            trio.ClosedResourceError: the database is closed.
        """
        async with self._view_turn:
            await self._run(_look, _checkpoint_all)

    @contextlib.asynccontextmanager
    async def view(self) -> AsyncIterator[View]:
        """Open a second connection, that sees the state of this moment while others write.

        The file of a database changes only when the log is moved into it. So all of the log is moved, and
        then none until the view is closed: who reads the file alone sees that state, without any lock. One
        view is open at a time; who wants another waits.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY, HOME_DAMAGED.
            trio.ClosedResourceError: the database is closed.
        """
        async with self._view_turn:
            await self._run(_look, self._write_ahead.keep)
            try:
                with _named_errors(self._path):
                    connection = await self._world.blocking.run(
                        partial(_connect_to_view, self._path, self._world.disk.sqlite_vfs)
                    )
                try:
                    yield View(self._world, self._path, connection)
                finally:
                    with trio.CancelScope(shield=True):
                        await self._world.blocking.run(connection.close)
            finally:
                self._write_ahead.is_kept = False

    async def aclose(self) -> None:
        """Wait for the transaction that runs, then close the file; twice is no error.

        When the disk is full or fails, the log stays beside the file, and the next opening reads it.
        """
        with trio.CancelScope(shield=True):
            async with self._view_turn, self._turn:
                connection, self._connection = self._connection, None
                if connection is not None:
                    await self._world.blocking.run(partial(_close, connection))

    async def _run(
        self,
        run: Callable[[apsw.Connection, Callable[[apsw.Connection], T]], T],
        work: Callable[[apsw.Connection], T],
    ) -> T:
        async with self._turn:
            if self._connection is None:
                raise trio.ClosedResourceError(f"{self._path} is closed")
            with _named_errors(self._path):
                try:
                    return await self._world.blocking.run(partial(run, self._connection, work))
                except apsw.SQLError:
                    check = partial(_check_schema, self._connection, self._migrations)
                    await self._world.blocking.run(check)
                    raise


class View:
    """One state of a database, open to be read; by one reader at a time."""

    def __init__(self, world: World, path: Path, connection: apsw.Connection) -> None:
        self._world = world
        self._path = path
        self.connection = connection
        """For what `read` runs."""

    async def read(self, work: Callable[[], T]) -> T:
        """Run `work`, which uses `connection`, outside the loop; return its result.

        Raises:
            KnodeError: HOME_DAMAGED; and what `work` raises.
        """
        with _named_errors(self._path):
            return await self._world.blocking.run(work)


@dataclass
class _WriteAheadLog:
    """How long the log is, and whether it may be moved into the file; used by whoever has the turn."""

    most_pages: int
    pages: int = 0
    """After the latest commit."""
    is_kept: bool = False
    """A view is open."""

    def committed(self, connection: apsw.Connection, name: str, pages: int) -> int:
        """Move the log into the file when it is long, after a commit.

        The commit stands whatever happens here, so it must not be reported as failed: the next commit
        tries again, and says it when the disk does not take that.
        """
        self.pages = pages
        if pages >= self.most_pages and not self.is_kept:
            with contextlib.suppress(apsw.Error):
                connection.wal_checkpoint(name)
        return apsw.SQLITE_OK

    def keep(self, connection: apsw.Connection) -> None:
        """Move all of it into the file, and from now on nothing."""
        _checkpoint_all(connection)
        self.pages, self.is_kept = 0, True


def _transact(connection: apsw.Connection, work: Callable[[apsw.Connection], T]) -> T:
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        # Some errors make SQLite roll back by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def _look(connection: apsw.Connection, work: Callable[[apsw.Connection], T]) -> T:
    connection.execute("PRAGMA query_only = ON")
    try:
        return work(connection)
    except apsw.ReadOnlyError as error:
        raise RuntimeError("a read tried to write") from error
    finally:
        connection.execute("PRAGMA query_only = OFF")


def _connect(
    path: Path, vfs: str | None, migrations: tuple[str, ...], synchronous: str, log: _WriteAheadLog
) -> apsw.Connection:
    with _named_errors(path):
        connection = apsw.Connection(str(path), vfs=vfs)
        try:
            connection.set_busy_timeout(BUSY_TIMEOUT_MS)
            setup = _SETUP.format(
                synchronous=synchronous, cache_kib=CACHE_KIB, journal_limit=JOURNAL_LIMIT_BYTES
            )
            _execute_all(connection, setup)
            connection.set_wal_hook(log.committed)
            _migrate(connection, path, migrations)
        except BaseException:
            _close(connection)
            raise
    return connection


def _connect_to_view(path: Path, vfs: str | None) -> apsw.Connection:
    # Of an immutable file SQLite takes no lock, and does not look at its log.
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    return apsw.Connection(f"{path.as_uri()}?immutable=1", flags=flags, vfs=vfs)


def _close(connection: apsw.Connection) -> None:
    # What is durable stays so; only the last checkpoint can fail here.
    with contextlib.suppress(apsw.FullError, apsw.ReadOnlyError, apsw.CantOpenError, apsw.IOError):
        connection.close()


def _checkpoint_all(connection: apsw.Connection) -> None:
    pages, moved = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    # A view takes no lock, so no other connection can hold it back.
    assert pages == moved, "a checkpoint that left something in the log"


def _migrate(connection: apsw.Connection, path: Path, migrations: tuple[str, ...]) -> None:
    version = connection.pragma("user_version")
    if version > len(migrations):
        raise KnodeError(
            Code.HOME_TOO_NEW,
            f"{path} has schema version {version}, and this knode knows versions up to {len(migrations)}",
            "install the newer knode that wrote it, or choose another folder with --home",
        )
    for number in range(version, len(migrations)):
        _transact(connection, partial(_migrate_once, script=migrations[number], version=number + 1))


def _execute_all(connection: apsw.Connection, script: str) -> None:
    # A cursor stops at the first row, and many a pragma gives one.
    connection.execute(script).fetchall()


def _migrate_once(connection: apsw.Connection, *, script: str, version: int) -> None:
    _execute_all(connection, script)
    connection.execute(f"PRAGMA user_version = {version}")


def _check_schema(connection: apsw.Connection, migrations: tuple[str, ...]) -> None:
    """Raise CorruptError when the tables are not as the migrations made them: what is wrong with a statement
    then is not the statement."""
    query = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name"
    made = apsw.Connection(":memory:")
    try:
        for script in migrations:
            _execute_all(made, script)
        if made.execute(query).fetchall() != connection.execute(query).fetchall():
            raise apsw.CorruptError("its tables are not as they were made")
    finally:
        made.close()


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors of disk and file into those of the table; others are faults and pass."""
    try:
        yield
    except apsw.FullError as error:
        raise LocalError(
            Code.DISK_FULL, f"no space left for {path}", "free some space, then run the command again"
        ) from error
    except (apsw.ReadOnlyError, apsw.PermissionsError, apsw.CantOpenError) as error:
        raise LocalError(
            Code.DISK_READ_ONLY,
            f"{path} cannot be opened or written ({error})",
            "check its owner, its permissions and its folder",
        ) from error
    except (apsw.CorruptError, apsw.NotADBError, apsw.IOError) as error:
        raise LocalError(
            Code.HOME_DAMAGED,
            f"{path} is damaged or its disk fails ({error})",
            "check the disk, move the file aside, then restore it from a backup",
        ) from error
    except (apsw.BusyError, apsw.LockedError) as error:
        raise LocalError(
            Code.LOCKED, f"another process has {path} open", "stop it with 'knode down', then try again"
        ) from error
