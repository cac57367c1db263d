"""The world as one value, handed to the node once."""

from __future__ import annotations

from dataclasses import dataclass

from knode.world.blocking import Blocking
from knode.world.clock import Clock
from knode.world.disk import Disk
from knode.world.randomness import Randomness


@dataclass(frozen=True, slots=True)
class World:
    """Everything that a node takes from outside, but for its links."""

    clock: Clock
    randomness: Randomness
    disk: Disk
    blocking: Blocking
