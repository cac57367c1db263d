"""How far is a peer? A request that does nothing."""

from __future__ import annotations

import msgspec

from knode.errors import Code, KnodeError
from knode.mesh.methods import Call, Methods
from knode.mesh.peer import Peer
from knode.world import Monotonic, World

PING_S = 3.0


class Ping(msgspec.Struct, frozen=True, array_like=True):
    """Nothing."""


class Pinging:
    """Both sides of a ping."""

    def __init__(self, world: World, methods: Methods) -> None:
        self._world = world
        methods.add("peer.ping", Ping, self._answer)

    async def ping(self, peer: Peer) -> float | None:
        """Return the round trip in seconds, or None when no answer came within three."""
        begun = self._world.clock.monotonic()
        try:
            await peer.request("peer.ping", Ping(), deadline=Monotonic(begun + PING_S))
        except KnodeError as error:
            if error.code in (Code.TIMEOUT, Code.UNAVAILABLE, Code.UNKNOWN):
                return None
            raise
        return self._world.clock.monotonic() - begun

    async def _answer(self, call: Call, ping: Ping) -> None:
        return None
