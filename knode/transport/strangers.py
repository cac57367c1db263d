"""Which of the log lines that strangers cause are written: nobody from outside sets the log's pace."""

from __future__ import annotations

import math

WINDOW_S = 60.0
HOSTS = 64
"""How many of them have a line in one window."""


class StrangerLines:
    """Lets through the first line about each host in a minute, and counts the others. Pure."""

    def __init__(self) -> None:
        self._window_ends = -math.inf
        self._hosts: set[str] = set()
        self._left_out = 0

    def admit(self, address: str, now: float) -> int | None:
        """Say whether a line about `address` (`host:port`) is written at `now`, monotonic seconds.

        Returns:
            None to leave it out; else how many were left out since the last one that was written.
        """
        if now >= self._window_ends:
            self._window_ends = now + WINDOW_S
            self._hosts.clear()
        host = address.rpartition(":")[0]  # each dial of one host comes from another port
        if host in self._hosts or len(self._hosts) >= HOSTS:
            self._left_out += 1
            return None
        self._hosts.add(host)
        left_out, self._left_out = self._left_out, 0
        return left_out
