"""A node's attempts: each is told once to the ledger, whoever restarts, is cut off or is full meanwhile."""

from __future__ import annotations

import pytest
import trio
from memory_cell import TEXT
from station import INCARNATION, STATE, Ledger, Station, assign, fence, new_disk, station
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.mesh.statements import Role
from knode.tasks import attempts as attempts_module
from knode.tasks.commands import Bundle
from knode.tasks.messages import CompleteAttempt, FailAttempt


async def refused(at: Station, code: Code, *arguments: object, **rest: object) -> None:
    with pytest.raises(KnodeError) as caught:
        await at.attempts.assign(assign(*arguments, **rest))  # type: ignore[arg-type]
    assert caught.value.code is code


async def test_an_attempt_runs_is_told_and_leaves_nothing(autojump_clock: MockClock) -> None:
    async with station(new_disk(), Ledger()) as at:
        done = await at.assign("sleep 3\nsay done")
        assert await at.kept() == [done]
        await at.until_idle()
        assert at.ledger.ended == [CompleteAttempt(done, Bundle(b"done"))]
        assert await at.kept() == []
        assert at.disk.list_folder(at.work._path.parent / "attempts") == []
        assert (at.places.load.running, at.places.load.queued) == (0, 0)
        assert at.attempts._kept_bytes == 0


async def test_a_built_in_agent_answers_without_a_folder(autojump_clock: MockClock) -> None:
    async with station(new_disk(), Ledger()) as at:
        await at.assign('{"op":"count","text":"a b"}', agent=TEXT)
        await at.until_idle()
        [result] = at.results
        assert b'"words":2' in result


async def test_the_same_fence_again_is_the_same_attempt_and_never_runs_again(
    autojump_clock: MockClock,
) -> None:
    async with station(new_disk(), Ledger()) as at:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(at.assign, "sleep 5\nsay x")
        await at.assign("sleep 5\nsay x")
        assert at.places.load.running == 1
        await at.until_idle()
        assert at.sandbox.most_at_once == 1
        assert at.results == [b"x"]
        await refused(at, Code.STALE_FENCE)


async def test_what_does_not_fit_or_cannot_run_here_is_refused_by_name(autojump_clock: MockClock) -> None:
    async with station(new_disk(), Ledger(), running=1, queued=1) as at:
        await refused(at, Code.NO_AGENT, agent="kExecutor:nobody")
        for task in (1, 2):
            await at.assign("sleep 5\nsay x", fence(task))
        await refused(at, Code.RATE_LIMITED, "say x", fence(3))
        assert (at.places.load.running, at.places.load.queued) == (1, 1)
        await at.until_idle()
        await at.assign("say now", fence(3))
        await at.until_idle()
        assert at.results == [b"x", b"x", b"now"]


async def test_a_node_whose_role_runs_nothing_refuses(autojump_clock: MockClock) -> None:
    async with station(new_disk(), Ledger()) as at:
        await at.membership.set_role(at.membership.own, Role.VOTER)
        await refused(at, Code.NOT_ALLOWED)


async def test_many_undelivered_attempts_are_a_limit_of_their_own(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "KEPT_ATTEMPTS", 3)
    ledger = Ledger(is_here=False)
    async with station(new_disk(), ledger) as at:
        for task in (1, 2, 3):
            await at.assign("say x", fence(task))
        await trio.sleep(10)
        await refused(at, Code.RATE_LIMITED, "say x", fence(4))
        ledger.is_here = True
        await at.until_idle()
        await at.assign("say x", fence(4))


async def test_undelivered_bytes_are_a_limit_of_their_own(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "KEPT_BYTES", 10_000)
    async with station(new_disk(), Ledger(is_here=False)) as at:
        await at.assign("say " + "x" * 9_000)
        await trio.sleep(1)
        await refused(at, Code.RATE_LIMITED, "say x", fence(2))


async def test_a_full_disk_refuses_new_attempts_and_keeps_those_that_it_has(
    autojump_clock: MockClock,
) -> None:
    async with station(new_disk(), Ledger()) as at:
        first = await at.assign("sleep 5\nsay first")
        at.disk.fill()
        await refused(at, Code.DISK_FULL, "say x", fence(2))
        assert at.places.load.running == 1
        await trio.sleep(10)
        assert at.results == [b"first"]  # told, though its end did not fit on the disk
        assert len(at.attempts) == 0
        at.disk.free()
        await trio.sleep(1)
        assert await at.kept() == []
        await at.assign("say second", fence(2))
        await at.until_idle()
        assert [end.fence for end in at.ledger.ended] == [first, fence(2)]


