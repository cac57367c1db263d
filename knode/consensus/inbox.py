"""What has come in and waits, with a share for each sender: one that sends much crowds out nobody else.

Pure: no loop.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from knode.consensus.configuration import gets_log
from knode.consensus.messages import Configuration, ReplicaId

T = TypeVar("T")

OTHERS = b""
"""Whose share all have together that the configuration does not name: anybody can make up many."""


def share_of(configuration: Configuration, sender: ReplicaId) -> bytes:
    """Return whose share a replica's messages are of."""
    return sender if gets_log(configuration, sender) else OTHERS


class Inbox(Generic[T]):
    """Items in the order in which they came.

    Args:
        most: items of one share that wait.
        most_bytes: of these, together.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._items: deque[tuple[bytes, T, int]] = deque()
        self._shares: dict[bytes, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def put(self, share: bytes, item: T, size_bytes: int) -> bool:
        """Add an item; False when its share is full: it was not added."""
        count, used = self._shares.get(share, (0, 0))
        if count >= self._most or used + size_bytes > self._most_bytes:
            return False
        self._shares[share] = (count + 1, used + size_bytes)
        self._items.append((share, item, size_bytes))
        return True

    def take(self) -> T:
        """Return the item that has waited longest; there is one."""
        share, item, size_bytes = self._items.popleft()
        count, used = self._shares.pop(share)
        if count > 1:
            self._shares[share] = (count - 1, used - size_bytes)
        return item

    def clear(self) -> None:
        """Drop all."""
        self._items.clear()
        self._shares.clear()
