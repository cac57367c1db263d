"""Direct tasks between real nodes, over the memory link and in virtual time."""

from __future__ import annotations

import json

import pytest
import trio
from memory_cell import COMMAND, TEXT, Cell, Host
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.mesh.statements import Role
from knode.tasks import direct
from knode.tasks.lifecycle import State
from knode.tasks.messages import Run, Stage
from knode.tasks.task import Task
from knode.world import Monotonic


def code_of(task: Task) -> Code | None:
    return None if task.error is None else task.error.code


def texts_of(task: Task) -> list[str]:
    return [report["text"] for report in task.progress]


def events_of(host: Host, task: Task) -> list[dict[str, object]]:
    return [line for line in map(json.loads, host.lines) if line.get("task") == task.id]


async def test_a_task_runs_on_the_node_that_was_asked_for(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    for selector in ("attic", attic.node.key.node_id, attic.node.key.public.did, attic.node.key.node_id[:20]):
        task = await desk.settle("say hello", on=selector)
        assert (task.state, task.output, task.node) == (State.SUCCEEDED, b"hello", "attic")
    assert (await desk.settle("say here", on="desk")).output == b"here"


async def test_without_a_node_the_least_busy_one_is_chosen_and_at_best_this_one(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    assert (await desk.settle("say x")).node == "desk"
    busy = await desk.submit("sleep 30", on="desk")
    await cell.until(lambda: desk.node.places.load.running == 1)
    assert (await desk.settle("say x")).node == "attic"
    await desk.node.tasks.cancel(busy)
    assert desk.attempts == attic.attempts == []


async def test_files_arrive_whole_and_nothing_of_them_stays(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    files = (desk.file("a.md", b"# one\n"), desk.file("b.md", b"x" * 3_000_000), desk.file("empty", b""))
    for node in ("attic", "desk"):
        task = await desk.settle('{"op":"count"}', TEXT, artifacts=files, on=node)
        assert task.state is State.SUCCEEDED, task.error
        assert task.output is not None
        rows = {row["name"]: row["bytes"] for row in json.loads(task.output)["files"]}
        assert rows == {"a.md": 6, "b.md": 3_000_000, "empty": 0}
        assert texts_of(task)[:3] == [f"sending {p.name} ({i} of 3)" for i, p in enumerate(files, 1)]
        listed = await desk.settle("list", artifacts=files, on=node)
        assert listed.output == b"a.md,b.md,empty"
    assert desk.attempts == attic.attempts == []


async def test_an_agents_failure_is_kept_apart_from_the_mesh_s(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    for node in ("attic", "desk"):
        failed = await desk.settle("die 3", on=node)
        assert (failed.state, code_of(failed)) == (State.FAILED, Code.AGENT_FAILED)
        assert "its last words" in str(failed.error)
        fault = await desk.settle("break", on=node)
        assert (fault.state, code_of(fault)) == (State.FAILED, Code.INTERNAL)
    assert (await desk.settle("say alive", on="attic")).output == b"alive"
    assert desk.attempts == attic.attempts == []


async def test_a_task_that_failed_is_kept_without_the_frames_of_its_error(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    task = await desk.settle("die 3")
    assert task.error is not None
    assert code_of(task) is Code.AGENT_FAILED
    assert task.error.__traceback__ is None
    assert task.error.__cause__ is None


async def test_progress_of_the_agent_reaches_the_submitter(autojump_clock: MockClock, cell: Cell) -> None:
    desk, _ = await cell.add("desk"), await cell.add("attic")
    task = await desk.settle("report 0.25 a quarter\nsleep 1\nreport 1 done\nsay x", on="attic")
    assert [(r["fraction"], r["text"], r["node"]) for r in task.progress] == [
        (0.25, "a quarter", "attic"),
        (1.0, "done", "attic"),
    ]


async def test_the_deadline_ends_a_task_as_expired_on_both_nodes(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    for node in ("attic", "desk"):
        begun = trio.current_time()
        task = await desk.settle("sleep 100", on=node, deadline_s=5.0)
        assert (task.state, code_of(task)) == (State.EXPIRED, Code.EXPIRED)
        assert trio.current_time() - begun == pytest.approx(5, abs=0.1)
    assert desk.attempts == attic.attempts == []
    assert attic.sandbox.running == []


async def test_a_deadline_that_comes_while_files_travel_is_expired_and_leaves_nothing(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    big = desk.file("big", bytes(60_000_000))
    cell.network.cut("desk", "attic")
    task = await desk.settle("list", artifacts=(big,), on="attic", deadline_s=1.0)
    assert (task.state, code_of(task)) == (State.EXPIRED, Code.EXPIRED)
    cell.network.heal("desk", "attic")
    await cell.until(lambda: attic.attempts == [])


async def test_a_cancelled_task_is_stopped_where_it_runs(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    for host in (attic, desk):
        task = await desk.submit("sleep 50", on=host.name)
        await cell.until(lambda host=host: host.sandbox.running != [])  # type: ignore[misc]
        await desk.node.tasks.cancel(task)
        assert (task.state, code_of(task)) == (State.CANCELLED, Code.CANCELLED)
        await cell.until(lambda host=host: host.sandbox.cancelled != [] and host.attempts == [])  # type: ignore[misc]
        with pytest.raises(KnodeError, match="ended already: it is cancelled") as caught:
            await desk.node.tasks.cancel(task)
        assert caught.value.code is Code.INVALID_ARGUMENT


async def test_cancelling_while_a_file_travels_leaves_nothing(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    big = desk.file("big", bytes(60_000_000))
    task = await desk.submit("list", artifacts=(big,), on="attic")
    await cell.until(lambda: attic.attempts != [])
    await desk.node.tasks.cancel(task)
    await cell.until(lambda: attic.attempts == [])
    assert task.state is State.CANCELLED
    assert (await desk.settle("say x", on="attic")).output == b"x"


async def test_a_worker_that_is_lost_leaves_the_task_unknown(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    task = await desk.submit("sleep 100", on="attic", deadline_s=200.0)
    await cell.until(lambda: attic.sandbox.running != [])
    begun = trio.current_time()
    await cell.crash(attic)
    await task.ended()
    assert (task.state, code_of(task)) == (State.UNKNOWN, Code.UNKNOWN)
    assert trio.current_time() - begun < 20
    assert (await desk.settle("say x")).node == "desk"


async def test_a_worker_that_restarts_leaves_the_task_unknown_and_removes_what_was_left(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    task = await desk.submit("sleep 100", on="attic", deadline_s=200.0)
    await cell.until(lambda: attic.sandbox.running != [])
    await cell.crash(attic)
    attic.disk.make_folder(attic.home.attempts / "left" / "input")
    attic.disk.write(attic.home.attempts / "left" / "input" / "file", b"x")
    await cell.start(attic)
    await task.ended()
    assert task.state is State.UNKNOWN
    assert attic.attempts == []


async def test_an_attempt_survives_a_link_that_breaks_and_comes_back(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    task = await desk.submit("sleep 8\nsay done", on="attic")
    await cell.until(lambda: attic.sandbox.running != [])
    cell.network.cut("desk", "attic")
    await trio.sleep(6)
    cell.network.heal("desk", "attic")
    await task.ended()
    assert (task.state, task.output) == (State.SUCCEEDED, b"done")
    assert attic.sandbox.cancelled == []


async def test_an_attempt_stops_soon_after_its_submitter_is_lost_for_good(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    await desk.submit("sleep 280", on="attic", deadline_s=290.0)
    await cell.until(lambda: attic.sandbox.running != [])
    begun = trio.current_time()
    await cell.crash(desk)
    await cell.until(lambda: attic.sandbox.running == [])
    assert trio.current_time() - begun < 25
    assert attic.attempts == []
    assert attic.node.places.load.running == 0


async def test_an_attempt_stops_soon_after_its_submitter_restarted(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    await desk.submit("sleep 280", on="attic", deadline_s=290.0)
    await cell.until(lambda: attic.sandbox.running != [])
    await cell.crash(desk)
    await cell.start(desk)
    await cell.until_whole()
    await cell.until(lambda: attic.sandbox.running == [])
    assert attic.attempts == []


async def test_who_asked_for_nobody_that_can_is_told_why_with_its_exit_code(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    await cell.add("pebble", Role.VOTER)
    refused = [
        (dict(agent="kExecutor:nope"), Code.NO_ELIGIBLE_NODE, 6),
        (dict(agent="kExecutor:nope", on="attic"), Code.NO_AGENT, 5),
        (dict(on="nobody"), Code.NOT_FOUND, 5),
        (dict(on="pebble"), Code.NOT_ALLOWED, 4),
        (dict(on="12D3Koo"), Code.INVALID_ARGUMENT, 2),
    ]
    for arguments, code, exit_code in refused:
        with pytest.raises(KnodeError) as caught:
            await desk.submit("say x", **arguments)  # type: ignore[arg-type]
        assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
        assert caught.value.next_step
    await cell.crash(attic)
    with pytest.raises(KnodeError) as caught:
        await desk.submit("say x", on="attic")
    assert caught.value.code is Code.UNAVAILABLE
    assert desk.node.tasks.list() == []


async def test_a_voter_submits_and_runs_nothing_even_for_who_asks_it_directly(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, pebble = await cell.add("desk"), await cell.add("pebble", Role.VOTER)
    assert (await pebble.settle("say x")).node == "desk"
    voter = pebble.node.membership.own
    for raised in ("task.run", "task.stage"):
        body = Run(bytes(16), COMMAND, b"", (), 1000) if raised == "task.run" else Stage(bytes(16), "a", 0)
        with pytest.raises(KnodeError) as caught:
            await desk.node.peers.peer(voter.key).request(
                raised, body, deadline=Monotonic(trio.current_time() + 5)
            )
        assert caught.value.code is Code.NOT_ALLOWED


async def test_a_stopped_agent_is_offered_no_more(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    attic.node.registry.stop(COMMAND)
    attic.node.offers.announce()
    await cell.until(lambda: COMMAND not in desk.node.offers.of(attic.node.key.public))
    with pytest.raises(KnodeError) as caught:
        await desk.submit("say x", on="attic")
    assert caught.value.code is Code.NO_AGENT


async def test_an_agent_that_was_stopped_a_moment_ago_fails_the_task_by_name(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    attic.node.registry.stop(COMMAND)
    task = await desk.settle("say x", on="attic")
    assert (task.state, code_of(task)) == (State.FAILED, Code.NO_AGENT)


async def test_what_cannot_be_submitted_is_refused_before_anything_begins(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    long_name, odd = desk.file("n" * 201, b"x"), desk.file("a\nb", b"x")
    fine = desk.file("fine", b"x")
    refused = [
        (dict(line="x" * (192 * 1024 + 1)), Code.TOO_LARGE),
        (dict(deadline_s=0.0), Code.INVALID_ARGUMENT),
        (dict(deadline_s=301.0), Code.INVALID_ARGUMENT),
        (dict(deadline_s=float("nan")), Code.INVALID_ARGUMENT),
        (dict(artifacts=(fine.parent / "missing",)), Code.NOT_FOUND),
        (dict(artifacts=(fine, fine)), Code.INVALID_ARGUMENT),
        (dict(artifacts=(long_name,)), Code.INVALID_ARGUMENT),
        (dict(artifacts=(odd,)), Code.INVALID_ARGUMENT),
        (dict(artifacts=(fine,) * 257), Code.TOO_LARGE),
    ]
    for arguments, code in refused:
        with pytest.raises(KnodeError) as caught:
            await desk.submit(**arguments)  # type: ignore[arg-type]
        assert caught.value.code is code, arguments
        assert caught.value.next_step
    assert desk.node.tasks.list() == []
    assert desk.attempts == []


async def test_a_file_over_the_limit_is_refused_by_the_node_that_would_keep_it(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic", tasks_artifact_bytes="1048576")
    big, half = desk.file("big", bytes(1_048_577)), desk.file("half", bytes(600_000))
    for files in ((big,), (half, desk.file("other", bytes(600_000)))):
        task = await desk.settle("list", artifacts=files, on="attic")
        assert (task.state, code_of(task)) == (State.FAILED, Code.TOO_LARGE)
        assert attic.attempts == []
    exact = desk.file("exact", bytes(1_048_576))
    assert (await desk.settle("list", artifacts=(exact,), on="attic")).output == b"exact"


async def test_a_file_that_vanishes_or_shrinks_on_its_way_fails_the_task_alone(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    changes = {
        Code.NOT_FOUND: desk.disk.remove,
        Code.INVALID_ARGUMENT: lambda path: desk.disk.write(path, b"short"),
    }
    for code, change in changes.items():
        big = desk.file("big", bytes(20_000_000))
        task = await desk.submit("list", artifacts=(big,), on="attic")
        await cell.until(lambda: attic.attempts != [])
        change(big)
        await task.ended()
        assert (task.state, code_of(task)) == (State.FAILED, code)
        await cell.until(lambda: attic.attempts == [])
    assert (await desk.settle("say x", on="attic")).output == b"x"


async def test_a_file_that_grows_is_sent_as_it_was(autojump_clock: MockClock, cell: Cell) -> None:
    desk, _ = await cell.add("desk"), await cell.add("attic")
    path = desk.file("log", b"x" * 5_000_000)
    task = await desk.submit('{"op":"count"}', TEXT, artifacts=(path,), on="attic")
    desk.disk.write(path, b"x" * 6_000_000)
    await task.ended()
    assert task.output is not None, task.error
    assert json.loads(task.output)["files"][0]["bytes"] == 5_000_000


async def test_full_disks_fail_the_task_by_name_and_leave_nothing(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    files = (desk.file("a", bytes(3_000_000)),)
    attic.disk.fill()
    task = await desk.settle("list", artifacts=files, on="attic")
    assert (task.state, code_of(task)) == (State.FAILED, Code.DISK_FULL)
    assert str(attic.home.path) not in str(task.error)  # its log alone has that
    assert any(str(attic.home.attempts) in line and "DISK_FULL" in line for line in attic.lines)
    assert attic.attempts == []
    attic.disk.free()
    assert (await desk.settle("list", artifacts=files, on="attic")).output == b"a"


async def test_a_disk_that_turns_read_only_fails_tasks_and_not_the_node(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    files = (desk.file("a", b"x"),)
    task = await desk.submit("sleep 1\nsay kept", artifacts=files, on="attic")
    await cell.until(lambda: attic.sandbox.running != [])
    attic.disk.read_only = True
    await task.ended()
    # Its folder cannot be removed, and its result is the submitter's all the same.
    assert (task.state, task.output) == (State.SUCCEEDED, b"kept")
    assert attic.attempts == [task.id]
    refused = await desk.settle("list", artifacts=files, on="attic")
    assert (refused.state, code_of(refused)) == (State.FAILED, Code.DISK_READ_ONLY)
    await trio.sleep(100)
    attic.disk.read_only = False
    assert (await desk.settle("list", artifacts=files, on="attic")).output == b"a"
    await cell.stop(attic)
    await cell.start(attic)
    assert attic.attempts == []


async def test_both_nodes_log_one_trace_with_task_and_agent(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    task = await desk.settle("say x", on="attic")
    ours, theirs = events_of(desk, task), events_of(attic, task)
    assert [line["event"] for line in ours] == ["task submitted", "task ended"]
    assert [line["event"] for line in theirs] == ["attempt begins", "attempt ended"]
    assert len({line["trace"] for line in ours + theirs}) == 1
    assert {line["agent"] for line in ours + theirs} == {COMMAND}
    assert theirs[0]["submitter"] == desk.node.key.node_id


async def test_a_node_that_goes_down_ends_its_tasks_and_others_know_it_left(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    ours = await desk.submit("sleep 100", on="attic")
    local = await desk.submit("sleep 100", on="desk")
    await cell.until(lambda: attic.sandbox.running != [] and desk.sandbox.running != [])
    key, begun = desk.node.key.public, trio.current_time()
    await cell.stop(desk)
    assert trio.current_time() - begun < 2
    assert {ours.state, local.state} == {State.UNKNOWN}
    assert attic.node.peers.peer(key).state == "left"


async def test_running_tasks_are_bounded(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "RUNNING_TASKS", 2)
    desk = await cell.add("desk")
    tasks = [await desk.submit("sleep 5") for _ in range(2)]
    with pytest.raises(KnodeError) as caught:
        await desk.submit("sleep 5")
    assert caught.value.code is Code.RATE_LIMITED
    for task in tasks:
        await task.ended()
    assert (await desk.settle("say x")).output == b"x"


async def test_only_the_last_tasks_are_kept_and_never_a_running_one_is_forgotten(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "KEPT_TASKS", 3)
    desk = await cell.add("desk")
    running = await desk.submit("sleep 5")
    ended = [await desk.settle(f"say {n}") for n in range(4)]
    assert desk.node.tasks.list() == [ended[3], ended[2], running]
    with pytest.raises(KnodeError) as caught:
        desk.node.tasks.find(ended[0].id)
    assert caught.value.code is Code.NOT_FOUND
    assert desk.node.tasks.find(running.id[:8]) is running
    await running.ended()


async def test_kept_results_are_bounded_by_their_size(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "KEPT_OUTPUT_BYTES", 250)
    desk = await cell.add("desk")
    tasks = [await desk.settle("say " + "x" * 100) for _ in range(5)]
    assert desk.node.tasks.list() == tasks[:1:-1]


async def test_a_task_is_found_by_a_unique_start_of_its_id(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    tasks = [await desk.settle("say x") for _ in range(20)]
    assert desk.node.tasks.find(tasks[0].id) is tasks[0]
    first = next(a for a in tasks for b in tasks if a is not b and a.id[0] == b.id[0])
    with pytest.raises(KnodeError) as caught:
        desk.node.tasks.find(first.id[0])
    assert caught.value.code is Code.INVALID_ARGUMENT
    with pytest.raises(KnodeError) as caught:
        desk.node.tasks.find("")
    assert caught.value.code is Code.NOT_FOUND


async def test_a_direct_task_whose_agent_leaves_effects_fails_by_name(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, _ = await cell.add("desk"), await cell.add("attic")
    task = await desk.settle('leave {"operation": 1}\nsay x', on="attic")
    assert (task.state, task.output) == (State.FAILED, None)
    assert task.error is not None
    assert task.error.code is Code.INVALID_ARGUMENT
    assert "direct task" in task.error.message
