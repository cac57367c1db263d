"""Which of the log lines that others cause are written: nobody from outside sets the log's pace."""

from __future__ import annotations

import math
from collections import Counter

WINDOW_S = 60.0
HOSTS = 64
"""How many of them have a line in one window."""


class LineLimit:
    """Lets through the first `each` lines about each source in a minute, and counts the others. Pure.

    Args:
        sources: how many of them have lines in one minute.
    """

    def __init__(self, *, each: int, sources: int) -> None:
        self._each = each
        self._most_sources = sources
        self._window_ends = -math.inf
        self._written: Counter[str] = Counter()
        self._left_out = 0

    def admit(self, source: str, now: float) -> int | None:
        """Say whether a line about `source` is written at `now`, monotonic seconds.

        Returns:
            None to leave it out; else how many were left out since the last one that was written.
        """
        if now >= self._window_ends:
            self._window_ends = now + WINDOW_S
            self._written.clear()
        is_new = source not in self._written
        if self._written[source] >= self._each or (is_new and len(self._written) >= self._most_sources):
            self._left_out += 1
            return None
        self._written[source] += 1
        left_out, self._left_out = self._left_out, 0
        return left_out


class StrangerLines:
    """One line about each host in a minute, whatever its port: each dial of one host comes from another."""

    def __init__(self) -> None:
        self._limit = LineLimit(each=1, sources=HOSTS)

    def admit(self, address: str, now: float) -> int | None:
        """Say whether a line about `address` (`host:port`) is written; see `LineLimit.admit`."""
        return self._limit.admit(address.rpartition(":")[0], now)
