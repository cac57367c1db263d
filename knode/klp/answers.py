"""At most once: what a node remembers of the requests that it was asked.

A request is known by (source key, source boot, counter), whatever link brought it. The first time it is
`Fresh` and the caller runs it; asked again it is `Running` or `Answered`; once its answer is forgotten it
is refused with UNKNOWN, never run again.

Forgetting an answer does not forget that the request was run. For each (source, boot) a window holds one
bit for each of the last 4,096 counters; what lies below the window is refused as if it had been seen. So
nothing runs twice, at the price that a request which 4,096 later ones have overtaken is not run at all.

A window is forgotten `MAX_TTL_MS + ANSWER_GRACE_MS` after its last request. That is safe, for a source
asks no request again after its ttl, and a link that is silent for seconds is dead with all that is in it.
A request that names another boot of this node is UNKNOWN: the boot that it names may have run it.

Bounded for each source and for all: a source that never acknowledges is the first that it hurts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from knode.errors import Code
from knode.klp import limits
from knode.klp.messages import Answer, Request, Response

_WINDOW_MASK = (1 << limits.ANSWERS) - 1
_HISTORY_SECONDS = (limits.MAX_TTL_MS + limits.ANSWER_GRACE_MS) / 1000
_ENTRY_BYTES = 256  # what a kept answer costs beside its body


@dataclass(frozen=True, slots=True)
class Fresh:
    """Run it, then call `finish`."""


@dataclass(frozen=True, slots=True)
class Running:
    """It runs; its answer will go to whoever waits for it."""


@dataclass(frozen=True, slots=True)
class Answered:
    """It was run; this is the answer."""

    message: Answer


@dataclass(frozen=True, slots=True)
class Refused:
    """It is not run: UNKNOWN or RATE_LIMITED, with why."""

    code: Code
    reason: str


Verdict: TypeAlias = Fresh | Running | Answered | Refused

_FRESH = Fresh()
_RUNNING = Running()


@dataclass(slots=True)
class _Entry:
    """A request that runs, or its answer."""

    expires: float
    answer: Answer | None = None
    acknowledged: bool = False


@dataclass(slots=True)
class _History:
    """The counters of one boot of a source, and its entries."""

    last_request: float
    highest: int = 0
    seen: int = 0
    """Bit n stands for the counter `highest - n`."""
    entries: dict[int, _Entry] = field(default_factory=dict)

    def has_seen(self, counter: int) -> bool:
        """Tell whether this counter was run, or lies below what is remembered."""
        if counter > self.highest:
            return False
        age = self.highest - counter
        return age >= limits.ANSWERS or bool(self.seen >> age & 1)

    def note(self, counter: int) -> None:
        """Remember that this counter is run."""
        if counter <= self.highest:
            self.seen |= 1 << (self.highest - counter)
            return
        gap = counter - self.highest
        # never shift by what a stranger chose: a gap of 2^63 would be 2^63 bits
        self.seen = (self.seen << gap & _WINDOW_MASK if gap < limits.ANSWERS else 0) | 1
        self.highest = counter


@dataclass(slots=True)
class _Source:
    """What one source has in memory, over all its boots."""

    histories: dict[bytes, _History] = field(default_factory=dict)
    entries: int = 0
    answer_bytes: int = 0


class Answers:
    """The requests that one boot of a node was asked.

    Args:
        boot: this node's, 16 bytes.

    `now` is monotonic, in seconds, and never goes back.
    """

    def __init__(self, boot: bytes) -> None:
        self._boot = boot
        self._sources: dict[bytes, _Source] = {}
        self._histories = 0
        self._entries = 0
        self._answer_bytes = 0

    def begin(self, source: bytes, source_boot: bytes, request: Request, now: float) -> Verdict:
        """Say what to do with a request.

        A request that is refused with RATE_LIMITED was not noted: it may be asked again.
        """
        if request.destination_boot != self._boot:
            return Refused(Code.UNKNOWN, "the node restarted since it was first asked")
        known = self._sources.get(source)
        history = known.histories.get(source_boot) if known else None
        if history is not None:
            entry = history.entries.get(request.counter)
            if entry is not None and not entry.acknowledged:
                return _RUNNING if entry.answer is None else Answered(entry.answer)
            if history.has_seen(request.counter):
                return Refused(Code.UNKNOWN, "the request is an old one, whose answer is forgotten")
        full = self._full(known, history)
        if full:
            return Refused(Code.RATE_LIMITED, full)
        if known is None:
            known = self._sources[source] = _Source()
        if history is None:
            history = known.histories[source_boot] = _History(last_request=now)
            self._histories += 1
        history.note(request.counter)
        history.last_request = now
        expires = now + (request.ttl_ms + limits.ANSWER_GRACE_MS) / 1000
        history.entries[request.counter] = _Entry(expires)
        known.entries += 1
        self._entries += 1
        return _FRESH

    def finish(self, source: bytes, source_boot: bytes, counter: int, message: Answer, now: float) -> None:
        """Keep the answer of a request that was Fresh, unless nobody waits for it or there is no room.

        Without room the answer is still sent once, by the caller; asked again the request is UNKNOWN.
        """
        known = self._sources[source]
        entry = known.histories[source_boot].entries[counter]
        assert entry.answer is None, "a request is finished once"
        size = _size_of(message)
        if (
            entry.acknowledged
            or now >= entry.expires
            or known.answer_bytes + size > limits.ANSWERS_BYTES // limits.SOURCE_SHARE
            or self._answer_bytes + size > limits.ANSWERS_BYTES
        ):
            self._forget(known, source_boot, counter)
            return
        entry.answer = message
        known.answer_bytes += size
        self._answer_bytes += size

    def acknowledge(self, source: bytes, source_boot: bytes, counters: tuple[int, ...]) -> None:
        """Forget answers that the source has. One that still runs is forgotten when it is finished."""
        known = self._sources.get(source)
        history = known.histories.get(source_boot) if known else None
        if known is None or history is None:
            return
        for counter in counters:
            entry = history.entries.get(counter)
            if entry is None:
                continue
            if entry.answer is None:
                entry.acknowledged = True
            else:
                self._forget(known, source_boot, counter)

    def expire(self, now: float) -> None:
        """Forget answers past their time, and sources of which nothing is left. Call it every few seconds."""
        for source, known in list(self._sources.items()):
            for boot, history in list(known.histories.items()):
                old = [n for n, entry in history.entries.items() if entry.answer and now >= entry.expires]
                for counter in old:
                    self._forget(known, boot, counter)
                if not history.entries and now >= history.last_request + _HISTORY_SECONDS:
                    del known.histories[boot]
                    self._histories -= 1
            if not known.histories:
                del self._sources[source]

    def _full(self, known: _Source | None, history: _History | None) -> str:
        """Say which limit is reached; empty when none is."""
        if self._entries >= limits.ANSWERS or self._answer_bytes >= limits.ANSWERS_BYTES:
            return "the node keeps as many answers as it can"
        if known is not None and (
            known.entries >= limits.ANSWERS // limits.SOURCE_SHARE
            or known.answer_bytes >= limits.ANSWERS_BYTES // limits.SOURCE_SHARE
        ):
            return "too many requests of this source run or wait to be acknowledged"
        if history is None and (
            self._histories >= limits.MAX_HISTORIES
            or (known is not None and len(known.histories) >= limits.MAX_BOOTS)
        ):
            return "the source restarted too often in the last minutes"
        return ""

    def _forget(self, known: _Source, source_boot: bytes, counter: int) -> None:
        entry = known.histories[source_boot].entries.pop(counter)
        known.entries -= 1
        self._entries -= 1
        if entry.answer is not None:
            size = _size_of(entry.answer)
            known.answer_bytes -= size
            self._answer_bytes -= size


def _size_of(answer: Answer) -> int:
    if isinstance(answer, Response):
        return _ENTRY_BYTES + len(answer.body)
    return _ENTRY_BYTES + 4 * (len(answer.message) + len(answer.next_step))
