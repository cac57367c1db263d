"""Durable tasks on the node that asks: everything is asked of whoever leads, until there is an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from knode.errors import NO_MEMBER, UNANSWERED, Code, KnodeError
from knode.mesh.membership import Membership
from knode.tasks.commands import ATTEMPTS, MAX_KEY, NewTask, task_digest
from knode.tasks.inputs import Fate, Inputs
from knode.tasks.leader import (
    CANCEL,
    EFFECTS,
    EXPLAIN,
    FATES,
    LIST,
    SHOW,
    SUBMIT,
    Leader,
)
from knode.tasks.messages import (
    AskFates,
    CancelTask,
    Effect,
    Effects,
    Explanation,
    ListEffects,
    ListTasks,
    Selector,
    ShowTask,
    SubmitTask,
    TaskView,
)
from knode.tasks.outbox import Outbox, Waiting
from knode.tasks.store import LedgerStore
from knode.tasks.values import MAX_INPUT_BYTES, AgentId
from knode.tasks.views import view_of_record
from knode.world import Log, Monotonic, World

COMMIT_S = 5.0
"""How long a submit waits for its commit, and everything else for its answer."""
FILES_S = 240.0
"""How long its files may take to be held where they outlive this node."""
REFRESH_EVERY_S = 900.0
"""How often the holders of a pending task's files are told that it still waits."""
KEY_LIVES_S = 24 * 3600.0
LONGEST_DEADLINE_S = 30 * 86_400.0
LISTED_TASKS = 1000
LISTED_EFFECTS = 10_000


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for."""

    agent: str
    input: bytes = b""
    artifacts: tuple[Path, ...] = ()
    """Absolute paths on this machine."""
    on: str | None = None
    """Name, id or start of an id of the node that must run it; None: whoever is best."""
    key: str | None = None
    """The same key of this node is the same task; None: nobody repeats it but the outbox."""
    deadline_s: float | None = None
    """How long after its commit it may take; None: as long as its key lives, a day."""


@dataclass(frozen=True, slots=True)
class Found:
    """Tasks as they could be found."""

    tasks: tuple[TaskView, ...]
    is_confirmed: bool
    """False: no leader answered; it is what this node knows, and may be old."""


class Durable:
    """The durable tasks of the cell, as this node asks for them."""

    def __init__(
        self,
        world: World,
        membership: Membership,
        leader: Leader,
        store: LedgerStore,
        inputs: Inputs,
        outbox: Outbox,
        log: Log,
    ) -> None:
        self._outbox = outbox
        self._world = world
        self._membership = membership
        self._leader = leader
        self._store = store
        self._inputs = inputs
        self._log = log

    async def run(self) -> None:
        """Submit what is pending, and have its files kept, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._outbox.run, self._submit_again)
            nursery.start_soon(self._keep_files)

    async def submit(self, request: Request, *, keep: bool = True) -> TaskView | Waiting:
        """Submit a task, and return it when it is committed; what cannot be in 5 seconds is kept and pending.

        Args:
            request: what is asked for.
            keep: False: raise UNAVAILABLE instead of keeping it.

        Raises:
            KnodeError: TOO_LARGE, INVALID_ARGUMENT, NOT_FOUND (a file or node), NO_ELIGIBLE_NODE, NO_AGENT,
                NOT_ALLOWED, KEY_CONFLICT, RATE_LIMITED, KEY_REVOKED, EXPIRED: it is not done. UNAVAILABLE:
                it may still be.

        Cancelling leaves open whether it is done.
        """
        submit = await self._prepare(request, keep=keep)
        taken: TaskView | Waiting | None = None
        try:
            taken = await self._take(submit, keep=keep)
        finally:
            if submit.task.files and (taken is None or taken.id != submit.id):
                with trio.CancelScope(shield=True):
                    await self._inputs.forget(submit.id)
        return taken

    async def _take(self, submit: SubmitTask, *, keep: bool) -> TaskView | Waiting:
        pending = self._outbox.with_key(submit.key)
        if pending is None:
            taken = await self._ask_for(submit, keep=keep)
            if isinstance(taken, TaskView):
                return taken
            pending = taken
        if pending.digest != task_digest(submit.task):
            raise _key_conflict(submit.key, pending.id)
        return pending

    async def tasks(self) -> Found:
        """Return the tasks of the cell, newest first: the last thousand."""
        if not self._membership.in_cell:
            return Found((), is_confirmed=True)
        tasks: list[TaskView] = []
        try:
            more = True
            while more and len(tasks) < LISTED_TASKS:
                before = tasks[-1].number if tasks else None
                page = await self._leader.ask(LIST, ListTasks(before), deadline=self._in(COMMIT_S))
                tasks += page.tasks
                more = page.more and bool(page.tasks)
        except KnodeError as error:
            if error.code not in UNANSWERED | NO_MEMBER:
                raise
            records = await self._store.list(LISTED_TASKS)
            return Found(tuple(map(view_of_record, records)), is_confirmed=False)
        return Found(tuple(tasks), is_confirmed=True)

    async def show(self, selector: str) -> Found:
        """Return the one task of the ledger that fits, or none.

        Raises:
            KnodeError: INVALID_ARGUMENT for what is no start of an id, or when several fit.
        """
        if not is_selector(selector) or not self._membership.in_cell:
            return Found((), is_confirmed=True)
        try:
            view = await self._leader.ask(SHOW, ShowTask(selector), deadline=self._in(COMMIT_S))
        except KnodeError as error:
            if error.code is Code.NOT_FOUND:
                return await self._show_settled(selector)
            if error.code not in UNANSWERED | NO_MEMBER:
                raise
            return await self._show_known(selector)
        return Found((view,), is_confirmed=True)

    async def _show_known(self, selector: str) -> Found:
        try:
            return Found((view_of_record(await self._store.find(selector)),), is_confirmed=False)
        except KnodeError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            settled = self._settled_as(selector)
            return Found((), is_confirmed=False) if settled is None else await self._show_known(settled)

    async def _show_settled(self, selector: str) -> Found:
        """Show what was pending here under such an id, and is a task with another."""
        settled = self._settled_as(selector)
        return Found((), is_confirmed=True) if settled is None else await self.show(settled)

    def _settled_as(self, selector: str) -> str | None:
        tasks = self._outbox.settled_as(selector)
        if len(tasks) > 1:
            raise KnodeError(
                Code.INVALID_ARGUMENT, f"{selector!r} fits {len(tasks)} tasks", "give more of the id"
            )
        return next((task.hex() for task in tasks), None)

    async def explain(self, task: bytes) -> Explanation:
        """Say why a task is where it is; NOT_FOUND, UNAVAILABLE."""
        return await self._leader.ask(
            EXPLAIN, ShowTask(self._outbox.task_of(task).hex()), deadline=self._in(COMMIT_S)
        )

    async def effects(self, task: bytes | None = None, *, after: int = 0) -> Effects:
        """Return the operations that all tasks left, or one, in their order, up to ten thousand.

        Args:
            task: whose alone.
            after: `next` of what was returned before; 0: from the first on.

        Raises:
            KnodeError: NOT_FOUND, UNAVAILABLE.
        """
        effects: list[Effect] = []
        selector = None if task is None else self._outbox.task_of(task).hex()
        while True:
            page = await self._leader.ask(EFFECTS, ListEffects(after, selector), deadline=self._in(COMMIT_S))
            effects += page.effects
            if page.next is None or len(effects) >= LISTED_EFFECTS:
                return Effects(tuple(effects), page.next, page.first, page.since)
            after = page.next

    async def cancel(self, task: bytes) -> TaskView | Waiting:
        """Cancel a task; one that is pending is cancelled as soon as its fate is known.

        Raises:
            KnodeError: INVALID_ARGUMENT when it has ended, NOT_ALLOWED, NOT_FOUND, UNAVAILABLE.
        """
        waiting = self._outbox.get(task)
        if waiting is not None and waiting.is_pending:
            await self._outbox.cancel(task)
            waiting = self._outbox.get(task)
            if waiting is not None:
                return waiting
        task = self._outbox.task_of(task)
        return await self._leader.ask(CANCEL, CancelTask(task), deadline=self._in(COMMIT_S))

    # Submitting.

    async def _ask_for(self, submit: SubmitTask, *, keep: bool) -> TaskView | Waiting:
        """Have its files held, then ask the leader; `keep` what cannot be done now."""
        try:
            submit = await self._spread(submit)
        except KnodeError as error:
            if error.code is not Code.UNAVAILABLE or not keep:
                raise
            return await self._outbox.keep(submit, error)
        try:
            return await self._leader.ask(SUBMIT, submit, deadline=self._in(COMMIT_S))
        except KnodeError as error:
            if error.code not in UNANSWERED:
                raise
            if not keep:
                raise _uncommitted(submit.key, error) from error
        return await self._outbox.keep(submit)

    async def _prepare(self, request: Request, *, keep: bool) -> SubmitTask:
        _check(request)
        _ = self._membership.own  # who is no member (any more) asks for nothing
        member = None if request.on is None else self._membership.roster.find(request.on)
        task = self._world.randomness.token(16)
        deadline_s = request.deadline_s or 0.0
        # Where a leader's clock was ahead, the ledger's time is; a key dated by the own clock would be over.
        now = self._store.time()
        files = await self._inputs.keep(task, request.artifacts, self._in(FILES_S))
        new = NewTask(
            agent=request.agent,
            input=request.input,
            files=files,
            on=b"" if member is None else member.id.raw,
            deadline_ms=round(deadline_s * 1000),
            attempts=ATTEMPTS,
        )
        # Without a key the task is repeated by the outbox alone, which keeps it as long; see
        # `knode.tasks.forgetting`. A person who may repeat it needs a key that is remembered.
        key = request.key or (task.hex() if keep else f"again-{task.hex()}")
        lives_s = KEY_LIVES_S if request.key is None else max(KEY_LIVES_S, deadline_s)
        return SubmitTask(task, key, now + round(1000 * lives_s), new, ())

    async def _spread(self, submit: SubmitTask) -> SubmitTask:
        """Have its files held where they outlive this node, unless they are; UNAVAILABLE."""
        files = submit.task.files
        if not files or submit.holders:
            return submit
        holders = await self._inputs.spread(submit.id, files, self._in(FILES_S))
        return msgspec.structs.replace(submit, holders=holders)

    async def fates(self, tasks: Sequence[bytes]) -> Mapping[bytes, Fate]:
        """Return what became of tasks, for who holds their files; UNAVAILABLE.

        A task that is pending here lives.
        """
        pending = {row.id for row in self._outbox.rows() if row.is_pending}
        asked = tuple(task for task in tasks if task not in pending)
        answer = await self._leader.ask(FATES, AskFates(asked), deadline=self._in(COMMIT_S))
        return {
            **dict.fromkeys(asked, Fate.UNKNOWN),
            **dict.fromkeys(answer.live, Fate.LIVE),
            **dict.fromkeys(answer.over, Fate.OVER),
            **{task: Fate.LIVE for task in tasks if task in pending},
        }

    async def _keep_files(self) -> None:
        """Tell the holders of pending tasks' files that they still wait."""
        while True:
            await trio.sleep(REFRESH_EVERY_S)
            for row in self._outbox.rows():
                try:
                    request = await self._outbox.read(row.id) if row.is_pending else None
                except KnodeError as error:  # it is committed meanwhile, or the disk cannot be read
                    self._log.info("files not held anew", task=row.id.hex(), why=str(error))
                    continue
                if request is not None and request.task.files:
                    await self._inputs.refresh(row.id, request.task.files, request.holders)

    async def _submit_again(self, request: SubmitTask, is_cancelled: bool) -> bytes:
        if request.task.files and not request.holders:
            if is_cancelled:
                raise KnodeError(Code.CANCELLED, "the task was cancelled before it was submitted")
            request = await self._spread(request)
            await self._outbox.change_holders(request)
        request = msgspec.structs.replace(request, is_cancelled=is_cancelled)
        view = await self._leader.ask(SUBMIT, request, deadline=self._in(COMMIT_S))
        self._log.info("a pending task is committed", task=view.id.hex(), state=view.state)
        if is_cancelled and not view.state.final:
            try:
                await self._leader.ask(CANCEL, CancelTask(view.id), deadline=self._in(COMMIT_S))
            except KnodeError as error:
                if error.code is not Code.INVALID_ARGUMENT:  # it has ended before
                    raise
        return view.id

    def _in(self, seconds: float) -> Monotonic:
        return Monotonic(self._world.clock.monotonic() + seconds)


