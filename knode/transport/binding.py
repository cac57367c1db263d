"""Binding a port for a listener, over TCP and UDP alike."""

from __future__ import annotations

import errno
import socket
from typing import Any

import trio

from knode.errors import Code, KnodeError
from knode.transport.interfaces import interface_addresses

_BACKLOG = 128


async def bind(host: str, port: int, kind: socket.SocketKind, *, setting: str) -> socket.socket:
    """Return a socket bound to an address of this machine; a TCP socket listens.

    Args:
        host: an address or a name of this machine; "" and "::" take IPv6 and IPv4, "0.0.0.0" IPv4 alone.
        port: 0 takes a free one.
        kind: SOCK_STREAM for TCP, SOCK_DGRAM for UDP.
        setting: the key of the configuration that the port comes from, for the error.

    Raises:
        KnodeError: PORT_IN_USE, or INVALID_ARGUMENT for an address that is not this machine's.
    """
    name = "UDP port" if kind is socket.SOCK_DGRAM else "port"
    try:
        if host not in ("", "::"):
            found = await trio.socket.getaddrinfo(host, port, type=kind)
            host = str(found[0][4][0])
        return _bind(host, port, kind)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise KnodeError(
                Code.PORT_IN_USE,
                f"another program listens on {name} {port}",
                f"stop it, or choose another port with 'knode config set {setting} PORT'",
            ) from error
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            f"cannot listen on {host!r}, {name} {port} ({error.strerror or error})",
            "choose an address of this machine, and a port from 1024 on",
        ) from error


def _bind(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    if host in ("", "::") and socket.has_dualstack_ipv6():
        try:
            return _bound(socket.AF_INET6, "::", port, kind, both_versions=True)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # IPv6 is there, but switched off
                raise
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return _bound(family, host or "0.0.0.0", port, kind, both_versions=False)


def _bound(
    family: socket.AddressFamily, host: str, port: int, kind: socket.SocketKind, *, both_versions: bool
) -> socket.socket:
    if kind is socket.SOCK_STREAM:
        return socket.create_server(
            (host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both_versions
        )
    bound = socket.socket(family, kind)
    try:
        if family is socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both_versions)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


def dialable(bound: tuple[Any, ...]) -> list[tuple[str, int]]:
    """Return the IP addresses, with the port, at which others can reach a socket now.

    Args:
        bound: its address, as the system gives it.

    Raises:
        OSError: no descriptor is left to ask the system with.
    """
    host, port = bound[:2]
    match host:
        case "0.0.0.0":
            hosts = interface_addresses(versions=frozenset({4}))
        case "::":
            hosts = interface_addresses(versions=frozenset({4, 6}))
        case _:
            hosts = [host]
    return [(each, port) for each in hosts]
