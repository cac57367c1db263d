"""Addresses as text, and the addresses of this machine."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.transport.address import join_address, split_address
from knode.transport.interfaces import interface_addresses

hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str).filter(lambda text: "." not in text),
    st.from_regex(r"[a-z][a-z0-9-]{0,20}(\.[a-z]{2,5})?", fullmatch=True),
)


@given(host=hosts, port=st.integers(1, 65535))
def test_what_is_joined_splits_again(host: str, port: int) -> None:
    assert split_address(join_address(host, port)) == (host, port)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        host, port = split_address(text)
    except ValueError:
        return
    assert host
    assert 0 < port < 65536


@pytest.mark.parametrize(
    "text",
    ["", ":", "host", "host:", "host:0", "host:65536", "host:-1", "host:٣", "::1:80", "[host]:80", "[]:1"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no host:port"):
        split_address(text)


def test_a_mapped_address_is_written_as_ipv4() -> None:
    assert join_address("::ffff:192.0.2.7", 80) == "192.0.2.7:80"


@pytest.mark.parametrize("versions", [{4}, {6}, {4, 6}])
def test_the_addresses_of_this_machine_can_be_bound(versions: set[int]) -> None:
    addresses = [ipaddress.ip_address(text) for text in interface_addresses(versions=frozenset(versions))]
    assert addresses == sorted(set(addresses), key=lambda address: (address.version, int(address)))
    assert {address.version for address in addresses} <= versions
    assert not any(address.is_unspecified or address.is_link_local for address in addresses)
    for address in addresses:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family) as each:
            each.bind((str(address), 0))
