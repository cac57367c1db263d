"""Networks in namespaces, with real packets; skipped, with the reason, where they cannot be made."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from real_processes import kill_daemons, namespaces_or_skip, until

from knode.errors import Code, KnodeError
from knode.testnet import Testnet
from knode.testnet.namespaces import Namespaces
from knode.testnet.processes import end
from knode.testnet.topology import Topology, on_a_lan

TOWN = {
    "what": "node1 and node4 in the open, node4 over a bad wire; node2 and node3 at two homes",
    "networks": [
        {"name": "internet", "ipv4": "11.0.0.0/24", "ipv6": "2a0b::/64"},
        {"name": "home-a", "ipv4": "192.168.1.0/24", "behind": "internet"},
        {"name": "home-b", "ipv4": "192.168.2.0/24", "behind": "internet"},
    ],
    "nodes": [
        {"network": "internet"},
        {"network": "home-a"},
        {"network": "home-b"},
        {"network": "internet", "wire": {"delay_ms": [20, 30], "loss": 0.2}},
    ],
}
SERVER = """
import socket
both = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
both.bind(("::", 4747))
print("bound", flush=True)
while True:
    data, sender = both.recvfrom(2048)
    both.sendto(data + b" " + sender[0].encode(), sender)
"""
CLIENT = """
import json, socket, sys, time
host, count, enough, wait_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
asking = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
asking.settimeout(wait_s)
answers, sent = [], {}
try:
    for number in range(count):
        sent[number] = time.monotonic()
        asking.sendto(str(number).encode(), (host, 4747))
        time.sleep(0.001)
    while len(answers) < enough:
        text = asking.recv(2048).decode().split()
        answers.append([time.monotonic() - sent[int(text[0])], text[1]])
except OSError:
    pass
