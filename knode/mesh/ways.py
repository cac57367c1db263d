"""The ways to a node, and which of them is better. Pure: addresses in, an order out.

Local before wide, direct before relayed (design, "Transport and mesh"). Within one scope the kinds of link
have an order of their own: on a local network TCP carries bulk many times faster than QUIC does in
Python; across the internet QUIC outlives a change of address and a lost packet holds up less
(docs/adr/0016). Of two equal ways the one that answers first is taken: it has the shorter round trip.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from knode.transport import Carrier, Link
from knode.transport.address import is_host_and_port, split_address


class Scope(IntEnum):
    """How near the other end of a way is; the greater, the better."""

    RELAYED = 0
    WIDE = 1
    LOCAL = 2


SCOPE_NAMES = {
    Scope.RELAYED: "through a relay",
    Scope.WIDE: "across the internet",
    Scope.LOCAL: "on the local network",
}
_ORDER = {
    Scope.LOCAL: ("memory", "websocket", "quic", "libp2p"),
    Scope.WIDE: ("memory", "quic", "websocket", "libp2p"),
    Scope.RELAYED: ("libp2p",),
}
"""The kinds of link in each scope, best first."""
_LOCAL_NAMES = (".local", ".lan", ".home.arpa", ".internal")


@dataclass(frozen=True, slots=True)
class Way:
    """One kind of link to one address."""

    carrier: str
    address: str

    @property
    def scope(self) -> Scope:
        """How near its other end is."""
        return scope_of(self.address)

    @property
    def quality(self) -> int:
        """The greater, the better; equal for ways between which only the round trip decides."""
        return _quality(self.scope, self.carrier)

    def __str__(self) -> str:
        return f"{self.carrier} {self.address}"


def quality_of(link: Link) -> int:
    """Return the quality of the way that an open link took, whichever end dialled."""
    return _quality(scope_of_link(link), link.carrier)


def scope_of_link(link: Link) -> Scope:
    """Tell how near the other end of an open link is."""
    return Scope.RELAYED if link.relayed else scope_of(link.remote_address)


def scope_of(address: str) -> Scope:
    """Tell how near an address is: `host:port`, `[v6]:port` or a multiaddr. What is no address is WIDE."""
    if not is_host_and_port(address):
        parts = address.split("/")
        if "p2p-circuit" in parts:
            return Scope.RELAYED
        host = parts[2] if len(parts) > 2 else ""
    else:
        try:
            host, _ = split_address(address)
        except ValueError:
            return Scope.WIDE
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        is_local = host and ("." not in host or host.endswith(_LOCAL_NAMES))
        return Scope.LOCAL if is_local else Scope.WIDE
    return Scope.LOCAL if ip.is_private or ip.is_link_local else Scope.WIDE


def can_be_dialled(address: str) -> bool:
    """Whether an address could be one machine's: not the unspecified one, and no group's."""
    try:
        host, _ = split_address(address)
        ip = ipaddress.ip_address(host)
    except ValueError:
        return True  # a name or a multiaddr: its carrier will see
    return not (ip.is_unspecified or ip.is_multicast or str(ip) == "255.255.255.255")


def fitting(addresses: Sequence[str], places: int) -> tuple[str, ...]:
    """Return the addresses that are told where only `places` fit: relayed ones work from everywhere, so
    some of them always do."""
    relayed = [address for address in addresses if scope_of(address) is Scope.RELAYED][: max(1, places // 4)]
    direct = [address for address in addresses if scope_of(address) is not Scope.RELAYED]
    return (*direct[: places - len(relayed)], *relayed)


def ways_to(addresses: Iterable[str], carriers: Mapping[str, Carrier]) -> list[Way]:
    """Return every way that one of `carriers` can take to one of `addresses`, best first, each once."""
    ways = {
        Way(name, address): None
        for address in addresses
        if can_be_dialled(address)
        for name, carrier in carriers.items()
        if carrier.dials(address)
    }
    return sorted(ways, key=lambda way: -way.quality)


def _quality(scope: Scope, carrier: str) -> int:
    order = _ORDER[scope]
    rank = len(order) - order.index(carrier) if carrier in order else 0
    return 10 * scope + rank
