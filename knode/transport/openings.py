"""How many connections are being opened at once, and for how long each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

OPENINGS_AT_ONCE = 64


class Openings:
    """Places for connections in their opening.

    When all are taken, the oldest makes room: an honest one takes milliseconds, so who holds connections
    open without a word shuts nobody out.
    """

    def __init__(self) -> None:
        self._scopes: dict[trio.CancelScope, None] = {}

    @contextmanager
    def take(self, seconds: float) -> Iterator[None]:
        """Hold a place; what is inside is cancelled when it takes too long, or another needs the place."""
        if len(self._scopes) == OPENINGS_AT_ONCE:
            oldest = next(iter(self._scopes))
            del self._scopes[oldest]
            oldest.cancel()
        with trio.move_on_after(seconds) as scope:
            self._scopes[scope] = None
            try:
                yield
            finally:
                self._scopes.pop(scope, None)
