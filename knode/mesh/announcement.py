"""What a node says of itself on the local network, as the strings of one DNS TXT record (RFC 6763).

`dnsaddr=/ip4/192.168.1.7/tcp/4748/p2p/12D3KooW…`, one string an address, is libp2p's form (its mDNS
specification); these are addresses that any libp2p implementation can dial. QUIC and WebSocket links of
KLP are none of libp2p's transports, so they stand under a key of their own, which others pass over:
`klp=12D3KooW…@192.168.1.7:4747,192.168.1.8:4747`.

What is read here was said by anybody. It is a claim, and nothing more than a place to try: the handshake
alone tells who is there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from knode.errors import Code, KnodeError
from knode.identity import NodeId
from knode.identity.names import node_id_of, parse_node_id
from knode.transport.address import is_host_and_port, join_address, split_address

MAX_STRING_BYTES = 255
MAX_TEXT_BYTES = 1300
"""What a node says at most: a record that one Ethernet frame carries (RFC 6763, section 6.2)."""
MAX_READ_BYTES = 8966
"""The largest record that is read; no mDNS message is larger (RFC 6762, section 17)."""
MAX_ADDRESSES = 8
"""How many addresses are said and taken, of each kind."""

_KLP = b"klp="
_DNSADDR = b"dnsaddr="


@dataclass(frozen=True, slots=True)
class Claim:
    """Somebody says that a node can be dialled at these addresses, best first; at most MAX_ADDRESSES."""

    node_id: NodeId
    addresses: tuple[str, ...]


def write_announcement(node_id: NodeId, addresses: Iterable[str]) -> bytes:
    """Return the TXT record of a node: of `addresses`, as listeners give them, those that fit.

    Loopback addresses, names, and addresses behind a relay are no use to neighbours and are left out; no
    bytes when none is left.
    """
    usable = [address for address in dict.fromkeys(addresses) if _is_of_use(address, node_id)]
    direct = [address for address in usable if is_host_and_port(address)][:MAX_ADDRESSES]
    libp2p = [address for address in usable if not is_host_and_port(address)][:MAX_ADDRESSES]
    strings: list[bytes] = []
    while direct and len(own := _KLP + f"{node_id}@{','.join(direct)}".encode()) > MAX_STRING_BYTES:
        direct.pop()
    if direct:
        strings.append(own)
    strings += [_DNSADDR + address.encode() for address in libp2p]
    text = b""
    for string in strings:
        if len(string) <= MAX_STRING_BYTES and len(text) + 1 + len(string) <= MAX_TEXT_BYTES:
            text += bytes([len(string)]) + string
    return text


def read_announcement(text: bytes) -> Claim | None:
    """Return what the TXT record of a neighbour claims; None when it speaks of no KLP or Ed25519 node.

    Of libp2p's addresses those over plain TCP are taken and the others passed over: they are for
    transports that no link of KLP uses.

    Raises:
        KnodeError: INVALID_ARGUMENT, saying what is wrong: what no knode says.
    """
    node_id: NodeId | None = None
    addresses: dict[str, None] = {}
    for string in sorted(_strings(text), key=lambda string: string[:4].lower() != _KLP):
        if string[:4].lower() == _KLP:
            if addresses:
                raise _no_announcement("it has two strings for KLP")
            claim = _read_klp(string[len(_KLP) :])
        elif string[:8].lower() == _DNSADDR:
            found = _read_dnsaddr(string[len(_DNSADDR) :])
            if found is None:
                continue
            claim = found
        else:
            continue
        if node_id is not None and claim.node_id != node_id:
            raise _no_announcement("it speaks of two nodes")
        node_id = claim.node_id
        addresses |= dict.fromkeys(claim.addresses)
    return None if node_id is None else Claim(node_id, tuple(addresses)[:MAX_ADDRESSES])


def local_hosts(addresses: Sequence[str]) -> tuple[str, ...]:
    """Return the IP addresses of this machine, among what its listeners give, that neighbours can dial."""
    hosts = dict.fromkeys(split_address(a)[0] for a in addresses if is_host_and_port(a))
    return tuple(host for host in hosts if _is_unicast(host))


def local_port(addresses: Sequence[str]) -> int:
    """Return the port of KLP's own links; 0 when there is none."""
    return next((split_address(a)[1] for a in addresses if is_host_and_port(a)), 0)


def _strings(text: bytes) -> Iterator[bytes]:
    if len(text) > MAX_READ_BYTES:
        raise _no_announcement(f"it has over {MAX_READ_BYTES} bytes")
    begin = 0
    while begin < len(text):
        end = begin + 1 + text[begin]
        if end > len(text):
            raise _no_announcement("its last string is cut off")
        yield text[begin + 1 : end]
        begin = end


def _read_klp(value: bytes) -> Claim:
    try:
        node_id, at, listed = value.decode("ascii").partition("@")
    except UnicodeDecodeError as error:
        raise _no_announcement("it is no ASCII") from error
    raw_key = parse_node_id(node_id)
    if not at or node_id_of(raw_key) != node_id:
        raise _no_announcement("it has no PeerId before an @")
    addresses = listed.split(",")
    if len(addresses) > MAX_ADDRESSES:
        raise _no_announcement(f"it has over {MAX_ADDRESSES} addresses")
    for address in addresses:
        if not _is_ip_and_port(address):
            raise _no_announcement(f"{address[:80]!r} is no address of a neighbour")
    return Claim(NodeId(node_id), tuple(addresses))


def _read_dnsaddr(value: bytes) -> Claim | None:
    """Return the one address of a string of libp2p's, when a link of KLP can go there."""
    try:
        address = value.decode("ascii")
        node_id = address.rpartition("/")[2]
        if node_id_of(parse_node_id(node_id)) != node_id or not _is_of_use(address, NodeId(node_id)):
            return None
    except (UnicodeDecodeError, KnodeError):
        return None  # another kind of key, or none: honest, and not for us
    return Claim(NodeId(node_id), (address,))


def _is_of_use(address: str, node_id: NodeId) -> bool:
    """Whether neighbours of the node can dial this address: `IP:port`, or `/ip4/IP/tcp/port/p2p/ID`."""
    if is_host_and_port(address):
        return _is_ip_and_port(address)
    match address.split("/"):
        case ["", ("ip4" | "ip6") as version, host, "tcp", port, "p2p", peer]:
            joined = join_address(host, int(port)) if port.isascii() and port.isdecimal() else ""
            return peer == node_id and (":" in host) == (version == "ip6") and _is_ip_and_port(joined)
    return False


def _is_ip_and_port(address: str) -> bool:
    try:
        host, port = split_address(address)
    except ValueError:
        return False
    return join_address(host, port) == address and _is_unicast(host)


def _is_unicast(host: str) -> bool:
    """Whether `host` is an IP address, in its one written form, at which a neighbour may answer.

    Link-local ones mean nothing without the name of an interface, and a name would have to be looked up.
    """
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    return str(ip) == host and not (
        ip.is_loopback
        or ip.is_link_local
        or ip.is_multicast
        or ip.is_unspecified
        or ip.is_reserved
        or (isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped is not None or ip.scope_id is not None))
    )


def _no_announcement(why: str) -> KnodeError:
    return KnodeError(Code.INVALID_ARGUMENT, f"this is no announcement of a node: {why}")
