"""TCP sockets as every kind of link over TCP has them."""

from __future__ import annotations

import socket

import trio

from knode.transport.binding import bind

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
    """Listen on a port; see `bind`."""
    return trio.SocketListener(
        trio.socket.from_stdlib_socket(await bind(host, port, socket.SOCK_STREAM, setting=setting))
    )