async def test_a_node_that_is_cut_off_finishes_and_delivers_when_it_is_back(
    autojump_clock: MockClock,
) -> None:
    ledger = Ledger()
    async with station(new_disk(), ledger) as at:
        for task in range(1, 6):
            await at.assign("sleep 60\nsay x", fence(task))
        ledger.is_here = False
        await trio.sleep(1000)
        assert at.sandbox.running == []
        assert len(at.attempts) == 5
        ledger.is_here = True
        begun = trio.current_time()
        await at.until_idle()
        assert trio.current_time() - begun < attempts_module.LONGEST_PAUSE_S + 2
        assert at.results == [b"x"] * 5


async def test_an_attempt_that_is_another_members_is_forgotten(autojump_clock: MockClock) -> None:
    async with station(new_disk(), Ledger(refusal=Code.NOT_ALLOWED)) as at:
        await at.assign("say x")
        await at.until_idle()
        assert at.ledger.ended == []
        assert await at.kept() == []


async def test_an_answer_that_gets_lost_is_asked_for_again(autojump_clock: MockClock) -> None:
    ledger = Ledger(answers_get_lost=3)
    async with station(new_disk(), ledger) as at:
        await at.assign("say x")
        await at.until_idle()
        assert at.results == [b"x"]
        assert ledger.told == 4


async def test_a_stale_attempt_is_forgotten(autojump_clock: MockClock) -> None:
    ledger = Ledger()
    async with station(new_disk(), ledger) as at:
        await at.assign("sleep 5\nsay x")
        ledger.current.clear()
        await at.until_idle()
        assert ledger.told == 1
        assert ledger.ended == []
        assert await at.kept() == []


@pytest.mark.parametrize("line", ["sleep 100\nsay x", "say x"], ids=["running", "undelivered"])
async def test_a_stopped_attempt_runs_no_more_and_is_told_to_nobody(
    autojump_clock: MockClock, line: str
) -> None:
    ledger = Ledger(is_here=False)
    async with station(new_disk(), ledger) as at:
        await at.assign(line)
        await trio.sleep(5)
        await at.attempts.stop(fence())
        assert at.sandbox.running == []
        assert len(at.attempts) == 0
        ledger.is_here = True
        await at.until_idle()
        assert ledger.told == 0
        assert await at.kept() == []
        assert at.places.load.running == 0
        await refused(at, Code.STALE_FENCE)  # a request that was overtaken


async def test_a_stop_that_overtakes_the_start_wins(autojump_clock: MockClock) -> None:
    async with station(new_disk(), Ledger()) as at:
        await at.attempts.stop(fence())
        await refused(at, Code.STALE_FENCE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at.assign, "sleep 100", fence(2))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(at.attempts.stop, fence(2))
        await at.until_idle()
        assert at.ledger.told == 0


async def test_a_newer_attempt_of_a_task_replaces_an_older_one(autojump_clock: MockClock) -> None:
    async with station(new_disk(), Ledger(), running=1, queued=0) as at:
        await at.assign("sleep 100\nsay old", fence(1, 1))
        await trio.sleep(1)
        await at.assign("sleep 5\nsay new", fence(1, 2))
        await refused(at, Code.STALE_FENCE, "say older", fence(1, 1))
        await at.until_idle()
        assert at.results == [b"new"]
        assert at.sandbox.most_at_once == 1


async def test_an_older_attempt_that_comes_late_is_refused(autojump_clock: MockClock) -> None:
    async with station(new_disk(), Ledger()) as at:
        await at.assign("sleep 5\nsay new", fence(1, 2))
        await refused(at, Code.STALE_FENCE, "say old", fence(1, 1))
        await at.until_idle()
        assert at.results == [b"new"]


async def test_an_attempt_of_another_incarnation_replaces_one_with_the_same_number(
    autojump_clock: MockClock,
) -> None:
    async with station(new_disk(), Ledger()) as at:
        await at.assign("sleep 50\nsay old", fence(1, 3))
        await trio.sleep(1)
        await at.assign("say new", fence(1, 3, INCARNATION[::-1]))
        await at.until_idle()
        assert at.results == [b"new"]


