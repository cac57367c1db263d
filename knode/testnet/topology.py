"""A topology: which networks there are, how bad each node's wire is, and where a NAT is between. Pure.

A short TOML file each. A topology without networks is nodes on loopback; every other needs namespaces.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import msgspec

from knode.errors import Code, KnodeError
from knode.world.real import RealDisk

FOLDER = Path(__file__).parent / "topologies"
"""The topologies that come with knode."""
MAX_NODES = 32
DEFAULT_NODES = 3
MAX_NETWORKS = 16
LIMIT_BYTES = 64 * 1024

Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=10_000)]
Probability = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?\Z")]
IPAddress = IPv4Address | IPv6Address

_ROUTER_INSIDE, _FIRST_NODE, _FIRST_ROUTER = 1, 11, 201
"""The places of hosts in a network, by the last number of their addresses."""
_SMALLEST_PREFIX, _IPV6_PREFIX = 24, 64
_REFERENCE = re.compile(r"\{node(\d+)\.(id|ipv4|ipv6)\}")


class Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to each frame on its way between a node and its network, in either direction."""

    delay_ms: tuple[Milliseconds, Milliseconds] = (0.0, 0.0)
    """From, to: drawn anew for each frame, which does not overtake those before it."""
    loss: Probability = 0.0


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A switch and the addresses of what is plugged in."""

    name: Name
    ipv4: str
    ipv6: str | None = None
    behind: str | None = None
    """The network to which a router masquerades (NAT, IPv4 alone). It lets in only answers."""

    @property
    def network4(self) -> IPv4Network:
        """Its IPv4 addresses."""
        return IPv4Network(self.ipv4)

    @property
    def network6(self) -> IPv6Network | None:
        """Its IPv6 addresses."""
        return None if self.ipv6 is None else IPv6Network(self.ipv6)


class PlannedNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One node; the first in the file is node1, which founds the cell."""

    network: str | None = None
    wire: Wire | None = None
    settings: dict[str, dict[str, Any]] = {}
    """As in a configuration file; `{node1.id}` and `{node2.ipv4}` in a text stand for what they name."""


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nodes and what lies between them. Nodes are numbered from 1."""

    what: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    nodes: Annotated[tuple[PlannedNode, ...], msgspec.Meta(min_length=1, max_length=MAX_NODES)]
    networks: Annotated[tuple[Network, ...], msgspec.Meta(max_length=MAX_NETWORKS)] = ()
    seed: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Of what is drawn for the wires."""

    @property
    def needs_namespaces(self) -> bool:
        """Whether it is more than nodes on loopback."""
        return bool(self.networks)

    def network(self, name: str) -> Network:
        """Return a network that there is."""
        return next(network for network in self.networks if network.name == name)

    def network_of(self, number: int) -> Network:
        """Return where a node is plugged in."""
        name = self.nodes[number - 1].network
        assert name is not None, "a topology with networks names one for each node"
        return self.network(name)

    def way_out(self, network: Network) -> list[Network]:
        """Return a network and those that it is behind, nearest first."""
        way = [network]
        while way[-1].behind is not None:
            way.append(self.network(way[-1].behind))
        return way

    def address4(self, number: int) -> IPv4Address:
        """Return a node's IPv4 address."""
        return self.network_of(number).network4[_FIRST_NODE - 1 + number]

    def address6(self, number: int) -> IPv6Address | None:
        """Return a node's IPv6 address, where its network has some."""
        network6 = self.network_of(number).network6
        return None if network6 is None else network6[_FIRST_NODE - 1 + number]

    def router_outside(self, network: Network) -> IPv4Address:
        """Return the address that all in `network` share, as those outside see it."""
        assert network.behind is not None
        return self.network(network.behind).network4[_FIRST_ROUTER + self.networks.index(network)]

    def barred(self, number: int, others: Iterable[int]) -> list[IPAddress]:
        """Return what a node must not let in while it is cut off from `others`, sorted."""
        addresses = {address for other in others for address in self.addresses_seen(number, other)}
        return sorted(addresses, key=lambda address: (address.version, int(address)))

    def addresses_seen(self, number: int, other: int) -> list[IPAddress]:
        """Return every address from which frames of `other` come to a node; none when no way leads there."""
        own = self.way_out(self.network_of(number))
        way = self.way_out(self.network_of(other))
        common = next((network for network in way if network in own), None)
        if common is None:
            return []
        place = way.index(common)
        if place > 0:
            return [self.router_outside(way[place - 1])]
        address6 = self.address6(other)
        addresses = [self.address4(other), link_local(other), address6]
        return [address for address in addresses if address is not None]

    def check_partition(self, side: Iterable[int]) -> None:
        """See that a partition leaves each network behind a NAT whole: outside, all there have one address.

        Raises:
            KnodeError: INVALID_ARGUMENT.
        """
        cut = set(side)
        for network in self.networks:
            if network.behind is None:
                continue
            inside = {n for n in self._numbers if network in self.way_out(self.network_of(n))}
            if inside & cut and inside - cut:
                names = ", ".join(f"node{n}" for n in sorted(inside))
                raise KnodeError(
                    Code.INVALID_ARGUMENT,
                    f"{names} are behind one NAT ({network.name}), and look like one machine from outside",
                    "put them all on the same side",
                )

    def settings_of(self, number: int, first_id: str) -> dict[str, dict[str, Any]]:
        """Return a node's settings, with what their references stand for; `first_id` is the id of node1."""
        filled: dict[str, dict[str, Any]] = _filled(
            self.nodes[number - 1].settings, lambda match: self._meaning(match, first_id)
        )
        return filled

    @property
    def _numbers(self) -> range:
        return range(1, len(self.nodes) + 1)

    def _meaning(self, reference: re.Match[str], first_id: str) -> str:
        number, what = int(reference[1]), reference[2]
        if what == "id":
            if number != 1:
                raise ValueError(f"{reference[0]} is not known when the nodes start: only that of node1 is")
            return first_id
        if number not in self._numbers or not self.networks:
            raise ValueError(f"{reference[0]} stands for no node of a network")
        address = self.address4(number) if what == "ipv4" else self.address6(number)
        if address is None:
            raise ValueError(f"{reference[0]}: its network has no IPv6")
        return str(address)

    def check(self) -> None:
        """See that the parts fit together; ValueError when they do not."""
        names = [network.name for network in self.networks]
        if len(set(names)) < len(names):
            raise ValueError("two networks have one name")
        for place, network in enumerate(self.networks):
            if network.behind is not None and network.behind not in names[:place]:
                raise ValueError(f"{network.name} is behind {network.behind!r}, which must stand before it")
            if network.network4.prefixlen > _SMALLEST_PREFIX:
                raise ValueError(f"{network.ipv4} is too small: take a /{_SMALLEST_PREFIX}")
            if network.network6 is not None and network.network6.prefixlen != _IPV6_PREFIX:
                raise ValueError(f"{network.ipv6} is no /{_IPV6_PREFIX}")
        for one, other in combinations(self.networks, 2):
            if one.network4.overlaps(other.network4) or (
                one.network6 and other.network6 and one.network6.overlaps(other.network6)
            ):
                raise ValueError(f"{one.name} and {other.name} share addresses")
        for number, node in enumerate(self.nodes, start=1):
            if self.networks and node.network not in names:
                raise ValueError(f"node{number} is in the network {node.network!r}, which is none")
            if not self.networks and (node.network or node.wire):
                raise ValueError(f"node{number} has a network or a wire, and there are no networks")
            if node.wire is not None and node.wire.delay_ms[0] > node.wire.delay_ms[1]:
                raise ValueError(f"node{number}: the least delay is more than the greatest")
            self.settings_of(number, "")


