"""Three processes that are one cell: the measuring process, which leads, and two daemons that joined it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import trio
import trio.testing

from knode.home.configuration import load_configuration
from knode.home.layout import Home
from knode.mesh.statements import Role
from knode.node import Machine, Node, initialise
from knode.tasks.durable import Request
from knode.tasks.messages import TaskView
from knode.transport.websocket import WebSocketCarrier
from knode.world import SilentLog
from knode.world.real import real_world

TOGETHER = 256
WITHIN_S = 60.0
RUNNING = 100
"""Attempts that each node may run at once, so that all that are in flight have a place."""
INPUT = b'{"op":"count","text":"x"}'
FLAGS = {
    "node.host": "127.0.0.1",
    "node.port": "0",
    "log.level": "warning",
    "discovery.mdns": "false",
    "discovery.libp2p": "false",
    "tasks.running": str(RUNNING),
}


@asynccontextmanager
async def cell_of_three(folder: Path) -> AsyncIterator[tuple[Node, list[Home]]]:
    """Give the node of this process, which leads a cell with two daemons, and their homes; all three vote."""
    world, home = real_world(), Home(folder / "ours")
    await trio.to_thread.run_sync(partial(initialise, home, name="ours", flags=FLAGS))
    carriers = {"websocket": WebSocketCarrier(home.certificate, SilentLog())}
    machine = Machine(os.cpu_count() or 1, lambda: 0, None)
    settings = load_configuration(world, home, environment={}, flags=FLAGS).values
    node = await Node.open(world, home, settings, carriers, machine, SilentLog())
    async with trio.open_nursery() as nursery:
        await nursery.start(node.run)
        tickets = [(await node.invite(Role.WORKER))[0].text() for _ in range(2)]
        homes = [Home(folder / name) for name in ("one", "two")]
        with _daemons(homes):
            for home, ticket in zip(homes, tickets, strict=True):
                await _join(home, ticket)
            with trio.fail_after(WITHIN_S):
                while not _is_complete(node):
                    await trio.testing.wait_all_tasks_blocked(0.01)
            yield node, homes
        nursery.cancel_scope.cancel()


def _is_complete(node: Node) -> bool:
    raft, members = node.replica.raft, node.membership.roster.members.values()
    voters = len(raft.configuration.voters) if raft is not None and not raft.is_joint else 0
    running = all("kExecutor:text" in node.offers.of(member.key) for member in members)
    return node.replica.is_leader and voters == len(members) and running


async def _join(home: Home, ticket: str) -> None:
    environment = {f"KNODE_{name.upper().replace('.', '_')}": value for name, value in FLAGS.items()}
    command = [sys.executable, "-m", "knode", "join", ticket, "--home", str(home.path), "--json"]
    await trio.run_process(
        command, capture_stdout=True, capture_stderr=True, env={**os.environ, **environment}
    )


@contextmanager
def _daemons(homes: list[Home]) -> Iterator[None]:
    """Stop the daemons of these homes in the end."""
    try:
        yield
    finally:
        for home in homes:
            subprocess.run(
                [sys.executable, "-m", "knode", "down", "--home", str(home.path)],
                capture_output=True,
                check=False,
            )


async def run_one(node: Node) -> None:
    """Submit a task that does next to nothing, and return when it has succeeded."""
    view = await node.durable.submit(Request("kExecutor:text", INPUT), keep=False)
    assert isinstance(view, TaskView)
    if not view.state.final:
        async for step in node.following.follow(view.id, view):
            view = step
    assert isinstance(view, TaskView)
    assert view.state == "succeeded", view


async def tasks_a_second(node: Node, count: int) -> float:
    """Return how many tasks end in a second while `TOGETHER` are under way."""
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await run_one(node)

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(TOGETHER):
            nursery.start_soon(work)
    return count / (time.perf_counter() - started)