async def test_attempts_in_flight_are_run_again_after_a_restart_and_ends_are_delivered(
    autojump_clock: MockClock,
) -> None:
    disk, ledger = new_disk(), Ledger()
    async with station(disk, ledger) as at:
        await at.assign("sleep 50\nsay long", fence(1))
        await trio.sleep(10)
        ledger.is_here = False
        await at.assign("say short", fence(2))
        await trio.sleep(5)
    ledger.is_here = True
    async with station(disk, ledger) as at:
        await trio.sleep(1)
        assert at.results == [b"short"]
        assert len(at.sandbox.running) == 1
        assert ledger.asked == [fence(1)]  # one with an end is told, not asked for
        await at.until_idle()
        assert at.results == [b"short", b"long"]
        assert await at.kept() == []


async def test_after_a_restart_what_the_leader_took_away_does_not_run_again(
    autojump_clock: MockClock,
) -> None:
    disk, ledger = new_disk(), Ledger()
    async with station(disk, ledger) as at:
        await at.assign("sleep 50\nsay x")
        await trio.sleep(1)
    ledger.current.clear()
    async with station(disk, ledger) as at:
        await at.until_idle()
        assert at.sandbox.most_at_once == 0
        assert await at.kept() == []
        assert at.places.load.running == 0


async def test_after_a_restart_without_a_leader_it_runs_unasked(autojump_clock: MockClock) -> None:
    disk, ledger = new_disk(), Ledger()
    async with station(disk, ledger) as at:
        await at.assign("sleep 50\nsay x")
        await trio.sleep(1)
    ledger.is_here = False
    async with station(disk, ledger) as at:
        await trio.sleep(100)
        assert at.sandbox.most_at_once == 1
        ledger.is_here = True
        await at.until_idle()
        assert at.results == [b"x"]


async def test_more_than_fit_after_a_restart_wait_and_keep_others_out(autojump_clock: MockClock) -> None:
    disk, ledger = new_disk(), Ledger()
    async with station(disk, ledger, running=4) as at:
        for task in range(1, 5):
            await at.assign("sleep 50\nsay x", fence(task))
    async with station(disk, ledger, running=1, queued=1) as at:
        await refused(at, Code.RATE_LIMITED, "say x", fence(9))
        await at.until_idle()
        assert at.results == [b"x"] * 4
        assert at.sandbox.most_at_once == 1


async def test_a_deadline_that_comes_here_first_leaves_the_verdict_to_the_ledger(
    autojump_clock: MockClock,
) -> None:
    async with station(new_disk(), Ledger(), running=1) as at:
        await at.assign("sleep 50", fence(1), seconds=5)
        await at.assign("say x", fence(2), seconds=3)
        begun = trio.current_time()
        await at.until_idle()
        assert trio.current_time() - begun < 8
        assert at.failures == [("EXPIRED", True), ("EXPIRED", True)]


@pytest.mark.parametrize(
    ("line", "code", "retryable"),
    [
        ("die 1", Code.AGENT_FAILED, False),
        ("die 75", Code.AGENT_FAILED, True),
        ("break", Code.INTERNAL, True),
    ],
    ids=["agent", "try again", "fault"],
)
async def test_a_failure_says_whose_it_is(
    autojump_clock: MockClock, line: str, code: Code, retryable: bool
) -> None:
    async with station(new_disk(), Ledger()) as at:
        request = assign(line)
        at.ledger.current.add(request.fence)
        await at.attempts.assign(request)
        await at.until_idle()
        assert at.failures == [(code, retryable)]


async def test_what_an_agent_leaves_is_in_the_bundle(autojump_clock: MockClock) -> None:
    lines = ['leave {"operation": {"n": 1}}', 'leave {"task": {"agent": "kExecutor:text"}}', "say x"]
    async with station(new_disk(), Ledger()) as at:
        await at.assign("\n".join(lines))
        await at.until_idle()
        [end] = at.ledger.ended
        assert isinstance(end, CompleteAttempt)
        assert end.bundle.operations == (b'{"n": 1}',)
        assert [each.task.agent for each in end.bundle.follow_ups] == ["kExecutor:text"]


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (['leave {"operation": 1}'] * 300, Code.TOO_LARGE),
        (['leave {"operation": "' + "x" * 17_000 + '"}'], Code.TOO_LARGE),
        (['leave {"operation": 1}', "leave nonsense"], Code.AGENT_FAILED),
    ],
    ids=["too many", "too large", "no effect"],
)
async def test_effects_over_a_limit_fail_the_attempt_and_none_of_them_counts(
    autojump_clock: MockClock, lines: list[str], code: Code
) -> None:
    async with station(new_disk(), Ledger()) as at:
        await at.assign("\n".join(lines))
        await at.until_idle()
        assert at.failures == [(code, False)]


