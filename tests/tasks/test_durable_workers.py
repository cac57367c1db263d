"""Durable tasks while the nodes that run them, or hold their files, are lost, cut off or restarted."""

from __future__ import annotations

import dataclasses

import pytest
import trio
from memory_cell import COMMAND, Cell, Host, Seeded, settled
from trio.testing import MockClock

from knode.consensus.electorate import Votes
from knode.errors import Code, KnodeError
from knode.mesh.statements import Role
from knode.tasks import forgetting
from knode.tasks.commands import Bundle, Fence
from knode.tasks.durable import Request
from knode.tasks.inputs import ASK_EVERY_S
from knode.tasks.lifecycle import State
from knode.tasks.messages import AssignAttempt, CompleteAttempt, StopAttempt, TaskView
from knode.world import Monotonic

MINE = 'leave {"operation": "mine"}'


async def submit(host: Host, *lines: str, **rest: object) -> TaskView:
    request = Request(COMMAND, "\n".join(lines).encode(), **rest)  # type: ignore[arg-type]
    view = await host.node.durable.submit(request)
    assert isinstance(view, TaskView)
    return view


async def effects_of(host: Host, task: bytes) -> list[bytes]:
    return [effect.operation for effect in (await host.node.durable.effects(task)).effects]


async def three(cell: Cell, **settings: str) -> tuple[Host, Host, Host]:
    """Three nodes that all vote: of fewer, the first alone would go on leading without the others."""
    desk, attic, barn = [await cell.add(name, **settings) for name in ("desk", "attic", "barn")]

    def votes(host: Host) -> bool:
        member = desk.node.membership.roster.find(host.name)
        return desk.node.electorate.votes(member) is Votes.VOTER

    await cell.until(lambda: all(map(votes, (desk, attic, barn))))
    return desk, attic, barn


def runner_of(cell: Cell) -> Host:
    """Return the one host that runs an attempt now."""
    [host] = [host for host in cell.hosts.values() if host.sandbox.running]
    return host


async def leader_of(cell: Cell) -> Host:
    """Return who leads, once all agree on it."""
    nodes = [host.node for host in cell.hosts.values()]

    def agreed() -> bool:
        leaders = [node.replica.leader() for node in nodes]
        return leaders[0] is not None and all(leader == leaders[0] for leader in leaders)

    await cell.until(agreed)
    [leader] = [host for host in cell.hosts.values() if host.node.replica.is_leader]
    return leader


async def lose_power(cell: Cell, host: Host, seed: str) -> None:
    """Cut a host's power: it is off, and its disk is what such a cut may leave."""
    disk = host.disk.crash(Seeded(seed))
    await cell.crash(host)
    host.disk, host.world = disk, dataclasses.replace(host.world, disk=disk)
    host.sandbox._disk = disk


async def test_what_a_lost_node_ran_is_run_by_another_and_takes_effect_once(
    autojump_clock: MockClock, cell: Cell
) -> None:
    await three(cell)
    leader = await leader_of(cell)
    worker = next(host for host in cell.hosts.values() if host is not leader)
    others = [host for host in cell.hosts.values() if host is not worker]
    blockers = [await submit(leader, "sleep 3", on=host.name) for host in others for _ in range(2)]
    task = await submit(leader, "sleep 60", MINE, "say done")
    await cell.until(lambda: runner_of_task(cell, task.id) is worker)
    await cell.crash(worker)
    ended = await settled(leader, task.id)
    assert (ended.state, ended.attempt, ended.result) == (State.SUCCEEDED, 2, b"done")
    assert await effects_of(leader, task.id) == [b'"mine"']
    for blocker in blockers:
        assert (await settled(leader, blocker.id)).state is State.SUCCEEDED
    await cell.start(worker)
    await cell.until_whole()
    await cell.until(lambda: len(worker.node.attempts) == 0)
    assert await effects_of(leader, task.id) == [b'"mine"']


def runner_of_task(cell: Cell, task: bytes) -> Host | None:
    for host in cell.hosts.values():
        if any(name.startswith(task.hex()) for name in host.sandbox.running):
            return host
    return None


async def test_a_node_that_restarts_at_once_runs_its_attempt_again_under_its_fence(
    autojump_clock: MockClock, cell: Cell
) -> None:
    await three(cell)
    leader = await leader_of(cell)
    worker = next(host for host in cell.hosts.values() if host is not leader)
    task = await submit(leader, "sleep 20", MINE, "say done", on=worker.name)
    await cell.until(lambda: worker.sandbox.running != [])
    await cell.crash(worker)
    await cell.start(worker)
    await cell.until(lambda: worker.sandbox.running != [])
    ended = await settled(leader, task.id)
    assert (ended.state, ended.attempt, ended.result) == (State.SUCCEEDED, 1, b"done")
    assert await effects_of(leader, task.id) == [b'"mine"']


