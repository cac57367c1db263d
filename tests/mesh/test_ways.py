from __future__ import annotations

import pytest

from knode.mesh.ways import Scope, Way, can_be_dialled, fitting, scope_of, ways_to
from knode.transport import Carrier
from knode.transport.address import is_host_and_port

RELAYED = "/ip4/8.8.8.8/tcp/4748/p2p/12D3KooWRelay/p2p-circuit/p2p/12D3KooWPeer"


@pytest.mark.parametrize(
    ("address", "scope"),
    [
        ("192.168.1.7:4747", Scope.LOCAL),
        ("10.0.0.1:4747", Scope.LOCAL),
        ("127.0.0.1:4747", Scope.LOCAL),
        ("[fd00::7]:4747", Scope.LOCAL),
        ("[fe80::7]:4747", Scope.LOCAL),
        ("server:4747", Scope.LOCAL),
        ("server.lan:4747", Scope.LOCAL),
        ("server.local:4747", Scope.LOCAL),
        ("8.8.8.8:4747", Scope.WIDE),
        ("100.64.0.1:4747", Scope.WIDE),
        ("[2606:4700::1]:4747", Scope.WIDE),
        ("home.example.org:4747", Scope.WIDE),
        ("/ip4/192.168.1.7/tcp/4748/p2p/12D3KooWPeer", Scope.LOCAL),
        ("/ip4/8.8.8.8/tcp/4748/p2p/12D3KooWPeer", Scope.WIDE),
        ("/dns4/home.example.org/tcp/4748/p2p/12D3KooWPeer", Scope.WIDE),
        (RELAYED, Scope.RELAYED),
        ("/", Scope.WIDE),
        ("no address", Scope.WIDE),
    ],
)
def test_scope_is_read_off_the_address(address: str, scope: Scope) -> None:
    assert scope_of(address) is scope


def test_local_comes_before_wide_direct_before_relayed_and_each_scope_has_its_order() -> None:
    ordered = [
        Way("websocket", "192.168.1.7:4747"),
        Way("quic", "192.168.1.7:4747"),
        Way("libp2p", "/ip4/192.168.1.7/tcp/4748/p2p/12D3KooWPeer"),
        Way("quic", "8.8.8.8:4747"),
        Way("websocket", "8.8.8.8:4747"),
        Way("libp2p", "/ip4/8.8.8.8/tcp/4748/p2p/12D3KooWPeer"),
        Way("libp2p", RELAYED),
    ]
    assert sorted(reversed(ordered), key=lambda way: -way.quality) == ordered
    assert len({way.quality for way in ordered}) == len(ordered)


class _Dials:
    def __init__(self, *, multiaddrs: bool) -> None:
        self._multiaddrs = multiaddrs

    def dials(self, address: str) -> bool:
        return is_host_and_port(address) is not self._multiaddrs


def test_every_kind_that_dials_an_address_is_a_way_and_each_way_is_there_once() -> None:
    carriers: dict[str, Carrier] = {
        "websocket": _Dials(multiaddrs=False),  # type: ignore[dict-item]
        "quic": _Dials(multiaddrs=False),  # type: ignore[dict-item]
        "libp2p": _Dials(multiaddrs=True),  # type: ignore[dict-item]
    }
    found = ways_to(["8.8.8.8:1", RELAYED, "8.8.8.8:1", "192.168.1.7:1"], carriers)
    assert found == [
        Way("websocket", "192.168.1.7:1"),
        Way("quic", "192.168.1.7:1"),
        Way("quic", "8.8.8.8:1"),
        Way("websocket", "8.8.8.8:1"),
        Way("libp2p", RELAYED),
    ]


@pytest.mark.parametrize("address", ["0.0.0.0:4747", "[::]:4747", "224.0.0.251:5353", "255.255.255.255:1"])
def test_what_is_no_machines_address_is_not_dialled(address: str) -> None:
    assert not can_be_dialled(address)
    assert ways_to([address], {"quic": _Dials(multiaddrs=False)}) == []  # type: ignore[dict-item]


def test_where_not_all_addresses_fit_a_relayed_one_has_its_place() -> None:
    direct = [f"192.168.1.{number}:4747" for number in range(6)]
    assert fitting(direct, 4) == tuple(direct[:4])
    assert fitting([*direct, RELAYED], 4) == (*direct[:3], RELAYED)
    assert fitting([RELAYED, RELAYED, *direct], 4) == (*direct[:3], RELAYED)
    assert fitting([direct[0], RELAYED], 4) == (direct[0], RELAYED)
    assert fitting([], 4) == ()
