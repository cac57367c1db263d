"""How tasks of the ledger are shown: to other members as `TaskView`, to people and programs as documents."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from knode.mesh.roster import Roster
from knode.tasks.commands import MAX_REASON
from knode.tasks.lifecycle import State
from knode.tasks.messages import NO_FRACTION, Effect, Report, TaskView
from knode.tasks.outbox import Waiting
from knode.tasks.records import LedgerTask, TaskRecord
from knode.tasks.task import readable

PENDING = "pending"
"""What is shown for a task that is in no ledger yet, as far as is known."""

_ENDED_AS = {"EXPIRED": State.EXPIRED, "CANCELLED": State.CANCELLED}


def view_of(
    task: LedgerTask, result: bytes | None = None, report: Report | None = None, reports: int = 0
) -> TaskView:
    """Return a task as it is shown to members."""
    return TaskView(
        id=task.id,
        number=task.number,
        agent=task.agent,
        state=task.state,
        attempt=task.attempt,
        member=task.member,
        submitter=task.submitter,
        key=task.key,
        submitted=task.submitted,
        deadline=task.deadline,
        result=result,
        code=task.code,
        message=task.message[:MAX_REASON],
        reports=reports,
        report=report,
    )


def view_of_record(record: TaskRecord) -> TaskView:
    """Return a task that was read from the ledger."""
    return view_of(record.task, record.result)


def task_document(view: TaskView, roster: Roster, *, is_confirmed: bool = True) -> dict[str, Any]:
    """Return a task of the ledger as JSON has it."""
    error = None
    if view.state.final and view.state is not State.SUCCEEDED:
        error = {"code": view.code, "message": view.message, "next": ""}
    return {
        "id": view.id.hex(),
        "agent": view.agent,
        "state": view.state,
        "attempt": view.attempt,
        "node": name_of(roster, view.member),
        "key": view.key,
        "result": None if view.result is None else readable(view.result),
        "error": error,
        "direct": False,
        "submitted": view.submitted,
        "submitter": name_of(roster, view.submitter),
        "deadline": view.deadline,
        "confirmed": is_confirmed,
    }


def waiting_document(waiting: Waiting, submitter: str | None) -> dict[str, Any]:
    """Return a task of this node's outbox as JSON has it."""
    error = None
    if waiting.code:
        error = {"code": waiting.code, "message": waiting.message, "next": ""}
    state: str = PENDING
    if not waiting.is_pending:
        state = _ENDED_AS.get(waiting.code, State.FAILED)
    return {
        "id": waiting.id.hex(),
        "agent": waiting.agent,
        "state": state,
        "attempt": 0,
        "node": None,
        "key": waiting.key,
        "result": None,
        "error": error,
        "direct": False,
        "submitted": waiting.submitted,
        "submitter": submitter,
        "deadline": waiting.not_after,
        "confirmed": False,
    }


def effect_document(effect: Effect) -> dict[str, Any]:
    """Return an operation that a task left as JSON has it."""
    return {
        "sequence": effect.sequence,
        "task": effect.task.hex(),
        "attempt": effect.attempt,
        "operation": _operation(effect.operation),
        "place": effect.place,
        "incarnation": effect.incarnation.hex(),
        "time": effect.time,
    }


def _operation(data: bytes) -> Any:
    """Return the JSON value that an agent gave; whatever else it may be as a result is shown."""
    shown = readable(data)
    if isinstance(shown, str):
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(shown, type=str | float | int | bool | None)
    return shown


def progress_document(report: Report, node: str | None) -> dict[str, Any]:
    """Return how far an attempt is as JSON has it."""
    fraction = None if report.permille == NO_FRACTION else report.permille / 1000
    return {"fraction": fraction, "text": report.text, "node": node}


def name_of(roster: Roster, member: bytes) -> str | None:
    """Return what a member, by its raw id, is called; its id when it is none any more."""
    if not member:
        return None
    found = roster.holders.get(member)
    return found.name if found is not None else roster.revoked.get(member) or member.hex()
