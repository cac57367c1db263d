"""What happened in a run, as a hash over everything that the nodes said and the network drew."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from hashlib import sha256
from struct import Struct
from typing import Any

import trio

from knode.simulation.world import SimulatedRandomness

_DRAW = Struct(">dd")
Line = dict[str, Any]
Reader = Callable[[str, Line], None]


class Trace:
    """The events of a run, in order. Two runs are the same when their hashes are.

    Args:
        show: called with each line of the nodes' logs, as text; None: nobody looks.
    """

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self.events = 0
        self.readers: list[Reader] = []
        """Called with each line: whose it is, and the line. They must not raise."""
        self._show = show
        self._hash = sha256()

    @property
    def hash(self) -> str:
        """The hash of all events so far, in hexadecimal."""
        return self._hash.hexdigest()

    def note(self, owner: str, event: str, **fields: Any) -> None:
        """Add a line: what `owner` did or what was done to it, now."""
        line = {"at": round(trio.current_time(), 6), "by": owner, "event": event, **fields}
        text = json.dumps(line, sort_keys=True, default=str)
        self.mark(text.encode())
        if self._show is not None:
            self._show(text)
        for read in self.readers:
            read(owner, line)

    def mark(self, data: bytes) -> None:
        """Add an event that is no line."""
        self.events += 1
        self._hash.update(len(data).to_bytes(4, "big") + data)


class TracedLog:
    """The log of one node: every line of it goes to the trace."""

    def __init__(self, trace: Trace, owner: str) -> None:
        self._trace = trace
        self._owner = owner

    def debug(self, event: str, **fields: Any) -> None:
        """Add a line of this level."""
        self._add("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Add a line of this level."""
        self._add("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Add a line of this level."""
        self._add("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Add a line of this level."""
        self._add("error", event, fields)

    def _add(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if fields.pop("exc_info", False):
            # The stack would name this machine's paths.
            fields["error"] = repr(sys.exc_info()[1])
        self._trace.note(self._owner, event, level=level, **fields)


class TracedRandomness(SimulatedRandomness):
    """The network's randomness: each draw is a frame on its way, so each goes to the trace."""

    def __init__(self, seed: int, owner: str, trace: Trace) -> None:
        super().__init__(seed, owner)
        self._trace = trace

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high]."""
        drawn = super().uniform(low, high)
        self._trace.mark(_DRAW.pack(trio.current_time(), drawn))
        return drawn
