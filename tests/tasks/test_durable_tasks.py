"""Durable tasks between real nodes, over the memory link and in virtual time."""

from __future__ import annotations

import trio
from memory_cell import COMMAND, Cell, Host
from trio.testing import MockClock

from knode.tasks.durable import Request
from knode.tasks.lifecycle import State
from knode.tasks.messages import TaskView
from knode.tasks.outbox import Waiting


async def submit(host: Host, line: str = "", agent: str = COMMAND, **rest: object) -> TaskView:
    view = await host.node.durable.submit(Request(agent, line.encode(), **rest))  # type: ignore[arg-type]
    assert isinstance(view, TaskView)
    return view


async def settled(host: Host, task: bytes) -> TaskView:
    last: TaskView | Waiting | None = None
    with trio.fail_after(600):
        async for view in host.node.durable.follow(task):
            last = view
    assert isinstance(last, TaskView)
    return last


async def test_a_task_is_committed_run_and_completed_in_a_cell_of_one(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    view = await submit(desk, "say hello")
    assert view.state in (State.ASSIGNED, State.SUCCEEDED)
    ended = await settled(desk, view.id)
    assert (ended.state, ended.result, ended.attempt) == (State.SUCCEEDED, b"hello", 1)


async def test_every_node_submits_and_every_node_runs(autojump_clock: MockClock, cell: Cell) -> None:
    hosts = [await cell.add(name) for name in ("desk", "attic", "barn")]
    for host in hosts:
        for name in ("desk", "attic", "barn"):
            view = await submit(host, f"say {name}", on=name)
            ended = await settled(host, view.id)
            assert (ended.state, ended.result) == (State.SUCCEEDED, name.encode()), ended
    found = await hosts[1].node.durable.tasks()
    assert found.is_confirmed
    assert len(found.tasks) == 9
