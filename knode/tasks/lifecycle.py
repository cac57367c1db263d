"""The life of a task, durable or direct, as one table. What is not in the table does not happen.

A durable task's events are commands of the ledger (`knode.tasks.ledger`); a direct one's happen on the
node that submitted it. `pending` is no state: it is what the outbox calls a task that no ledger has yet.
"""

from __future__ import annotations

from enum import StrEnum

from knode.errors import Code


class State(StrEnum):
    """Where a task is."""

    QUEUED = "queued"
    ASSIGNED = "assigned"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    UNKNOWN = "unknown"
    """Of direct tasks alone: nobody can say whether it was done."""

    @property
    def final(self) -> bool:
        """Whether it stays so for ever."""
        return self not in (State.QUEUED, State.ASSIGNED)


class Event(StrEnum):
    """What can happen to a task."""

    SUBMITTED = "submitted"
    SENT = "sent directly"
    ASSIGNED = "assigned, next attempt"
    RELEASED = "lease lost, node gone or refuses"
    RETRIED = "failed, attempts left"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    LOST = "direct, no answer"


TRANSITIONS: dict[tuple[State | None, Event], State] = {
    (None, Event.SUBMITTED): State.QUEUED,
    (None, Event.SENT): State.ASSIGNED,
    (State.QUEUED, Event.ASSIGNED): State.ASSIGNED,
    (State.QUEUED, Event.CANCELLED): State.CANCELLED,
    (State.QUEUED, Event.DEADLINE): State.EXPIRED,
    (State.ASSIGNED, Event.RELEASED): State.QUEUED,
    (State.ASSIGNED, Event.RETRIED): State.QUEUED,
    (State.ASSIGNED, Event.COMPLETED): State.SUCCEEDED,
    (State.ASSIGNED, Event.FAILED): State.FAILED,
    (State.ASSIGNED, Event.CANCELLED): State.CANCELLED,
    (State.ASSIGNED, Event.DEADLINE): State.EXPIRED,
    (State.ASSIGNED, Event.LOST): State.UNKNOWN,
}

_EVENTS: dict[Code, Event] = {
    Code.CANCELLED: Event.CANCELLED,
    Code.EXPIRED: Event.DEADLINE,
    # Sent, and no answer: whether it ran, and how far, nobody can say.
    Code.TIMEOUT: Event.LOST,
    Code.UNKNOWN: Event.LOST,
}


def event_of(code: Code) -> Event:
    """Return what an error means for the direct task that met it."""
    return _EVENTS.get(code, Event.FAILED)


def diagram() -> str:
    """Return the table as a Mermaid diagram; the guide on tasks shows it."""
    lines = ["stateDiagram-v2"]
    for (state, event), after in TRANSITIONS.items():
        lines.append(f"    {state or '[*]'} --> {after}: {event}")
    lines += [f"    {state} --> [*]" for state in State if state.final]
    return "\n".join(lines)
