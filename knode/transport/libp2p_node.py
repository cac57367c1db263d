"""A node among libp2p's peers: the host, and all that it offers and asks there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from knode.identity import KeyPair
from knode.transport.libp2p_address import PeerAddress
from knode.transport.libp2p_carrier import Libp2pSettings
from knode.transport.libp2p_connection import Connection
from knode.transport.libp2p_host import Host
from knode.transport.libp2p_lookup import Lookup
from knode.transport.libp2p_relay import RelayClient, RelayServer
from knode.transport.libp2p_services import PING, Identity, answer_pings
from knode.world import Log, World


class Libp2pNode:
    """Puts the pieces together; see `Libp2pCarrier` for the arguments."""

    def __init__(
        self,
        world: World,
        key: KeyPair,
        log: Log,
        settings: Libp2pSettings,
        may_reserve: Callable[[str], bool],
    ) -> None:
        self.host = Host(key, log)
        self.host.handlers[PING] = answer_pings
        self._addresses: Callable[[], Sequence[str]] = lambda: ()
        self.relay_client = RelayClient(world, self.host, settings.relays, log)
        self.relay_server: RelayServer | None = None
        if settings.offers_relay:
            self.relay_server = RelayServer(
                world, self.host, lambda: self._addresses(), may_reserve, settings.limits
            )
        identity = Identity(self.host, lambda: self._addresses())
        # the connections to relays are kept with the places there
        self._stay_with = [
            each
            for each in settings.bootstrap
            if each.peer_id not in {relay.peer_id for relay in settings.relays}
        ]
        asked = [*settings.bootstrap, *settings.relays]
        self.lookup = Lookup(self.host, identity, asked, self.relay_server)

    async def run(self, addresses: Callable[[], Sequence[str]]) -> None:
        """Keep places at relays and connections to those that know others, until cancelled.

        Args:
            addresses: the multiaddrs that others can dial now.
        """
        self._addresses = addresses
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.relay_client.run)
            nursery.start_soon(self.lookup.run, self._stay_with)

    async def dial(self, address: PeerAddress) -> Connection:
        """Open a connection to a peer, straight or through a relay.

        Raises:
            NotOpened: with why. The caller sets the deadline.
        """
        if address.behind is None:
            return await self.host.dial(address)
        return await self.relay_client.dial(address)
