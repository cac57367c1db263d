"""The KEEPALIVE frame: I am here, this is how busy I am, and how far you are.

It says nothing that anybody acts on for good, so it is not signed: the link's TLS guards it, as it guards
DATA. In return it costs a node a few microseconds, and fifty nodes can keep each other alive.
"""

from __future__ import annotations

from struct import Struct as Layout
from struct import error as OutOfRange

from msgspec import Struct

from knode.errors import Code, KnodeError
from knode.klp.frames import Kind

_LAYOUT = Layout(">BQQQHHHB")
KEEPALIVE_BYTES = _LAYOUT.size
_MOST_PERCENT = 100


class Load(Struct, frozen=True, gc=False):
    """How busy a node is.

    Args:
        running: attempts at work; this and the next two are at most 65,535.
        queued: attempts that wait.
        capacity: how many can be at work at once.
        cpu_percent: of all cores together, 0 to 100.
    """

    running: int
    queued: int
    capacity: int
    cpu_percent: int


class Keepalive(Struct, frozen=True, gc=False):
    """I am here. Round trip of the one who reads it: now - echo_us - held_us, on its own clock.

    Args:
        sent_us: the sender's monotonic clock, microseconds, from 1 on; never less than before.
        echo_us: the last `sent_us` that the sender got from the receiver; 0 for none.
        held_us: how long ago that was, microseconds.
    """

    sent_us: int
    echo_us: int
    held_us: int
    load: Load

    def frame(self) -> bytes:
        """Return the frame; INVALID_ARGUMENT when a number is out of its bounds."""
        load = self.load
        try:
            _check_bounds(self.sent_us, load.cpu_percent)
            return _LAYOUT.pack(
                Kind.KEEPALIVE,
                self.sent_us,
                self.echo_us,
                self.held_us,
                load.running,
                load.queued,
                load.capacity,
                load.cpu_percent,
            )
        except (OutOfRange, ValueError) as error:
            raise KnodeError(Code.INVALID_ARGUMENT, f"no keepalive of the protocol: {error}") from error


def read_keepalive(frame: bytes) -> Keepalive:
    """Return what a KEEPALIVE frame says; BAD_FRAME when it is none."""
    if len(frame) != KEEPALIVE_BYTES:
        raise KnodeError(Code.BAD_FRAME, "a KEEPALIVE frame of the wrong size")
    _, sent_us, echo_us, held_us, running, queued, capacity, cpu_percent = _LAYOUT.unpack(frame)
    try:
        _check_bounds(sent_us, cpu_percent)
    except ValueError as error:
        raise KnodeError(Code.BAD_FRAME, f"a KEEPALIVE frame with {error}") from error
    return Keepalive(sent_us, echo_us, held_us, Load(running, queued, capacity, cpu_percent))


def _check_bounds(sent_us: int, cpu_percent: int) -> None:
    if sent_us < 1 or cpu_percent > _MOST_PERCENT:
        raise ValueError("a number out of its bounds")
