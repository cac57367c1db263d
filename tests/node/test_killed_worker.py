"""A real daemon with real sandboxes, killed with SIGKILL while attempts run: each task takes effect once."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_processes import PATIENCE_S, Process, kill_daemons, plain_environment, until

from knode.cli.daemon import answering
from knode.control.client import Client
from knode.home.layout import Home
from knode.node import initialise
from knode.testnet.processes import processes_with

FLAGS = {
    "node.host": "127.0.0.1",
    "node.port": "0",
    "discovery.mdns": "false",
    "discovery.libp2p": "false",
    "tasks.running": "2",
}
TASKS = 4
_numbers = itertools.count()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path / "home", None)
    initialise(made, name="desk", flags=FLAGS)
    yield made
    kill_daemons(made.path)


def start(home: Home) -> Process:
    return Process(
        [sys.executable, "-m", "knode", "up", "--home", str(home.path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=plain_environment(),
    )


def call(client: Client, method: str, **params: Any) -> Any:
    return client.call(method, params, silence_s=PATIENCE_S)


def test_tasks_of_a_node_that_is_killed_again_and_again_take_effect_once(home: Home) -> None:
    # Part of the command lines, so that an attempt that runs can be seen from outside.
    marker = f"1.{os.getpid():07}{next(_numbers):03}"
    file = home.path.parent / "given"
    file.write_text("given")
    with start(home), until(lambda: answering(home)) as client:
        tasks = [
            call(
                client,
                "task.submit",
                agent="kExecutor:command",
                input=f"sleep {marker}; echo '{{\"operation\": {number}}}' > effects.jsonl; cat input/given",
                artifacts=[str(file)],
            )["id"]
            for number in range(TASKS)
        ]
        until(lambda: processes_with(marker.encode()))
        kill_daemons(home.path)
        until(lambda: not processes_with(marker.encode()))
    with start(home), until(lambda: answering(home)):
        until(lambda: processes_with(marker.encode()))
        kill_daemons(home.path)
    with start(home) as daemon, until(lambda: answering(home)) as client:
        documents = [until(lambda task=task: ended(call(client, "task.show", task=task))) for task in tasks]
        assert {(each["state"], each["attempt"], each["result"]) for each in documents} == {
            ("succeeded", 1, "given")
        }
        effects = call(client, "task.effects")
        assert sorted(effect["operation"] for effect in effects) == list(range(TASKS))
        assert list((home.state / "attempts").iterdir()) == []
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(PATIENCE_S)


def ended(document: Any) -> Any:
    """Return a task's document once it has ended."""
    return document if document["state"] not in ("pending", "queued", "assigned") else None
