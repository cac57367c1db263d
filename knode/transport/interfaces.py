"""Which addresses of this machine others can dial."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
# RFC 5737 and RFC 3849: documentation addresses; nothing is sent, the kernel only picks a source address
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
_SIOCGIFADDR = 0x8915
_IF_INET6 = Path("/proc/net/if_inet6")


def interface_addresses(*, versions: frozenset[int]) -> list[str]:
    """Return the addresses of this machine's interfaces, of IP `versions` 4 and 6.

    Loopback is named only when there is nothing else; link-local addresses never, since they mean
    nothing without the name of an interface of the dialling machine.

    Linux tells about each interface, also in a network without a default route. Elsewhere the source
    address of the default route stands for all.
    """
    found = _linux_addresses() if sys.platform == "linux" else []
    parsed = [ipaddress.ip_address(text) for text in found or _default_route_addresses()]
    usable = [
        str(address)
        for address in sorted(set(parsed), key=lambda address: (address.version, int(address)))
        if address.version in versions and not (address.is_loopback or address.is_link_local)
    ]
    return usable or [_LOOPBACK[version] for version in sorted(versions)]


def _linux_addresses() -> list[str]:
    """Ask for the first IPv4 address of each interface (netdevice(7)) and read all IPv6 addresses."""
    import fcntl

    addresses: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as question:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(question, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                addresses.append(socket.inet_ntoa(answer[20:24]))
    if _IF_INET6.exists():  # absent where IPv6 is switched off
        lines = _IF_INET6.read_text().splitlines()
        addresses += [str(ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))) for line in lines]
    return addresses


def _default_route_addresses() -> list[str]:
    addresses: list[str] = []
    for family, elsewhere in _ELSEWHERE:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as question:  # no route
            question.connect((elsewhere, 9))
            addresses.append(question.getsockname()[0])
    return addresses
