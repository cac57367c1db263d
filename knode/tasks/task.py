"""A direct task, as the node that submitted it sees it."""

from __future__ import annotations

from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from knode.agents.limits import is_too_deep
from knode.errors import KnodeError
from knode.tasks.lifecycle import TRANSITIONS, Event, State, event_of

MAX_PROGRESS = 100
"""Reports kept for whoever begins to watch late."""


@dataclass(eq=False)
class Task:
    """One task and how it ended."""

    id: str
    """32 hexadecimal digits."""
    agent: str
    node_id: str
    node: str
    """Name of the node that runs it."""
    submitted: int
    """Wall time, milliseconds."""
    state: State = State.ASSIGNED
    output: bytes | None = None
    error: KnodeError | None = None
    progress: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_PROGRESS))
    reported: int = 0
    """Reports so far, with those that are not kept any more."""
    changed: trio.Event = field(default_factory=trio.Event)

    def report(self, fraction: float | None, text: str) -> None:
        """Keep a report of the attempt; only the last hundred are kept."""
        self.reported += 1
        self.progress.append({"fraction": fraction, "text": text, "node": self.node})
        self._tell()

    def succeed(self, output: bytes) -> None:
        """End it with the agent's output."""
        self._move(Event.COMPLETED)
        self.output = output
        self._tell()

    def fail(self, error: KnodeError) -> None:
        """End it with an error, whose code says how."""
        self._move(event_of(error.code))
        self.error = error.bare()
        self._tell()

    async def ended(self) -> None:
        """Return once the state is final."""
        while not self.state.final:
            await self.changed.wait()

    async def reports(self) -> AsyncIterator[dict[str, Any]]:
        """Give the kept reports and then new ones, each once, until the task has ended."""
        given = 0
        while True:
            changed, final = self.changed, self.state.final
            lag = min(self.reported - given, len(self.progress))
            for report in list(self.progress)[len(self.progress) - lag :]:
                yield report
            given = self.reported
            if final:
                return
            await changed.wait()

    def document(self) -> dict[str, Any]:
        """Return the task as JSON has it; a direct task has one attempt and no key."""
        error = None
        if self.error is not None:
            error = {"code": self.error.code, "message": self.error.message, "next": self.error.next_step}
        return {
            "id": self.id,
            "agent": self.agent,
            "state": self.state,
            "attempt": 1,
            "node": self.node,
            "key": None,
            "result": None if self.output is None else readable(self.output),
            "error": error,
            "direct": True,
            "submitted": self.submitted,
            "submitter": None,
            "deadline": None,
            "confirmed": True,
        }

    def _move(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


def readable(output: bytes) -> Any:
    """Return an object or array for JSON output, text for text, base64 for the rest.

    JSON that goes deeper than MAX_JSON_DEPTH, or that cannot be written again, is text: an agent must not be
    able to make a program that lists tasks stumble.
    """
    try:
        text = output.decode()
    except UnicodeDecodeError:
        return {"base64": b64encode(output).decode()}
    if text.lstrip()[:1] in ("{", "["):
        try:
            value = msgspec.json.decode(output)
            if not is_too_deep(value):
                msgspec.json.encode(value)
                return value
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
            return text
    return text
