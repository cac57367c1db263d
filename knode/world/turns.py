"""Waiting for one's turn."""

from __future__ import annotations

from types import TracebackType

import trio


class Turns:
    """At most so many are inside `async with turns:` at once; the rest wait, in the order in which they came.

    A free place is taken at once. `trio.Lock` and its like let the loop go round even then, which costs more
    than much of what is done inside. So entering notices a cancellation only when it waits.
    """

    def __init__(self, at_once: int = 1) -> None:
        self._places = trio.Semaphore(at_once)

    def locked(self) -> bool:
        """Tell whether who comes now must wait."""
        return not self._places.value

    async def __aenter__(self) -> None:
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            await self._places.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._places.release()
