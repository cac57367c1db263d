"""Replicas of real nodes over the memory network, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import trio
from mesh_cell import key_of, refused
from replica_cell import FILES, LOG, ReplicaCell, replicas, short_log, until
from trio.testing import MockClock

from knode.consensus.messages import (
    MAX_COMMAND_BYTES,
)
from knode.errors import Code, KnodeError
from knode.simulation.volume import Event
from knode.world import Monotonic

__all__ = ["replicas", "short_log"]

T = TypeVar("T")


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
    leader, follower = await replicas.leader_and_follower()
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
    leader, follower = await replicas.leader_and_follower()
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


async def test_a_leader_applies_and_commits_while_it_dumps_its_state(
    autojump_clock: MockClock, replicas: ReplicaCell, short_log: None
) -> None:
    leader, follower = await replicas.leader_and_follower()
    await replicas.kill(follower)
    for number in range(60):
        await leader.propose(f"{number}")
    leader.machine.may_dump = trio.Event()
    await replicas.restart(follower)
    await until(lambda: leader.machine.is_dumping)
    assert leader.replica.raft is not None
    first = leader.replica.raft.first_index
    for number in range(60, 120):
        await leader.propose(f"{number}")
    assert len(leader.commands) == 120
    assert leader.replica.raft.first_index == first, "the log goes on from the state that is being sent"
    leader.machine.may_dump.set()
    await replicas.until_equal()
    await leader.propose("after")
    raft = leader.replica.raft
    await until(lambda: raft.first_index > first)


async def test_a_follower_with_a_full_disk_stands_still_until_there_is_room(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    leader, follower = await replicas.leader_and_follower()
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
    leader, follower = await replicas.leader_and_follower()
    new = key_of("rotated")
    await follower.membership.rotate(new)
    await until(lambda: all(new.public.raw in node.membership.roster.members for node in replicas.nodes))
    await replicas.kill(follower)
    follower.key = new
    await leader.propose("meanwhile")
    await replicas.restart(follower)
    await replicas.until_equal()
    assert follower.commands == ["meanwhile"]


async def test_a_log_that_is_gone_or_damaged_makes_the_replica_unfit_and_the_node_goes_on(
    autojump_clock: MockClock,
    replicas: ReplicaCell,
) -> None:
    leader, follower = await replicas.leader_and_follower()
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


class SlowDisk:
    """Blocking work that takes ten milliseconds."""

    async def run(self, work: Callable[[], T]) -> T:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.01)
        return work()


async def test_what_comes_while_the_disk_works_shares_the_next_sync(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    [node] = await replicas.grow(1)
    await replicas.kill(node)
    node.blocking = SlowDisk()
    await replicas.restart(node)
    await replicas.leader()
    syncs = 0

    def count(event: Event) -> None:
        nonlocal syncs
        syncs += event == "sync"

    node.disk.watch(count)
    begun = trio.current_time()

    async def propose_some(name: int) -> None:
        for number in range(5):
            await node.propose(f"{name} {number}")

    async with trio.open_nursery() as nursery:
        for name in range(100):
            nursery.start_soon(propose_some, name)
    assert len(node.commands) == 500
    assert syncs <= 10
    assert trio.current_time() - begun < 0.2
    assert max(node.machine.batches) >= 50


async def test_the_largest_command_is_committed_and_a_larger_one_refused(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    await replicas.grow(3)
    leader = await replicas.leader()
    await leader.propose("x" * MAX_COMMAND_BYTES)
    await replicas.until_equal()
    await refused(Code.TOO_LARGE, leader.propose, "x" * (MAX_COMMAND_BYTES + 1))
    assert not leader.replica.dropped


@pytest.mark.parametrize("of_leader", [True, False])
async def test_a_failed_sync_ends_a_replica_for_good_and_its_node_goes_on(
    autojump_clock: MockClock, replicas: ReplicaCell, of_leader: bool
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    broken = leader if of_leader else next(node for node in nodes if node is not leader)
    await leader.propose("before")
    told: list[bool] = []
    broken.replica.on_leader.append(lambda: told.append(broken.replica.is_leader))
    broken.disk.fail_sync("*/raft/log/*")
    if of_leader:
        await refused(Code.UNKNOWN, leader.propose, "perhaps")
        await refused(Code.UNAVAILABLE, leader.propose, "no")
        leader = await replicas.leader(but=broken)
    await leader.propose("after")
    await until(lambda: broken.replica.standing is not None and broken.replica.standing.unfit is not None)
    assert told == [False] * of_leader
    broken.disk.mend_sync()
    await replicas.kill(broken)
    await replicas.restart(broken)
    await replicas.connected()
    await trio.sleep(5)
    assert broken.replica.raft is None
    assert broken.commands in (["before"], [])
    assert await leader.ask(broken, "test.echo", "here") == "here"


async def test_a_leader_that_steps_down_in_the_midst_of_sending_a_state_stops(
    autojump_clock: MockClock, replicas: ReplicaCell, short_log: None
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    behind, other = (node for node in nodes if node is not leader)
    await replicas.kill(behind)
    for number in range(60):
        await leader.propose(f"{number}")
    await replicas.restart(behind)
    await until(lambda: "sending the ledger" in leader.log.events("info"))
    leader.replica.transfer(other.replica_id)
    await replicas.leader(but=leader)
    await replicas.until_equal()
    await trio.sleep(2)
    assert [node.disk.list_folder(FILES) for node in nodes] == [[], [], []]


class Gate:
    """A disk that can be made to hang."""

    def __init__(self) -> None:
        self.opened = trio.Event()
        self.opened.set()

    async def run(self, work: Callable[[], T]) -> T:
        with trio.CancelScope(shield=True):
            await self.opened.wait()
        return work()


async def test_a_follower_acknowledges_and_votes_only_when_its_disk_has_it(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    follower, other = (node for node in nodes if node is not leader)
    gate = follower.blocking = Gate()
    await replicas.kill(follower)
    await replicas.restart(follower)
    await replicas.connected()
    await leader.propose("before")
    await replicas.until_equal()
    await replicas.kill(other)
    gate.opened = trio.Event()
    await refused(Code.TIMEOUT, leader.propose, "hangs", within_s=3)
    assert replicas.leads(leader), "it heard heartbeats all the time"
    assert follower.commands == ["before"]
    gate.opened.set()
    assert await leader.propose("after") == 3
    gate.opened = trio.Event()
    leader.replica.transfer(follower.replica_id)
    await trio.sleep(0.5)
    assert not follower.replica.is_leader, "its own vote is not durable"
    gate.opened.set()
    await until(lambda: follower.replica.is_leader or leader.replica.is_leader)
