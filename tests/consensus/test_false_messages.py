"""What no honest replica says, and what too much is, to replicas of real nodes."""

from __future__ import annotations

from functools import partial
from hashlib import sha256

import msgspec
import pytest
import trio
from mesh_cell import refused
from replica_cell import FILES, ReplicaCell, ReplicaNode, replicas, until
from trio.testing import MockClock

from knode.consensus.driver import INBOX_MESSAGES
from knode.consensus.envelope import REFUSED_TOPIC, TOPIC, Offer, Refused, Started
from knode.consensus.messages import (
    MOST,
    Append,
    AppendReply,
    Configuration,
    Entry,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Kind,
    Message,
    PreVote,
    PreVoteReply,
    Snapshot,
    TimeoutNow,
    Vote,
    VoteReply,
)
from knode.consensus.post import UNRECORDED
from knode.consensus.transfer import MAX_STATE_BYTES
from knode.errors import Code
from knode.klp.codec import encode
from knode.klp.messages import Context
from knode.mesh.statements import Role
from knode.simulation.disk import SimulatedDisk

__all__ = ["replicas"]


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
    leader, follower = await replicas.leader_and_follower()
    follower.peer(leader).send_event(TOPIC, body, Context())
    await until(lambda: leader.peers.refusals.get(Code.BAD_FRAME) == 1)
    await replicas.connected()
    assert replicas.leads(leader)