def is_selector(text: str) -> bool:
    """Tell whether it may be the start of a task's id."""
    try:
        msgspec.convert(text, Selector)
    except msgspec.ValidationError:
        return False
    return True


def _uncommitted(key: str, error: KnodeError) -> KnodeError:
    return KnodeError(
        Code.UNAVAILABLE,
        f"it is not committed but may still be, under the key {key} ({error.message})",
        f"submit it again with '--key {key}': it is the same task then",
    )


def _key_conflict(key: str, task: bytes) -> KnodeError:
    return KnodeError(
        Code.KEY_CONFLICT,
        f"the key {key!r} was used for another task, {task.hex()}",
        f"'knode task show {task.hex()}' shows it; take another --key for this one",
    )


def _check(request: Request) -> None:
    if len(request.input) > MAX_INPUT_BYTES:
        raise KnodeError(
            Code.TOO_LARGE,
            f"the input has {len(request.input)} bytes; at most {MAX_INPUT_BYTES} fit",
            "pass the data as a file: '--artifact PATH'",
        )
    try:
        msgspec.convert(request.agent, AgentId)
    except msgspec.ValidationError as error:
        raise KnodeError(
            Code.NO_ELIGIBLE_NODE,
            f"{request.agent[:64]!r} is no name of an agent, so no node can run it",
            "'knode agent list' shows the agents; a name is like kExecutor:text",
        ) from error
    if request.key is not None and not 1 <= len(request.key) <= MAX_KEY:
        raise KnodeError(
            Code.INVALID_ARGUMENT, f"a key has 1 to {MAX_KEY} characters", "give a shorter one: '--key K'"
        )
    deadline_s = request.deadline_s
    if deadline_s is not None and not 0.001 <= deadline_s <= LONGEST_DEADLINE_S:
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            f"a deadline lies ahead, by {LONGEST_DEADLINE_S / 86_400:g} days at most",
            "give seconds: '--deadline 60'",
        )
