"""What a node has every member know: of each topic the latest, whichever links it comes over, in any order.

Two links to one peer deliver in no order, and one of them may break with what it carried. So a bulletin is
numbered by who tells it (the correlation of its context), told again over the link that is left when another
ends, and counts for nothing when a later one was heard.
"""

from __future__ import annotations

from collections.abc import Iterable

from knode.klp.messages import Context, Event


class Bulletins:
    """What this node tells."""

    def __init__(self) -> None:
        self._latest: dict[str, Event] = {}
        self._told = 0

    @property
    def latest(self) -> Iterable[Event]:
        """What whoever comes is told."""
        return self._latest.values()

    def replace(self, topic: str, body: bytes) -> Event | None:
        """Put another in the place of the topic's; return what is to be told now: None for the same."""
        before = self._latest.get(topic)
        if before is not None and before.body == body:
            return None
        self._told += 1
        event = self._latest[topic] = Event(topic, Context(self._told.to_bytes(16, "big")), body)
        return event


class Heard:
    """Which of one peer's bulletins was heard last, of topics that somebody here listens to."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[bytes, int]] = {}

    def is_news(self, event: Event, boot: bytes) -> bool:
        """Take note of a bulletin of the peer's `boot`; tell whether none that is later was heard."""
        number = int.from_bytes(event.context.correlation, "big")
        last_boot, last_number = self._last.get(event.topic, (boot, 0))
        if last_boot == boot and number < last_number:
            return False
        self._last[event.topic] = boot, number
        return True
