"""What a node takes from outside: clocks, randomness, disk, and threads for blocking work.

The real world is in `real`; the simulator brings its own. Nothing else in the package may ask the
operating system for time, randomness or files on a path that the simulator runs. The network, too,
comes from outside: as carriers (`knode.transport`).
"""

from knode.world.blocking import Blocking
from knode.world.clock import Clock, Monotonic, WallTime
from knode.world.disk import Disk, WritableFile
from knode.world.log import Log, SilentLog
from knode.world.randomness import Randomness
from knode.world.turns import Turns
from knode.world.world import World

__all__ = [
    "Blocking",
    "Clock",
    "Disk",
    "Log",
    "Monotonic",
    "Randomness",
    "SilentLog",
    "Turns",
    "WallTime",
    "World",
    "WritableFile",
]
