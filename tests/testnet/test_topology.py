"""Topologies: what a file may say, and what its nodes are to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from knode.errors import Code, KnodeError
from knode.testnet.topology import (
    FOLDER,
    Network,
    PlannedNode,
    Topology,
    choose,
    link_local,
    load,
    mac_address,
    names,
    on_a_lan,
    on_loopback,
)

INTERNET = {"name": "internet", "ipv4": "11.0.0.0/24", "ipv6": "2a0b::/64"}
HOME = {"name": "home", "ipv4": "192.168.1.0/24", "behind": "internet"}


A = "networks = [{name = 'a', ipv4 = '10.0.0.0/24'}]"


def made_of(networks: list[dict[str, Any]], *nodes: dict[str, Any]) -> Topology:
    topology = msgspec.convert({"what": "a test", "networks": networks, "nodes": nodes}, Topology)
    topology.check()
    return topology


def town() -> Topology:
    """node1 and node2 are in the open, node3 and node4 at one home, node5 at another, node6 in its cellar."""
    cellar = {"name": "cellar", "ipv4": "192.168.3.0/24", "behind": "other-home"}
    other = {"name": "other-home", "ipv4": "192.168.2.0/24", "behind": "internet"}
    places = ("internet", "internet", "home", "home", "other-home", "cellar")
    return made_of([INTERNET, HOME, other, cellar], *({"network": place} for place in places))


@pytest.mark.parametrize("name", names())
def test_what_comes_with_knode_is_whole_and_says_what_it_is(name: str) -> None:
    topology = load(name)
    assert topology.what
    assert topology.needs_namespaces
    assert load(str(FOLDER / f"{name}.toml")) == topology
    assert msgspec.convert(msgspec.to_builtins(topology), Topology) == topology


def test_the_folder_of_the_project_is_the_one_that_is_installed() -> None:
    project = Path(__file__).parents[2]
    assert (project / "testnet").resolve() == FOLDER.resolve()
    assert set(names()) >= {"five-on-a-lan", "flaky-link", "two-homes-behind-nat"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "what"),
        ("what = 'x'", "nodes"),
        ("what = 'x'\nnodes = []", "length >= 1"),
        ("what = 'x'\nnodes = [{}]\nspeed = 1", "speed"),
        ("what = 'x'\nnodes = [{network = 'lan'}]", "there are no networks"),
        ("what = 'x'\nnodes = [{wire = {loss = 0.1}}]", "there are no networks"),
        (f"what = 'x'\nnodes = [{{}}]\n{A}", "node1 is in"),
        (f"what = 'x'\nnodes = [{{network = 'a'}}]\n{A.replace('10.0.0.0/24', '10.0.0.1/24')}", "host bits"),
        (f"what = 'x'\nnodes = [{{network = 'a'}}]\n{A.replace('10.0.0.0/24', '10.0.0.0/25')}", "too small"),
        (f"what = 'x'\nnodes = [{{network = 'a'}}]\n{A.replace('10.0.0.0/24', 'ten')}", "ten"),
        (f"what = 'x'\nnodes = [{{network = 'a', wire = {{delay_ms = [2, 1]}}}}]\n{A}", "least delay"),
        (f"what = 'x'\nnodes = [{{network = 'a', wire = {{loss = 1.0}}}}]\n{A}", "< 1"),
        ("what = 'x'\nnodes = [{settings = {node = {name = '{node2.id}'}}}]", "only that of node1"),
        ("what = 'x'\nnodes = [{settings = {node = {name = '{node1.ipv4}'}}}]", "no node of a network"),
        ("what = ", "at end of document"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_reason(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(KnodeError, match="is no topology") as caught:
        load(str(file))
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert why in caught.value.message


def test_networks_have_names_and_addresses_of_their_own() -> None:
    for second, why in (
        ({**HOME, "name": "internet"}, "one name"),
        ({**HOME, "ipv4": "11.0.0.0/16"}, "share addresses"),
        ({"name": "b", "ipv4": "10.0.0.0/24", "ipv6": "2a0b::/64"}, "share addresses"),
        ({**HOME, "behind": "elsewhere"}, "must stand before"),
        ({**HOME, "behind": "home"}, "must stand before"),
        ({**HOME, "ipv6": "fd00::/48"}, "no /64"),
    ):
        with pytest.raises(ValueError, match=why):
            made_of([INTERNET, second], {"network": "internet"})


def test_a_topology_that_is_none_names_those_that_there_are() -> None:
    for name in ("none", "../scenarios/calm", "mine.toml"):
        with pytest.raises(KnodeError) as caught:
            load(name)
        assert caught.value.code is Code.NOT_FOUND
        assert "flaky-link" in caught.value.next_step


def test_a_node_sees_neighbours_as_they_are_and_those_at_home_as_their_router() -> None:
    topology = town()
    assert [str(address) for address in topology.addresses_seen(1, 2)] == [
        "11.0.0.12",
        str(link_local(2)),
        "2a0b::c",
    ]
    assert [str(address) for address in topology.addresses_seen(1, 3)] == ["11.0.0.202"]
    assert topology.addresses_seen(1, 3) == topology.addresses_seen(5, 4)
    assert str(topology.addresses_seen(3, 1)[0]) == "11.0.0.11"
    assert str(topology.addresses_seen(3, 4)[0]) == "192.168.1.14"
    assert [str(address) for address in topology.addresses_seen(5, 6)] == ["192.168.2.204"]
    assert [str(address) for address in topology.addresses_seen(1, 6)] == ["11.0.0.203"]


def test_nodes_without_a_way_to_each_other_see_nothing() -> None:
    apart = made_of(
        [INTERNET, {"name": "island", "ipv4": "10.0.0.0/24"}], {"network": "internet"}, {"network": "island"}
    )
    assert apart.addresses_seen(1, 2) == []
    assert apart.barred(1, [2]) == []


def test_a_partition_leaves_homes_whole() -> None:
    topology = town()
    for side in ([1], [3, 4], [1, 3, 4], [5, 6]):
        topology.check_partition(side)
    for side in ([3], [1, 4], [6], [5]):
        with pytest.raises(KnodeError, match="behind one NAT") as caught:
            topology.check_partition(side)
        assert caught.value.code is Code.INVALID_ARGUMENT
    assert [str(address) for address in topology.barred(1, [3, 4, 5])] == ["11.0.0.202", "11.0.0.203"]


def test_settings_name_the_first_node_and_any_address() -> None:
    settings = {"a": {"b": ["/ip4/{node1.ipv4}/p2p/{node1.id}", 1, "{other}"], "c": "{node2.ipv6}"}}
    topology = made_of([INTERNET], {"network": "internet"}, {"network": "internet", "settings": settings})
    assert topology.settings_of(1, "ID") == {}
    assert topology.settings_of(2, "ID") == {
        "a": {"b": ["/ip4/11.0.0.11/p2p/ID", 1, "{other}"], "c": "2a0b::c"}
    }


def test_a_number_of_nodes_or_a_topology() -> None:
    assert choose(nodes=None, netns=False, name=None) == on_loopback(3)
    assert choose(nodes=2, netns=True, name=None) == on_a_lan(2)
    assert choose(nodes=None, netns=True, name="flaky-link") == load("flaky-link")
    with pytest.raises(KnodeError) as caught:
        choose(nodes=3, netns=False, name="flaky-link")
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_the_largest_lan_has_room_for_all() -> None:
    lan = on_a_lan(32)
    lan.check()
    assert len({lan.address4(number) for number in range(1, 33)}) == 32
    assert len({mac_address(number) for number in range(1, 33)}) == 32


def test_link_local_addresses_are_those_of_the_rfc() -> None:
    assert str(link_local(1)) == "fe80::6b:6eff:fe6f:6401"


def test_many_networks_are_bounded() -> None:
    nets = tuple(Network(f"n{each}", f"10.0.{each}.0/24") for each in range(17))
    document = msgspec.to_builtins(Topology("many", (PlannedNode("n0"),), nets))
    with pytest.raises(msgspec.ValidationError, match="length <= 16"):
        msgspec.convert(document, Topology)
