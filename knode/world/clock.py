"""Time, in two kinds that never mix."""

from __future__ import annotations

from typing import NewType, Protocol

Monotonic = NewType("Monotonic", float)
"""Seconds on a clock that only goes forward; its zero means nothing. The same clock as trio's, so a
deadline can be given to `trio.CancelScope`."""

WallTime = NewType("WallTime", int)
"""Milliseconds since 1970-01-01 UTC. May jump; serves only certificates, tickets, statements and logs."""


class Clock(Protocol):
    """Both clocks of a node."""

    def monotonic(self) -> Monotonic:
        """Return seconds for durations and deadlines; never goes back."""
        ...

    def wall(self) -> WallTime:
        """Return the time of day; may jump either way."""
        ...
