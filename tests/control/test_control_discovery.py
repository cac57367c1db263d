"""Daemons on machines of their own find each other when nothing but multicast DNS says where they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_network import LIBP2P_BROWSER, Owner, line, machines_of_an_owner
from real_processes import until


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    with machines_of_an_owner(tmp_path) as owner:
        yield owner


def test_nodes_that_all_get_new_addresses_find_each_other_by_multicast_dns_alone(owner: Owner) -> None:
    """They move while they run, as when the router hands out other addresses.

    Before that the libp2p library sees the one that speaks libp2p, and the doctor finds all well.
    """
    network = owner.network
    desk, attic = network.machine("10.99.0.1/24"), network.machine("10.99.0.2/24")
    owner.knode(desk, "init", "--name", "desk")
    owner.knode(desk, "up", "--detach", KNODE_DISCOVERY_LIBP2P="true")
    ticket = owner.knode(desk, "invite", "--no-wait")["ticket"]
    owner.knode(attic, "join", ticket, "--name", "attic")
    owner.peer(desk)
    desk_id = owner.knode(desk, "status")["node_id"]
    with network.start(attic, LIBP2P_BROWSER) as browser:
        assert line(browser) == ["found", desk_id, "/ip4/10.99.0.1/tcp/4748"]
    checks = {check["check"]: check for check in owner.knode(desk, "doctor")["checks"]}
    assert (checks["mdns"]["grade"], checks["clock of others"]["grade"]) == ("pass", "pass")
    assert "attic reaches this node by" in checks["reachability"]["found"]
    network.move(desk, "10.99.7.1/24")
    network.move(attic, "10.99.7.2/24")

    def has_moved() -> bool:
        [peer] = owner.knode(desk, "peer", "list")
        return peer["state"] == "alive" and "10.99.7." in (peer["address"] or "")

    until(has_moved)
