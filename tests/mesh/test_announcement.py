from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mesh_cell import key_of
from multiaddr import Multiaddr

from knode.errors import Code, KnodeError
from knode.mesh.announcement import (
    MAX_ADDRESSES,
    MAX_READ_BYTES,
    MAX_STRING_BYTES,
    MAX_TEXT_BYTES,
    Claim,
    local_hosts,
    local_port,
    read_announcement,
    write_announcement,
)

A, B = key_of("a").public.node_id, key_of("b").public.node_id
LIBP2P = f"/ip4/192.168.1.7/tcp/4748/p2p/{A}"


def record(*strings: str | bytes) -> bytes:
    encoded = [s.encode() if isinstance(s, str) else s for s in strings]
    return b"".join(bytes([len(s)]) + s for s in encoded)


def strings(text: bytes) -> list[bytes]:
    found = []
    while text:
        found.append(text[1 : 1 + text[0]])
        text = text[1 + text[0] :]
    return found


def test_what_a_node_says_is_what_another_reads() -> None:
    addresses = ("192.168.1.7:4747", "[fd00::7]:4747", LIBP2P)
    assert read_announcement(write_announcement(A, addresses)) == Claim(A, addresses)


def test_libp2p_is_told_its_own_addresses_and_no_transport_that_is_not_its() -> None:
    text = write_announcement(A, ("192.168.1.7:4747", LIBP2P, f"/ip6/fd00::7/tcp/4748/p2p/{A}"))
    told = [s.removeprefix(b"dnsaddr=") for s in strings(text) if s.startswith(b"dnsaddr=")]
    parsed = [Multiaddr(address.decode()) for address in told]  # libp2p's own parser
    assert [m.value_for_protocol("tcp") for m in parsed] == ["4748", "4748"]
    assert {m.value_for_protocol("p2p") for m in parsed} == {A}
    assert not any(b"quic" in s or b"4747" in s for s in told)
    assert strings(write_announcement(A, ("192.168.1.7:4747",))) == [f"klp={A}@192.168.1.7:4747".encode()]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:4747",
        "[::1]:4747",
        "[fe80::1]:4747",
        "0.0.0.0:4747",
        "attic:4747",
        f"/ip4/127.0.0.1/tcp/4748/p2p/{A}",
        f"/ip4/192.168.1.9/tcp/4001/p2p/{B}/p2p-circuit/p2p/{A}",
        f"/ip4/192.168.1.7/udp/4748/quic-v1/p2p/{A}",
        f"/dns4/attic/tcp/4748/p2p/{A}",
        f"/ip4/192.168.1.7/tcp/4748/p2p/{B}",
    ],
)
def test_an_address_that_is_no_use_to_neighbours_is_not_told(address: str) -> None:
    assert write_announcement(A, (address,)) == b""


def test_many_addresses_are_told_as_far_as_a_record_reaches() -> None:
    addresses = [f"[fd00:1111:2222:3333:4444:5555:6666:{n:x}]:4747" for n in range(1, 40)]
    addresses += [f"/ip6/fd00:1111:2222:3333:4444:5555:6666:{n:x}/tcp/4748/p2p/{A}" for n in range(1, 40)]
    text = write_announcement(A, addresses)
    assert len(text) <= MAX_TEXT_BYTES
    assert all(len(string) <= MAX_STRING_BYTES for string in strings(text))
    claim = read_announcement(text)
    assert claim is not None
    assert claim.addresses[0] == addresses[0]
    assert 1 < len(claim.addresses) <= MAX_ADDRESSES


@pytest.mark.parametrize(
    "said",
    [
        ("klp=",),
        (f"klp={A}",),
        (f"klp={A}@",),
        ("klp=nobody@192.168.1.7:4747",),
        (f"klp={A[:-1]}@192.168.1.7:4747",),
        (f"klp={A}@192.168.1.7",),
        (f"klp={A}@192.168.1.7:0",),
        (f"klp={A}@192.168.1.7:4747,",),
        (f"klp={A}@192.168.1.07:4747",),
        (f"klp={A}@attic.example:4747",),
        (f"klp={A}@127.0.0.1:22",),
        (f"klp={A}@[::ffff:127.0.0.1]:22",),
        (f"klp={A}@[fd00::1%eth0]:22",),
        (f"klp={A}@224.0.0.251:5353",),
        (f"klp={A}@" + ",".join(f"10.0.0.{n}:1" for n in range(9)),),
        (f"klp={A}@192.168.1.7:4747", f"klp={A}@192.168.1.8:4747"),
        (f"klp={A}@192.168.1.7:4747", f"dnsaddr=/ip4/192.168.1.7/tcp/4748/p2p/{B}"),
        (b"klp=\xff\xfe@192.168.1.7:4747",),
    ],
)
def test_what_no_node_says_is_refused(said: tuple[str | bytes, ...]) -> None:
    with pytest.raises(KnodeError) as refused:
        read_announcement(record(*said))
    assert refused.value.code is Code.INVALID_ARGUMENT


def test_a_record_that_is_cut_off_or_too_large_is_refused() -> None:
    good = record(f"klp={A}@192.168.1.7:4747")
    for bad in (good[:-1], good + b"\x09short", record(*["x" * 200] * 50)):
        with pytest.raises(KnodeError):
            read_announcement(bad)
    assert len(record(*["x" * 200] * 50)) > MAX_READ_BYTES


@pytest.mark.parametrize(
    "said",
    [
        (),
        ("",),
        ("txtvers=1", "path=/printer"),
        ("dnsaddr=/ip4/192.168.1.9/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",),
        (f"dnsaddr=/ip4/192.168.1.7/udp/4001/quic-v1/p2p/{A}",),
        ("dnsaddr=/ip4/192.168.1.7/tcp/4001",),
        (b"dnsaddr=\xff",),
    ],
)
def test_other_services_and_other_libp2p_nodes_are_passed_over(said: tuple[str | bytes, ...]) -> None:
    assert read_announcement(record(*said)) is None


def test_a_libp2p_node_with_a_key_like_ours_is_found_by_its_tcp_addresses() -> None:
    text = record(f"dnsaddr=/ip4/192.168.1.7/udp/4748/quic-v1/p2p/{A}", f"dnsaddr={LIBP2P}", "other=1")
    assert read_announcement(text) == Claim(A, (LIBP2P,))


@given(
    st.one_of(
        st.binary(max_size=600),
        st.lists(st.binary(max_size=60).map(lambda b: b"klp=" + b), max_size=4).map(lambda s: record(*s)),
        st.lists(st.binary(max_size=60).map(lambda b: b"dnsaddr=/" + b), max_size=4).map(
            lambda s: record(*s)
        ),
    )
)
def test_whatever_is_said_it_is_read_within_bounds_or_refused(text: bytes) -> None:
    try:
        claim = read_announcement(text)
    except KnodeError:
        return
    assert claim is None or 0 < len(claim.addresses) <= MAX_ADDRESSES


def test_the_interfaces_are_those_that_neighbours_can_dial() -> None:
    addresses = (LIBP2P, "127.0.0.1:4747", "192.168.1.7:4747", "[fd00::7]:4747", "192.168.1.7:4747")
    assert local_hosts(addresses) == ("192.168.1.7", "fd00::7")
    assert local_port(addresses) == 4747
    assert local_hosts(("127.0.0.1:4747", "attic:4747")) == ()
