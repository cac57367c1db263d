"""A cell that lost the majority of its voters for good goes on from what one of them has."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from mesh_cell import RECOVERY, key_of, refused, until
from trio.testing import MockClock
from voters_cell import VotingCell, VotingNode, voting

from knode.consensus.electorate import Votes
from knode.consensus.recovery import LogEnd
from knode.errors import Code
from knode.mesh.incarnations import Incarnation, Verdict
from knode.mesh.roster import Roster
from knode.mesh.statements import Role
from knode.simulation.disk import SimulatedDisk

__all__ = ["voting"]


async def only(voting: VotingCell, *stay: VotingNode) -> None:
    """Kill all others, and wait until that is noticed."""
    for node in voting.nodes:
        if node not in stay:
            await voting.kill(node)
    gone = [n for n in voting.nodes if n not in stay]
    await until(lambda: all(s.peer(g).conversation is None for s in stay for g in gone))
    if len(stay) * 2 < len(voting.nodes) or len(voting.nodes) == 2:
        await until(lambda: all(s.electorate.leaderless_since is not None for s in stay))


def incarnation(node: VotingNode) -> Incarnation:
    return node.membership.roster.incarnations.present


async def test_the_survivor_goes_on_alone_and_the_others_join_it_again(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    for number in range(40):
        await voting.leading().propose(str(number))
    await voting.until_equal()
    survivor, *others = nodes
    old = [n.replica_id for n in others]
    await only(voting, survivor)
    survey = await survivor.recovery.survey()
    assert (survey.missing, survey.more) == (("node1", "node2"), ())
    assert survey.leaderless_since is not None
    begun = await survivor.recovery.begin()
    assert begun == incarnation(survivor) == Incarnation(1, begun.hash)
    await voting.until_led()
    assert survivor.commands == [str(number) for number in range(40)]
    await survivor.propose("alone")
    for node in others:
        await voting.restart(node)
    await voting.until_voting(3)
    assert all(n.replica_id not in old and n.standing.incarnation == begun for n in others)
    leader = await voting.until_led()
    await leader.propose("together again")
    await voting.until_equal()
    assert others[1].commands == [*(str(number) for number in range(40)), "alone", "together again"]


async def test_what_others_had_beyond_the_survivor_is_void(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    survivor = nodes[0]
    await voting.let_lead(nodes[1])
    leader = nodes[1]
    await leader.propose("all have it")
    await voting.until_equal()
    for node in nodes[1:]:
        voting.cut(survivor, node)
    await until(lambda: survivor.peer(nodes[1]).conversation is None)
    await until(lambda: survivor.peer(nodes[2]).conversation is None)
    await leader.propose("only two have it")
    for node in nodes[1:]:
        await voting.kill(node)
    for node in nodes[1:]:
        voting.heal(survivor, node)
    assert survivor.commands == ["all have it"]
    await until(lambda: survivor.electorate.missing() is not None)
    await survivor.recovery.begin()
    for node in nodes[1:]:
        await voting.restart(node)
    await voting.until_voting(3)
    await (await voting.until_led()).propose("after")
    await voting.until_equal()
    assert [node.commands for node in nodes] == [["all have it", "after"]] * 3


async def test_an_entry_that_the_survivor_had_and_did_not_know_to_be_committed_stands(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    survivor = nodes[0]
    await voting.let_lead(survivor)
    for node in nodes[1:]:
        await voting.kill(node)
    with trio.move_on_after(0.5):
        await survivor.propose("written here alone")
    await until(lambda: not survivor.replica.is_leader)
    assert survivor.commands == []
    await survivor.recovery.begin()
    await until(lambda: survivor.commands == ["written here alone"])


async def test_the_ledger_of_each_incarnation_begins_with_its_first_command(
    autojump_clock: MockClock, voting: VotingCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VotingNode, "first_command", lambda _, begun: f"begin {begun.number}".encode())
    nodes = await voting.of(3)
    await voting.leading().propose("one")
    await voting.until_equal()
    await only(voting, nodes[0])
    await nodes[0].recovery.begin()
    await voting.until_led()
    await nodes[0].propose("two")
    for node in nodes[1:]:
        await voting.restart(node)
    await voting.until_voting(3)
    await voting.until_equal()
    assert nodes[2].commands == ["begin 0", "one", "begin 1", "two"]


async def test_it_is_refused_while_a_majority_is_here_and_on_who_holds_no_key(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    await refused(Code.NOT_ALLOWED, nodes[0].recovery.begin)
    await only(voting, nodes[1])
    await refused(Code.NOT_ALLOWED, nodes[1].recovery.begin)
    await refused(Code.NOT_ALLOWED, nodes[1].recovery.begin, recovery=key_of("another"))
    assert nodes[1].part() is Votes.VOTER, "it takes part as before"
    await nodes[1].recovery.begin(recovery=RECOVERY)
    await until(lambda: nodes[1].replica.is_leader)


async def test_who_is_here_and_has_more_is_named_and_must_be_overruled(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(5)
    lagging = nodes[0]
    await voting.let_lead(nodes[1])
    leader = nodes[1]
    await voting.until_equal()
    fuller = next(n for n in nodes[1:] if n is not leader)
    for node in nodes[1:]:
        voting.cut(lagging, node)
    await leader.propose("the lagging one has not")
    await until(lambda: "the lagging one has not" in fuller.commands)
    for node in nodes[1:]:
        if node is not fuller:
            await voting.kill(node)
    voting.heal(lagging, fuller)
    await lagging.connected(fuller)
    await until(lambda: lagging.electorate.missing() is not None)
    error = await refused(Code.NOT_ALLOWED, lagging.recovery.begin)
    assert fuller.name in error.message
    assert f"run it on {fuller.name}" in error.next_step
    await fuller.recovery.begin(recovery=RECOVERY)
    await until(lambda: "the lagging one has not" in lagging.commands)


async def test_a_learner_survives_the_sole_voter(autojump_clock: MockClock, voting: VotingCell) -> None:
    nodes = await voting.of(2)
    await nodes[0].propose("one")
    await voting.until_equal()
    await only(voting, nodes[1])
    await nodes[1].recovery.begin(recovery=RECOVERY)
    await until(lambda: nodes[1].replica.is_leader)
    await nodes[1].propose("two")
    await voting.restart(nodes[0])
    await until(lambda: nodes[0].commands == ["one", "two"])
    assert nodes[0].part() is Votes.LEARNER


async def test_a_member_that_is_here_may_be_revoked_in_the_same_step(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    await only(voting, nodes[0], nodes[1])
    await until(lambda: nodes[0].electorate.missing() is None)
    await voting.until_led()
    thief = nodes[0].member(nodes[1])
    await refused(Code.NOT_ALLOWED, nodes[0].recovery.survey)
    await nodes[0].recovery.begin(lost=[thief], though_others_have_more=True)
    await until(lambda: nodes[0].replica.is_leader)
    assert nodes[1].key.public.raw in nodes[0].membership.roster.revoked
    await nodes[0].propose("without it")
    assert not nodes[1].replica.is_leader


async def test_two_recoveries_stop_both_until_the_owner_keeps_one(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    owner, other, third = nodes
    await voting.leading().propose("before")
    await voting.until_equal()
    await only(voting, owner)
    await owner.recovery.begin()
    await until(lambda: owner.replica.is_leader)
    await owner.propose("here")
    await voting.kill(owner)
    await voting.restart(other)
    await until(lambda: other.electorate.missing() is not None)
    there = await other.recovery.begin(recovery=RECOVERY)
    await until(lambda: other.replica.is_leader)
    await other.propose("there")

    await voting.restart(owner)
    await voting.restart(third)
    await until(lambda: all(n.replica.stopped is not None for n in nodes))
    assert not any(n.replica.is_leader for n in nodes)
    error = await refused(Code.UNAVAILABLE, owner.propose, "no")
    assert "begun anew twice" in error.message
    assert "knode member recover --keep" in error.next_step

    await owner.membership.keep_incarnation(there.hash)
    await voting.until_voting(3)
    await (await voting.until_led()).propose("after")
    await voting.until_equal()
    assert [n.commands for n in nodes] == [["before", "there", "after"]] * 3


async def test_a_crash_at_any_write_of_the_recovery_leaves_a_ledger_that_goes_on(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    await voting.leading().propose("before")
    await voting.until_equal()
    await only(voting, nodes[0])
    survivor = nodes[0]
    await voting.kill(survivor)
    before = survivor.disk.snapshot()
    points = [SimulatedDisk.restored(before)]
    for number in (1, 2, 4, 7, 11, 16, 22, 29, 37, 46):
        survivor.disk = SimulatedDisk.restored(before)
        await voting.restart(survivor)
        await until(lambda: survivor.electorate.missing() is not None)
        count = 0

        def at(_: object, number: int = number) -> None:
            nonlocal count
            count += 1
            if count == number:
                points.append(SimulatedDisk.restored(survivor.disk.snapshot()))

        survivor.disk.watch(at)
        await survivor.recovery.begin()
        await until(lambda: survivor.replica.is_leader)
        assert survivor.commands == ["before"]
        await voting.kill(survivor)
    assert len(points) > 5
    for disk in points:
        survivor.disk = disk
        await voting.restart(survivor)
        await until(lambda: survivor.electorate.missing() is not None or survivor.replica.is_leader)
        if incarnation(survivor).number == 0:
            await survivor.recovery.begin()
        await until(lambda: survivor.replica.is_leader)
        assert survivor.commands == ["before"]
        assert survivor.standing.incarnation == incarnation(survivor)
        await survivor.propose("after")
        await voting.kill(survivor)


async def test_a_ledger_that_a_former_owner_began_stands_still_until_the_present_one_keeps_it(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    await voting.leading().propose("before")
    await voting.until_equal()
    await only(voting, nodes[0])
    begun = await nodes[0].recovery.begin()
    await until(lambda: nodes[0].replica.is_leader)
    await nodes[0].propose("after")
    await voting.kill(nodes[0])
    # Somebody recovers the owner's key elsewhere, and knows nothing of that.
    await voting.restart(nodes[1])
    await nodes[1].membership.recover(RECOVERY, key_of("second owner"))
    for node in (nodes[0], nodes[2]):
        await voting.restart(node)
    await until(lambda: nodes[0].replica.stopped is not None)
    incarnations = nodes[0].membership.roster.incarnations
    assert incarnations.judge(begun, nodes[0].replica_id) is Verdict.NOT_ACKNOWLEDGED
    await nodes[1].membership.keep_incarnation(begun.hash)
    await voting.until_voting(3)
    await voting.until_led()
    await until(lambda: all(n.commands == ["before", "after"] for n in nodes))


async def without_founder(voting: VotingCell, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A cell of before there were ledgers, whose founder had gone when its members learned of them."""
    monkeypatch.setattr(Roster, "is_founder", lambda roster, member: False)
    for number in range(count):
        if number == 0:
            node = await voting._make("node0")
            await node.found()
            await node.start(voting._nursery)
            voting.nodes.append(node)
        else:
            await voting.join()


