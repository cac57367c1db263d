"""Bad wires: frames between pairs of TAP devices, with delay, jitter and loss drawn from a seed."""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from random import Random
from typing import BinaryIO

from knode.testnet.topology import Wire

QUEUED_FRAMES = 4096
"""How many frames are on their way in one direction; more are lost, as in a router."""
_FRAME_BYTES = 65536


class Direction:
    """One direction of a wire: frames in, and the same ones out, later, in order, or never. Pure.

    The same seed gives the same frames the same fate. Times are monotonic seconds.
    """

    def __init__(self, wire: Wire, seed: str) -> None:
        self.lost = 0
        """Frames that the wire lost, as it was told to."""
        self.overflowed = 0
        """Frames that were lost because too many were on their way."""
        self._wire = wire
        self._random = Random(seed)
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._last_arrival = -inf

    @property
    def next_arrival(self) -> float:
        """When the next frame comes out; infinity when none is on its way."""
        return self._under_way[0][0] if self._under_way else inf

    def put(self, frame: bytes, now: float) -> None:
        """Let a frame set out."""
        is_lost = self._random.random() < self._wire.loss
        low_ms, high_ms = self._wire.delay_ms
        arrival = now + self._random.uniform(low_ms, high_ms) / 1000
        if is_lost:
            self.lost += 1
        elif len(self._under_way) >= QUEUED_FRAMES:
            self.overflowed += 1
        else:
            self._last_arrival = max(self._last_arrival, arrival)
            self._under_way.append((self._last_arrival, frame))

    def arrived(self, now: float) -> Iterator[bytes]:
        """Take out the frames that have come to the end of it."""
        while self._under_way and self._under_way[0][0] <= now:
            yield self._under_way.popleft()[1]


@dataclass(frozen=True, slots=True)
class _Lane:
    source: BinaryIO
    direction: Direction
    sink: BinaryIO


def carry(wires: Sequence[tuple[Wire, BinaryIO, BinaryIO]], seed: int) -> None:
    """Carry frames for ever, between the two non-blocking devices of each wire."""
    selector = selectors.DefaultSelector()
    lanes = []
    for number, (wire, one, other) in enumerate(wires):
        for source, sink, way in ((one, other, "out"), (other, one, "in")):
            lane = _Lane(source, Direction(wire, f"{seed} {number} {way}"), sink)
            selector.register(source, selectors.EVENT_READ, lane)
            lanes.append(lane)
    while True:
        next_arrival = min((lane.direction.next_arrival for lane in lanes), default=inf)
        wait_s = None if next_arrival == inf else max(0.0, next_arrival - time.monotonic())
        for key, _ in selector.select(wait_s):
            with suppress(BlockingIOError):
                while frame := key.data.source.read(_FRAME_BYTES):
                    key.data.direction.put(frame, time.monotonic())
        for lane in lanes:
            for frame in lane.direction.arrived(time.monotonic()):
                with suppress(BlockingIOError):  # the kernel's queue is full: it is lost, as in a router
                    lane.sink.write(frame)
