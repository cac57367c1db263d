"""Daemons on machines of their own change to another kind of link when the network stops one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_network import Owner, machines_of_an_owner
from real_processes import until

WITHOUT_TCP = (
    "add table ip t; add chain ip t i { type filter hook input priority 0; }; "
    "add rule ip t i tcp dport 1-65535 drop"
)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    if shutil.which("nft") is None:
        pytest.skip("no firewall to try it with: there is no 'nft' (nftables)")
    with machines_of_an_owner(tmp_path) as owner:
        yield owner


def firewall(owner: Owner, machine: str, rules: str) -> None:
    subprocess.run(owner.network.on(machine, "nft", rules), check=True, timeout=60)


def test_quic_takes_over_where_tcp_is_no_longer_let_through(owner: Owner) -> None:
    desk, attic = owner.network.machine("10.98.0.1/24"), owner.network.machine("10.98.0.2/24")
    owner.knode(desk, "init", "--name", "desk")
    owner.knode(desk, "up", "--detach")
    ticket = owner.knode(desk, "invite", "--no-wait")["ticket"]
    owner.knode(attic, "join", ticket, "--name", "attic")
    until(lambda: owner.peer(desk)["link"] == "websocket")  # QUIC may be the faster on a busy machine
    for machine in (desk, attic):
        firewall(owner, machine, WITHOUT_TCP)
    until(lambda: owner.peer(desk)["link"] == "quic")
    pinged = owner.knode(desk, "peer", "ping", "attic", "--count", "1")
    assert pinged["lost"] == 0
    assert "websocket 10.98.0.2:4747 is better but" in pinged["why"]
    count = ("task", "submit", "kExecutor:text", "--input", '{"op":"count","text":"a b"}', "--on", "attic")
    assert owner.knode(desk, *count, "--direct", "--wait")["state"] == "succeeded"
