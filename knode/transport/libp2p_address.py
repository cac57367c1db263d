"""The multiaddrs of libp2p links, as text: where to dial, and which PeerId must answer there.

`/ip4/192.168.1.7/tcp/4748/p2p/12D3KooW…` goes straight to a peer, `…/p2p/RELAY/p2p-circuit/p2p/PEER` through
a relay. This module needs no libp2p: which addresses a node dials is asked before libp2p is there.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

import base58

MAX_CHARACTERS = 261
"""As long as an address in a ticket or a contact record may be."""

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?\.?\Z")
# multihashes of a key: identity of an Ed25519 key (a node's), SHA-256 of a larger one (some public relays)
_PEER_ID_FORMS = ((bytes.fromhex("002408011220"), 38), (bytes.fromhex("1220"), 34))


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """One way to a peer.

    Args:
        host: where TCP goes: an IP address or a name.
        port: likewise.
        peer_id: who must answer there.
        behind: the peer that is meant, when the one who answers there is a relay; else None.
    """

    host: str
    port: int
    peer_id: str
    behind: str | None = None

    def __str__(self) -> str:
        relay = direct_address(self.host, self.port, self.peer_id)
        return relay if self.behind is None else circuit_address(relay, self.behind)

    @property
    def target(self) -> str:
        """The PeerId that is meant."""
        return self.behind or self.peer_id


def direct_address(host: str, port: int, peer_id: str) -> str:
    """Return the multiaddr of a peer that listens at an IP address or a name."""
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        kind = "dns"
    return f"/{kind}/{host}/tcp/{port}/p2p/{peer_id}"


def circuit_address(relay: str, peer_id: str) -> str:
    """Return the multiaddr of a peer behind a relay whose multiaddr is `relay`."""
    return f"{relay}/p2p-circuit/p2p/{peer_id}"


def without_peer_id(address: str) -> str:
    """Return a multiaddr without the PeerId at its end, if it has one."""
    rest, slash, peer_id = address.rpartition("/p2p/")
    return rest if slash and "/" not in peer_id else address


def parse_peer_address(text: str) -> PeerAddress:
    """Read a multiaddr of one of the two forms.

    Raises:
        ValueError: it is neither.
    """
    wrong = ValueError(f"{text[:80]!r} is no multiaddr of a libp2p peer over TCP")
    match text.split("/"):
        case ["", kind, host, "tcp", port, "p2p", peer_id]:
            behind = None
        case ["", kind, host, "tcp", port, "p2p", peer_id, "p2p-circuit", "p2p", behind]:
            pass
        case _:
            raise wrong
    if (
        len(text) > MAX_CHARACTERS
        or not _is_host(kind, host)
        or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536)
        or not all(is_peer_id(each) for each in (peer_id, behind) if each is not None)
    ):
        raise wrong
    return PeerAddress(host, int(port), peer_id, behind)


def is_peer_id(text: str) -> bool:
    """Whether `text` is a PeerId in its usual form, base58."""
    try:
        decoded = base58.b58decode(text) if len(text) < 64 else b""
    except ValueError:
        return False
    return any(decoded.startswith(prefix) and len(decoded) == size for prefix, size in _PEER_ID_FORMS)


def _is_host(kind: str, host: str) -> bool:
    if kind in ("dns", "dns4", "dns6"):
        return _HOST.match(host) is not None
    try:
        return kind == f"ip{ipaddress.ip_address(host).version}" and "%" not in host
    except ValueError:
        return False