async def test_a_node_that_is_cut_off_finishes_but_what_it_did_too_late_takes_no_effect(
    autojump_clock: MockClock, cell: Cell
) -> None:
    await three(cell)
    leader = await leader_of(cell)
    worker, other = [host for host in cell.hosts.values() if host is not leader]
    cold = [await submit(leader, "sleep 2", on=host.name) for host in (leader, other) for _ in range(2)]
    task = await submit(leader, "sleep 30", MINE, "say done")
    await cell.until(lambda: runner_of_task(cell, task.id) is worker)
    for host in (leader, other):
        cell.network.cut(worker.name, host.name)
    ended = await settled(leader, task.id)
    assert (ended.state, ended.attempt) == (State.SUCCEEDED, 2)
    assert ended.member != worker.node.key.public.raw
    assert worker.sandbox.cancelled == []  # it went on with what it accepted
    assert len(worker.node.attempts) == 1
    for host in (leader, other):
        cell.network.heal(worker.name, host.name)
    await cell.until(lambda: len(worker.node.attempts) == 0)
    assert await effects_of(leader, task.id) == [b'"mine"']
    assert len(cold) == 4


async def test_a_node_that_was_cut_off_for_a_moment_delivers_when_it_is_back(
    autojump_clock: MockClock, cell: Cell
) -> None:
    await three(cell)
    leader = await leader_of(cell)
    worker, other = [host for host in cell.hosts.values() if host is not leader]
    task = await submit(leader, "sleep 2", MINE, "say done", on=worker.name)
    await cell.until(lambda: worker.sandbox.running != [])
    for host in (leader, other):
        cell.network.cut(worker.name, host.name)
    await trio.sleep(4)
    for host in (leader, other):
        cell.network.heal(worker.name, host.name)
    ended = await settled(leader, task.id)
    assert (ended.state, ended.attempt) == (State.SUCCEEDED, 1)
    assert await effects_of(leader, task.id) == [b'"mine"']