async def test_a_completion_that_the_leader_can_never_take_is_a_failure(autojump_clock: MockClock) -> None:
    async with station(new_disk(), Ledger(refusal=Code.TOO_LARGE)) as at:
        await at.assign("say x")
        await at.until_idle()
        assert at.failures == [("TOO_LARGE", False)]


async def test_a_completion_for_which_there_is_no_room_is_repeated_for_a_while_then_a_failure(
    autojump_clock: MockClock,
) -> None:
    async with station(new_disk(), Ledger(refusal=Code.RATE_LIMITED)) as at:
        await at.assign("say x", fence(1))
        await trio.sleep(attempts_module.PATIENCE_S / 2)
        at.ledger.refusal = None
        await at.until_idle()
        assert at.results == [b"x"]
        at.ledger.refusal = Code.RATE_LIMITED
        began = trio.current_time()
        await at.assign("say x", fence(2))
        await at.until_idle()
        assert attempts_module.PATIENCE_S < trio.current_time() - began < 2 * attempts_module.PATIENCE_S
        assert at.failures == [("RATE_LIMITED", True)]


async def test_a_revoked_node_stops_and_tells_nothing(autojump_clock: MockClock) -> None:
    disk, ledger = new_disk(), Ledger()
    async with station(disk, ledger) as at:
        await at.assign("sleep 50\nsay x", fence(1))
        ledger.is_here = False
        await at.assign("say y", fence(2))
        await trio.sleep(5)
        await at.revoke()
        ledger.is_here = True
        await at.until_idle()
        assert at.sandbox.running == []
        assert ledger.told == 0
        assert await at.kept() == []
        await refused(at, Code.KEY_REVOKED, "say x", fence(3))


async def test_progress_is_told_at_most_twice_a_second_and_the_latest(autojump_clock: MockClock) -> None:
    async with station(new_disk(), Ledger()) as at:
        lines = [f"report {number / 100} step {number}\nsleep 0.01" for number in range(100)]
        await at.assign("\n".join([*lines, "sleep 2", "say x"]))
        await at.until_idle()
        assert 2 <= len(at.ledger.reports) <= 4
        last = at.ledger.reports[-1]
        assert (last.fence, last.report.permille, last.report.text) == (fence(), 990, "step 99")


async def test_a_leader_that_fails_in_an_unforeseen_way_is_told_again(autojump_clock: MockClock) -> None:
    class Broken(Ledger):
        async def fail(self, request: FailAttempt, *, deadline: object) -> None:  # type: ignore[override]
            if self.told < 3:
                self.told += 1
                raise RuntimeError("a fault")
            return await super().fail(request, deadline=deadline)  # type: ignore[arg-type, return-value]

    async with station(new_disk(), Broken()) as at:
        await at.assign("die 1")
        await at.until_idle()
        assert at.failures == [("AGENT_FAILED", False)]


@pytest.mark.parametrize("damage", ["no database", "a page", "no request"])
async def test_a_damaged_file_of_attempts_is_begun_anew_and_the_leader_repeats_them(
    autojump_clock: MockClock, damage: str
) -> None:
    disk, ledger = new_disk(), Ledger()
    path = STATE / "work.db"
    async with station(disk, ledger) as at:
        await at.assign("sleep 50\nsay x")
        await trio.sleep(1)
        if damage == "no request":
            await at.work._database.write(
                lambda connection: connection.execute("UPDATE attempt SET request = x'c1'")
            )
    content = bytearray(disk.read(path, limit_bytes=2**20))
    if damage == "no database":
        disk.write(path, b"no database at all " * 400)
    if damage == "a page":
        content[4096:8192] = b"x" * 4096
        disk.write(path, bytes(content))
    async with station(disk, ledger) as at:
        assert len(at.attempts) == 0
        assert any("accepted attempts are lost" in line for line in at.lines)
        await at.assign("sleep 50\nsay x")
        await at.until_idle()
        assert at.results == [b"x"]
