"""TCP sockets as every kind of link over TCP has them."""

from __future__ import annotations

import errno
import socket

import trio

from knode.errors import Code, KnodeError
from knode.transport.interfaces import interface_addresses

_BACKLOG = 128
# a silent peer is found by KLP's keepalive within seconds; these end connections that nobody keeps alive
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


def prepare_tcp(connected: trio.socket.SocketType) -> None:
    """Send small pieces at once, and find out when the other machine is gone; raises OSError."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not every system has all three
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def bind_tcp(host: str, port: int, *, setting: str) -> trio.SocketListener:
    """Listen on a port.

    Args:
        host: an address or a name of this machine; "" and "::" take IPv6 and IPv4, "0.0.0.0" IPv4 alone.
        port: 0 takes a free one.
        setting: the key of the configuration that the port comes from, for the error.

    Raises:
        KnodeError: PORT_IN_USE, or INVALID_ARGUMENT for an address that is not this machine's.
    """
    try:
        if host not in ("", "::"):
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            host = str(found[0][4][0])
        bound = _bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise KnodeError(
                Code.PORT_IN_USE,
                f"another program listens on port {port}",
                f"stop it, or choose another port with 'knode config set {setting} PORT'",
            ) from error
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            f"cannot listen on {host!r}, port {port} ({error.strerror or error})",
            "choose an address of this machine, and a port from 1024 on",
        ) from error
    return trio.SocketListener(trio.socket.from_stdlib_socket(bound))


def dialable(listening: trio.socket.SocketType) -> list[tuple[str, int]]:
    """Return the IP addresses, with the port, at which others can reach a listening socket now.

    Raises:
        OSError: it is closed, or no descriptor is left to ask the system with.
    """
    host, port = listening.getsockname()[:2]
    match host:
        case "0.0.0.0":
            hosts = interface_addresses(versions=frozenset({4}))
        case "::":
            hosts = interface_addresses(versions=frozenset({4, 6}))
        case _:
            hosts = [host]
    return [(each, port) for each in hosts]


def _bind(host: str, port: int) -> socket.socket:
    if host in ("", "::") and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # IPv6 is there, but switched off
                raise
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host or "0.0.0.0", port), family=family, backlog=_BACKLOG)
