"""A leader killed with SIGKILL: how long until another takes the next submit; etcd's beside it.

Three daemons on loopback. The submit is asked of a node that lives, from the moment of the kill on, and
counts when it is committed (`queued` or beyond, not `pending`).
"""

from __future__ import annotations

import http.client
import os
import signal
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import _etcd
from benchmarks.report import ROUNDS, Row
from knode.control.client import Client
from knode.errors import KnodeError
from knode.home.layout import Home
from knode.tasks.views import PENDING
from knode.testnet import Testnet
from knode.testnet.testnet import TestnetNode

AT_MOST_S = 2.0
WITHIN_S = 60.0


def run() -> list[Row]:
    """Kill ten leaders of ours, and as many of etcd's where it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        net = Testnet.up(Path(folder, "net"), nodes=3)
        try:
            ours = [_failover_s(net) for _ in range(ROUNDS)]
        finally:
            net.down()
        theirs = []
        if _etcd.is_installed():
            theirs = [_etcd_failover_s(Path(folder, f"etcd{number}")) for number in range(ROUNDS)]
    typical = median(ours)
    peer = median(theirs) if theirs else None
    return [
        Row(
            "leader killed: next submit acknowledged",
            f"{typical:.2f} s, {min(ours):.2f} to {max(ours):.2f}",
            "" if peer is None else f"{peer:.2f} s etcd, next put",
            typical / (peer or AT_MOST_S),
            f"at most {AT_MOST_S:g} s",
            typical <= AT_MOST_S,
        )
    ]


def _failover_s(net: Testnet) -> float:
    """Kill the leader, measure, and bring it back."""
    leader = _settled_leader(net)
    other = next(node for node in net.nodes if node != leader)
    with Client.connect(Home(leader.home)) as client:
        pid = client.daemon_pid
    with Client.connect(Home(other.home)) as client:
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while True:
            task = client.call(
                "task.submit", {"agent": "kExecutor:text", "input": '{"op":"count","text":"x"}'}
            )
            if task["state"] != PENDING:
                break
        seconds = time.monotonic() - killed_at
    net.restart(leader.name)
    return seconds


def _settled_leader(net: Testnet) -> TestnetNode:
    """Return who leads once every node sees all, and that one leads."""
    until = time.monotonic() + WITHIN_S
    while True:
        try:
            views = [_view(node) for node in net.nodes]
        except KnodeError:
            views = []
        leaders = {leader for leader, _ in views}
        if len(leaders) == 1 and all(alive == len(net.nodes) for _, alive in views):
            [leader] = leaders
            for node in net.nodes:
                if node.node_id == leader:
                    return node
        if time.monotonic() > until:
            raise TimeoutError(f"the nodes do not agree on a leader: {views}")
        time.sleep(0.1)


def _view(node: TestnetNode) -> tuple[str | None, int]:
    with Client.connect(Home(node.home)) as client:
        status = client.call("status", silence_s=WITHIN_S)
    return status["leader"], sum(member["state"] == "alive" for member in status["members"])


def _etcd_failover_s(folder: Path) -> float:
    """Kill the leader of a fresh cluster; return how long until another member takes a put."""
    folder.mkdir()
    with _etcd.cluster(folder) as members:
        leader = next(member for member in members if member.is_leader())
        others = [member for member in members if member is not leader]
        killed_at = time.monotonic()
        leader.process.kill()
        while True:
            for member in others:
                try:
                    member.put("after", "the kill")
                except (OSError, http.client.HTTPException):
                    continue
                return time.monotonic() - killed_at
            time.sleep(0.01)