async def test_every_acknowledged_task_ends_once_though_the_whole_cell_loses_power(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    tasks = [
        await submit(hosts[number % 3], f"sleep {number % 5}", f'leave {{"operation": {number}}}')
        for number in range(9)
    ]
    for round in range(3):
        await trio.sleep(1.3)
        for host in hosts:
            await lose_power(cell, host, f"{round} {host.name}")
        for host in hosts:
            await cell.start(host)
        await cell.until_whole()
    ended = [await settled(hosts[0], task.id) for task in tasks]
    assert {view.state for view in ended} == {State.SUCCEEDED}
    everything = [effect.operation for effect in (await hosts[0].node.durable.effects()).effects]
    assert sorted(everything) == [str(number).encode() for number in range(9)]
    await cell.until(lambda: all(len(host.node.attempts) == 0 for host in hosts))
    for host in hosts:
        assert host.attempts == []


async def test_a_worker_gets_files_from_the_second_holder_when_the_submitter_is_gone(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic, barn = await three(cell)
    leader = await leader_of(cell)
    submitter = next(host for host in (desk, attic, barn) if host is not leader)
    others = [host for host in (desk, attic, barn) if host is not submitter]
    paths = (submitter.file("a", b"one"), submitter.file("b", b"two"))
    blocked = [await submit(submitter, "sleep 10", on=host.name) for host in others for _ in range(2)]
    task = await submit(submitter, "list", artifacts=paths, on=others[0].name)
    await cell.crash(submitter)
    ended = await settled(others[0], task.id)
    assert (ended.state, ended.result) == (State.SUCCEEDED, b"a,b")
    task = await submit(others[0], "list", artifacts=(others[0].file("c", b"x"),), on=others[1].name)
    assert (await settled(others[0], task.id)).result == b"c"
    await trio.sleep(ASK_EVERY_S + 5)
    for host in others:
        assert host.node.inputs._holding.tasks == ()
        assert host.disk.list_folder(host.home.inputs) == []
    await cell.start(submitter)
    await cell.until_whole()
    await trio.sleep(ASK_EVERY_S + 5)
    assert submitter.disk.list_folder(submitter.home.inputs) == []
    assert len(blocked) == 4


async def test_a_task_follows_another_once(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    line = '{"task": {"agent": "kExecutor:command", "input": "leave {\\"operation\\": 2}"}}'
    task = await submit(desk, f"leave {line}", 'leave {"operation": 1}')
    await settled(desk, task.id)
    found = (await desk.node.durable.tasks()).tasks
    assert len(found) == 2
    for view in found:
        assert (await settled(desk, view.id)).state is State.SUCCEEDED
    assert [effect.operation for effect in (await desk.node.durable.effects()).effects] == [b"1", b"2"]


async def test_the_leader_soon_lets_the_ledger_forget_what_is_too_much(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "KEPT_TASKS", 2)
    monkeypatch.setattr(forgetting, "CROWDED_TASKS", 3)
    monkeypatch.setattr(forgetting, "KEPT_OPERATION_BYTES", 4)
    desk = await cell.add("desk")
    await cell.until(lambda: desk.node.ledger.level == forgetting.LEVEL)
    for number in range(10):
        task = await submit(desk, f'leave {{"operation": {number}}}')
        await settled(desk, task.id)
    page = await desk.node.durable.effects(after=3)
    assert [(effect.place, effect.operation) for effect in page.effects[:2]] == [(4, b"3"), (5, b"4")]
    await trio.sleep(60)
    assert len((await desk.node.durable.tasks()).tasks) == 10, "each may still be submitted again"
    await trio.sleep(forgetting.REMEMBERED_MS / 1000)
    assert desk.node.ledger.totals.kept == 3
    page = await desk.node.durable.effects()
    assert [effect.operation for effect in page.effects] == [b"6", b"7", b"8", b"9"]
    assert (page.first, page.since) == (7, page.effects[0].time)


async def test_an_agents_failure_ends_the_task_and_trouble_is_tried_again(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    for line, code, attempts in (("die 1", "AGENT_FAILED", 1), ("die 75", "AGENT_FAILED", 3)):
        task = await submit(desk, MINE, line)
        ended = await settled(desk, task.id)
        assert (ended.state, ended.code, ended.attempt) == (State.FAILED, code, attempts)
    assert (await desk.node.durable.effects()).effects == ()


async def test_a_revoked_node_stops_its_attempts_and_another_runs_them(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic, barn = await three(cell)
    cold = [await submit(desk, "sleep 5", on=host.name) for host in (desk, barn) for _ in range(2)]
    task = await submit(desk, "sleep 30", MINE, "say done")
    await cell.until(lambda: runner_of_task(cell, task.id) is attic)
    membership = desk.node.membership
    await membership.revoke(membership.roster.find("attic"))
    await cell.until(lambda: attic.sandbox.running == [])
    ended = await settled(desk, task.id)
    assert (ended.state, ended.attempt) == (State.SUCCEEDED, 2)
    assert await effects_of(desk, task.id) == [b'"mine"']
    assert len(attic.node.attempts) == 0
    assert len(cold) == 4


async def test_who_does_not_lead_gives_and_takes_away_nothing_and_ends_nobody_elses_attempt(
    autojump_clock: MockClock, cell: Cell
) -> None:
    await three(cell)
    leader = await leader_of(cell)
    worker, rogue = [host for host in cell.hosts.values() if host is not leader]
    task = await submit(leader, "sleep 10", MINE, "say done", on=worker.name)
    await cell.until(lambda: worker.sandbox.running != [])
    fence = leader.node.ledger.live[task.id].fence
    forged = Fence(fence.incarnation, b"f" * 16, 1)
    deadline = Monotonic(trio.current_time() + 60)
    to_worker = rogue.node.peers.peer(worker.node.key.public)
    to_leader = rogue.node.peers.peer(leader.node.key.public)
    for peer, method, body in (
        (to_worker, "task.assign", AssignAttempt(forged, COMMAND, b"say x", (), (), 9000, "t")),
        (to_worker, "task.stop", StopAttempt(fence)),
        (to_leader, "task.complete", CompleteAttempt(fence, Bundle(b"forged"))),
    ):
        with pytest.raises(KnodeError) as caught:
            await peer.request(method, body, deadline=deadline)
        assert caught.value.code is Code.NOT_ALLOWED
    ended = await settled(leader, task.id)
    assert (ended.result, ended.attempt) == (b"done", 1)


async def test_an_observer_gives_no_attempts_though_nobody_is_known_to_lead(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic, barn = await three(cell)
    watcher = await cell.add("watcher", Role.OBSERVER)
    await cell.crash(attic)
    await cell.crash(barn)
    await cell.until(lambda: desk.node.replica.leader() is None)
    forged = Fence(bytes(32), b"f" * 16, 1)
    to_desk = watcher.node.peers.peer(desk.node.key.public)
    for method, body in (
        ("task.assign", AssignAttempt(forged, COMMAND, b"say x", (), (), 9000, "t")),
        ("task.stop", StopAttempt(forged)),
    ):
        with pytest.raises(KnodeError) as caught:
            await to_desk.request(method, body, deadline=Monotonic(trio.current_time() + 5))
        assert caught.value.code is Code.NOT_ALLOWED
