"""How fast a member ends its attempts, and so how many it is given ahead of time.

A member that runs two attempts at once, and ends each within milliseconds, would mostly wait for the next
commit. It is given some more than it can run, which wait there; but none as soon as one takes long, for what
waits there cannot run elsewhere.

Pure: no clock.
"""

from __future__ import annotations

AHEAD = 8
"""How many times its capacity a quick member may have."""
MOST_AHEAD = 48
"""Attempts that a member is given in all, when that is more than its capacity: it queues 64 unless told."""
SHORT_S = 0.25
"""From its assignment to its end, on average."""
LONG_S = 0.75
"""An attempt that has taken so long says that the next ones may, too."""
ENOUGH = 8
_WEIGHT = 0.1
"""Of the latest attempt in the average."""


class Pace:
    """One member's. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._began: dict[bytes, float] = {}
        self._average_s = 0.0
        self._ended = 0

    def begin(self, task: bytes, now: float) -> None:
        """Note that an attempt was assigned."""
        self._began[task] = now

    def end(self, task: bytes, now: float, *, is_done: bool) -> None:
        """Note that an attempt is over; `is_done`: by itself, so that it says how long one takes."""
        began = self._began.pop(task, None)
        if began is None or not is_done:
            return
        self._ended += 1
        weight = max(_WEIGHT, 1 / self._ended)
        self._average_s += weight * (now - began - self._average_s)

    def room(self, capacity: int, now: float) -> int:
        """Return how many attempts it may have at once."""
        oldest = next(iter(self._began.values()), now)
        if self._ended < ENOUGH or self._average_s > SHORT_S or now - oldest > LONG_S:
            return capacity
        return max(capacity, min(AHEAD * capacity, MOST_AHEAD))
