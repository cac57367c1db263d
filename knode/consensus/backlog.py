"""How long the applied part of the log may grow, and how much of it stays for followers that are behind.

Pure: no loop, no disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from knode.consensus.log import size_of
from knode.consensus.messages import Entry, Index

LONG_ENTRIES = 10_000
LONG_BYTES = 8 * 1024 * 1024
"""Longer, and it is compacted."""
KEPT_ENTRIES = 5_000
KEPT_BYTES = 4 * 1024 * 1024
"""At most so much of it stays."""


class Backlog:
    """The sizes of the entries that are applied and not compacted.

    Args:
        snapshot: index of the log's snapshot.
    """

    def __init__(self, snapshot: Index) -> None:
        self._snapshot = snapshot
        self._sizes: deque[int] = deque()
        self._bytes = 0

    @property
    def is_long(self) -> bool:
        """Whether the log should be compacted."""
        return len(self._sizes) > LONG_ENTRIES or self._bytes > LONG_BYTES

    def extend(self, entries: Iterable[Entry]) -> None:
        """Note that these entries, which follow, are applied."""
        for entry in entries:
            size = size_of(entry)
            self._sizes.append(size)
            self._bytes += size

    def unneeded(self) -> Index:
        """Return up to which index nothing need stay."""
        kept, kept_bytes = 0, 0
        for size in reversed(self._sizes):
            kept_bytes += size
            if kept == KEPT_ENTRIES or kept_bytes > KEPT_BYTES:
                break
            kept += 1
        return self._snapshot + len(self._sizes) - kept

    def forget(self, index: Index) -> None:
        """Note that the log begins behind `index` now."""
        while self._snapshot < index:
            self._snapshot += 1
            self._bytes -= self._sizes.popleft()
