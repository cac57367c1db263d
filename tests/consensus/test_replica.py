"""Replicas of real nodes over the memory network, in virtual time."""

from __future__ import annotations

import msgspec
import pytest
import trio
from mesh_cell import key_of, refused
from replica_cell import FILES, LOG, ReplicaCell, replicas, short_log, until
from trio.testing import MockClock

from knode.consensus.driver import INBOX_MESSAGES
from knode.consensus.envelope import TOPIC, Offer
from knode.consensus.messages import Configuration, HeartbeatReply, InstallSnapshot, Snapshot, Vote
from knode.consensus.transfer import MAX_STATE_BYTES
from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.klp.messages import Context
from knode.simulation.disk import SimulatedDisk
from knode.world import Monotonic

__all__ = ["replicas", "short_log"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
async def test_a_cell_elects_a_leader_and_commits(
    autojump_clock: MockClock, replicas: ReplicaCell, count: int
) -> None:
    voters = 1 if count == 2 else count
    nodes = await replicas.grow(count, voters=voters)
    leader = await replicas.leader()
    assert await leader.propose("one") == 1
    assert await leader.propose("two") == 2
    await replicas.until_equal()
    assert all(node.commands == ["one", "two"] for node in nodes)
    assert [n.replica.leader().name for n in nodes] == [leader.name] * count  # type: ignore[union-attr]


async def test_another_leads_within_three_seconds_and_has_all_that_was_committed(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    await replicas.grow(3)
    first = await replicas.leader()
    for number in range(20):
        await first.propose(f"before {number}")
    begun = trio.current_time()
    await replicas.kill(first)
    second = await replicas.leader(but=first)
    await second.propose("after")
    assert trio.current_time() - begun < 3
    assert second.commands == [*(f"before {number}" for number in range(20)), "after"]


async def test_a_follower_that_was_away_catches_up_from_its_log(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    follower = next(node for node in nodes if node is not leader)
    await leader.propose("before")
    await replicas.kill(follower)
    await leader.propose("meanwhile")
    await replicas.restart(follower)
    await replicas.until_equal()
    assert follower.commands == ["before", "meanwhile"]


async def test_a_whole_cell_restarts_with_all_that_was_committed(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    await leader.propose("before")
    for node in nodes:
        await replicas.kill(node)
    for node in nodes:
        await replicas.restart(node)
    leader = await replicas.leader()
    assert await leader.propose("after") == 2
    await replicas.until_equal()
    assert nodes[0].commands == ["before", "after"]


async def test_a_barrier_of_a_follower_waits_for_what_was_committed_when_it_was_called(
    autojump_clock: MockClock,
    replicas: ReplicaCell,
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    for number in range(10):
        await leader.propose(f"{number}")
        for node in nodes:
            await node.barrier()
            assert len(node.commands) == number + 1


async def test_only_the_leader_takes_proposals(autojump_clock: MockClock, replicas: ReplicaCell) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    for node in nodes:
        if node is not leader:
            await refused(Code.UNAVAILABLE, node.propose, "no")
    assert leader.commands == []


async def test_without_a_quorum_a_proposal_times_out_and_a_barrier_finds_no_leader(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    for node in nodes:
        if node is not leader:
            await replicas.kill(node)
    begun = trio.current_time()
    await refused(Code.TIMEOUT, leader.propose, "perhaps", within_s=5)
    assert trio.current_time() - begun == pytest.approx(5, abs=0.01)
    assert not leader.replica.is_leader
    await refused(Code.UNAVAILABLE, leader.propose, "no")
    await refused(Code.UNAVAILABLE, leader.barrier, within_s=2)


async def test_a_proposal_that_another_leader_replaced_was_not_done(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    old = await replicas.leader()
    for node in nodes:
        if node is not old:
            replicas.cut(old, node)
    error: list[KnodeError] = []

    async def propose() -> None:
        error.append(await refused(Code.UNAVAILABLE, old.propose, "lost", within_s=60))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(propose)
        new = await replicas.leader(but=old)
        await new.propose("kept")
        for node in nodes:
            if node is not old:
                replicas.heal(old, node)
    assert "not done" in error[0].message
    await replicas.until_equal()
    assert old.commands == ["kept"]


async def test_a_lagging_follower_gets_the_whole_state_when_the_log_is_gone(
    autojump_clock: MockClock, replicas: ReplicaCell, short_log: None
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    follower = next(node for node in nodes if node is not leader)
    await replicas.kill(follower)
    for number in range(60):
        await leader.propose(f"{number}")
    assert leader.replica.raft is not None
    assert leader.replica.raft.first_index > 30
    await replicas.restart(follower)
    await replicas.until_equal()
    assert follower.commands == [f"{number}" for number in range(60)]
    assert follower.replica.raft is not None
    assert follower.replica.raft.first_index > 30
    await trio.sleep(1)
    assert follower.disk.list_folder(FILES) == leader.disk.list_folder(FILES) == []
    await leader.propose("after")
    await replicas.kill(follower)
    await replicas.restart(follower)
    await replicas.until_equal()
    assert follower.commands[-1] == "after"


async def test_a_follower_with_a_full_disk_stands_still_until_there_is_room(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    follower = next(node for node in nodes if node is not leader)
    follower.disk.fill()
    for number in range(5):
        await leader.propose(f"{number}")
    await until(lambda: follower.replica.trouble is not None)
    assert follower.commands == []
    await trio.sleep(10)
    assert replicas.leads(leader)
    follower.disk.free()
    await replicas.until_equal()
    assert follower.replica.trouble is None


async def test_a_leader_with_a_full_disk_gives_way_and_comes_back(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    await replicas.grow(3)
    first = await replicas.leader()
    first.disk.fill()
    await refused(Code.TIMEOUT, first.propose, "perhaps", within_s=2)
    refusal = await refused(Code.UNAVAILABLE, first.propose, "no")
    assert "no space" in refusal.message
    second = await replicas.leader(but=first)
    await second.propose("second")
    first.disk.free()
    await replicas.until_equal()
    assert first.replica.trouble is None
    assert "second" in first.commands


async def test_the_only_replica_goes_on_when_there_is_room_again(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    [node] = await replicas.grow(1)
    node.disk.fill()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: node.propose("waits", within_s=30))
        await until(lambda: node.replica.trouble is not None)
        await refused(Code.UNAVAILABLE, node.propose, "no")
        node.disk.free()
    assert node.commands == ["waits"]
    assert await node.propose("after") == 2


async def test_cancelled_in_the_midst_nothing_is_lost(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    acknowledged: list[str] = []

    async def keep_proposing(name: str) -> None:
        for number in range(1000):
            try:
                await leader.propose(f"{name} {number}")
            except KnodeError:
                return
            acknowledged.append(f"{name} {number}")

    async with trio.open_nursery() as nursery:
        for name in "abcd":
            nursery.start_soon(keep_proposing, name)
        await until(lambda: len(acknowledged) > 50)
        await leader.stop()
    await replicas.restart(leader)
    await replicas.connected()
    await replicas.leader()
    await replicas.until_equal()
    assert set(acknowledged) <= set(nodes[0].commands)


async def test_a_leader_that_goes_hands_over_first(autojump_clock: MockClock, replicas: ReplicaCell) -> None:
    await replicas.grow(3)
    leader = await replicas.leader()
    begun = trio.current_time()
    await leader.replica.hand_over()
    assert trio.current_time() - begun < 0.5
    other = await replicas.leader(but=leader)
    assert not leader.replica.is_leader
    await other.propose("one")


async def test_a_member_that_no_configuration_names_finds_the_leader_by_asking(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    await replicas.grow(3)
    leader = await replicas.leader()
    stranger = await replicas.join()
    assert not stranger.replica.is_named
    deadline = Monotonic(trio.current_time() + 5)
    found = await stranger.replica.find_leader(deadline=deadline)
    assert found.key == leader.key.public
    await refused(Code.UNAVAILABLE, stranger.barrier)
    await replicas.kill(leader)
    other = await replicas.leader(but=leader)
    await until(lambda: (known := stranger.replica.leader()) is not None and known.key == other.key.public)


async def test_a_rotated_key_still_speaks_for_its_replica(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    follower = next(node for node in nodes if node is not leader)
    new = key_of("rotated")
    await follower.membership.rotate(new)
    await until(lambda: all(new.public.raw in node.membership.roster.members for node in nodes))
    await replicas.kill(follower)
    follower.key = new
    await leader.propose("meanwhile")
    await replicas.restart(follower)
    await replicas.until_equal()
    assert follower.commands == ["meanwhile"]


async def test_who_speaks_for_another_members_replica_loses_its_session(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    forger, victim = (node for node in nodes if node is not leader)
    term = leader.replica.term
    vote = Vote(term + 5, victim.replica_id, leader.replica_id, 1000, term + 4, True)
    forger.speak(leader, vote)
    await until(lambda: leader.peers.refusals.get(Code.NOT_ALLOWED) == 1)
    await replicas.connected()
    assert leader.replica.term == term
    assert replicas.leads(leader)


@pytest.mark.parametrize("body", [b"", b"\x93garbage", b"\xc1" * 1000, encode([b"x" * 200_000])])
async def test_garbage_ends_the_session_that_brought_it(
    autojump_clock: MockClock, replicas: ReplicaCell, body: bytes
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    follower = next(node for node in nodes if node is not leader)
    follower.peer(leader).send_event(TOPIC, body, Context())
    await until(lambda: leader.peers.refusals.get(Code.BAD_FRAME) == 1)
    await replicas.connected()
    assert replicas.leads(leader)


async def test_what_is_of_another_incarnation_or_for_another_replica_is_dropped(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    follower = next(node for node in nodes if node is not leader)
    term = leader.replica.term
    vote = Vote(term + 5, follower.replica_id, leader.replica_id, 1000, term + 4, True)
    follower.speak(leader, vote, incarnation=bytes(32))
    gone = leader.replica_id[:32] + bytes(8)
    follower.speak(leader, Vote(term + 5, follower.replica_id, gone, 1000, term + 4, True))
    await until(lambda: leader.replica.dropped.total() == 2)
    assert leader.replica.dropped == {"another incarnation": 1, "another replica": 1}
    assert leader.replica.term == term
    assert replicas.leads(leader)


async def test_a_state_that_is_not_what_was_announced_changes_nothing(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    await leader.propose("one")
    await replicas.until_equal()
    follower = next(node for node in nodes if node is not leader)
    snapshot = Snapshot(1000, leader.replica.term, Configuration((leader.replica_id,)))
    message = InstallSnapshot(leader.replica.term, leader.replica_id, follower.replica_id, snapshot)
    wrong_hash = Offer(leader.envelope(message), 5, bytes(32))
    await refused(Code.INVALID_ARGUMENT, leader.offer, follower, wrong_hash, b"12345")
    too_large = Offer(leader.envelope(message), MAX_STATE_BYTES + 1, bytes(32))
    await refused(Code.TOO_LARGE, leader.offer, follower, too_large, b"")
    forged = msgspec.structs.replace(message, source=nodes[2].replica_id, target=leader.replica_id)
    await refused(
        Code.NOT_ALLOWED, nodes[1].offer, nodes[0], Offer(nodes[1].envelope(forged), 0, bytes(32)), b""
    )
    assert follower.disk.list_folder(FILES) == []
    assert await leader.propose("two") == 2


async def test_a_flood_is_dropped_and_counted_and_the_cell_goes_on(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    follower = next(node for node in nodes if node is not leader)
    driver = leader.driver
    beat = HeartbeatReply(leader.replica.term, follower.replica_id, leader.replica_id, 0)
    for _ in range(2 * INBOX_MESSAGES):
        driver.receive(beat, 100)
    assert driver.dropped >= INBOX_MESSAGES
    await leader.propose("one")
    await replicas.until_equal()


async def test_a_restored_copy_is_refused_and_never_counted_again(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    follower = next(node for node in nodes if node is not leader)
    copy = follower.disk.snapshot()
    await replicas.kill(follower)
    await replicas.restart(follower)
    await leader.propose("one")
    await replicas.until_equal()
    await replicas.kill(follower)
    follower.disk = SimulatedDisk.restored(copy)
    await replicas.restart(follower)
    await until(lambda: follower.replica.standing is not None and follower.replica.standing.unfit is not None)
    assert "old copy" in str(follower.replica.trouble)
    await leader.propose("two")
    await trio.sleep(5)
    assert replicas.leads(leader)
    assert follower.commands == []


async def test_a_log_that_is_gone_or_damaged_makes_the_replica_unfit_and_the_node_goes_on(
    autojump_clock: MockClock,
    replicas: ReplicaCell,
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    follower = next(node for node in nodes if node is not leader)
    await leader.propose("one")
    await replicas.until_equal()
    await replicas.kill(follower)
    follower.disk.remove(LOG)
    await replicas.restart(follower)
    assert follower.replica.standing is not None
    assert follower.replica.standing.unfit is not None
    await leader.propose("two")
    assert follower.log.events("error") == ["this node takes no part in the consensus of its cell"]
    await replicas.connected()
    assert await follower.ask(leader, "test.echo", "still here") == "still here"


async def test_a_cell_of_one_with_a_lost_log_does_not_start(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    [node] = await replicas.grow(1)
    await node.propose("one")
    await replicas.kill(node)
    node.disk.remove(LOG)
    with pytest.RaisesGroup(KnodeError, flatten_subgroups=True, allow_unwrapped=True) as caught:
        await replicas.restart(node)
    del caught


async def test_a_commit_takes_few_turns_of_the_loop(autojump_clock: MockClock, replicas: ReplicaCell) -> None:
    await replicas.grow(3)
    leader = await replicas.leader()
    await leader.propose("warm")
    await trio.sleep(0.05)
    turns = 0

    class Count(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            nonlocal turns
            turns += 1

    counter = Count()
    trio.lowlevel.add_instrument(counter)
    await leader.propose("one")
    trio.lowlevel.remove_instrument(counter)
    assert turns <= 40, "some twenty, of all three nodes, and what else they happen to do"
