"""Was what clients saw possible with one copy of the data, changed at one moment each? A checker.

The algorithm of Wing and Gong (1993), with the cache of states of Lowe (2017): operations are put in an
order that respects real time, each step allowed by a model, and a set of operations that led to the
same state is tried once.

Linearizability is local (Herlihy and Wing 1990, theorem 1): a history is linearizable when the part of
it that is about each object is. So a history is cut by object first, and each part stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)
A = TypeVar("A")

MOST_OPERATIONS = 64
"""About one object; what is to be decided grows exponentially in those that overlap."""


@dataclass(frozen=True, slots=True)
class Operation(Generic[A]):
    """Something that a client asked for, and when it knew the answer."""

    action: A
    """What was asked and what was answered, as the model takes it."""
    called_at: float
    returned_at: float | None
    """None: no answer ever came, so it took effect at any later moment, or never."""


def is_linearizable(
    operations: Sequence[Operation[A]], initial: S, step: Callable[[S, A], Iterable[S]]
) -> bool:
    """Tell whether some order of the operations explains all the answers.

    Args:
        operations: about one object, in any order; at most MOST_OPERATIONS.
        initial: the object's first state.
        step: the model: the states in which the object may be after an action with its answer, none when
            the answer is impossible in that state. What the object does by itself may happen within a step.

    Raises:
        ValueError: there are too many operations to decide.
    """
    if len(operations) > MOST_OPERATIONS:
        raise ValueError(f"{len(operations)} operations on one object are too many to check")
    ordered = sorted(operations, key=lambda operation: operation.called_at)
    answered = sum(1 << i for i, each in enumerate(ordered) if each.returned_at is not None)
    seen = {(0, initial)}
    waiting = [(0, initial)]
    while waiting:
        done, state = waiting.pop()
        if done & answered == answered:
            return True
        for number in _next(ordered, done):
            for after in step(state, ordered[number].action):
                reached = (done | 1 << number, after)
                if reached not in seen:
                    seen.add(reached)
                    waiting.append(reached)
    return False


def _next(ordered: Sequence[Operation[A]], done: int) -> list[int]:
    """Return which operations may come next: those called before any other that is left had returned."""
    left = [i for i in range(len(ordered)) if not done >> i & 1]
    returns = [at for i in left if (at := ordered[i].returned_at) is not None]
    return [i for i in left if ordered[i].called_at <= min(returns, default=float("inf"))]