def choose(*, nodes: int | None, netns: bool, name: str | None) -> Topology:
    """Return the topology that is meant: a named one, or so many nodes, on one LAN or on loopback.

    Raises:
        KnodeError: INVALID_ARGUMENT when a named one is given a number of nodes, or as the others raise.
    """
    if name is None:
        count = DEFAULT_NODES if nodes is None else nodes
        return on_a_lan(count) if netns else on_loopback(count)
    if nodes is not None:
        raise KnodeError(
            Code.INVALID_ARGUMENT, "a topology says how many nodes it has", "leave out --nodes or --topology"
        )
    return load(name)


def on_loopback(nodes: int) -> Topology:
    """Return so many nodes and no network. Raises KnodeError: INVALID_ARGUMENT over the bounds."""
    _check_count(nodes)
    return Topology(f"{nodes} nodes on loopback", (PlannedNode(),) * nodes)


def on_a_lan(nodes: int) -> Topology:
    """Return so many nodes on one network, with IPv4 and IPv6. Raises as `on_loopback`."""
    _check_count(nodes)
    lan = Network("lan", "192.168.77.0/24", "fd77::/64")
    return Topology(f"{nodes} nodes on a LAN", (PlannedNode(lan.name),) * nodes, (lan,))


def _check_count(nodes: int) -> None:
    if not 1 <= nodes <= MAX_NODES:
        raise KnodeError(
            Code.INVALID_ARGUMENT, f"a testnet has 1 to {MAX_NODES} nodes, not {nodes}", "give --nodes 3"
        )


def names() -> list[str]:
    """Return the names of the topologies that come with knode, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Topology:
    """Return a topology by its name, or read from a file when the name ends in `.toml`.

    Raises:
        KnodeError: NOT_FOUND, naming the topologies that there are; INVALID_ARGUMENT for a file that is
            none, TOO_LARGE over 64 KiB, or the disk's errors.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file() or (path.parent == FOLDER and path.stem not in names()):
        raise KnodeError(
            Code.NOT_FOUND,
            f"there is no topology {name[:80]!r}",
            f"choose one of {', '.join(names())}, or give a file that ends in .toml",
        )
    try:
        text = RealDisk().read(path, limit_bytes=LIMIT_BYTES).decode()
        topology = msgspec.convert(tomllib.loads(text), Topology)
        topology.check()
    except (ValueError, RecursionError) as error:
        raise KnodeError(
            Code.INVALID_ARGUMENT, f"{path.name} is no topology ({error})", "see docs/guides/testnet.md"
        ) from error
    return topology


def mac_address(number: int) -> str:
    """Return the hardware address of a node: one of those that nobody sells."""
    return f"02:6b:6e:6f:64:{number:02x}"


def link_local(number: int) -> IPv6Address:
    """Return the address that the kernel makes from a node's hardware address (RFC 4291, appendix A)."""
    mac = bytes.fromhex(mac_address(number).replace(":", ""))
    identifier = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return IPv6Address(b"\xfe\x80" + bytes(6) + identifier)


def router_inside(network: Network) -> IPv4Address:
    """Return the address of the router that a network is behind."""
    return network.network4[_ROUTER_INSIDE]


def _filled(value: Any, meaning: Callable[[re.Match[str]], str]) -> Any:
    match value:
        case str():
            return _REFERENCE.sub(meaning, value)
        case dict():
            return {key: _filled(each, meaning) for key, each in value.items()}
        case list():
            return [_filled(each, meaning) for each in value]
        case _:
            return value
