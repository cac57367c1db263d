"""What a member was asked to submit while no quorum could commit it: durable here until its fate is known.

A submit that is kept here may already stand in the cell's log: nobody here can know. So it is never changed
and never given up early; it is submitted again with the same id, key and `not_after` until the cell commits
or refuses it, or until `not_after` has passed, after which no leader takes it any more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import apsw
import trio

from knode.errors import Code, KnodeError
from knode.klp.codec import Decoder, encode
from knode.storage import Database
from knode.tasks.commands import task_digest
from knode.tasks.messages import SubmitTask
from knode.world import Log, World

MAX_PENDING = 1000
MAX_PENDING_BYTES = 32 * 1024 * 1024
MAX_ENDED = 100
"""Submits that were refused or came too late are shown for a day after their `not_after`; so many at most."""
ENDED_SHOWN_MS = 24 * 3_600_000
MAX_SETTLED = 1000
"""What was pending under one id and is a task with another: the last so many are remembered."""
AT_ONCE = 16
MAX_MESSAGE = 1024
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 3.0

MIGRATIONS = (
    """
CREATE TABLE outbox (
    turn INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE,
    request BLOB NOT NULL,
    submitted INTEGER NOT NULL, -- wall time, milliseconds
    is_cancelled INTEGER NOT NULL, -- whether it is to be cancelled once it is committed
    code TEXT NOT NULL, -- why it ended here; empty: it is pending
    message TEXT NOT NULL
);
""",
    """
CREATE TABLE outbox_settled (
    turn INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE, -- under which it was pending
    task BLOB NOT NULL, -- which it turned out to be
    not_after INTEGER NOT NULL
);
""",
)

Submit = Callable[[SubmitTask, bool], Awaitable[bytes]]
"""Submits once more, and then cancels when told so; returns the task's id when the cell knows it. That is
another one when the cell knew the key already, by a submit whose answer was lost.

A KnodeError that is retryable, and UNKNOWN, leave it pending; any other is the cell's refusal.
NO_ELIGIBLE_NODE does not end what was accepted: the node that can may come back."""

_request: Decoder[SubmitTask] = Decoder(SubmitTask)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A submit that is kept, without its input."""

    id: bytes
    agent: str
    key: str
    on: bytes
    digest: bytes
    """Of what was asked for: the same key must come with the same."""
    not_after: int
    submitted: int
    size_bytes: int
    """Encoded."""
    is_cancelled: bool = False
    code: str = ""
    message: str = ""

    is_pending: bool = True
    """Whether its fate is not known yet; then `code` says what it met last."""


