"""What the voters' clocks say, so that a leader whose clock is far ahead does not take the cell's time along.

A ledger's time never goes back, so one wrong clock ends deadlines and keys for good. Each voter announces
its clock every minute. A leader dates by its own clock, but at most `AHEAD_MS` beyond the time that the
clocks of a majority have reached: what one entry dates, a majority would soon have dated so.
"""

from __future__ import annotations

from typing import Annotated

import trio
from msgspec import Meta, Struct

from knode.consensus.electorate import Electorate, Votes
from knode.consensus.messages import Configuration, ReplicaId
from knode.consensus.quorum import agreed
from knode.consensus.voters import member_of
from knode.identity import PublicKey
from knode.klp.codec import Decoder, encode
from knode.mesh.liveness import PeerState
from knode.mesh.membership import Membership
from knode.mesh.peers import Peers
from knode.world import Log, WallTime, World

TOPIC = "consensus.clock"
EVERY_S = 60.0
AHEAD_MS = 60_000
"""With what an announcement may be late, a leader is at most two minutes ahead of a majority."""


class Reading(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What a voter's clock said when it announced this."""

    wall: Annotated[int, Meta(ge=0, le=2**53)]
    """Milliseconds since 1970."""


_decoder: Decoder[Reading] = Decoder(Reading)


class Clocks:
    """The clocks of the cell's voters, as this node has heard of them."""

    def __init__(
        self, world: World, membership: Membership, peers: Peers, electorate: Electorate, log: Log
    ) -> None:
        self.held_back_ms = 0
        """How far this node's clock was ahead of what was allowed, when it was asked last."""
        self._world = world
        self._membership = membership
        self._peers = peers
        self._electorate = electorate
        self._log = log
        self._has_warned = False
        self._heard: dict[bytes, float] = {}
        """By raw id: what a member's clock says at most, less this node's monotonic clock, milliseconds."""
        peers.on_bulletin(TOPIC, self._take)

    async def run(self) -> None:
        """Announce this node's clock while it votes, until cancelled."""
        while True:
            if self._votes():
                self._peers.announce(TOPIC, encode(Reading(self._world.clock.wall())))
                await trio.sleep(EVERY_S)
            else:
                await trio.sleep(1)

    def wall(self) -> WallTime:
        """Return this node's time of day, or less when a majority of the voters say that it is far ahead.

        Of whom nothing is known, or who is not here, says nothing; when the rest is no majority, the own
        clock counts alone.
        """
        own = self._world.clock.wall()
        if not self._membership.in_cell:
            return own
        reached = agreed(self._electorate.configuration or Configuration(), self._clock_of)
        ahead_ms = own - reached - AHEAD_MS if reached else 0
        if ahead_ms > 0 and not self._has_warned:
            self._has_warned = True
            self._log.warning("this node's clock is ahead of a majority's", ahead_s=(own - reached) // 1000)
        self.held_back_ms = max(0, ahead_ms)
        return WallTime(own - self.held_back_ms)

    def _votes(self) -> bool:
        if not self._membership.in_cell:
            return False
        own = self._membership.own_if_member
        return own is not None and self._electorate.votes(own) is Votes.VOTER

    def _clock_of(self, replica: ReplicaId) -> int:
        member = self._membership.roster.members.get(member_of(replica))
        if member is None:
            return 0
        if member.key == self._membership.key.public:
            return self._world.clock.wall()
        heard = self._heard.get(member.id.raw)
        if heard is None or self._peers.peer(member.key).state is not PeerState.ALIVE:
            return 0
        return max(0, int(heard + self._world.clock.monotonic() * 1000))

    def _take(self, key: PublicKey, body: bytes) -> None:
        reading = _decoder.decode(body)
        member = self._membership.roster.holders.get(key.raw)
        if member is not None:
            late_ms = EVERY_S * 1000  # who comes later hears the latest, which may be as old
            self._heard[member.id.raw] = reading.wall + late_ms - self._world.clock.monotonic() * 1000
