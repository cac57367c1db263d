"""What the daemon answers about tasks, direct and durable ones together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from knode.control.parameters import Nothing, OfEffects, OfSubmission, OfTask
from knode.control.server import Handler, Notify
from knode.control.typed import typed
from knode.errors import Code, KnodeError
from knode.mesh.roster import Roster
from knode.node.node import Node
from knode.tasks.commands import Considered
from knode.tasks.direct import DEFAULT_DEADLINE_S, Submission
from knode.tasks.durable import Request, is_selector
from knode.tasks.following import not_found
from knode.tasks.messages import TaskView
from knode.tasks.outbox import Waiting
from knode.tasks.task import Task
from knode.tasks.views import (
    effect_document,
    name_of,
    progress_document,
    task_document,
    waiting_document,
)

NOT_CONFIRMED = "no leader answers: this is what this node knows, and it may be old"


class TaskMethods:
    """The methods about tasks of one daemon."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def table(self) -> Mapping[str, Handler]:
        """Return every method by its name."""
        return {
            "task.submit": typed(OfSubmission, self._submit),
            "task.list": typed(Nothing, self._list),
            "task.show": typed(OfTask, self._show),
            "task.explain": typed(OfTask, self._explain),
            "task.watch": typed(OfTask, self._watch),
            "task.cancel": typed(OfTask, self._cancel),
            "task.effects": typed(OfEffects, self._effects),
        }

    async def _submit(self, of: OfSubmission, notify: Notify) -> Any:
        if of.direct:
            return await self._submit_directly(of, notify)
        request = Request(
            agent=of.agent,
            input=of.input.encode(),
            artifacts=tuple(Path(path) for path in of.artifacts),
            on=of.on,
            key=of.key,
            deadline_s=of.deadline_s,
        )
        submitted = await self._node.durable.submit(request, keep=of.outbox)
        if not of.wait:
            return self._document(submitted)
        notify({"task": submitted.id.hex(), "fraction": None, "text": "submitted", "node": None})
        known = submitted if isinstance(submitted, TaskView) else None
        return await self._follow_durable(submitted.id, notify, known)

    async def _submit_directly(self, of: OfSubmission, notify: Notify) -> Any:
        if of.key is not None or not of.outbox:
            raise KnodeError(
                Code.INVALID_ARGUMENT,
                "a direct task has no key and is in no outbox: it is done at most once, now or not at all",
                "leave out --direct, or --key and --no-outbox",
            )
        submission = Submission(
            agent=of.agent,
            input=of.input.encode(),
            artifacts=tuple(Path(path) for path in of.artifacts),
            on=of.on,
            deadline_s=DEFAULT_DEADLINE_S if of.deadline_s is None else of.deadline_s,
        )
        task = await self._node.tasks.submit(submission)
        if not of.wait:
            return task.document()
        try:
            return await _follow_direct(task, notify)
        except trio.Cancelled:
            # Whoever waited has gone away, and nobody else would read the result.
            if not task.state.final:
                with trio.CancelScope(shield=True):
                    await self._node.tasks.cancel(task)
            raise

    async def _list(self, _: Nothing, notify: Notify) -> Any:
        found = await self._node.durable.tasks()
        if not found.is_confirmed:
            notify({"note": NOT_CONFIRMED})
        known = {view.id for view in found.tasks}
        documents = [task.document() for task in self._node.tasks.list()]
        if self._node.membership.in_cell:
            waiting = [row for row in self._node.outbox.rows() if row.id not in known]
            documents += [self._document(row) for row in waiting]
            documents += [
                task_document(view, self._roster, is_confirmed=found.is_confirmed) for view in found.tasks
            ]
        return sorted(documents, key=lambda document: -document["submitted"])

    async def _show(self, of: OfTask, notify: Notify) -> Any:
        found, is_confirmed = await self._find(of.task)
        if not is_confirmed:
            notify({"note": NOT_CONFIRMED})
        if isinstance(found, TaskView):
            return task_document(found, self._roster, is_confirmed=is_confirmed)
        return self._document(found)

    async def _explain(self, of: OfTask, notify: Notify) -> Any:
        found, _ = await self._find(of.task)
        if isinstance(found, Task):
            raise KnodeError(
                Code.INVALID_ARGUMENT,
                "a direct task was sent to one node at once: there is nothing to explain",
                f"'knode task show {found.id[:8]}'",
            )
        if isinstance(found, Waiting):
            met = f" ({found.message})" if found.message else ""
            waits_for = f"the voters to take it{met}" if found.is_pending else ""
            return self._explained(self._document(found), waits_for)
        said = await self._node.durable.explain(found.id)
        given_back = "" if said.task.state.final else said.task.message
        return self._explained(
            self._document(said.task), said.waits_for, given_back, said.considered, said.now
        )

    async def _watch(self, of: OfTask, notify: Notify) -> Any:
        found, _ = await self._find(of.task)
        if isinstance(found, Task):
            return await _follow_direct(found, notify)
        return await self._follow_durable(found.id, notify)

    async def _cancel(self, of: OfTask, notify: Notify) -> Any:
        found, _ = await self._find(of.task)
        if isinstance(found, Task):
            await self._node.tasks.cancel(found)
            return found.document()
        return self._document(await self._node.durable.cancel(found.id))

    async def _effects(self, of: OfEffects, notify: Notify) -> Any:
        task = None
        if of.task is not None:
            found, _ = await self._find(of.task)
            if not isinstance(found, TaskView):
                return []
            task = found.id
        page = await self._node.durable.effects(task, after=of.after)
        if task is None and page.first > of.after + 1:
            notify({"dropped": page.first - 1, "since": page.since or None})
        if page.next is not None:
            notify({"next": page.next})
        return [effect_document(effect) for effect in page.effects]

    # Tasks by the start of their ids.

    async def _find(self, selector: str) -> tuple[Task | Waiting | TaskView, bool]:
        """Return the one task that fits, and whether nobody can know another state of it."""
        fitting: dict[str, Task | Waiting | TaskView] = {}
        is_confirmed = True
        fitting |= {row.id.hex(): row for row in self._node.outbox.rows()}
        fitting |= {task.id: task for task in self._node.tasks.list()}
        fitting = {id: task for id, task in fitting.items() if selector and id.startswith(selector)}
        if is_selector(selector):
            found = await self._node.durable.show(selector)
            is_confirmed = found.is_confirmed
            fitting |= {view.id.hex(): view for view in found.tasks}
        if not fitting:
            raise not_found(selector)
        if len(fitting) > 1:
            raise KnodeError(
                Code.INVALID_ARGUMENT, f"{selector!r} fits {len(fitting)} tasks", "give more of the id"
            )
        [task] = fitting.values()
        return task, is_confirmed or not isinstance(task, TaskView)

    async def _follow_durable(self, task: bytes, notify: Notify, known: TaskView | None = None) -> Any:
        """Pass on each change of a task until it has ended; leaving it changes nothing."""
        before: tuple[object, ...] = ()
        reports = 0
        last: TaskView | Waiting | None = None
        step: tuple[object, ...]
        async for last in self._node.following.follow(task, known):
            if isinstance(last, Waiting):
                step, text = ("pending",), f"pending: {last.message or 'not committed yet'}"
            else:
                node = name_of(self._roster, last.member)
                if last.report is not None and last.reports > reports:
                    notify(progress_document(last.report, node))
                reports = last.reports
                step, text = (last.state, last.attempt), f"{last.state}, attempt {last.attempt}"
            if step != before and not (isinstance(last, TaskView) and last.state.final):
                node = None if isinstance(last, Waiting) else name_of(self._roster, last.member)
                notify({"fraction": None, "text": text, "node": node})
            before = step
        assert last is not None
        return self._document(last)

    # Documents.

    @property
    def _roster(self) -> Roster:
        return self._node.membership.roster

    def _own_name(self) -> str | None:
        member = self._node.membership.own_if_member
        return member.name if member is not None else None

    def _document(self, task: Task | Waiting | TaskView) -> dict[str, Any]:
        match task:
            case Task():
                return task.document()
            case Waiting():
                return waiting_document(task, self._own_name())
            case TaskView():
                return task_document(task, self._roster)

    def _explained(
        self,
        document: dict[str, Any],
        waits_for: str,
        given_back: str = "",
        considered: tuple[Considered, ...] = (),
        now: tuple[Considered, ...] = (),
    ) -> dict[str, Any]:
        return {
            "task": document,
            "waits_for": waits_for or None,
            "given_back": given_back or None,
            "considered": [self._considered(one) for one in considered],
            "now": [self._considered(one) for one in now],
        }

    def _considered(self, one: Considered) -> dict[str, Any]:
        return {"node": name_of(self._roster, one.member), "score": one.score, "why": one.why or None}


async def _follow_direct(task: Task, notify: Notify) -> Any:
    """Pass on each report of a task once, until it has ended."""
    async for report in task.reports():
        notify(report)
    return task.document()
