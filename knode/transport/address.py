"""Addresses as people and tickets write them: `host:port`, `[v6]:port`; those of libp2p begin with `/`."""

from __future__ import annotations


def join_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets round an IPv6 address; a mapped IPv4 address is written as IPv4."""
    host = host.removeprefix("::ffff:") if "." in host else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_host_and_port(address: str) -> bool:
    """Whether this is an address of a QUIC or WebSocket link, or of the memory, and not of libp2p."""
    return not address.startswith("/")


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[v6]:port`.

    Raises:
        ValueError: it is neither, or the port is not 1 to 65535.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise ValueError(f"{address[:80]!r} is no host:port")
    if bracketed:
        host = host[1:-1]
    if not host or (":" in host) != bracketed:
        raise ValueError(f"{address[:80]!r} is no host:port")
    return host, int(port)
