"""The process that is a testnet's network: it builds the namespaces and lives as long as they do.

Run by `Namespaces` in a network and a mount namespace of its own, so that the names, switches, routers and
wires that it makes exist in there alone: when it ends, and the nodes with it, nothing of them is left.
It reads the topology from standard input, says `ready` or an error as JSON, and goes on until a signal.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from knode.testnet.namespaces import NAMES, READY
from knode.testnet.topology import Network, Topology, Wire, mac_address, router_inside
from knode.testnet.wire import carry

_TUN = Path("/dev/net/tun")
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000

FIREWALL = """\
table inet knode {
    set cut4 { type ipv4_addr; }
    set cut6 { type ipv6_addr; }
    chain input {
        type filter hook input priority 0;
        ip saddr @cut4 drop
        ip6 saddr @cut6 drop
    }
}
"""
"""A node's; `partition` fills the sets. What comes in is dropped, at both ends: no sender sees an error."""

NAT = """\
table ip knode {
    chain postrouting {
        type nat hook postrouting priority 100;
        oifname "outside" masquerade
    }
    chain forward {
        type filter hook forward priority 0; policy drop;
        iifname "inside" accept
        ct state established,related accept
    }
    chain input {
        type filter hook input priority 0; policy drop;
        iifname { "lo", "inside" } accept
        ct state established,related accept
        ip protocol icmp accept
    }
}
"""


def build(topology: Topology) -> list[tuple[Wire, BinaryIO, BinaryIO]]:
    """Make all of it in the namespace where this process is; return both ends of each bad wire.

    Raises:
        OSError, subprocess.CalledProcessError: the kernel or a program refuses something.
    """
    subprocess.run(["mount", "-t", "tmpfs", "none", NAMES.parent], check=True, capture_output=True)
    NAMES.mkdir()
    for place, network in enumerate(topology.networks):
        _ip(f"link add br{place} type bridge mcast_snooping 0", f"link set br{place} up")
        if network.behind is not None:
            _make_router(topology, network)
    return [wire for number in range(1, len(topology.nodes) + 1) for wire in _plug_in(topology, number)]


def _plug_in(topology: Topology, number: int) -> list[tuple[Wire, BinaryIO, BinaryIO]]:
    """Make a node's namespace and its wire to the switch."""
    name, port = f"node{number}", f"port{number}"
    network = topology.network_of(number)
    wire = topology.nodes[number - 1].wire
    _ip(f"netns add {name}")
    bad: list[tuple[Wire, BinaryIO, BinaryIO]] = []
    if wire is None:
        _ip(f"link add {port} type veth peer name eth0 netns {name}")
    else:
        bad = [(wire, _tap(f"wire{number}"), _tap(port))]
        _ip(f"link set wire{number} netns {name} name eth0")
    _ip(f"link set {port} master br{topology.networks.index(network)}", f"link set {port} up")
    address6, network4 = topology.address6(number), network.network4
    _ip(
        f"link set eth0 address {mac_address(number)}",
        "link set lo up",
        "link set eth0 up",
        f"address add {topology.address4(number)}/{network4.prefixlen} broadcast + dev eth0",
        *([] if address6 is None else [f"address add {address6}/64 dev eth0 nodad"]),
        *([] if network.behind is None else [f"route add default via {router_inside(network)}"]),
        inside=name,
    )
    _run_inside(name, ["nft", "-f", "-"], FIREWALL)
    return bad


def _make_router(topology: Topology, network: Network) -> None:
    """Put a router between a network and the one it is behind."""
    assert network.behind is not None
    place = topology.networks.index(network)
    outer = topology.network(network.behind)
    name = f"router{place}"
    _ip(f"netns add {name}")
    for side, bridge in (("inside", place), ("outside", topology.networks.index(outer))):
        port = f"{side}{place}"
        _ip(
            f"link add {port} type veth peer name {side} netns {name}",
            f"link set {port} master br{bridge}",
            f"link set {port} up",
        )
    _ip(
        "link set lo up",
        "link set inside up",
        "link set outside up",
        f"address add {router_inside(network)}/{network.network4.prefixlen} dev inside",
        f"address add {topology.router_outside(network)}/{outer.network4.prefixlen} dev outside",
        *([] if outer.behind is None else [f"route add default via {router_inside(outer)}"]),
        inside=name,
    )
    _run_inside(name, ["nft", "-f", "-"], NAT)
    _run_inside(name, ["tee", "/proc/sys/net/ipv4/ip_forward"], "1")


def _tap(name: str) -> BinaryIO:
    """Make a TAP device, whose frames this process reads and writes."""
    device = _TUN.open("r+b", buffering=0)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    os.set_blocking(device.fileno(), False)
    return device


def _ip(*lines: str, inside: str | None = None) -> None:
    namespace = [] if inside is None else ["-n", inside]
    _run(["ip", *namespace, "-batch", "-"], "\n".join(lines) + "\n")


def _run_inside(namespace: str, words: Sequence[str], text: str) -> None:
    _run(["nsenter", f"--net={NAMES / namespace}", "--", *words], text)


def _run(words: Sequence[str], text: str) -> None:
    subprocess.run(words, input=text.encode(), check=True, capture_output=True)


def main() -> None:
    """Build the network of standard input, say so, and carry the frames of its bad wires."""
    topology = msgspec.json.decode(sys.stdin.buffer.read(), type=Topology)
    try:
        wires = build(topology)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        print(json.dumps(f"{' '.join(map(str, error.cmd))}: {said}"), flush=True)
        sys.exit(1)
    except OSError as error:
        print(json.dumps(str(error)), flush=True)
        sys.exit(1)
    print(json.dumps(READY), flush=True)
    silent = os.open(os.devnull, os.O_RDWR)
    for said in (0, 1, 2):
        os.dup2(silent, said)
    carry(wires, topology.seed)


if __name__ == "__main__":
    main()