async def test_a_cell_whose_founder_had_gone_before_it_had_a_ledger_gets_one_from_its_owner(
    autojump_clock: MockClock, voting: VotingCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VotingNode, "first_command", lambda _, now: b"begin %d" % now.number)
    await without_founder(voting, monkeypatch, 3)
    nodes = voting.nodes
    await trio.sleep(60)
    assert not any(node.replica.is_named or node.replica.is_leader for node in nodes), (
        "nobody founds it unasked"
    )
    assert all(node.electorate.voterless_since is not None for node in nodes)
    chosen = nodes[1]
    await refused(Code.NOT_ALLOWED, chosen.recovery.begin)
    survey = await chosen.recovery.survey()
    assert (survey.end, survey.missing, survey.more) == (LogEnd(0, 0), (), ())
    begun = await chosen.recovery.begin(recovery=RECOVERY)
    assert begun.number == 1
    await voting.until_voting(3)
    leader = await voting.until_led()
    await leader.propose("at last")
    await voting.until_equal()
    assert nodes[0].commands == ["begin 1", "at last"]
    assert all(node.electorate.voterless_since is None for node in nodes)
    for node in nodes:
        await voting.kill(node)
        await voting.restart(node)
    await voting.until_voting(3)
    await (await voting.until_led()).propose("still there")
    await voting.until_equal()
    assert nodes[2].commands == ["begin 1", "at last", "still there"]


