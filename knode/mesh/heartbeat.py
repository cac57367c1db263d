"""One timer for all conversations of a node: it says that the node is here, and notices who is not.

A node that was itself held up (a slow machine, a long pause) must not accuse the others: time in
which its own timer came late counts for nobody (memberlist's local health, Dadgar et al. 2017, in the
simplest form).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from knode.klp.keepalive import Load
from knode.mesh.conversation import Conversation
from knode.world import Clock, Monotonic

FEW = 16
"""Up to so many peers hear from a node each `keepalive_s`."""


class Heartbeat:
    """Keeps conversations alive, and ends those whose peer has fallen silent.

    Args:
        keepalive_s: seconds between two signs of life to each peer, while they are few.
        dead_after_s: seconds of silence after which a peer is given up; at least twice `keepalive_s`.
        load: how busy this node is; every sign of life tells it.
    """

    def __init__(
        self, clock: Clock, keepalive_s: float, dead_after_s: float, load: Callable[[], Load]
    ) -> None:
        self._clock = clock
        self._keepalive_s = keepalive_s
        self._longest_s = max(keepalive_s, dead_after_s / 2)
        self._load = load
        self._conversations: dict[Conversation, None] = {}  # in the order of their opening

    @contextmanager
    def keeping(self, conversation: Conversation) -> Iterator[None]:
        """Keep a conversation alive meanwhile, from this moment on."""
        self._conversations[conversation] = None
        try:
            conversation.beat(self._clock.monotonic(), self._load())
            yield
        finally:
            del self._conversations[conversation]

    @property
    def interval_s(self) -> float:
        """Seconds between two signs of life to each peer.

        It grows with their number, so that a large cell is not busy with itself, and stays short enough
        that one sign of life may be late without a peer being suspected.
        """
        return min(self._longest_s, self._keepalive_s * max(1.0, len(self._conversations) / FEW))

    async def run(self) -> None:
        """Beat until cancelled."""
        due = self._clock.monotonic()
        while True:
            now = self._clock.monotonic()
            if now - due > self._longest_s:
                for conversation in self._conversations:
                    conversation.liveness.excuse(now - due, now)
            load = self._load()
            for conversation in self._conversations:
                conversation.beat(now, load)
            # Woken when a peer will have failed, so that this is not noticed a whole beat later.
            fail_at = [conversation.liveness.fails_at for conversation in self._conversations]
            due = Monotonic(min([now + self.interval_s, *(at for at in fail_at if at > now)]))
            await trio.sleep_until(due)
