"""The tasks that wait for a member, as the leader keeps them in mind: in order, by what they need.

Pure: no clock. Times are the ledger's, in milliseconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from knode.tasks.records import LedgerTask

SPARE = 64
"""Of tasks that wait no more, and of the rest twice as many: kept under one need before they are cleared."""


class Need(NamedTuple):
    """What a task needs: whoever can run one that needs the same can run this one."""

    agent: str
    on: bytes


class Queue:
    """Tasks by their needs, each in the order of submission; those that wait for their time apart."""

    def __init__(self) -> None:
        self._ready: dict[Need, list[tuple[int, bytes]]] = {}
        self._later: list[tuple[int, int, bytes]] = []
        self._tasks: dict[bytes, LedgerTask] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: LedgerTask, not_before: int = 0) -> None:
        """Add a queued task, or note that it is another now."""
        self._tasks[task.id] = task
        heapq.heappush(self._later, (max(task.not_before, not_before), task.number, task.id))

    def remove(self, task: bytes) -> None:
        """Take a task out, when it is there."""
        self._tasks.pop(task, None)

    def advance(self, now: int) -> None:
        """Note the time: who has waited for it is ready."""
        while self._later and self._later[0][0] <= now:
            _, number, id = heapq.heappop(self._later)
            task = self._tasks.get(id)
            if task is not None:
                ready = self._ready.setdefault(need_of(task), [])
                heapq.heappush(ready, (number, id))
                if len(ready) > 2 * len(self._tasks) + SPARE:
                    ready[:] = sorted({each for each in ready if each[1] in self._tasks})

    @property
    def next_at(self) -> int | None:
        """When the next one will be ready; None when no one waits for its time."""
        while self._later and self._later[0][2] not in self._tasks:
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else None

    def needs(self) -> list[Need]:
        """Return what ready tasks need; the need of the one that was submitted first comes first."""
        for need in [need for need in self._ready if self.first(need) is None]:
            del self._ready[need]
        return sorted(self._ready, key=lambda need: self._ready[need][0])

    def first(self, need: Need) -> LedgerTask | None:
        """Return the first ready task with this need."""
        return next(self._living(need), None)

    def _living(self, need: Need) -> Iterator[LedgerTask]:
        heap = self._ready.get(need, [])
        while heap:
            task = self._tasks.get(heap[0][1])
            if task is not None:
                yield task
            heapq.heappop(heap)


def need_of(task: LedgerTask) -> Need:
    """Return what a task needs."""
    return Need(task.agent, task.on)
