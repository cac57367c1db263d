"""Multiaddrs of libp2p links, as text."""

from __future__ import annotations

import pytest
from multiaddr import Multiaddr

from knode.identity import KeyPair
from knode.transport.libp2p_address import (
    PeerAddress,
    circuit_address,
    direct_address,
    is_peer_id,
    parse_peer_address,
    without_peer_id,
)

A, B = (KeyPair(seed * 32).node_id for seed in (b"a", b"b"))
RSA = "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN"


@pytest.mark.parametrize(
    ("text", "means"),
    [
        (f"/ip4/192.168.1.7/tcp/4748/p2p/{A}", PeerAddress("192.168.1.7", 4748, A)),
        (f"/ip6/2001:db8::7/tcp/1/p2p/{A}", PeerAddress("2001:db8::7", 1, A)),
        (f"/dns/home.example.net/tcp/65535/p2p/{RSA}", PeerAddress("home.example.net", 65535, RSA)),
        (f"/ip4/203.0.113.9/tcp/4748/p2p/{B}/p2p-circuit/p2p/{A}", PeerAddress("203.0.113.9", 4748, B, A)),
    ],
)
def test_both_forms_are_read_and_written(text: str, means: PeerAddress) -> None:
    assert parse_peer_address(text) == means
    assert str(means) == text
    assert str(Multiaddr(text)) == text, "libp2p reads it alike"
    assert means.target in text.rpartition("/")[2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "192.168.1.7:4748",
        f"/ip4/192.168.1.7/tcp/4748/p2p/{A}/",
        f"/ip4/192.168.1.7/udp/4748/quic-v1/p2p/{A}",
        f"/ip4/192.168.1.7/tcp/0/p2p/{A}",
        f"/ip4/192.168.1.7/tcp/65536/p2p/{A}",
        f"/ip4/192.168.1.7/tcp/４/p2p/{A}",
        f"/ip4/192.168.1.999/tcp/4748/p2p/{A}",
        f"/ip4/2001:db8::7/tcp/4748/p2p/{A}",
        f"/ip6/fe80::1%eth0/tcp/4748/p2p/{A}",
        f"/dns/-/tcp/4748/p2p/{A}",
        f"/dns/a b/tcp/4748/p2p/{A}",
        f"/dns/{'a' * 300}/tcp/4748/p2p/{A}",
        "/ip4/192.168.1.7/tcp/4748",
        f"/ip4/192.168.1.7/tcp/4748/p2p/{A[:-1]}",
        f"/ip4/192.168.1.7/tcp/4748/p2p/{KeyPair(b'a' * 32).public.did}",
        f"/ip4/192.168.1.7/tcp/4748/p2p/{B}/p2p-circuit",
        f"/p2p/{B}/p2p-circuit/p2p/{A}",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no multiaddr"):
        parse_peer_address(text)


def test_addresses_are_put_together_and_taken_apart() -> None:
    relay = direct_address("203.0.113.9", 4748, B)
    assert without_peer_id(relay) == "/ip4/203.0.113.9/tcp/4748"
    assert without_peer_id(circuit_address(relay, A)) == f"{relay}/p2p-circuit"
    assert without_peer_id("/ip4/1.2.3.4/tcp/5") == "/ip4/1.2.3.4/tcp/5"
    assert direct_address("::1", 1, A) == f"/ip6/::1/tcp/1/p2p/{A}"
    assert direct_address("home.lan", 1, A) == f"/dns/home.lan/tcp/1/p2p/{A}"


@pytest.mark.parametrize("text", ["", "0", "12D3KooW", A + "1", "Qm", "1" * 500])
def test_what_is_no_peer_id(text: str) -> None:
    assert not is_peer_id(text)
