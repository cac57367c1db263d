"""Durable tasks of real processes: whoever is killed, what tasks leave is there once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_processes import until

from knode.control.client import Client
from knode.home.layout import Home
from knode.testnet import Testnet

BATCH = 8
SCRIPT = """
import json, time
time.sleep(0.3)
with open("effects.jsonl", "w") as file:
    print(json.dumps({{"operation": "{mark}"}}), file=file)
print("{mark}")
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testnet]:
    made = Testnet.up(tmp_path_factory.mktemp("durable"), nodes=3)
    yield made
    made.down()


def knode(net: Testnet, node: str, *words: str, code: int = 0) -> Any:
    line = [sys.executable, "-m", "knode", *words, "--home", str(net.node(node).home), "--json"]
    run = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == code, run.stdout + run.stderr
    return json.loads(run.stdout)


def call(net: Testnet, node: str, method: str, **params: Any) -> Any:
    with Client.connect(Home(net.node(node).home)) as client:
        return client.call(method, params)


def leader_of(net: Testnet, asked: str) -> str | None:
    names = {node.node_id: node.name for node in net.nodes}
    return names.get(call(net, asked, "status")["leader"])


def submit(net: Testnet, node: str, mark: str) -> str:
    script = SCRIPT.format(mark=mark)
    task: str = call(net, node, "task.submit", agent="kExecutor:python", input=script, key=mark)["id"]
    return task


def test_every_node_leads_to_the_same_result_and_bad_input_has_its_exit_code(
    net: Testnet, tmp_path: Path
) -> None:
    file = tmp_path / "words.txt"
    file.write_text("one two three\n")
    words = ("task", "submit", "kExecutor:text", "--input", '{"op":"count"}', "--artifact", str(file))
    for node in net.nodes:
        done = knode(net, node.name, *words, "--on", "node2", "--wait")
        assert (done["state"], done["node"], done["attempt"]) == ("succeeded", "node2", 1)
        assert done["result"]["total"]["words"] == 3
    assert (
        knode(net, "node1", "task", "submit", "kExecutor:nobody", code=6)["error"]["code"]
        == "NO_ELIGIBLE_NODE"
    )
    failed = knode(net, "node1", "task", "submit", "kExecutor:python", "--input", "exit(3)", "--wait", code=1)
    assert failed["error"]["code"] == "AGENT_FAILED"
    refused = knode(net, "node1", "task", "cancel", failed["id"], code=2)
    assert refused["error"]["code"] == "INVALID_ARGUMENT"
    listed = call(net, "node3", "task.list")
    assert Counter(task["state"] for task in listed) == {"succeeded": 3, "failed": 1}


def test_a_batch_outlives_the_leader_killed_in_its_midst_and_takes_effect_once(net: Testnet) -> None:
    leader = leader_of(net, "node1")
    assert leader is not None
    asked = [node.name for node in net.nodes if node.name != leader]
    marks = [f"{node}-{number}" for number in range(BATCH) for node in asked]
    first = {mark: submit(net, mark.split("-")[0], mark) for mark in marks[:BATCH]}
    net.kill(leader)
    first |= {mark: submit(net, mark.split("-")[0], mark) for mark in marks[BATCH:]}
    for mark, task in first.items():
        ended = call(net, asked[0], "task.watch", task=task)
        assert (ended["state"], ended["result"]) == ("succeeded", f"{mark}\n"), ended
    assert leader_of(net, asked[0]) in asked
    net.restart(leader)
    until(lambda: leader_of(net, leader) is not None)

    for mark, task in first.items():
        assert submit(net, mark.split("-")[0], mark) == task
    effects = knode(net, leader, "task", "effects")
    assert Counter(effect["operation"] for effect in effects) == dict.fromkeys(marks, 1)
    assert {effect["operation"]: effect["task"] for effect in effects} == first
    assert [effect["sequence"] for effect in effects] == list(range(1, len(marks) + 1))
    [own] = call(net, leader, "task.effects", task=first[marks[0]])
    assert own["operation"] == marks[0]