print(json.dumps(answers))
"""


def topology_of(document: dict) -> Topology:
    topology = msgspec.convert(document, Topology)
    topology.check()
    return topology


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespaces]:
    folder = tmp_path_factory.mktemp("town")
    network = namespaces_or_skip(folder, topology_of(TOWN))
    servers = []
    try:
        for node in ("node1", "node2", "node3", "node4"):
            line = [*network.enter(node), sys.executable, "-S", "-c", SERVER]
            server = subprocess.Popen(line, stdout=subprocess.PIPE)
            servers.append(server)
            assert server.stdout is not None
            assert server.stdout.readline() == b"bound\n"
        yield network
    finally:
        for server in servers:
            server.kill()
            server.communicate()
        Namespaces.stop(folder)


def ask(
    network: Namespaces, node: str, host: str, count: int = 1, enough: int = 1, wait_s: float = 5.0
) -> list:
    """Send datagrams from a node to the echo of another; return how long each took, and who it saw."""
    asking = [sys.executable, "-S", "-c", CLIENT, host, str(count), str(enough), str(wait_s)]
    line = [*network.enter(node), *asking]
    return json.loads(subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout)


def test_neighbours_reach_each_other_by_both_versions_of_ip(town: Namespaces) -> None:
    for host, seen in (("11.0.0.11", "::ffff:11.0.0.14"), ("2a0b::b", "2a0b::e")):
        # The wire of node4 loses the questions for neighbours, too, and the system gives up after three.
        assert until(lambda host=host: ask(town, "node4", host, 50))[0][1] == seen  # type: ignore[misc]


def test_a_bad_wire_delays_and_loses_in_both_directions(town: Namespaces) -> None:
    for node, host in (("node4", "11.0.0.11"), ("node1", "11.0.0.14")):
        answers = ask(town, node, host, 200, 200, wait_s=1.0)
        assert 0 < len(answers) < 200
        assert min(took for took, _ in answers) >= 0.04


def test_a_home_is_seen_as_its_router_and_lets_nothing_in_that_was_not_asked_for(town: Namespaces) -> None:
    for node, router in (("node2", "11.0.0.202"), ("node3", "11.0.0.203")):
        assert [who for _, who in ask(town, node, "11.0.0.11")] == [f"::ffff:{router}"]
        assert ask(town, "node1", router, wait_s=0.3) == []
    assert ask(town, "node2", "11.0.0.203", wait_s=0.3) == []
    assert ask(town, "node2", "192.168.2.13", wait_s=0.3) == []


def test_who_is_barred_is_not_heard_until_it_is_no_more(town: Namespaces) -> None:
    topology = topology_of(TOWN)
    town.bar("node1", topology.barred(1, [2]))
    try:
        assert ask(town, "node2", "11.0.0.11", wait_s=0.3) == []
        assert len(ask(town, "node3", "11.0.0.11")) == 1
    finally:
        town.bar("node1", [])
    assert len(ask(town, "node2", "11.0.0.11")) == 1


def test_a_network_is_found_by_its_folder_and_ends_with_its_process(tmp_path: Path) -> None:
    network = namespaces_or_skip(tmp_path, on_a_lan(2))
    try:
        assert Namespaces.find(tmp_path) == network
        assert Namespaces.find(tmp_path / "other") is None
        ours = {"port1", "port2", "br0"} & {name for _, name in socket.if_nameindex()}
        assert not ours, "the machine's own network is untouched"
    finally:
        assert end([network.pid], signal.SIGKILL) == []
    assert Namespaces.find(tmp_path) is None


def test_a_network_that_cannot_be_built_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    namespaces_or_skip(tmp_path / "a", on_a_lan(1))
    Namespaces.stop(tmp_path / "a")
    twice = on_a_lan(2)
    broken = msgspec.structs.replace(
        twice, networks=(msgspec.structs.replace(twice.networks[0], ipv6="ff00::/64"),)
    )
    with pytest.raises(KnodeError, match="cannot be built") as caught:
        Namespaces.start(tmp_path / "b", broken)
    assert caught.value.code is Code.UNAVAILABLE
    assert Namespaces.find(tmp_path / "b") is None


def test_without_the_programs_it_says_which_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knode.testnet.namespaces._PATH", str(tmp_path))
    with pytest.raises(KnodeError, match="'unshare' is not installed") as caught:
        Namespaces.start(tmp_path, on_a_lan(1))
    assert caught.value.code is Code.UNAVAILABLE
    assert "util-linux" in caught.value.next_step


def test_two_homes_meet_through_the_relay_are_parted_healed_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("KNODE_DISCOVERY_MDNS", "KNODE_DISCOVERY_LIBP2P"):
        monkeypatch.delenv(variable, raising=False)  # in here it is the topology that says
    namespaces_or_skip(tmp_path, on_a_lan(1))
    Namespaces.stop(tmp_path)
    folder = tmp_path / "net"
    homes = [folder / f"node{number}" for number in (1, 2, 3)]

    def knode(*words: str) -> Any:
        line = [sys.executable, "-m", "knode", *words, "--json"]
        run = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        return json.loads(run.stdout)

    def node2_sees(*states: str) -> bool:
        return net.status()["nodes"][1]["sees"] == dict(zip(("node1", "node2", "node3"), states, strict=True))

    try:
        rows = knode("testnet", "up", "--topology", "two-homes-behind-nat", "--dir", str(folder))["nodes"]
        net = Testnet.open(folder)
        places = {os.readlink(f"/proc/{pid}/ns/net") for pid in ("self", *(row["pid"] for row in rows))}
        assert len(places) == 4
        relayed = {peer["name"]: peer["relayed"] for peer in knode("peer", "list", "--home", str(homes[1]))}
        assert relayed == {"node1": False, "node3": True}
        task = ("task", "submit", "kExecutor:text", "--direct", "--wait", "--on", "node3")
        words = '{"op":"count","text":"from home to home"}'
        assert knode(*task, "--input", words, "--home", str(homes[1]))["state"] == "succeeded"
        net.cut(["2"])
        until(lambda: node2_sees("failed", "alive", "failed"))
        net.heal()
        until(lambda: node2_sees("alive", "alive", "alive"))
        net.kill("2")
        net.down()
        assert list(folder.iterdir()) == []
        assert Namespaces.find(folder) is None
    finally:
        kill_daemons(*homes)
        Namespaces.stop(folder)