async def test_what_is_of_another_incarnation_or_for_another_replica_is_dropped(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    leader, follower = await replicas.leader_and_follower()
    term = leader.replica.term
    vote = Vote(term + 5, follower.replica_id, leader.replica_id, 1000, term + 4, True)
    follower.speak(leader, vote, incarnation=bytes(32))
    gone = leader.replica_id[:32] + bytes(8)
    follower.speak(leader, Vote(term + 5, follower.replica_id, gone, 1000, term + 4, True))
    await until(lambda: leader.replica.dropped.total() == 2)
    assert leader.replica.dropped == {"another incarnation": 1, "another replica": 1}
    assert leader.replica.term == term
    assert replicas.leads(leader)


async def test_a_member_whose_role_does_not_vote_can_neither_lead_nor_disturb(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = list(await replicas.grow(3))
    leader = await replicas.leader()
    await leader.propose("one")
    await replicas.until_equal()
    observer = await replicas.join(role=Role.OBSERVER)
    term, index = leader.replica.term, leader.replica.applied
    forged = Entry(term + 5, index + 1, Kind.COMMAND, b"forged")
    for node in nodes:
        header = (term + 5, observer.replica_id, node.replica_id, index, term)
        observer.speak(node, Append(*header, (forged,), index + 1))
        observer.speak(node, Vote(*header, True))
    await until(lambda: all(node.replica.dropped["no voting role"] == 2 for node in nodes))
    await trio.sleep(3)
    assert leader.replica.term == term
    assert leader.replica.is_leader


def is_refused(node: ReplicaNode, code: Code, times: int) -> bool:
    return node.peers.refusals.get(code) == times


async def until_disproved(node: ReplicaNode, times: int) -> None:
    await until(lambda: is_refused(node, Code.BAD_SIGNATURE, times))


async def test_no_member_can_make_the_replica_of_another_unfit(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    """Nor can all others together: it takes a proof that only its own node can have given."""
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    standing = leader.replica.standing
    assert standing is not None
    later = Started(leader.replica_id, standing.start + 1, bytes(16))
    former = Started(leader.replica_id[:32] + bytes(8), standing.start + 1, bytes(16))
    liars = [node for node in nodes if node is not leader]
    said = 0
    for liar in liars:
        for proof in (bytes(64), standing.proof, later.prove(liar.key), former.prove(leader.key)):
            refusal = Refused(later.replica, later.start, later.boot, proof)
            liar.peer(leader).send_event(REFUSED_TOPIC, encode(refusal), Context())
            said += 1
            await until_disproved(leader, said)
            await replicas.connected()
    assert standing.unfit is None
    assert leader.replica.standing is standing
    leading = await replicas.leader()
    await leading.propose("one")
    await replicas.until_equal()


async def test_one_proof_suffices(autojump_clock: MockClock, replicas: ReplicaCell) -> None:
    """Perhaps nobody else was shown the later start."""
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    copy = next(node for node in nodes if node is not leader)
    other = next(node for node in nodes if node not in (leader, copy))
    standing = copy.replica.standing
    assert standing is not None
    earlier = Refused(copy.replica_id, standing.start, standing.boot, standing.proof)
    other.peer(copy).send_event(REFUSED_TOPIC, encode(earlier), Context())
    await trio.sleep(2)
    assert standing.unfit is None
    later = Started(copy.replica_id, standing.start, bytes(16))
    refusal = Refused(later.replica, later.start, later.boot, later.prove(copy.key))
    other.peer(copy).send_event(REFUSED_TOPIC, encode(refusal), Context())
    await until(lambda: standing.unfit is not None)


async def test_a_start_without_proof_is_not_recorded(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    liar = next(node for node in nodes if node is not leader)
    standing = leader.replica.standing
    assert standing is not None
    before = standing.shown(liar.replica_id)
    assert before is not None
    beat = HeartbeatReply(leader.replica.term, liar.replica_id, leader.replica_id, 0)
    envelope = msgspec.structs.replace(liar.envelope(beat), start=before.start + 1)
    liar.peer(leader).send_event(TOPIC, encode(envelope), Context())
    await until_disproved(leader, 1)
    assert standing.shown(liar.replica_id) == before
    snapshot = Snapshot(1000, leader.replica.term, Configuration((leader.replica_id,)))
    message = InstallSnapshot(leader.replica.term, liar.replica_id, leader.replica_id, snapshot)
    offered = msgspec.structs.replace(liar.envelope(message), start=before.start + 1)
    await replicas.connected()
    await refused(Code.BAD_SIGNATURE, liar.offer, leader, Offer(offered, 0, bytes(32)), b"")
    assert standing.shown(liar.replica_id) == before


def with_numbers(node: ReplicaNode, to: ReplicaNode, number: int) -> list[Message]:
    """Each message that goes as an event, with this number wherever one stands."""
    n, ends = number, (number, node.replica_id, to.replica_id)
    return [
        PreVote(*ends, n, n),
        PreVoteReply(*ends, False),
        PreVoteReply(*ends, True),
        Vote(*ends, n, n, True),
        VoteReply(*ends, True),
        Append(*ends, n, n, (Entry(n, n, Kind.COMMAND, b"forged"),), n),
        AppendReply(*ends, n, True, n, n),
        Heartbeat(*ends, n, n),
        HeartbeatReply(*ends, n),
        TimeoutNow(*ends),
    ]


async def test_the_greatest_numbers_end_no_node_and_do_not_keep_the_cell_from_electing(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    await (await replicas.leader()).propose("one")
    await replicas.until_equal()
    liar = nodes[2]
    others = [nodes[0], nodes[1]]
    before = [dict(node.peers.refusals) for node in nodes]
    for _ in range(5):
        for other in others:
            for message in with_numbers(liar, other, MOST):
                liar.speak(other, message)
        await trio.sleep(0.5)
    assert all(other.driver.raft.contradictions >= 50 for other in others)
    assert 1 < max(other.replica.term for other in others) < 2**40
    await until(lambda: any(node.replica.is_leader for node in nodes), within_s=60)
    await (await replicas.leader()).propose("two")
    await replicas.until_equal()
    assert [node.commands for node in nodes] == [["one", "two"]] * 3
    assert [dict(node.peers.refusals) for node in nodes] == before


@pytest.mark.parametrize("number", [MOST + 1, 2**63 - 1, 2**63, 2**64 - 1])
async def test_greater_numbers_end_the_session_alone(
    autojump_clock: MockClock, replicas: ReplicaCell, number: int
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    liar = next(node for node in nodes if node is not leader)
    for times, message in enumerate(with_numbers(liar, leader, number), start=1):
        liar.speak(leader, message)
        await until(partial(is_refused, leader, Code.BAD_FRAME, times))
        await replicas.connected()
    leading = await replicas.leader()
    await leading.propose("one")
    await replicas.until_equal()
    assert leader.replica.term < 100


async def test_a_state_that_is_not_what_was_announced_changes_nothing(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    leader, follower = await replicas.leader_and_follower()
    await leader.propose("one")
    await replicas.until_equal()
    snapshot = Snapshot(1000, leader.replica.term, Configuration((leader.replica_id,)))
    message = InstallSnapshot(leader.replica.term, leader.replica_id, follower.replica_id, snapshot)
    wrong_hash = Offer(leader.envelope(message), 5, bytes(32))
    await refused(Code.INVALID_ARGUMENT, leader.offer, follower, wrong_hash, b"12345")
    too_large = Offer(leader.envelope(message), MAX_STATE_BYTES + 1, bytes(32))
    await refused(Code.TOO_LARGE, leader.offer, follower, too_large, b"")
    forged = msgspec.structs.replace(message, source=replicas.nodes[2].replica_id, target=leader.replica_id)
    await refused(
        Code.NOT_ALLOWED,
        replicas.nodes[1].offer,
        replicas.nodes[0],
        Offer(replicas.nodes[1].envelope(forged), 0, bytes(32)),
        b"",
    )
    assert follower.disk.list_folder(FILES) == []
    assert await leader.propose("two") == 2


async def test_after_a_state_that_is_none_a_replica_goes_on_with_its_own(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    leader, follower = await replicas.leader_and_follower()
    await leader.propose("one")
    await replicas.until_equal()
    snapshot = Snapshot(1000, leader.replica.term, Configuration((leader.replica_id,)))
    message = InstallSnapshot(leader.replica.term, leader.replica_id, follower.replica_id, snapshot)
    await leader.offer(follower, Offer(leader.envelope(message), 1, sha256(b"\xc1").digest()), b"\xc1")
    assert await leader.propose("two") == 2
    await replicas.until_equal()
    assert follower.replica.trouble is None
    assert follower.disk.list_folder(FILES) == []


async def test_a_state_of_another_index_than_was_said_makes_the_replica_unfit_and_its_node_goes_on(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    leader, follower = await replicas.leader_and_follower()
    await leader.propose("one")
    await replicas.until_equal()
    snapshot = Snapshot(1000, leader.replica.term, Configuration((leader.replica_id,)))
    message = InstallSnapshot(leader.replica.term, leader.replica_id, follower.replica_id, snapshot)
    data = encode([999, [b"false"]])
    await leader.offer(follower, Offer(leader.envelope(message), len(data), sha256(data).digest()), data)
    await until(lambda: follower.replica.must_be_renewed)
    await replicas.kill(follower)
    await replicas.restart(follower)
    await replicas.connected()
    assert follower.replica.must_be_renewed
    assert await leader.propose("two") == 2


async def test_a_flood_is_dropped_and_counted_and_the_cell_goes_on(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    leader, follower = await replicas.leader_and_follower()
    driver = leader.driver
    beat = HeartbeatReply(leader.replica.term, follower.replica_id, leader.replica_id, 0)
    for _ in range(2 * INBOX_MESSAGES):
        driver.receive(beat, 100)
    assert driver.dropped == INBOX_MESSAGES
    assert leader.replica.dropped_messages["too many"] == INBOX_MESSAGES
    await leader.propose("one")
    await replicas.until_equal()


async def test_a_flood_crowds_out_nobody_else(autojump_clock: MockClock, replicas: ReplicaCell) -> None:
    """Not even one under ever other replica ids."""
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    flooder, other = (node for node in nodes if node is not leader)
    driver = leader.driver

    def beat(source: bytes) -> HeartbeatReply:
        return HeartbeatReply(leader.replica.term, source, leader.replica_id, 0)

    for number in range(2 * INBOX_MESSAGES):
        driver.receive(beat(flooder.replica_id), 100)
        driver.receive(beat(flooder.replica_id[:32] + number.to_bytes(8, "big")), 100)
    assert driver.dropped == 2 * INBOX_MESSAGES
    for _ in range(INBOX_MESSAGES):
        driver.receive(beat(other.replica_id), 100)
    assert driver.dropped == 2 * INBOX_MESSAGES
    await leader.propose("one")
    await replicas.until_equal()


async def test_starts_that_are_made_up_keep_nobody_else_from_being_recorded(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    nodes = await replicas.grow(3)
    leader = await replicas.leader()
    flooder, other = (node for node in nodes if node is not leader)
    beat = HeartbeatReply(leader.replica.term, flooder.replica_id, leader.replica_id, 0)
    post = leader.replica._life.post  # type: ignore[union-attr]
    for number in range(2 * UNRECORDED):
        started = Started(flooder.replica_id, 100 + number, bytes(16))
        envelope = msgspec.structs.replace(
            flooder.envelope(beat), start=started.start, boot=started.boot, proof=started.prove(flooder.key)
        )
        post.take(flooder.key.public, encode(envelope))
    assert leader.replica.dropped["not recorded"] == UNRECORDED
    await replicas.kill(other)
    await replicas.restart(other)
    await until(lambda: leader.replica.is_leader)
    await leader.propose("one")
    await replicas.until_equal(leader, other)


async def test_a_restored_copy_is_refused_and_never_counted_again(
    autojump_clock: MockClock, replicas: ReplicaCell
) -> None:
    leader, follower = await replicas.leader_and_follower()
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
