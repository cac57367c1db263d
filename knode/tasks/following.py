"""Following durable tasks to their end: one question to whoever leads, for all that is followed here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import trio

from knode.errors import NO_MEMBER, UNANSWERED, Code, KnodeError
from knode.tasks.leader import WAIT, Leader
from knode.tasks.messages import Seen, TaskView, WaitForTasks
from knode.tasks.outbox import Outbox, Waiting
from knode.world import Log, Monotonic, World

FOLLOWED_AT_ONCE = 1024
POLL_S = 25.0


class Following:
    """The tasks that somebody follows here."""

    def __init__(self, world: World, leader: Leader, outbox: Outbox, log: Log) -> None:
        self._world = world
        self._leader = leader
        self._outbox = outbox
        self._log = log
        self._followed: dict[bytes, _Followed] = {}
        self._work = trio.Event()
        self._poll = trio.CancelScope()
        outbox.changed.append(self._tell)

    async def run(self) -> None:
        """Ask for what is followed, until cancelled."""
        while True:
            self._work = trio.Event()
            asked = {
                task: followed
                for task, followed in self._followed.items()
                if not followed.is_settled and (followed.view is not None or self._is_in_ledger(task))
            }
            if not asked:
                await self._work.wait()
                continue
            seen = tuple(followed.seen for followed in asked.values())
            with trio.CancelScope() as self._poll:
                until = Monotonic(self._world.clock.monotonic() + POLL_S)
                try:
                    page = await self._leader.ask(WAIT, WaitForTasks(seen), deadline=until)
                except KnodeError as error:
                    if error.code not in UNANSWERED:
                        self._log.warning("tasks cannot be followed", code=error.code, why=str(error))
                        if error.code in NO_MEMBER:
                            for followed in asked.values():
                                followed.fail(error.bare())
                        await trio.sleep(1)
                    continue
                for view in page.tasks:
                    if view.id in asked:
                        asked[view.id].take(view)
                for task in page.missing:
                    if task in asked:
                        asked[task].miss()

    async def follow(
        self, task: bytes, known: TaskView | None = None
    ) -> AsyncGenerator[TaskView | Waiting, None]:
        """Give a task as it is and then each time that it has changed, until it has ended.

        Args:
            task: its id.
            known: how it was a moment ago, as `submit` told: then only changes are asked for.

        Raises:
            KnodeError: NOT_FOUND when the cell does not know it, RATE_LIMITED; KEY_REVOKED, UNKNOWN_PEER once
                this node is no member.
        """
        followed = self._followed.get(task)
        if followed is None:
            if len(self._followed) >= FOLLOWED_AT_ONCE:
                raise KnodeError(
                    Code.RATE_LIMITED,
                    f"{FOLLOWED_AT_ONCE} tasks are followed on this node",
                    "try again later",
                )
            followed = self._followed[task] = _Followed(task, known)
        followed.followers += 1
        try:
            if followed.followers == 1 or followed.view is None:
                self._ask_anew()
            while True:
                changed = followed.changed
                waiting = self._outbox.get(task)
                if waiting is not None:
                    yield waiting
                    if not waiting.is_pending:
                        return
                elif (settled := self._outbox.task_of(task)) != task:
                    async with aclosing(self.follow(settled)) as views:
                        async for view in views:
                            yield view
                    return
                elif followed.error is not None:
                    raise followed.error.bare()
                elif followed.is_missing:
                    raise not_found(task.hex())
                elif followed.view is not None:
                    yield followed.view
                    if followed.view.state.final:
                        return
                await changed.wait()
        finally:
            followed.followers -= 1
            if not followed.followers:
                del self._followed[task]

    def _ask_anew(self) -> None:
        self._work.set()
        self._poll.cancel()

    def _tell(self, task: bytes) -> None:
        """The outbox has changed: whoever follows that task looks again, in the ledger when it is there."""
        followed = self._followed.get(task)
        if followed is not None:
            followed.tell()
            self._ask_anew()

    def _is_in_ledger(self, task: bytes) -> bool:
        """Tell whether this id, if any task has it, is that of a task in the ledger."""
        return self._outbox.get(task) is None and self._outbox.task_of(task) == task


class _Followed:
    """A task that somebody follows."""

    def __init__(self, task: bytes, known: TaskView | None) -> None:
        self.followers = 0
        self.view: TaskView | None = None
        self.seen = Seen(task, None, 0, 0)
        """What is known of it, as the leader is told: each time, with all others that are followed."""
        self.is_missing = False
        self.error: KnodeError | None = None
        """Why nobody will ever tell this node."""
        self.is_settled = False
        """Whether nothing new can come."""
        self.changed = trio.Event()
        if known is not None:
            self.take(known)

    def take(self, view: TaskView) -> None:
        if not self.is_settled:
            self.view = view
            self.seen = Seen(self.seen.task, view.state, view.attempt, view.reports)
            self.is_settled = view.state.final
            self.tell()

    def miss(self) -> None:
        self.is_missing = self.is_settled = True
        self.tell()

    def fail(self, error: KnodeError) -> None:
        self.error, self.is_settled = error, True
        self.tell()

    def tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


def not_found(selector: str) -> KnodeError:
    """Return the error for a task that nobody knows."""
    return KnodeError(
        Code.NOT_FOUND,
        f"there is no task {selector[:64]!r}",
        "'knode task list' shows the cell's tasks, and the direct ones of this node since its start",
    )
