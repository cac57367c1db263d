"""The life of a direct task, as a table. What is not in the table does not happen."""

from __future__ import annotations

from enum import StrEnum

from knode.errors import Code


class State(StrEnum):
    """Where a task is."""

    ASSIGNED = "assigned"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    UNKNOWN = "unknown"

    @property
    def final(self) -> bool:
        """Whether it stays so for ever."""
        return self is not State.ASSIGNED


class Outcome(StrEnum):
    """What can happen to a task."""

    COMPLETED = "completed"
    AGENT_OR_MESH_FAILED = "failed"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    LOST = "lost"


TRANSITIONS: dict[tuple[State, Outcome], State] = {
    (State.ASSIGNED, Outcome.COMPLETED): State.SUCCEEDED,
    (State.ASSIGNED, Outcome.AGENT_OR_MESH_FAILED): State.FAILED,
    (State.ASSIGNED, Outcome.CANCELLED): State.CANCELLED,
    (State.ASSIGNED, Outcome.DEADLINE): State.EXPIRED,
    (State.ASSIGNED, Outcome.LOST): State.UNKNOWN,
}

_OUTCOMES: dict[Code, Outcome] = {
    Code.CANCELLED: Outcome.CANCELLED,
    Code.EXPIRED: Outcome.DEADLINE,
    # Sent, and no answer: whether it ran, and how far, nobody can say.
    Code.TIMEOUT: Outcome.LOST,
    Code.UNKNOWN: Outcome.LOST,
}


def outcome_of(code: Code) -> Outcome:
    """Return what an error means for the task that met it."""
    return _OUTCOMES.get(code, Outcome.AGENT_OR_MESH_FAILED)
