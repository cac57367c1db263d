"""A UDP socket that never waits, and knows to which of this machine's addresses a datagram came."""

from __future__ import annotations

import socket
import struct
import sys
from contextlib import suppress
from typing import Any, NamedTuple

BUFFER_BYTES = 4 * 1024 * 1024
"""What the kernel is asked to hold; it gives what its limits allow."""

_READ_BYTES = 65_536
_ERROR_BYTES = 256
# linux/in.h and linux/in6.h; Python names neither before 3.14
_IP_PKTINFO = 8
_IP_RECVERR = 11
_IPV6_RECVERR = 25
# linux/udp.h: the system cuts one piece into datagrams, and hands over several as one
_SOL_UDP = 17
_UDP_SEGMENT = 103
_UDP_GRO = 104
SEGMENTS_AT_ONCE = 48
"""How many full datagrams one call sends: below the 64 KiB that IP allows."""
_ANCILLARY_BYTES = 3 * socket.CMSG_SPACE(64)
_LINUX = sys.platform == "linux"

SocketAddress = tuple[Any, ...]
"""As the system gives it: (host, port), for IPv6 with flow and scope."""


class Path(NamedTuple):
    """A way between two machines."""

    remote: SocketAddress
    local: bytes = b""
    """Our address on it, as the system packs it; empty where there is no choice."""


class UdpSocket:
    """Sends and receives datagrams on a bound socket, which it owns.

    A socket that is bound to all addresses answers from the one that was asked: the other end takes nothing
    from another.
    """

    def __init__(self, bound: socket.socket) -> None:
        bound.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            bound.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        self.bound = bound
        self.family = bound.family
        self.address: SocketAddress = bound.getsockname()
        self._local_level = 0
        self._local_type = 0
        self.sends_segments = False
        """Whether several datagrams can be sent at once."""
        if _LINUX:
            self._ask_for_errors()
            with suppress(OSError):  # Linux before 5.0
                bound.setsockopt(_SOL_UDP, _UDP_GRO, 1)
                self.sends_segments = True
            if self.address[0] in ("::", "0.0.0.0"):
                self._ask_for_local_addresses()

    @property
    def takes_both_versions(self) -> bool:
        """Whether it is bound to all addresses of IPv6 and of IPv4."""
        return (
            self.family == socket.AF_INET6
            and self.address[0] == "::"
            and not self.bound.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        )

    def _ask_for_errors(self) -> None:
        self.bound.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        if self.family == socket.AF_INET6:
            self.bound.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)

    def _ask_for_local_addresses(self) -> None:
        if self.family == socket.AF_INET6:
            self.bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            self._local_level, self._local_type = socket.IPPROTO_IPV6, socket.IPV6_PKTINFO
        else:
            self.bound.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            self._local_level, self._local_type = socket.IPPROTO_IP, _IP_PKTINFO

    def receive(self) -> tuple[list[bytes], Path]:
        """Return the next datagrams of one way: several where the system handed them over as one.

        Raises:
            BlockingIOError: there is none.
            OSError: something else is there to be known; there may still be datagrams.
        """
        data, ancillary, _, remote = self.bound.recvmsg(_READ_BYTES, _ANCILLARY_BYTES)
        local, size = b"", len(data)
        for level, kind, content in ancillary:
            if level == _SOL_UDP and kind == _UDP_GRO:
                [size] = struct.unpack("i", content)
            elif level == self._local_level and kind == self._local_type:
                local = self._as_source(content)
        if size >= len(data):
            return [data], Path(remote, local)
        return [data[begin : begin + size] for begin in range(0, len(data), size)], Path(remote, local)

    def _as_source(self, content: bytes) -> bytes:
        """Turn where a datagram came to into where the answer comes from."""
        if self._local_level == socket.IPPROTO_IPV6:
            return content[:16] + bytes(4)  # in6_pktinfo; any interface
        return bytes(4) + content[4:8] + bytes(4)  # in_pktinfo: interface, source, destination

    def send(self, data: bytes, path: Path, *, segment_bytes: int = 0) -> None:
        """Send a datagram, or several of `segment_bytes` each, the last of which may be shorter.

        Raises:
            BlockingIOError: the kernel takes no more at the moment.
            OSError: it cannot be sent.
        """
        if not (path.local or segment_bytes):
            self.bound.sendto(data, path.remote)
            return
        ancillary: list[tuple[int, int, bytes]] = []
        if path.local:
            ancillary.append((self._local_level, self._local_type, path.local))
        if segment_bytes:
            ancillary.append((_SOL_UDP, _UDP_SEGMENT, struct.pack("H", segment_bytes)))
        self.bound.sendmsg([data], ancillary, 0, path.remote)

    def refusals(self) -> list[tuple[SocketAddress, int]]:
        """Return whom the network says it cannot reach (ICMP), each with an `errno`, and forget it."""
        refused: list[tuple[SocketAddress, int]] = []
        if _LINUX:
            with suppress(OSError):  # there is none, or no memory to tell of one
                while True:
                    _, ancillary, _, remote = self.bound.recvmsg(
                        _ERROR_BYTES, _ANCILLARY_BYTES, socket.MSG_ERRQUEUE
                    )
                    for level, kind, content in ancillary:
                        if (level, kind) in _ERROR_KINDS:  # sock_extended_err begins with the errno
                            refused.append((remote, struct.unpack_from("I", content)[0]))
        return refused

    def close(self) -> None:
        """Close it; twice is no error."""
        self.bound.close()


_ERROR_KINDS = ((socket.IPPROTO_IP, _IP_RECVERR), (socket.IPPROTO_IPV6, _IPV6_RECVERR))
