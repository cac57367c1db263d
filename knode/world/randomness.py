"""Randomness, injected so that a simulated run can be repeated."""

from __future__ import annotations

from typing import Protocol


class Randomness(Protocol):
    """A source of random bytes and of jitter."""

    def token(self, size: int) -> bytes:
        """Return `size` bytes fit for keys and nonces."""
        ...

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high], for jitter only."""
        ...
