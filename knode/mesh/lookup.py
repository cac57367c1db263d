"""Looking for members that are away: asking those who may know where they are now.

What they say are claims, as what the local network says: they end in `Peers.discovered`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from knode.mesh.peers import Peers
from knode.world import Log, World

FIRST_AFTER_S = 10.0
"""How long the addresses that are known have for themselves."""
EVERY_S = 60.0
AT_ONCE = 4


class Finder(Protocol):
    """Somebody who may know where a node is."""

    async def find(self, node_id: str) -> Sequence[str]:
        """Return addresses that are claimed for it, few, within half a minute; empty when nobody knows."""
        ...


class Lookup:
    """Asks a finder, about once a minute, for every member that this node has no conversation with."""

    def __init__(self, world: World, peers: Peers, finder: Finder, log: Log) -> None:
        self._world = world
        self._peers = peers
        self._finder = finder
        self._log = log

    async def run(self) -> None:
        """Look until cancelled."""
        await trio.sleep(FIRST_AFTER_S)
        while True:
            limit = trio.CapacityLimiter(AT_ONCE)
            async with trio.open_nursery() as nursery:
                for peer in self._peers.members():
                    if peer.conversation is None:
                        nursery.start_soon(self._look_for, peer.node_id, limit)
            await trio.sleep(EVERY_S * self._world.randomness.uniform(0.8, 1.2))

    async def _look_for(self, node_id: str, limit: trio.CapacityLimiter) -> None:
        async with limit:
            addresses = await self._finder.find(node_id)
        if addresses:
            self._log.debug("claimed for an absent member", peer=node_id, addresses=addresses)
            self._peers.discovered(node_id, addresses)
