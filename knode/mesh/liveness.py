"""Is the peer there? A pure judgement from what was heard and when."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class PeerState(StrEnum):
    """What a node thinks of a peer."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    FAILED = "failed"
    LEFT = "left"


@dataclass(slots=True)
class Liveness:
    """Judges one peer. Times are monotonic seconds."""

    dead_after_s: float
    heard_at: float
    good_bye: bool = False

    @property
    def fails_at(self) -> float:
        """When the peer will have failed, should nothing more be heard."""
        return self.heard_at + self.dead_after_s

    def heard(self, now: float) -> None:
        """Note that anything at all came from the peer."""
        self.heard_at = now
        self.good_bye = False

    def excuse(self, late_s: float, now: float) -> None:
        """Note that this node itself was held up for so long: the peer may have spoken meanwhile."""
        self.heard_at = min(now, self.heard_at + late_s)

    def left(self) -> None:
        """Note that the peer said good-bye."""
        self.good_bye = True

    def state(self, now: float) -> PeerState:
        """Say what to think of the peer now."""
        if self.good_bye:
            return PeerState.LEFT
        if now >= self.fails_at:
            return PeerState.FAILED
        return PeerState.SUSPECT if now >= self.heard_at + self.dead_after_s * 2 / 3 else PeerState.ALIVE
