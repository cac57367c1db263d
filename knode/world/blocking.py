"""Work that would block the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Blocking(Protocol):
    """Runs blocking functions without blocking the loop."""

    async def run(self, work: Callable[[], T]) -> T:
        """Return what `work()` returns.

        A thread in production; inline, after a virtual delay, in the simulator. Cancelling waits for
        `work` to end: what it did is done. At most 16 run at once, the rest wait.
        """
        ...
