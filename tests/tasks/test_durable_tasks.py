"""Durable tasks between real nodes, over the memory link and in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable

import msgspec
import pytest
import trio
from memory_cell import COMMAND, TEXT, Cell, Host, settled
from trio.testing import MockClock

from knode.consensus.electorate import Votes
from knode.errors import Code, KnodeError
from knode.identity import PublicKey
from knode.mesh.statements import Role
from knode.tasks import dispatch
from knode.tasks.commands import Bundle, Command, Fence, NewTask, Release
from knode.tasks.durable import Request
from knode.tasks.leader import COMPLETE, FAIL, SUBMIT
from knode.tasks.lifecycle import State
from knode.tasks.messages import CompleteAttempt, FailAttempt, SubmitTask, TaskView
from knode.tasks.outbox import Waiting
from knode.tasks.records import Outcome, TaskRecord
from knode.world import Monotonic

THREE = ("desk", "attic", "barn")


async def submit(host: Host, line: str = "", agent: str = COMMAND, **rest: object) -> TaskView:
    view = await host.node.durable.submit(Request(agent, line.encode(), **rest))  # type: ignore[arg-type]
    assert isinstance(view, TaskView)
    return view


async def test_a_task_is_committed_run_and_completed_in_a_cell_of_one(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    view = await submit(desk, "say hello")
    assert view.state in (State.ASSIGNED, State.SUCCEEDED)
    ended = await settled(desk, view.id)
    assert (ended.state, ended.result, ended.attempt) == (State.SUCCEEDED, b"hello", 1)


async def test_who_follows_what_it_submitted_is_told_of_changes_alone(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = [await cell.add(name) for name in ("desk", "attic")]
    for host in hosts:
        for size in (1, 100_000):
            submitted = await submit(host, "say " + size * "x", on="desk")
            views = [view async for view in host.node.following.follow(submitted.id, submitted)]
            assert views[0] == submitted
            assert [view.state for view in views if isinstance(view, TaskView)] == ["assigned", "succeeded"]
            assert isinstance(views[1], TaskView)
            assert len(views[1].result or b"") == size


async def test_who_follows_what_the_ledger_has_no_more_is_told(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    gone = msgspec.structs.replace(await submit(desk, "say x"), id=bytes(16))
    views = desk.node.following.follow(gone.id, gone)
    assert await anext(views) == gone
    with pytest.raises(KnodeError) as error:
        await anext(views)
    assert error.value.code is Code.NOT_FOUND


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


async def three(cell: Cell, **settings: str) -> list[Host]:
    """Three nodes that all vote."""
    hosts = [await cell.add(name, **settings) for name in THREE]
    await cell.until(lambda: all(votes(hosts[0], host) for host in hosts))
    return hosts


def votes(judge: Host, host: Host) -> bool:
    node = judge.node
    return node.electorate.votes(node.membership.roster.find(host.name)) is Votes.VOTER


def leader_of(hosts: list[Host]) -> Host:
    [leader] = [host for host in hosts if host.running is not None and host.node.dispatcher.leads]
    return leader


async def until_led(cell: Cell, hosts: list[Host]) -> Host:
    await cell.until(lambda: any(h.running is not None and h.node.dispatcher.leads for h in hosts))
    return leader_of(hosts)


async def refusal(answer: Awaitable[object]) -> Code:
    with pytest.raises(KnodeError) as refused:
        await answer
    return refused.value.code


async def test_a_batch_outlives_its_leader_and_each_task_ends_once(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    first = leader_of(hosts)
    others = [host for host in hosts if host is not first]
    ids = [(await submit(host, f"sleep 1\nsay {n}")).id for n in range(10) for host in others]
    await cell.crash(first)
    led = await until_led(cell, others)
    assert led is not first
    ended = [await settled(others[n % 2], task) for n, task in enumerate(ids)]
    assert [view.result for view in ended] == [str(n // 2).encode() for n in range(20)]
    assert {view.state for view in ended} == {State.SUCCEEDED}
    await cell.start(first)
    await cell.until(lambda: first.node.replica.leader() is not None)
    found = await first.node.durable.tasks()
    assert {view.id: view.result for view in found.tasks} == {view.id: view.result for view in ended}
    await cell.until(lambda: len(first.node.attempts) == 0)


async def test_a_submit_is_acknowledged_soon_after_the_leader_is_lost(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    first = leader_of(hosts)
    other = next(host for host in hosts if host is not first)
    await cell.crash(first)
    began = trio.current_time()
    assert (await submit(other, "say x")).state in (State.ASSIGNED, State.QUEUED, State.SUCCEEDED)
    assert trio.current_time() - began < 3


async def test_the_same_key_is_the_same_task_and_with_other_input_a_conflict(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    desk, attic = hosts[0], hosts[1]
    first = await submit(desk, "say a", key="k")
    assert (await submit(desk, "say a", key="k")).id == first.id
    assert await refusal(submit(desk, "say b", key="k")) is Code.KEY_CONFLICT
    await settled(desk, first.id)
    again = await submit(desk, "say a", key="k")
    assert (again.id, again.state, again.result) == (first.id, State.SUCCEEDED, b"a")
    other = await submit(attic, "say b", key="k")
    assert other.id != first.id


@pytest.mark.parametrize("others", [0, 1, 2])
async def test_a_submit_with_files_is_pending_until_a_second_member_can_hold_them(
    autojump_clock: MockClock, cell: Cell, others: int
) -> None:
    if others == 2:
        desk, *gone = await three(cell)
    else:
        desk, *gone = [await cell.add(name) for name in ("desk", "attic")[: others + 1]]
    for host in gone:
        await cell.crash(host)
    await trio.sleep(20)
    request = Request(COMMAND, b"list", artifacts=(desk.file("a", b"one"),), key="k")
    if not gone:  # nobody else could hold them
        view = await submit(desk, "list", artifacts=request.artifacts)
        assert (await settled(desk, view.id)).result == b"a"
        return
    with pytest.raises(KnodeError, match="no other member takes the files") as refused:
        await desk.node.durable.submit(request, keep=False)
    assert refused.value.code is Code.UNAVAILABLE
    assert desk.node.inputs.held == (0, 0)
    waiting = await desk.node.durable.submit(request)
    assert isinstance(waiting, Waiting)
    assert (waiting.is_pending, waiting.code) == (True, "UNAVAILABLE")
    assert f"{gone[0].name}: it is " in waiting.message
    assert desk.node.inputs.held == (1, 3)
    unwanted = await desk.node.durable.submit(Request(COMMAND, b"list", artifacts=request.artifacts))
    await desk.node.durable.cancel(unwanted.id)
    await cell.until(lambda: not desk.node.outbox.get(unwanted.id).is_pending)  # type: ignore[union-attr]
    assert desk.node.outbox.get(unwanted.id).code == "CANCELLED"  # type: ignore[union-attr]

    await cell.stop(desk)
    await cell.start(desk)
    await cell.start(gone[-1])
    await cell.until(lambda: not any(row.is_pending for row in desk.node.outbox.rows()))
    ended = await settled(desk, waiting.id)
    assert (ended.state, ended.result) == (State.SUCCEEDED, b"a")
    [record] = [record for record in await desk.node.ledger.list(10) if record.task.id == waiting.id]
    members = [host.node.membership.own.id.raw for host in (desk, gone[-1])]
    assert list(record.task.holders) == members


async def test_without_a_quorum_a_submit_is_pending_and_done_once_when_it_is_back(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    desk, others = hosts[0], hosts[1:]
    done = await settled(desk, (await submit(desk, "say before")).id)
    for host in others:
        await cell.crash(host)
    began = trio.current_time()
    waiting = await desk.node.durable.submit(Request(COMMAND, b"say after", key="k"))
    assert isinstance(waiting, Waiting)
    assert 5 <= trio.current_time() - began < 8
    assert (await desk.node.durable.submit(Request(COMMAND, b"say after", key="k"))).id == waiting.id
    assert await refusal(submit(desk, "say other", key="k")) is Code.KEY_CONFLICT
    with pytest.raises(KnodeError, match="under the key sure") as refused:
        await desk.node.durable.submit(Request(COMMAND, b"say sure", key="sure"), keep=False)
    assert refused.value.code is Code.UNAVAILABLE
    with pytest.raises(KnodeError, match="submit it again with '--key again-") as refused:
        await desk.node.durable.submit(Request(COMMAND, b"say unsure"), keep=False)
    assert refused.value.code is Code.UNAVAILABLE
    known = await desk.node.durable.tasks()
    assert not known.is_confirmed
    assert [view.id for view in known.tasks] == [done.id]
    shown = await desk.node.durable.show(done.id.hex()[:8])
    assert (shown.is_confirmed, shown.tasks[0].result) == (False, b"before")

    await cell.stop(desk)
    await cell.start(desk)
    assert [row.id for row in desk.node.outbox.rows()] == [waiting.id]
    for host in others:
        await cell.start(host)
    ended = await settled(desk, waiting.id)
    assert (ended.state, ended.result, ended.key) == (State.SUCCEEDED, b"after", "k")
    assert desk.node.outbox.rows() == []
    everything = await desk.node.durable.tasks()
    assert everything.is_confirmed
    assert [view.key for view in everything.tasks].count("k") == 1


async def test_a_pending_task_whose_key_stood_for_one_is_that_one(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    desk, others = hosts[0], hosts[1:]
    first = await settled(desk, (await submit(desk, "say a", key="k")).id)
    for host in others:
        await cell.crash(host)
    waiting = await desk.node.durable.submit(Request(COMMAND, b"say a", key="k"))
    assert isinstance(waiting, Waiting)
    for host in others:
        await cell.start(host)
    assert await settled(desk, waiting.id) == first


async def test_a_pending_task_that_the_cell_knows_by_its_key_is_found_by_both_ids(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    desk, others = hosts[0], hosts[1:]
    first = await submit(desk, "sleep 1000", key="k", on="desk")
    for host in others:
        await cell.crash(host)
    waiting = await desk.node.durable.submit(Request(COMMAND, b"sleep 1000", key="k", on="desk"))
    assert isinstance(waiting, Waiting)
    assert waiting.id != first.id
    seen: list[bytes] = []

    async def watch() -> None:
        async for view in desk.node.following.follow(waiting.id):
            seen.append(view.id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.sleep(1)
        for host in others:
            await cell.start(host)
        await cell.until(lambda: not desk.node.outbox.rows())
        shown = await desk.node.durable.show(waiting.id.hex()[:10])
        assert [view.id for view in shown.tasks] == [first.id]
        assert (await desk.node.durable.explain(waiting.id)).task.id == first.id
        cancelled = await desk.node.durable.cancel(waiting.id)
        assert isinstance(cancelled, TaskView)
        assert cancelled.id == first.id
    assert (seen[0], seen[-1]) == (waiting.id, first.id)


async def test_a_pending_task_is_cancelled_when_the_quorum_is_back(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    desk, others = hosts[0], hosts[1:]
    for host in others:
        await cell.crash(host)
    waiting = await desk.node.durable.submit(Request(COMMAND, b"sleep 100"))
    assert isinstance(await desk.node.durable.cancel(waiting.id), Waiting)
    for host in others:
        await cell.start(host)
    assert (await settled(desk, waiting.id)).state is State.CANCELLED


async def test_a_pending_task_that_nobody_can_run_can_be_cancelled(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    desk, others = hosts[0], hosts[1:]
    for host in others:
        await cell.crash(host)
    waiting = await desk.node.durable.submit(Request("kNobody:has-it", b""))
    for host in others:
        await cell.start(host)
    await cell.until(lambda: [row.code for row in desk.node.outbox.rows()] == ["NO_ELIGIBLE_NODE"])
    assert isinstance(await desk.node.durable.cancel(waiting.id), Waiting)
    assert (await settled(desk, waiting.id)).state is State.CANCELLED
    assert desk.node.outbox.rows() == []


async def test_what_a_lost_worker_had_runs_elsewhere_and_its_late_end_is_stale(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    leader = leader_of(hosts)
    worker = next(host for host in hosts if host is not leader)
    for name in (leader.name, next(h.name for h in hosts if h not in (leader, worker))):
        for _ in range(2):
            await submit(leader, "sleep 5", on=name)
    view = await submit(leader, "sleep 20\nsay done")
    holder = worker
    assert view.member == holder.node.key.public.raw
    await cell.crash(holder)
    await cell.until(lambda: leader.node.ledger.live[view.id].attempt == 2)
    assert leader.node.ledger.live[view.id].charged == 1
    await cell.start(holder)
    ended = await settled(leader, view.id)
    assert (ended.state, ended.attempt, ended.result) == (State.SUCCEEDED, 2, b"done")
    await cell.until(lambda: len(holder.node.attempts) == 0)


async def test_a_worker_that_is_stopped_loses_its_attempts_at_once_and_uncharged(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    leader = leader_of(hosts)
    worker = next(host for host in hosts if host is not leader)
    for name in (leader.name, next(h.name for h in hosts if h not in (leader, worker))):
        for _ in range(2):
            await submit(leader, "sleep 5", on=name)
    view = await submit(leader, "sleep 20\nsay done")
    assert view.member == worker.node.key.public.raw
    began = trio.current_time()
    await cell.stop(worker)
    await cell.until(lambda: leader.node.ledger.live[view.id].attempt == 2)
    assert leader.node.ledger.live[view.id].charged == 0
    assert trio.current_time() - began < 7
    ended = await settled(leader, view.id)
    assert (ended.state, ended.attempt) == (State.SUCCEEDED, 2)


async def test_more_than_fit_wait_in_the_order_of_submission(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    views = [await submit(desk, "sleep 10") for _ in range(6)]
    assert [view.state for view in views] == [State.ASSIGNED] * 2 + [State.QUEUED] * 4
    explained = await desk.node.durable.explain(views[-1].id)
    assert "free place" in explained.waits_for
    assert "2 attempts" in explained.now[0].why
    await cell.until(lambda: desk.node.ledger.live[views[2].id].state is State.ASSIGNED)
    assert [desk.node.ledger.live[view.id].state for view in views[2:]] == [
        *[State.ASSIGNED] * 2,
        *[State.QUEUED] * 2,
    ]
    for view in views:
        assert (await settled(desk, view.id)).state is State.SUCCEEDED
    assert desk.sandbox.most_at_once == 2


async def test_a_task_for_a_node_that_is_away_waits_for_it(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    attic = await cell.add("attic")
    await cell.crash(attic)
    await cell.until(lambda: desk.node.peers.peer(members_key(desk, "attic")).state == "failed")
    view = await submit(desk, "say there", on="attic")
    assert view.state is State.QUEUED
    explained = await desk.node.durable.explain(view.id)
    assert {one.why for one in explained.now} == {"another node was asked for", "it is failed"}
    await cell.start(attic)
    ended = await settled(desk, view.id)
    assert (ended.state, ended.member) == (State.SUCCEEDED, attic.node.key.public.raw)


def members_key(host: Host, name: str) -> PublicKey:
    return host.node.membership.roster.find(name).key


async def test_a_cancelled_task_stops_where_it_runs(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    view = await submit(attic, "sleep 100", on="attic")
    await cell.until(lambda: attic.sandbox.running != [])
    cancelled = await attic.node.durable.cancel(view.id)
    assert isinstance(cancelled, TaskView)
    assert (cancelled.state, cancelled.code) == (State.CANCELLED, "CANCELLED")
    await cell.until(lambda: attic.sandbox.running == [] and attic.sandbox.cancelled != [])
    assert await refusal(attic.node.durable.cancel(view.id)) is Code.INVALID_ARGUMENT
    assert await refusal(desk.node.durable.cancel(bytes(16))) is Code.NOT_FOUND


async def test_only_the_submitter_and_admins_cancel(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic, barn = [await cell.add(name) for name in THREE]
    view = await submit(attic, "sleep 100")
    assert await refusal(barn.node.durable.cancel(view.id)) is Code.NOT_ALLOWED
    await desk.node.durable.cancel(view.id)
    assert (await settled(barn, view.id)).state is State.CANCELLED


async def test_a_deadline_ends_a_task_queued_or_running(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    running = [await submit(desk, "sleep 100", deadline_s=5.0) for _ in range(2)]
    queued = await submit(desk, "say x", deadline_s=3.0)
    began = trio.current_time()
    ended = await settled(desk, queued.id)
    assert (ended.state, ended.attempt, ended.code) == (State.EXPIRED, 0, "EXPIRED")
    assert trio.current_time() - began == pytest.approx(3, abs=0.5)
    for view in running:
        assert (await settled(desk, view.id)).state is State.EXPIRED
    assert trio.current_time() - began == pytest.approx(5, abs=0.5)
    await cell.until(lambda: desk.sandbox.running == [])


async def test_progress_is_seen_from_every_node(autojump_clock: MockClock, cell: Cell) -> None:
    desk, _, barn = await three(cell)
    view = await submit(desk, "report 0.5 half\nsleep 5\nreport 0.9 most\nsleep 5", on="attic")
    seen = [
        state.report.text
        async for state in barn.node.following.follow(view.id)
        if isinstance(state, TaskView) and state.report is not None
    ]
    assert seen[0] == "half"
    assert seen[-1] == "most"


async def test_an_agent_that_fails_ends_its_task_with_its_words(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    ended = await settled(desk, (await submit(desk, "die 3")).id)
    assert (ended.state, ended.code, ended.attempt) == (State.FAILED, Code.AGENT_FAILED, 1)
    assert "its last words" in ended.message
    again = await settled(desk, (await submit(desk, "die 75")).id)
    assert (again.state, again.attempt) == (State.FAILED, 3)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Request("kExecutor:nowhere"), Code.NO_ELIGIBLE_NODE),
        (Request("no name of an agent"), Code.NO_ELIGIBLE_NODE),
        (Request(TEXT, b"x" * (192 * 1024 + 1)), Code.TOO_LARGE),
        (Request(TEXT, deadline_s=-1.0), Code.INVALID_ARGUMENT),
        (Request(TEXT, deadline_s=0.0), Code.INVALID_ARGUMENT),
        (Request(TEXT, deadline_s=float("nan")), Code.INVALID_ARGUMENT),
        (Request(TEXT, deadline_s=31 * 86_400.0), Code.INVALID_ARGUMENT),
        (Request(TEXT, key=""), Code.INVALID_ARGUMENT),
        (Request(TEXT, key="k" * 129), Code.INVALID_ARGUMENT),
        (Request(TEXT, on="nobody"), Code.NOT_FOUND),
        (Request("kExecutor:nowhere", on="desk"), Code.NO_ELIGIBLE_NODE),
    ],
)
async def test_bad_input_is_refused_by_name(
    autojump_clock: MockClock, cell: Cell, request_: Request, code: Code
) -> None:
    desk = await cell.add("desk")
    assert await refusal(desk.node.durable.submit(request_)) is code
    assert (await desk.node.durable.tasks()).tasks == ()
    assert desk.node.outbox.rows() == []


async def test_a_submit_whose_time_is_over_is_refused(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    task = NewTask(COMMAND, b"say x", (), b"", 0, 3)
    late = SubmitTask(bytes(16), "late", desk.clock.wall() - 1, task, ())
    deadline = Monotonic(trio.current_time() + 5)
    assert await refusal(desk.node.leader.ask(SUBMIT, late, deadline=deadline)) is Code.EXPIRED


async def test_a_revoked_node_asks_for_nothing(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    await desk.node.membership.revoke(desk.node.membership.roster.find("attic"))
    own = attic.node.key.public.raw
    await cell.until(lambda: own not in attic.node.membership.roster.members)
    assert await refusal(submit(attic, "say x")) is Code.KEY_REVOKED
    assert attic.node.outbox.rows() == []
    assert not (await attic.node.durable.tasks()).is_confirmed


async def test_who_follows_a_task_on_a_node_that_is_revoked_is_told(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    task = await submit(attic, "sleep 500", on="desk")
    codes: list[Code] = []

    async def follow() -> None:
        codes.append(await refusal(settled(attic, task.id)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        await trio.sleep(5)
        await desk.node.membership.revoke(desk.node.membership.roster.find("attic"))
        began = trio.current_time()
    assert codes == [Code.KEY_REVOKED]
    assert trio.current_time() - began < 30


async def test_an_observer_submits_and_runs_nothing(autojump_clock: MockClock, cell: Cell) -> None:
    desk, lookout = await cell.add("desk"), await cell.add("lookout", Role.OBSERVER)
    view = await submit(lookout, "say x")
    ended = await settled(lookout, view.id)
    assert (ended.state, ended.member) == (State.SUCCEEDED, desk.node.key.public.raw)
    assert await refusal(submit(lookout, "say x", on="lookout")) is Code.NO_ELIGIBLE_NODE


async def test_stale_and_forged_ends_take_no_effect(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic, barn = [await cell.add(name) for name in THREE]
    view = await submit(desk, "sleep 10\nsay right", on="attic")
    fence = Fence(desk.node.ledger.incarnation, view.id, 1)
    deadline = Monotonic(trio.current_time() + 5)

    async def complete(host: Host, fence: Fence) -> bool:
        claimed = CompleteAttempt(fence, Bundle(b"wrong"))
        return (await host.node.leader.ask(COMPLETE, claimed, deadline=deadline)).is_current

    for host in (barn, desk):
        assert await refusal(complete(host, fence)) is Code.NOT_ALLOWED
        failed = FailAttempt(fence, "AGENT_FAILED", "no", False)
        assert await refusal(host.node.leader.ask(FAIL, failed, deadline=deadline)) is Code.NOT_ALLOWED
    stale = [
        Fence(desk.node.ledger.incarnation, view.id, 2),
        Fence(b"i" * 32, view.id, 1),
        Fence(desk.node.ledger.incarnation, bytes(16), 1),
    ]
    for other in stale:
        assert not await complete(attic, other)
    assert desk.node.reception.refused == {"forged": 4, "stale": 3}
    ended = await settled(desk, view.id)
    assert (ended.state, ended.result) == (State.SUCCEEDED, b"right")
    deadline = Monotonic(trio.current_time() + 5)
    assert await complete(attic, fence), "an end that was told before is told as done again"
    assert (await settled(desk, view.id)).result == b"right"


async def test_files_go_with_a_task_wherever_it_runs(autojump_clock: MockClock, cell: Cell) -> None:
    hosts = [await cell.add(name) for name in THREE]
    paths = (hosts[1].file("a.md", b"# one\n"), hosts[1].file("b.md", b"x" * 100_000))
    for name in THREE:
        view = await submit(hosts[1], "list", artifacts=paths, on=name)
        ended = await settled(hosts[2], view.id)
        assert (ended.state, ended.result) == (State.SUCCEEDED, b"a.md,b.md"), ended
    assert await refusal(submit(hosts[1], "list", artifacts=(paths[0].with_name("none"),))) is Code.NOT_FOUND


async def test_an_attempt_that_its_worker_refuses_is_released_though_the_first_try_is_lost(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = await cell.add("desk", tasks_running="1", tasks_queued="0")
    propose, lost = desk.node.dispatcher.propose, list[Command]()

    async def lose_one(command: Command) -> Outcome:
        if isinstance(command, Release) and not lost:
            lost.append(command)
            raise KnodeError(Code.UNAVAILABLE, "another node is about to lead the cell")
        return await propose(command)

    monkeypatch.setattr(desk.node.dispatcher, "propose", lose_one)
    direct = await desk.submit("sleep 3")  # the ledger does not know of it
    view = await submit(desk, "say x")
    ended = await settled(desk, view.id)
    assert (ended.state, ended.result, len(lost)) == (State.SUCCEEDED, b"x", 1)
    await direct.ended()


async def test_deadlines_of_tasks_that_have_ended_do_not_gather(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "SPARE_DEADLINES", 8)
    desk = await cell.add("desk")
    for number in range(20):
        view = await submit(desk, f"say {number}")
        await settled(desk, view.id)
    assert len(desk.node.dispatcher._deadlines) <= 10
    late = await submit(desk, "sleep 100", deadline_s=3.0)
    assert (await settled(desk, late.id)).state is State.EXPIRED


async def test_after_a_leader_whose_clock_was_days_ahead_every_node_still_submits(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    leader = leader_of(hosts)
    leader.clock.skew_s = 10 * 86_400.0
    leader.node.ledger.wall = leader.clock.wall  # as if a majority's clocks had been so
    await settled(leader, (await submit(leader, "say ahead")).id)
    leader.clock.skew_s = 0.0
    for host in hosts:
        ended = await settled(host, (await submit(host, f"say {host.name}", deadline_s=60.0)).id)
        assert (ended.state, ended.result) == (State.SUCCEEDED, host.name.encode())


async def test_a_leader_whose_clock_is_far_ahead_of_a_majority_ends_nothing_early(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = await three(cell)
    leader = leader_of(hosts)
    others = [host for host in hosts if host is not leader]
    await trio.sleep(61)
    task = await submit(leader, "sleep 110\nsay done", deadline_s=600.0)
    for host, skew_s in ((leader, 3600.0), (others[0], 120.0), (others[1], -3600.0)):
        host.clock.skew_s = skew_s
    await trio.sleep(61)  # until all have said so
    for number in range(3):
        await settled(leader, (await submit(leader, f"say {number}")).id)
        ahead_s = (leader.node.ledger.now - true_time(others[0])) / 1000
        assert 120 < ahead_s < 120 + 2 * 60 + 1, "the second of three clocks counts"
    assert leader.node.clocks.held_back_ms > 3_000_000
    assert sum("this node's clock is ahead of a majority's" in line for line in leader.lines) == 1
    assert (await settled(others[0], task.id)).state is State.SUCCEEDED
    others[0].clock.skew_s = 3600.0
    await trio.sleep(61)
    await settled(leader, (await submit(leader, "say on")).id)
    assert leader.node.ledger.now >= leader.clock.wall() - 10_000, "two of three say that it is so late"
    assert leader.node.clocks.held_back_ms == 0


async def test_a_voter_of_whose_clock_nobody_else_is_heard_goes_by_its_own(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    desk.clock.skew_s = 3600.0
    await settled(desk, (await submit(desk, "say alone")).id)
    assert desk.node.ledger.now >= desk.clock.wall() - 10_000
    assert desk.node.clocks.held_back_ms == 0


def true_time(host: Host) -> int:
    return host.clock.wall() - round(host.clock.skew_s * 1000)


async def test_a_task_that_the_leader_cannot_read_ends_neither_its_node_nor_its_turn(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = await cell.add("desk")
    read, failures = desk.node.ledger.task, [1]

    async def fail_once(id: bytes) -> TaskRecord | None:
        if failures:
            failures.pop()
            raise KnodeError(Code.HOME_DAMAGED, "the disk fails")
        return await read(id)

    monkeypatch.setattr(desk.node.ledger, "task", fail_once)
    for _ in range(2):
        await submit(desk, "sleep 1")
    waiting = await submit(desk, "say x")
    assert waiting.state is State.QUEUED, "what is assigned at once is not read again"
    ended = await settled(desk, waiting.id)
    assert (ended.state, ended.attempt) == (State.SUCCEEDED, 2)


async def test_an_explanation_leaves_room_for_itself_whatever_the_result(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    small, large = await submit(desk, "say x"), await submit(desk, "say " + 180_000 * "x")
    for task, result in ((small, b"x"), (large, None)):
        await settled(desk, task.id)
        assert (await desk.node.durable.explain(task.id)).task.result == result


async def test_a_page_of_tasks_fits_a_message_in_every_script(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic", tasks_running="200")
    for _ in range(130):
        task = await submit(desk, "sleep 1000", on="attic")
        failed = FailAttempt(
            Fence(desk.node.ledger.incarnation, task.id, 1), "AGENT_FAILED", "漢" * 1024, False
        )
        await attic.node.leader.ask(FAIL, failed, deadline=Monotonic(trio.current_time() + 5))
    found = await attic.node.durable.tasks()
    assert found.is_confirmed
    assert [view.message for view in found.tasks] == ["漢" * 1024] * 130


async def test_large_results_cut_no_list_short(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    tasks = [await submit(desk, "say " + 100_000 * "x") for _ in range(6)]
    for task in tasks:
        await settled(desk, task.id)
    found = await desk.node.durable.tasks()
    assert [view.id for view in found.tasks] == [task.id for task in reversed(tasks)]
