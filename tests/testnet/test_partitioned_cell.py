"""A cell whose leader is cut off by a firewall while both sides take durable tasks: each has one effect."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from real_processes import PATIENCE_S, namespaces_or_skip, until

from knode.control.client import Client
from knode.home.layout import Home
from knode.testnet import Testnet
from knode.testnet.namespaces import Namespaces
from knode.testnet.testnet import TestnetNode
from knode.testnet.topology import on_a_lan

LANES = 3
"""Each side is asked by so many at once, each of which submits one task after another."""
SCRIPT = """
import json, time
time.sleep(0.2)
with open("effects.jsonl", "w") as file:
    print(json.dumps({{"operation": "{mark}"}}), file=file)
print("{mark}")
"""


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Testnet]:
    namespaces_or_skip(tmp_path, on_a_lan(1))
    Namespaces.stop(tmp_path)
    made = Testnet.build(tmp_path / "net", on_a_lan(3))
    yield made
    made.down()


@dataclass
class Side:
    """What is submitted on one node until the network is cut, and once more then."""

    node: TestnetNode
    answers: dict[str, Any] = field(default_factory=dict)
    """What was answered before the cut and across it, by key."""
    answers_after: dict[str, Any] = field(default_factory=dict)
    """What was answered to those that were submitted when the cut had been made."""

    def submit(self, lane: int, is_cut: threading.Event) -> None:
        number = 0
        while not is_cut.is_set():
            mark = f"{self.node.name}-{lane}-{number}"
            self.answers[mark] = submit(self.node, mark)
            number += 1
        mark = f"{self.node.name}-{lane}-cut"
        words = ("task", "submit", "kExecutor:python", "--input", SCRIPT.format(mark=mark), "--key", mark)
        self.answers_after[mark] = knode(self.node, *words)

    def everything(self) -> dict[str, Any]:
        return self.answers | self.answers_after


def call(node: TestnetNode, method: str, **params: Any) -> Any:
    with Client.connect(Home(node.home)) as client:
        return client.call(method, params, silence_s=PATIENCE_S)


def submit(node: TestnetNode, mark: str) -> Any:
    return call(node, "task.submit", agent="kExecutor:python", input=SCRIPT.format(mark=mark), key=mark)


def knode(node: TestnetNode, *words: str) -> Any:
    """Run a command as it would be typed; it must exit with 0."""
    line = [sys.executable, "-m", "knode", *words, "--home", str(node.home), "--json"]
    run = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout)


def leader_known_to(node: TestnetNode) -> str | None:
    leader: str | None = call(node, "status")["leader"]
    return leader


def test_tasks_of_both_sides_of_a_cut_leader_all_end_with_one_effect_for_each_key(net: Testnet) -> None:
    led_by = until(lambda: leader_known_to(net.nodes[0]))
    [leader] = [node for node in net.nodes if node.node_id == led_by]
    majority = [node for node in net.nodes if node is not leader]
    lone, other = sides = (Side(leader), Side(majority[0]))
    is_cut = threading.Event()
    with ThreadPoolExecutor(2 * LANES) as pool:
        lanes = [pool.submit(side.submit, lane, is_cut) for side in sides for lane in range(LANES)]
        try:
            until(
                lambda: all(len(side.answers) > LANES for side in sides) or any(lane.done() for lane in lanes)
            )
            net.cut([leader.name])
        finally:
            is_cut.set()
        for lane in lanes:
            lane.result()

    # Who is alone acknowledges nothing, whatever it was asked; the others elect one of them and go on.
    assert {task["state"] for task in lone.answers_after.values()} == {"pending"}
    explained = knode(leader, "task", "explain", next(iter(lone.answers_after.values()))["id"])
    assert (explained["task"]["state"], explained["task"]["submitter"]) == ("pending", leader.name)
    assert explained["waits_for"].startswith("the voters to take it")
    for task in other.everything().values():
        assert call(other.node, "task.watch", task=task["id"])["state"] == "succeeded"
    assert leader_known_to(majority[0]) in [node.node_id for node in majority]

    net.heal()
    asked = lone.everything() | other.everything()
    for mark, task in asked.items():
        ended = call(leader, "task.watch", task=task["id"])
        assert (ended["state"], ended["result"], ended["key"]) == ("succeeded", f"{mark}\n", mark)
    ids = {mark: task["id"] for mark, task in asked.items()}
    for node in net.nodes:
        shown = knode(node, "task", "list")
        assert {task["key"]: task["id"] for task in shown} == ids
        assert Counter(task["state"] for task in shown) == {"succeeded": len(ids)}
        effects = knode(node, "task", "effects")
        assert Counter(effect["operation"] for effect in effects) == dict.fromkeys(ids, 1)
        assert {effect["operation"]: effect["task"] for effect in effects} == ids
    for side in sides:  # Each key once more: the same task.
        assert {mark: submit(side.node, mark)["id"] for mark in side.everything()}.items() <= ids.items()
    assert len(call(leader, "task.list")) == len(ids)