async def test_no_ledger_is_founded_where_one_may_be(autojump_clock: MockClock, voting: VotingCell) -> None:
    nodes = [*await voting.of(3)]
    newcomer = await voting.join(role=Role.OBSERVER)
    assert isinstance(newcomer, VotingNode)
    await only(voting, nodes[0], newcomer)
    begin = partial(newcomer.recovery.begin, recovery=RECOVERY, though_others_have_more=True)
    role = partial(nodes[0].membership.set_role, nodes[0].member(newcomer))
    await role(Role.WORKER)
    await until(lambda: newcomer.membership.own.role is Role.WORKER)
    error = await refused(Code.UNAVAILABLE, begin)
    assert "no copy of the ledger" in error.message
    newcomer.electorate._heard.clear()  # as if the voter had only just come
    error = await refused(Code.NOT_ALLOWED, begin)
    assert "node0 is here and has more" in error.message
    async with nodes[0].replica.suspended():  # as if its disk were full: it is here, and cannot say
        newcomer.electorate._heard.clear()
        survey = await newcomer.recovery.survey()
        assert (survey.founds, survey.more, survey.missing) == (True, (), ("node0", "node1", "node2"))
    await role(Role.OBSERVER)
    await until(lambda: newcomer.membership.own.role is Role.OBSERVER)
    await refused(Code.UNAVAILABLE, begin)
    assert not newcomer.replica.is_named


async def test_two_ledgers_that_were_founded_apart_stand_still_until_one_is_named(
    autojump_clock: MockClock, voting: VotingCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    await without_founder(voting, monkeypatch, 2)
    one, other = voting.nodes
    voting.cut(one, other)
    await until(lambda: one.peer(other).conversation is None and other.peer(one).conversation is None)
    here = await one.recovery.begin()
    there = await other.recovery.begin(recovery=RECOVERY)
    assert here != there
    await until(lambda: one.replica.is_leader and other.replica.is_leader)
    voting.heal(one, other)
    await until(lambda: all(node.replica.stopped is not None for node in voting.nodes))
    await one.membership.keep_incarnation(there.hash, recovery=RECOVERY)
    await until(lambda: other.replica.is_leader and one.part() is Votes.LEARNER)
    await other.propose("one ledger")
    await voting.until_equal()
