"""The world of one simulated node: clocks, randomness and blocking work, all from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import sha256
from typing import TypeVar

import trio

from knode.world import Monotonic, Randomness, WallTime
from knode.world.real import BLOCKING_AT_ONCE

T = TypeVar("T")

EPOCH_MS = 1_767_225_600_000
"""When every simulation begins: 2026-01-01 00:00 UTC."""


class SimulatedClock:
    """trio's virtual time, and a wall clock that may be wrong and may jump."""

    def __init__(self, skew_s: float = 0.0) -> None:
        self.skew_s = skew_s
        """How far the wall clock is ahead of the simulation's time; change it to let it jump."""

    def monotonic(self) -> Monotonic:
        """Return the virtual time, in seconds."""
        return Monotonic(trio.current_time())

    def wall(self) -> WallTime:
        """Return what this node takes for the time of day, in milliseconds."""
        return WallTime(EPOCH_MS + round((trio.current_time() + self.skew_s) * 1000))


class SimulatedRandomness:
    """Randomness that is a function of the seed and of whose it is."""

    def __init__(self, seed: int, owner: str) -> None:
        digest = sha256(f"{seed}/{owner}".encode()).digest()
        self._random = random.Random(int.from_bytes(digest, "big"))

    def token(self, size: int) -> bytes:
        """Return `size` bytes."""
        return self._random.randbytes(size)

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high]."""
        return self._random.uniform(low, high)

    def choose(self, count: int) -> int:
        """Return a number in [0, count)."""
        return self._random.randrange(count)

    def happens(self, probability: float) -> bool:
        """Tell whether something of that probability happens."""
        return self._random.random() < probability


class SimulatedBlocking:
    """Blocking work done in place, at the end of a virtual delay. A real thread would be real time."""

    def __init__(self, randomness: Randomness, delay_s: Callable[[], tuple[float, float]]) -> None:
        self._randomness = randomness
        self._delay_s = delay_s
        self._limiter = trio.CapacityLimiter(BLOCKING_AT_ONCE)

    async def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; cancelling waits for it to end."""
        async with self._limiter:
            done_at = trio.current_time() + self._randomness.uniform(*self._delay_s())
            with trio.CancelScope(shield=True, deadline=done_at):
                await trio.sleep_forever()
            return work()
