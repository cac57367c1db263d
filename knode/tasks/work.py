"""The attempts that a node has accepted, on its disk: `state/work.db`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import apsw
import trio

from knode.errors import Code, KnodeError
from knode.klp.codec import Decoder, encode
from knode.storage import Database
from knode.tasks.commands import Fence
from knode.tasks.messages import AssignAttempt, CompleteAttempt, FailAttempt
from knode.world import Log, Turns, World

MIGRATIONS = (
    """
    CREATE TABLE attempt (
        number INTEGER PRIMARY KEY,
        fence BLOB NOT NULL UNIQUE,
        request BLOB NOT NULL,
        completion BLOB,
        failure BLOB
    ) STRICT;
    """,
)

Outcome: TypeAlias = CompleteAttempt | FailAttempt
"""How an attempt ended, as the leader is told."""

_request: Decoder[AssignAttempt] = Decoder(AssignAttempt)
_completion: Decoder[CompleteAttempt] = Decoder(CompleteAttempt)
_failure: Decoder[FailAttempt] = Decoder(FailAttempt)


@dataclass(eq=False, slots=True)
class _Change:
    """One statement, and what came of it."""

    sql: str
    values: tuple[bytes | None, ...]
    is_done: bool = False
    error: Exception | None = None


class Work:
    """What a node must know of its attempts when it starts again. Make one with `open`.

    It survives the process, not a power cut: what is lost then, the leader repeats. So a damaged file is
    removed and begun anew.

    Whoever writes at the same time shares one transaction.
    """

    def __init__(self, world: World, path: Path, database: Database, log: Log) -> None:
        self._world = world
        self._path = path
        self._database = database
        self._log = log
        self._turn = Turns()
        self._waiting: list[_Change] = []
        self._forgotten: dict[bytes, None] = {}

    @classmethod
    async def open(cls, world: World, path: Path, log: Log) -> Work:
        """Open or make the file; the errors are those of `Database.open`, but for a damaged one's."""
        try:
            database = await _open(world, path)
        except KnodeError as error:
            if error.code is not Code.HOME_DAMAGED:
                raise
            database = await _open_anew(world, path, log, error)
        return cls(world, path, database, log)

    async def load(self) -> list[tuple[AssignAttempt, Outcome | None]]:
        """Return what was accepted and not forgotten, in that order, each with its outcome.

        Raises:
            KnodeError: HOME_DAMAGED when not even a new file can be made; DISK_FULL, DISK_READ_ONLY.
        """

        def read(connection: apsw.Connection) -> list[tuple[bytes, bytes | None, bytes | None]]:
            rows = connection.execute("SELECT request, completion, failure FROM attempt ORDER BY number")
            return list(rows)

        try:
            return [
                (_request.decode(request), _outcome(completion, failure))
                for request, completion, failure in await self._database.read(read)
            ]
        except KnodeError as error:
            if error.code not in (Code.HOME_DAMAGED, Code.BAD_FRAME, Code.NON_CANONICAL):
                raise
            await self._database.aclose()
            self._database = await _open_anew(self._world, self._path, self._log, error)
            return []

    async def accept(self, request: AssignAttempt) -> None:
        """Keep an attempt. Not cancelled.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY, HOME_DAMAGED: it is not kept.
        """
        sql = "INSERT INTO attempt (fence, request) VALUES (?, ?)"
        await self._write(_Change(sql, (encode(request.fence), encode(request))))

    async def end(self, outcome: Outcome) -> None:
        """Keep an attempt's outcome in place of what was kept before. Not cancelled; raises as `accept`."""
        encoded = encode(outcome)
        pair = (encoded, None) if isinstance(outcome, CompleteAttempt) else (None, encoded)
        sql = "UPDATE attempt SET completion = ?, failure = ? WHERE fence = ?"
        await self._write(_Change(sql, (*pair, encode(outcome.fence))))

    def forget(self, fence: Fence) -> None:
        """Forget an attempt with the next thing that is written; until then a new start finds it again."""
        self._forgotten[encode(fence)] = None

    async def flush(self) -> None:
        """Write what `forget` left; raises as `accept`, and tries again the next time."""
        if self._forgotten:
            await self._write(None)

    async def aclose(self) -> None:
        """Close the file."""
        await self._database.aclose()

    async def _write(self, change: _Change | None) -> None:
        if change is not None:
            self._waiting.append(change)
        # Whoever has the turn writes for all who wait, so that work under load comes in few transactions.
        with trio.CancelScope(shield=True):
            async with self._turn:
                if change is None or not change.is_done:
                    await self._write_all()
        if change is not None and change.error is not None:
            raise change.error

    async def _write_all(self) -> None:
        """Write all that waits in one transaction; each change is told whether that was done."""
        changes, self._waiting = self._waiting, []
        forgotten = list(self._forgotten)

        def work(connection: apsw.Connection) -> None:
            connection.executemany("DELETE FROM attempt WHERE fence = ?", [(fence,) for fence in forgotten])
            for change in changes:
                connection.execute(change.sql, change.values)

        failed: Exception | None = None
        try:
            await self._database.write(work)
        except Exception as error:
            failed = error
        for change in changes:
            change.is_done, change.error = True, failed
        if failed is None:
            for fence in forgotten:
                del self._forgotten[fence]
        elif not changes:
            raise failed


async def _open(world: World, path: Path) -> Database:
    return await Database.open(world, path, MIGRATIONS, synchronous="NORMAL")


async def _open_anew(world: World, path: Path, log: Log, why: KnodeError) -> Database:
    log.warning("accepted attempts are lost, the leader will repeat them", path=str(path), why=why.message)
    for suffix in ("", "-wal", "-journal"):
        await world.blocking.run(partial(world.disk.remove, path.with_name(path.name + suffix)))
    return await _open(world, path)


def _outcome(completion: bytes | None, failure: bytes | None) -> Outcome | None:
    if completion is not None:
        return _completion.decode(completion)
    return None if failure is None else _failure.decode(failure)
