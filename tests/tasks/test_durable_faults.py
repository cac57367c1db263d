"""A cell goes on when a command meets a fault of the ledger's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from memory_cell import COMMAND, Cell, Host, settled
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.node.status import status
from knode.tasks import ledger
from knode.tasks.commands import Assign, Fence
from knode.tasks.dispatch import FORGET_EVERY_S
from knode.tasks.durable import Request
from knode.tasks.lifecycle import State
from knode.tasks.messages import FailAttempt, TaskView
from knode.world import Monotonic

AN_HOUR = 3600.0


async def submit(host: Host, line: str, **rest: Any) -> TaskView:
    view = await host.node.durable.submit(Request(COMMAND, line.encode(), **rest))
    assert isinstance(view, TaskView)
    return view


def break_rule(monkeypatch: pytest.MonkeyPatch, name: str, when: Any) -> None:
    """Let a rule raise, after all that it does was done, when its last argument is so."""
    rule = getattr(ledger, name)

    def broken(*values: Any) -> Any:
        outcome = rule(*values)
        if when(values[-1]):
            raise LookupError(str(values[0]))
        return outcome

    monkeypatch.setattr(ledger, name, broken)


async def test_a_submit_that_meets_a_fault_is_answered_and_the_cell_goes_on(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rule(monkeypatch, "_submit", lambda command: command.task.input == b"say poison")
    hosts = [await cell.add(name) for name in ("desk", "attic", "barn")]
    for host in hosts:
        with pytest.raises(KnodeError) as caught:
            await submit(host, "say poison")
        assert caught.value.code is Code.INTERNAL
    view = await submit(hosts[0], "say well")
    assert (await settled(hosts[0], view.id, within_s=AN_HOUR)).result == b"well"
    await cell.until(lambda: all(host.node.ledger.applied == hosts[0].node.ledger.applied for host in hosts))
    for host in hosts:
        told = status(host.node)
        assert told["durable"]["faults"] == 3
        assert any("fault of knode itself" in warning for warning in told["warnings"])
    await cell.crash(hosts[1])
    await cell.start(hosts[1])
    assert (
        await settled(hosts[1], (await submit(hosts[1], "say again")).id, within_s=AN_HOUR)
    ).result == b"again"


async def test_an_attempt_whose_end_meets_a_fault_fails_at_last(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rule(monkeypatch, "_take_effect", lambda bundle: bundle.result == b"poison")
    desk = await cell.add("desk")
    view = await settled(desk, (await submit(desk, "say poison")).id, within_s=AN_HOUR)
    assert (view.state, view.code, view.attempt) == (State.FAILED, Code.INTERNAL, 3)
    await cell.until(lambda: not len(desk.node.attempts))


async def test_one_task_whose_end_meets_a_fault_does_not_keep_others_from_expiring(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison: list[bytes] = []
    break_rule(monkeypatch, "_expire", lambda command: set(poison) & set(command.tasks))
    desk = await cell.add("desk")
    views = [await submit(desk, "sleep 100", deadline_s=5.0) for _ in range(3)]
    poison.append(views[0].id)
    assert [(await settled(desk, view.id, within_s=AN_HOUR)).state for view in views[1:]] == [
        State.EXPIRED
    ] * 2
    assert not (await desk.node.ledger.find(views[0].id.hex())).task.state.final


async def test_a_task_whose_assignment_meets_a_fault_is_tried_again_in_a_cell_that_is_idle(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[bytes] = []

    def is_first(command: Assign) -> bool:
        met.append(command.task)
        return len(met) <= 2  # in a batch that meets a fault each command is applied twice

    break_rule(monkeypatch, "_assign", is_first)
    desk = await cell.add("desk")
    view = await submit(desk, "break")  # what is tried again is queued, then assigned
    assert (await settled(desk, view.id, within_s=AN_HOUR)).attempt == 3
    assert len(met) == 4
    assert trio.current_time() < 60


async def test_status_counts_what_durable_tasks_keep_and_what_was_refused(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    file = Path("/a")
    desk.node.world.disk.write(file, bytes(1000))
    view = await submit(desk, "sleep 50", artifacts=(file,), on="attic")
    await cell.until(lambda: len(attic.node.attempts) == 1)
    for host in (desk, attic):
        told = status(host.node)["durable"]
        assert (told["held_files"], told["held_file_bytes"]) == (1, 1000)
        assert (told["kept_attempts"], told["kept_attempt_bytes"] > 0) == (int(host is attic), host is attic)
    forged = FailAttempt(Fence(desk.node.ledger.incarnation, view.id, 7), "AGENT_FAILED", "no", False)
    answer = await attic.node.leader.fail(forged, deadline=Monotonic(trio.current_time() + 5))
    assert not answer.is_current
    assert (await settled(desk, view.id, within_s=AN_HOUR)).state is State.SUCCEEDED
    leader = desk if desk.node.dispatcher.leads else attic
    assert status(leader.node)["durable"]["refused_ends"] == {"stale": 1}
    await cell.until(lambda: not len(attic.node.attempts))
    assert status(attic.node)["durable"]["kept_attempt_bytes"] == 0


async def test_a_node_goes_on_when_old_operations_cannot_be_looked_for(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    async def damaged(time: int) -> bool:
        asked.append(time)
        raise KnodeError(Code.HOME_DAMAGED, "the disk fails")

    desk = await cell.add("desk")
    monkeypatch.setattr(desk.node.ledger, "has_operations_before", damaged)
    await trio.sleep(FORGET_EVERY_S + 5)
    assert asked
    assert (await settled(desk, (await submit(desk, "say well")).id, within_s=AN_HOUR)).result == b"well"
