"""What members ask of the leader about the tasks of the cell, and how it answers.

Nothing is answered from a ledger that may be old: a node answers while it leads and has applied what was
committed before it did, and reads behind a barrier (Ongaro 2014, section 6.4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import trio

from knode.consensus.replica import Replica
from knode.errors import Code, KnodeError
from knode.mesh.member_log import MemberLog
from knode.mesh.roster import Member
from knode.mesh.statements import Role
from knode.tasks.commands import Cancel, Complete, Fail, Fence, Submit
from knode.tasks.dispatch import Dispatcher, work_of
from knode.tasks.leader import (
    CANCEL,
    COMPLETE,
    CURRENT,
    EFFECTS,
    EXPLAIN,
    FAIL,
    FATES,
    LIST,
    SHOW,
    SUBMIT,
    WAIT,
    Asked,
    Leader,
)
from knode.tasks.lifecycle import State
from knode.tasks.messages import (
    MAX_EFFECTS,
    MAX_VIEWS,
    AskAttempt,
    AskFates,
    AttemptReport,
    CancelTask,
    CompleteAttempt,
    Effect,
    Effects,
    Explanation,
    FailAttempt,
    Fates,
    ListEffects,
    ListTasks,
    Seen,
    Settled,
    ShowTask,
    SubmitTask,
    TaskView,
    Views,
    WaitForTasks,
)
from knode.tasks.records import Change, LedgerTask, Outcome, TaskRecord
from knode.tasks.routing import Work
from knode.tasks.store import LedgerStore
from knode.tasks.views import view_of, view_of_record
from knode.world import Log, World

WAIT_S = 20.0
PAGE_BYTES = 160 * 1024
"""Of results, or of operations, in one answer; with all else it fits a message."""
LISTED_RESULT_BYTES = 4 * 1024
"""Larger results are shown one by one."""
WAITING_AT_ONCE = 256


class _News:
    """What has become of the tasks that a member waits for."""

    def __init__(self) -> None:
        self.event = trio.Event()
        """Set when there is something new; whoever waits puts another in its place."""
        self.changed: dict[bytes, None] = {}
        """The tasks of which there is."""
        self.ended: dict[bytes, TaskView] = {}
        """Tasks that ended meanwhile, as far as they fit one answer: they need not be looked up."""
        self._room_bytes = PAGE_BYTES

    def take(self, change: Change) -> None:
        """Note that a task has changed."""
        task, result = change.after, change.result
        self.note(change.id)
        if task is None or not task.state.final or (task.state is State.SUCCEEDED and result is None):
            return
        view = view_of(task, result)
        self._room_bytes -= _size_of(view)
        if self._room_bytes >= 0:
            self.ended[task.id] = view

    def note(self, task: bytes) -> None:
        """Note that there is something new of a task."""
        self.changed[task] = None
        self.event.set()


class Reception:
    """Answers every member, this node included, while this node leads."""

    def __init__(
        self,
        world: World,
        leader: Leader,
        replica: Replica,
        store: LedgerStore,
        dispatcher: Dispatcher,
        log: Log,
    ) -> None:
        self.refused: Counter[str] = Counter()
        """What members said of attempts that were not theirs, or not any more, by kind."""
        self._world = world
        self._replica = replica
        self._store = store
        self._dispatcher = dispatcher
        self._log = MemberLog(world.clock, log)
        self._waiting: dict[bytes, dict[_News, None]] = {}
        self._waiting_count = 0
        store.on_change.append(self._tell)
        leader.on_report = self._take_report
        leader.answer(SUBMIT, self._submit)
        leader.answer(CANCEL, self._cancel)
        leader.answer(SHOW, self._show)
        leader.answer(LIST, self._list)
        leader.answer(WAIT, self._wait)
        leader.answer(EXPLAIN, self._explain)
        leader.answer(EFFECTS, self._effects)
        leader.answer(COMPLETE, self._complete)
        leader.answer(FAIL, self._fail)
        leader.answer(CURRENT, self._is_current)
        leader.answer(FATES, self._fates)

    # What changes the ledger.

    async def _submit(self, asked: Asked, request: SubmitTask) -> TaskView:
        self._check_leads()
        work = Work(request.id, request.task.agent, request.task.on, request.holders)
        is_to_run = request.id not in self._store.live and not request.is_cancelled
        assignment = self._dispatcher.assign(work) if is_to_run else None
        if is_to_run and assignment is None:
            try:
                self._dispatcher.check(work)
            except KnodeError:
                # It may be there already, from another time that it was asked for.
                known = await self._known(asked, request)
                if known is None:
                    raise
                return known
        try:
            outcome = await self._dispatcher.propose(
                Submit(
                    now=self._dispatcher.now(),
                    id=request.id,
                    submitter=asked.member.id.raw,
                    key=request.key,
                    not_after=request.not_after,
                    task=request.task,
                    holders=request.holders,
                    assignment=assignment,
                )
            )
        finally:
            self._dispatcher.unassign(assignment)
        outcome.check()
        return await self._view(outcome.task)

    async def _known(self, asked: Asked, request: SubmitTask) -> TaskView | None:
        await self._replica.barrier(deadline=asked.deadline)
        record = await self._store.task(request.id)
        if record is None or (record.task.submitter, record.task.key) != (asked.member.id.raw, request.key):
            return None
        return view_of_record(record)

    async def _cancel(self, asked: Asked, request: CancelTask) -> TaskView:
        self._check_leads()
        await self._replica.barrier(deadline=asked.deadline)
        task = (await self._record(request.task)).task
        if asked.member.id.raw != task.submitter and asked.member.role is not Role.ADMIN:
            raise KnodeError(
                Code.NOT_ALLOWED,
                "only the node that submitted a task, and admins, may cancel it",
                "'knode task show' says who submitted it",
            )
        outcome = await self._dispatcher.propose(
            Cancel(self._dispatcher.now(), request.task, asked.member.id.raw)
        )
        outcome.check()
        return await self._view(request.task)

    async def _complete(self, asked: Asked, request: CompleteAttempt) -> Settled:
        settled = await self._check_attempt(asked, request.fence, State.SUCCEEDED)
        if settled is not None:
            return settled
        command = Complete(self._dispatcher.now(), request.fence, asked.member.id.raw, request.bundle)
        return self._settled(await self._dispatcher.propose(command), asked.member)

    async def _fail(self, asked: Asked, request: FailAttempt) -> Settled:
        settled = await self._check_attempt(asked, request.fence, State.FAILED)
        if settled is not None:
            return settled
        command = Fail(
            now=self._dispatcher.now(),
            fence=request.fence,
            member=asked.member.id.raw,
            code=request.code,
            message=request.message,
            retryable=request.retryable,
        )
        return self._settled(await self._dispatcher.propose(command), asked.member)

    async def _check_attempt(self, asked: Asked, fence: Fence, ended: State) -> Settled | None:
        """Return how an attempt that is over was settled, None for a current one of the member that asks.

        What it does not know, or knows as older, the ledger may have in an entry that is not applied here.
        """
        self._check_leads()
        task = self._store.live.get(fence.task)
        if not _is_at(task, fence):
            await self._replica.barrier(deadline=asked.deadline)
            task = self._store.live.get(fence.task)
        if task is None:
            record = await self._store.task(fence.task)
            task = None if record is None else record.task
        if task is None or task.attempt == 0 or task.fence != fence:
            self._refuse(asked.member, fence, "stale")
            return Settled(False)
        if task.member != asked.member.id.raw:
            self._refuse(asked.member, fence, "forged")
            raise _forged()
        if task.state is State.ASSIGNED:
            return None
        return Settled(task.state is ended)

    def _settled(self, outcome: Outcome, member: Member) -> Settled:
        if outcome.code is Code.STALE_FENCE:
            self.refused["stale"] += 1
            return Settled(False)
        outcome.check()
        return Settled(True)

    def _refuse(self, member: Member, fence: Fence, kind: str) -> None:
        self.refused[kind] += 1
        self._log.warning(
            "an attempt's end is refused",
            peer=member.node_id,
            task=fence.task.hex(),
            attempt=fence.attempt,
            why=kind,
        )

    async def _is_current(self, asked: Asked, request: AskAttempt) -> Settled:
        self._check_leads()
        fence = request.fence
        if not _is_at(self._store.live.get(fence.task), fence):
            await self._replica.barrier(deadline=asked.deadline)
        task = self._store.live.get(fence.task)
        return Settled(_is_at(task, fence) and task is not None and task.member == asked.member.id.raw)

    # What is only read.

    async def _show(self, asked: Asked, request: ShowTask) -> TaskView:
        await self._replica.barrier(deadline=asked.deadline)
        self._check_leads()
        record = await self._store.find(request.task)
        return await self._view(record.task.id)

    async def _list(self, asked: Asked, request: ListTasks) -> Views:
        await self._replica.barrier(deadline=asked.deadline)
        self._check_leads()
        records = await self._store.list(MAX_VIEWS, before=request.before, most_bytes=PAGE_BYTES)
        views, size = list[TaskView](), 0
        for record in records:
            view = self._listed(record)
            size += _size_of(view)
            if views and size > PAGE_BYTES:
                break
            views.append(view)
        # The store ends a list at its bytes, too. Tasks are counted from 1 on.
        return Views(tuple(views), more=bool(views) and views[-1].number > 1)

    async def _explain(self, asked: Asked, request: ShowTask) -> Explanation:
        await self._replica.barrier(deadline=asked.deadline)
        self._check_leads()
        record = await self._store.find(request.task)
        task = record.task
        now = () if task.state.final else self._dispatcher.route(work_of(task)).considered
        return Explanation(
            self._listed(record), tuple(record.considered), now, self._waits_for(task, now)[:1024]
        )

    async def _effects(self, asked: Asked, request: ListEffects) -> Effects:
        await self._replica.barrier(deadline=asked.deadline)
        self._check_leads()
        only = None if request.task is None else (await self._store.find(request.task)).task.id
        page = await self._store.operations(request.after, MAX_EFFECTS, task=only, most_bytes=PAGE_BYTES)
        effects = (
            Effect(each.place, each.incarnation, each.number, each.time, each.task, each.attempt, each.data)
            for each in page.found
        )
        return Effects(tuple(effects), page.next, page.first, page.since)

    async def _fates(self, asked: Asked, request: AskFates) -> Fates:
        await self._replica.barrier(deadline=asked.deadline)
        self._check_leads()
        over = list[bytes]()
        for task in request.tasks:
            if task not in self._store.live and await self._store.task(task) is not None:
                over.append(task)
        return Fates(tuple(task for task in request.tasks if task in self._store.live), tuple(over))

    async def _wait(self, asked: Asked, request: WaitForTasks) -> Views:
        self._check_leads()
        is_up_to_date = False
        seen: Sequence[Seen] = request.seen
        news = self._subscribe(request.seen)
        try:
            with trio.move_on_after(WAIT_S):
                while True:
                    self._check_leads()
                    news.event, news.changed = trio.Event(), {}
                    views = await self._views(seen, news.ended)
                    if views.missing and not is_up_to_date:
                        # It may be in an entry that is not applied here yet.
                        await self._replica.barrier(deadline=asked.deadline)
                        is_up_to_date, seen = True, request.seen
                        continue
                    if views.tasks or views.missing:
                        return views
                    await news.event.wait()
                    seen = [one for one in request.seen if one.task in news.changed]
        finally:
            self._unsubscribe(request.seen, news)
        return Views((), more=False)

    async def _views(self, seen: Sequence[Seen], known: Mapping[bytes, TaskView]) -> Views:
        live = self._store.live
        over = [
            one.task
            for one in seen
            if one.task not in live and one.task not in known and not _is_settled(one)
        ]
        over = over[:MAX_VIEWS]
        records = await self._store.tasks(over, most_bytes=PAGE_BYTES) if over else ()
        ended, live = dict(zip(over, records, strict=False)), self._store.live
        views, missing, size = list[TaskView](), list[bytes](), 0
        for one in seen:
            task = live.get(one.task)
            if task is not None:
                reports, report = self._dispatcher.report_of(task.id)
                if (one.state, one.attempt, one.reports) == (task.state, task.attempt, reports):
                    continue
                view = view_of(task, None, report, reports)
            elif one.task in known:
                view = known[one.task]
            elif one.task not in ended:  # or it ended while the others were read: then this is done again
                continue
            elif (record := ended[one.task]) is None:
                missing.append(one.task)
                continue
            else:
                view = view_of_record(record)
            size += _size_of(view)
            if views and (size > PAGE_BYTES or len(views) == MAX_VIEWS):
                return Views(tuple(views), more=True, missing=tuple(missing))
            views.append(view)
        return Views(tuple(views), more=False, missing=tuple(missing))

    def _subscribe(self, seen: Sequence[Seen]) -> _News:
        if self._waiting_count >= WAITING_AT_ONCE:
            raise KnodeError(Code.RATE_LIMITED, "too many wait for tasks here", "try again later")
        self._waiting_count += 1
        news = _News()
        for one in seen:
            self._waiting.setdefault(one.task, {})[news] = None
        return news

    def _unsubscribe(self, seen: Sequence[Seen], news: _News) -> None:
        self._waiting_count -= 1
        for one in seen:
            waiting = self._waiting.get(one.task)
            if waiting is not None:
                waiting.pop(news, None)
                if not waiting:
                    del self._waiting[one.task]

    def _tell(self, changes: Sequence[Change]) -> None:
        for change in changes:
            for news in self._waiting.get(change.id, ()):
                news.take(change)

    def _take_report(self, member: Member, report: AttemptReport) -> None:
        if self._dispatcher.take_report(member, report):
            for news in self._waiting.get(report.fence.task, ()):
                news.note(report.fence.task)

    # What answers are made of.

    def _check_leads(self) -> None:
        if not self._dispatcher.leads:
            raise KnodeError(Code.UNAVAILABLE, "this node does not lead the cell", "ask the one that does")

    async def _record(self, task: bytes) -> TaskRecord:
        return await self._store.find(task.hex())

    async def _view(self, id: bytes) -> TaskView:
        task = self._store.live.get(id)
        if task is not None:
            reports, report = self._dispatcher.report_of(id)
            return view_of(task, None, report, reports)
        return view_of_record(await self._record(id))

    def _listed(self, record: TaskRecord) -> TaskView:
        task, result = record.task, record.result
        reports, report = self._dispatcher.report_of(task.id)
        fits = result is not None and len(result) <= LISTED_RESULT_BYTES
        return view_of(task, result if fits else None, report, reports)

    def _waits_for(self, task: LedgerTask, now: Sequence[object]) -> str:
        if task.state is not State.QUEUED:
            return ""
        wait_s = (task.not_before - self._dispatcher.now()) / 1000
        if wait_s > 0:
            return f"its next attempt begins in {wait_s:.1f} s at the earliest: {task.message}"
        return "a node that can run it and has a free place"


def _is_at(task: LedgerTask | None, fence: Fence) -> bool:
    return task is not None and task.state is State.ASSIGNED and task.fence == fence


def _is_settled(seen: Seen) -> bool:
    return seen.state is not None and seen.state.final


def _size_of(view: TaskView) -> int:
    text = view.message + view.key + (view.report.text if view.report is not None else "")
    return len(view.result or b"") + 4 * len(text) + 256  # a character has four bytes at most


def _forged() -> KnodeError:
    return KnodeError(Code.NOT_ALLOWED, "the attempt was given to another member")
