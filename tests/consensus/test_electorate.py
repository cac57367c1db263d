"""Members come and go, die and are replaced, and whose vote counts follows."""

from __future__ import annotations

import pytest
import trio
from mesh_cell import refused, until
from replica_cell import LOG
from trio.testing import MockClock
from voters_cell import VotingCell, voting

from knode.consensus.electorate import TOPIC, Announcement, Votes
from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.mesh.statements import Role
from knode.simulation.disk import SimulatedDisk
from knode.world import Monotonic

__all__ = ["voting"]


@pytest.mark.parametrize(("members", "voters"), [(1, 1), (2, 1), (3, 3), (4, 4)])
async def test_who_joins_learns_and_then_votes_but_there_are_never_two(
    autojump_clock: MockClock, voting: VotingCell, members: int, voters: int
) -> None:
    nodes = await voting.of(members)
    parts = [node.part() for node in nodes]
    assert parts.count(Votes.VOTER) == voters
    assert parts.count(Votes.LEARNER) == members - voters


async def test_of_nine_members_seven_vote_and_the_rest_has_no_replica(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(9)
    assert [node.part() for node in nodes].count(Votes.NOT) == 2
    await voting.leading().propose("one")
    await until(lambda: [n.commands for n in nodes].count(["one"]) == 7)
    others = [n for n in nodes if n.part() is Votes.NOT]
    assert all(n.votes() == nodes[0].votes() for n in others), "they know it from what the others announce"


async def test_members_join_while_commands_are_committed(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    [first] = await voting.of(1)
    done: list[str] = []

    async def work() -> None:
        for number in range(300):
            await first.propose(str(number))
            done.append(str(number))
            await trio.sleep(0.02)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        for _ in range(4):
            await voting.join()
    await voting.until_voting(5)
    await voting.until_equal()
    assert first.commands == done


async def test_an_observer_learns_nothing_and_who_becomes_one_lets_go_of_its_vote(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(4)
    await nodes[0].membership.set_role(nodes[0].member(nodes[3]), Role.OBSERVER)
    await voting.until_voting(3)
    assert nodes[3].part() is Votes.NOT


async def test_who_lost_its_vote_while_it_was_away_finds_the_leader_all_the_same(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(4)
    away = nodes[3]
    await voting.kill(away)
    await nodes[0].membership.set_role(nodes[0].member(away), Role.OBSERVER)
    await voting.until_led()
    await until(lambda: nodes[0].votes()["node3"] is Votes.NOT)
    await voting.restart(away)  # its log has it that it votes, and nobody listens to it
    await until(lambda: away.membership.own.role is Role.OBSERVER)
    leader = await away.replica.find_leader(deadline=Monotonic(trio.current_time() + 30))
    assert leader.name == voting.leading().name
    assert away.part() is Votes.NOT


async def test_a_revoked_follower_leaves(autojump_clock: MockClock, voting: VotingCell) -> None:
    nodes = await voting.of(4)
    await voting.until_led()
    gone = next(n for n in nodes[1:] if not n.replica.is_leader)
    nodes[0].electorate.check_revocation(nodes[0].member(gone))
    await nodes[0].membership.revoke(nodes[0].member(gone))
    await voting.until_voting(3, but=gone)
    await voting.leading().propose("after")


async def test_a_revoked_leader_is_followed_by_another_that_lets_it_go(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(4)
    owner, gone = nodes[0], nodes[1]
    await voting.leading().propose("before")
    await voting.let_lead(gone)
    await owner.membership.revoke(owner.member(gone))
    leader = await voting.until_led(but=gone)
    await voting.until_voting(3, but=gone)
    await leader.propose("after")
    assert leader.commands == ["before", "after"]
    assert not gone.replica.is_leader


async def test_the_leader_that_may_vote_no_longer_hands_over_first(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(4)
    owner, leaves = nodes[0], nodes[2]
    await voting.let_lead(leaves)
    begun = trio.current_time()
    await owner.membership.set_role(owner.member(leaves), Role.OBSERVER)
    await voting.until_voting(3)
    assert voting.leading() is not leaves
    assert trio.current_time() - begun < 3


async def test_a_dead_voter_stays_until_it_is_revoked_and_a_new_member_takes_its_place(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    dead = nodes[2]
    await voting.kill(dead)
    await voting.until_led()
    await trio.sleep(30)
    assert nodes[0].votes()["node2"] is Votes.VOTER
    nodes[0].electorate.check_revocation(nodes[0].member(dead))
    await nodes[0].membership.revoke(nodes[0].member(dead))
    await voting.until_voting(1)
    voting.nodes.remove(dead)
    await voting.join("node3")
    await voting.until_voting(3)
    await (await voting.until_led()).propose("three again")
    await voting.until_equal()


async def test_a_revocation_that_would_break_the_quorum_is_refused_with_the_way_out(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    await voting.kill(nodes[2])
    await until(lambda: nodes[0].peer(nodes[2]).conversation is None)
    with pytest.raises(KnodeError) as caught:
        nodes[0].electorate.check_revocation(nodes[0].member(nodes[1]))
    assert caught.value.code is Code.UNAVAILABLE
    assert "node2 is away" in caught.value.message
    assert "knode member recover --lost-majority --revoke node1" in caught.value.next_step


async def test_a_sole_voter_is_not_revoked(autojump_clock: MockClock, voting: VotingCell) -> None:
    nodes = await voting.of(2)
    with pytest.raises(KnodeError):
        nodes[1].electorate.check_revocation(nodes[1].member(nodes[0]))
    nodes[0].electorate.check_revocation(nodes[0].member(nodes[1]))


def flip(disk: SimulatedDisk) -> None:
    """Damage the first record of the log."""
    [path] = [LOG / name for name in disk.list_folder(LOG)][:1]
    data = bytearray(disk.read(path, limit_bytes=2**26))
    data[len(data) // 3] ^= 1
    disk.write(path, bytes(data))


def lose(disk: SimulatedDisk) -> None:
    disk.remove(LOG)


@pytest.mark.parametrize("damage", [flip, lose])
async def test_a_voter_with_a_damaged_log_comes_back_as_another_replica_and_votes_again(
    autojump_clock: MockClock, voting: VotingCell, damage: object
) -> None:
    nodes = await voting.of(3)
    for number in range(30):
        await voting.leading().propose(str(number))
    await voting.until_equal()
    broken = next(n for n in nodes if not n.replica.is_leader)
    old = broken.replica_id
    await voting.change_disk(broken, damage)  # type: ignore[arg-type]
    await until(lambda: broken.replica.standing is not None and broken.replica_id != old)
    await until(broken.has_vote)
    await voting.until_voting(3)
    configuration = voting.leading().electorate.configuration
    assert configuration is not None
    assert old not in (*configuration.voters, *configuration.learners)
    await voting.leading().propose("with the new one")
    await voting.until_equal()
    assert broken.replica.stopped is None


async def test_a_voter_whose_disk_does_not_sync_is_replaced_while_it_runs(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    broken = next(n for n in nodes if not n.replica.is_leader)
    old = broken.replica_id
    broken.driver.fail(KnodeError(Code.HOME_DAMAGED, "a sync failed"))
    await until(lambda: broken.replica_id != old and broken.has_vote())
    await voting.until_voting(3)
    await voting.leading().propose("one")
    await voting.until_equal()
    assert nodes[0].commands == ["one"]


async def test_a_restored_home_never_counts_and_comes_back_as_another_replica(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    restored = next(n for n in nodes if not n.replica.is_leader)
    await voting.kill(restored)
    copy = restored.disk.snapshot()
    for _ in range(2):
        await voting.restart(restored)
        await voting.until_voting(3)
        await voting.until_led()
        await voting.leading().propose("after the copy was made")
        await voting.until_equal()
        await voting.kill(restored)
    old = restored.replica_id
    restored.disk = SimulatedDisk.restored(copy)
    await voting.restart(restored)
    await until(lambda: restored.replica_id != old and restored.has_vote())
    await voting.until_voting(3)
    await voting.until_led()
    await voting.leading().propose("with the new one")
    await voting.until_equal()
    assert any("old copy" in str(fields) for _, _, fields in restored.log.lines)


async def test_a_failed_sync_is_remembered_though_the_disk_is_full(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(3)
    failed = next(n for n in nodes if not n.replica.is_leader)
    old = failed.replica_id
    failed.disk.fail_sync("*/raft/log/*")
    failed.disk.watch(lambda event: failed.disk.fill() if event == "sync" else None)
    await voting.leading().propose("what was not synced")
    await until(lambda: failed.standing.unfit is not None)
    await until(lambda: not failed.disk.exists(LOG.parent / "fit"))
    await voting.kill(failed)
    failed.disk.free()
    others = [n for n in nodes if n is not failed]
    for node in others:
        voting.cut(failed, node)
    await voting.restart(failed)
    assert (failed.replica_id, failed.replica.raft) == (old, None)
    assert "full disk" in str(failed.standing.unfit)
    for node in others:
        voting.heal(failed, node)
    await until(lambda: failed.replica_id != old and failed.has_vote())


async def test_a_sole_voter_that_was_damaged_keeps_what_it_has_and_waits_for_its_owner(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(2)
    broken = nodes[0] if nodes[0].part() is Votes.VOTER else nodes[1]
    old = broken.replica_id
    await voting.change_disk(broken, flip)
    await trio.sleep(60)
    assert broken.replica_id == old
    assert broken.standing.unfit is not None
    assert broken.disk.list_folder(LOG)


async def test_who_has_no_voting_role_makes_nobody_let_go_of_what_it_has(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    nodes = await voting.of(2)
    owner, liar = nodes
    await owner.membership.set_role(owner.member(liar), Role.OBSERVER)
    await until(lambda: liar.part() is Votes.NOT)
    await voting.change_disk(owner, flip)
    await owner.connected(liar)
    old = owner.replica_id
    claim = Announcement(liar.replica_id, owner.standing.incarnation.hash, True, Votes.VOTER, 1)

    for _ in range(100):  # its own node says the truth in between
        liar.peers.broadcast(TOPIC, encode(claim))
        await trio.sleep(0.02)
    assert owner.replica_id == old
    assert owner.disk.list_folder(LOG)


async def test_a_node_alone_in_its_cell_refuses_to_start_with_a_damaged_log(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    [node] = await voting.of(1)
    await voting.kill(node)
    flip(node.disk)
    await refused(Code.HOME_DAMAGED, node.start, voting._nursery)


async def test_the_level_that_all_understand_is_told_to_whoever_leads(
    autojump_clock: MockClock, voting: VotingCell
) -> None:
    await voting.of(3)
    await until(lambda: 1 in voting.leading().levels)


async def test_nobody_announces_for_another(autojump_clock: MockClock, voting: VotingCell) -> None:
    a, b = await voting.of(2)
    false = Announcement(a.replica_id, a.standing.incarnation.hash, False, Votes.NOT, 1)
    before = b.conversation(a)
    b.peers.announce(TOPIC, encode(false))
    await until(lambda: b.peer(a).conversation is not before)
    assert a.part() is Votes.VOTER