class Outbox:
    """The submits of this node whose fate is not known, and the last that ended without a task."""

    def __init__(self, world: World, database: Database, log: Log) -> None:
        self.changed: list[Callable[[bytes], None]] = []
        """Called with the id of whatever came, ended or went; must not raise."""
        self._world = world
        self._database = database
        self._log = log
        self._rows: dict[bytes, Waiting] = {}
        self._settled: dict[bytes, tuple[bytes, int]] = {}
        """By the id under which it was pending: the task that it is, and until when that is remembered."""
        self._woken = trio.Event()
        self._turn = trio.Lock()

    async def load(self) -> None:
        """Read what earlier runs of the node left."""

        def read_settled(connection: apsw.Connection) -> dict[bytes, tuple[bytes, int]]:
            query = "SELECT id, task, not_after FROM outbox_settled ORDER BY turn"
            return {id: (task, not_after) for id, task, not_after in connection.execute(query)}

        def read(connection: apsw.Connection) -> list[Waiting]:
            query = "SELECT request, submitted, is_cancelled, code, message FROM outbox ORDER BY turn"
            return [
                replace(
                    _waiting(_request.decode(request), submitted),
                    is_cancelled=bool(is_cancelled),
                    is_pending=not code,
                    code=code,
                    message=message,
                )
                for request, submitted, is_cancelled, code, message in connection.execute(query)
            ]

        self._rows = {row.id: row for row in await self._database.read(read)}
        self._settled = await self._database.read(read_settled)

    def rows(self) -> list[Waiting]:
        """Return what is kept, newest first."""
        return list(reversed(self._rows.values()))

    def get(self, task: bytes) -> Waiting | None:
        """Return the submit with this id."""
        return self._rows.get(task)

    def task_of(self, id: bytes) -> bytes:
        """Return the id of the task that was pending here under `id`: as a rule the same.

        Another one, for as long as the key lives, when the cell knew the key already.
        """
        task, _ = self._settled.get(id, (id, 0))
        return task

    def settled_as(self, selector: str) -> frozenset[bytes]:
        """Return the tasks with another id that were pending here under one that begins with `selector`."""
        return frozenset(task for id, (task, _) in self._settled.items() if id.hex().startswith(selector))

    def with_key(self, key: str) -> Waiting | None:
        """Return the pending submit with this key."""
        return next((row for row in self._rows.values() if row.key == key and row.is_pending), None)

    async def keep(self, request: SubmitTask, why: KnodeError | None = None) -> Waiting:
        """Keep a submit durably, and go on trying; one with the same key that is kept already stays.

        Args:
            request: one with files that names no holders was never submitted.
            why: what it met, when that is not the want of a quorum.

        Raises:
            KnodeError: RATE_LIMITED when it is full, DISK_FULL, DISK_READ_ONLY; then it is not kept.
        """
        async with self._turn:
            known = self.with_key(request.key)
            if known is not None:
                return known
            row = _waiting(request, self._world.clock.wall())
            if why is not None:
                row = replace(row, code=why.code.value, message=why.message[:MAX_MESSAGE])
            self._check_room(row)
            data = encode(request)
            await self._database.write(
                lambda connection: connection.execute(
                    "INSERT INTO outbox (id, request, submitted, is_cancelled, code, message) "
                    "VALUES (?, ?, ?, 0, '', '')",
                    (row.id, data, row.submitted),
                )
            )
            self._rows[row.id] = row
        self._tell(row.id)
        return row

    def _check_room(self, row: Waiting) -> None:
        pending = [row for row in self._rows.values() if row.is_pending]
        size = sum(each.size_bytes for each in pending) + row.size_bytes
        if len(pending) >= MAX_PENDING or size > MAX_PENDING_BYTES:
            raise KnodeError(
                Code.RATE_LIMITED,
                f"{len(pending)} tasks wait on this node for the cell's voters already",
                "'knode status' says which voters are missing",
            )

    async def change_holders(self, request: SubmitTask) -> None:
        """Keep who holds the files of a submit now; that is no part of what is asked for."""
        data = encode(request)
        await self._database.write(
            lambda connection: connection.execute(
                "UPDATE outbox SET request = ? WHERE id = ?", (data, request.id)
            )
        )

    async def cancel(self, task: bytes) -> None:
        """Have a pending submit cancelled as soon as it is committed."""
        await self._database.write(
            lambda connection: connection.execute("UPDATE outbox SET is_cancelled = 1 WHERE id = ?", (task,))
        )
        if task in self._rows:
            self._rows[task] = replace(self._rows[task], is_cancelled=True)
            self._tell(task)

    def wake(self) -> None:
        """Try again now: there is a leader."""
        self._woken.set()

    async def run(self, submit: Submit) -> None:
        """Submit what is pending again and again, until cancelled."""
        pause_s = FIRST_PAUSE_S
        while True:
            woken = self._woken = trio.Event()
            await self._forget_old()
            pending = [row for row in self._rows.values() if row.is_pending]
            for start in range(0, len(pending), AT_ONCE):
                async with trio.open_nursery() as nursery:
                    for row in pending[start : start + AT_ONCE]:
                        nursery.start_soon(self._try, row, submit)
            if not any(row.is_pending for row in self._rows.values()):
                pause_s = FIRST_PAUSE_S
                await woken.wait()
                continue
            with trio.move_on_after(pause_s * self._world.randomness.uniform(0.75, 1.25)):
                await woken.wait()
            pause_s = FIRST_PAUSE_S if woken.is_set() else min(2 * pause_s, LONGEST_PAUSE_S)

    async def _try(self, row: Waiting, submit: Submit) -> None:
        try:
            if self._world.clock.wall() > row.not_after:
                why = "no quorum of voters was there until its key expired"
                await self._end(row, Code.EXPIRED, f"{why}; it may still have been done just before")
                return
            request = await self.read(row.id)
            try:
                is_cancelled = self._rows[row.id].is_cancelled
                task = await submit(request, is_cancelled)
            except KnodeError as error:
                if not error.retryable and error.code is not Code.UNKNOWN:
                    await self._end(row, error.code, str(error))
                else:
                    self._rows[row.id] = replace(
                        self._rows[row.id], code=error.code.value, message=str(error)[:MAX_MESSAGE]
                    )
                return
            await self._settle(row, task, is_cancelled)
        except KnodeError as error:  # of the disk: it is as it was
            self._log.warning("the outbox cannot be written", task=row.id.hex(), why=str(error))

    async def read(self, task: bytes) -> SubmitTask:
        """Return a submit that is kept, with its input; NOT_FOUND when it is not any more."""

        def read(connection: apsw.Connection) -> Any:
            return connection.execute("SELECT request FROM outbox WHERE id = ?", (task,)).fetchall()

        for (request,) in await self._database.read(read):
            return _request.decode(request)
        raise KnodeError(Code.NOT_FOUND, "the submit is not kept any more")

    async def _end(self, row: Waiting, code: Code, message: str) -> None:
        message = message[:MAX_MESSAGE]
        await self._database.write(
            lambda connection: connection.execute(
                "UPDATE outbox SET code = ?, message = ? WHERE id = ?", (code.value, message, row.id)
            )
        )
        self._rows[row.id] = replace(self._rows[row.id], is_pending=False, code=code.value, message=message)
        self._log.warning("a pending task was not taken", task=row.id.hex(), code=code, why=message)
        self._tell(row.id)

    async def _settle(self, row: Waiting, task: bytes, is_cancelled: bool) -> None:
        """Let go of what the cell knows; what it knows by another id stays findable by this one.

        What was to be cancelled only meanwhile stays, to be submitted and cancelled in the next round.
        """

        def settle(connection: apsw.Connection) -> bool:
            connection.execute(
                "DELETE FROM outbox WHERE id = ? AND is_cancelled = ?", (row.id, int(is_cancelled))
            )
            is_gone = connection.changes() > 0
            if is_gone and task != row.id:
                connection.execute(
                    "INSERT INTO outbox_settled (id, task, not_after) VALUES (?, ?, ?)",
                    (row.id, task, row.not_after),
                )
            return is_gone

        if await self._database.write(settle):
            if task != row.id:
                self._settled[row.id] = task, row.not_after
            del self._rows[row.id]
            self._tell(row.id)

    async def _forget_old(self) -> None:
        """Forget what has ended and whose time is over, or of which there is too much."""
        now = self._world.clock.wall()
        ended = [row for row in self._rows.values() if not row.is_pending]
        surplus = ended[: max(0, len(ended) - MAX_ENDED)]
        old = [row for row in ended if now > row.not_after + ENDED_SHOWN_MS]
        try:
            await self._remove([row.id for row in {row.id: row for row in [*surplus, *old]}.values()])
            await self._forget_settled(now)
        except KnodeError as error:
            self._log.warning("the outbox cannot be written", why=str(error))

    async def _forget_settled(self, now: int) -> None:
        surplus = list(self._settled)[: max(0, len(self._settled) - MAX_SETTLED)]
        old = [id for id, (_, not_after) in self._settled.items() if now > not_after]
        gone = dict.fromkeys([*surplus, *old])
        if gone:
            rows = [(id,) for id in gone]
            await self._database.write(
                lambda connection: connection.executemany("DELETE FROM outbox_settled WHERE id = ?", rows)
            )
            for id in gone:
                del self._settled[id]

    async def _remove(self, tasks: list[bytes]) -> None:
        if not tasks:
            return
        rows = [(task,) for task in tasks]
        await self._database.write(
            lambda connection: connection.executemany("DELETE FROM outbox WHERE id = ?", rows)
        )
        for task in tasks:
            del self._rows[task]
            self._tell(task)

    def _tell(self, task: bytes) -> None:
        self._woken.set()
        for tell in self.changed:
            tell(task)


def _waiting(request: SubmitTask, submitted: int) -> Waiting:
    return Waiting(
        id=request.id,
        agent=request.task.agent,
        key=request.key,
        on=request.task.on,
        digest=task_digest(request.task),
        not_after=request.not_after,
        submitted=submitted,
        size_bytes=len(encode(request)),
    )
