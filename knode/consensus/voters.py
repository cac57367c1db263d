"""Whose vote should count: the configuration that follows from the roster and from what members announce.

The roster says who belongs to the cell; the Raft configuration says whose vote counts, and the leader makes
it follow, one step after the other, until `next_configuration` finds nothing to do:

1. Admins, workers and voters have a replica each, the first seven of them; observers never.
2. A new replica begins as learner and votes once it has caught up.
3. There are never two voters: with two, the loss of either stops the cell, so one votes and the other learns.
4. A dead voter stays until its member is revoked: who is merely away finds its vote when it comes back.
5. A replica that is replaced stays (silent, as if dead) until its successor has caught up, and both change
   places in one step; so what is committed meanwhile lies on as many disks as before.
6. No step is taken of which the living could not form a majority, before it and after it.

Pure: no clock, no disk, no network.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from knode.consensus.messages import Configuration, ReplicaId
from knode.mesh.statements import Role

MAX_VOTERS = 7
MEMBER_BYTES = 32
VOTING_ROLES = frozenset({Role.ADMIN, Role.WORKER, Role.VOTER})


def member_of(replica: ReplicaId) -> bytes:
    """Return the raw id of the member whose replica this is."""
    return replica[:MEMBER_BYTES]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A member of a role that votes, as the leader sees it."""

    member: bytes
    """Its raw id."""
    joined: int
    """Who joined earlier comes first when there are more than seven."""
    replica: ReplicaId | None
    """What it announced, under the present incarnation; None: nothing yet."""
    fit: bool
    """What it announced: whether this replica may vote and acknowledge."""
    alive: bool
    level: int
    """Up to which feature level it understands the ledger's commands; 0: it did not say."""


def next_configuration(
    present: Configuration,
    leader: ReplicaId,
    candidates: Sequence[Candidate],
    caught_up: Collection[ReplicaId],
) -> Configuration | None:
    """Return what the leader should propose next; None: nothing, now.

    Args:
        present: the configuration in force.
        leader: its own replica.
        candidates: every member that may vote, the leader's too while it may.
        caught_up: learners that have almost all of the leader's log.
    """
    living = living_replicas(candidates) | {leader}
    if present.outgoing or not has_majority(present.voters, living):
        return None
    by_member = {candidate.member: candidate for candidate in candidates}
    ready = {
        member_of(replica): replica
        for replica in present.learners
        if replica in caught_up and replica in living
    }
    staying = {member_of(v): v for v in present.voters if member_of(v) in by_member}
    newcomers = sorted(m for m in ready if m not in staying)[: max(0, MAX_VOTERS - len(staying))]
    wanted = staying | {m: r for m, r in ready.items() if m in staying or m in newcomers}
    voters = _never_two(wanted, leader, present.voters)
    if not has_majority(voters, living):
        voters = set(present.voters)
    learners = _learners(present, voters, candidates)
    target = Configuration(voters=tuple(sorted(voters)), learners=tuple(sorted(learners)))
    return target if target != present else None


def has_majority(voters: Collection[ReplicaId], living: Collection[ReplicaId]) -> bool:
    """Tell whether the living among these voters can decide."""
    return 2 * sum(voter in living for voter in voters) > len(voters)


def keeps_quorum(present: Configuration, member: bytes, living: Collection[ReplicaId]) -> bool:
    """Tell whether the cell, if it can decide now, still can when this member is revoked and so silent."""
    others = {replica for replica in living if member_of(replica) != member}
    halves = [half for half in (present.voters, present.outgoing) if half]
    can_now = all(has_majority(half, living) for half in halves)
    return not can_now or all(has_majority(half, others) for half in halves)


def living_replicas(candidates: Iterable[Candidate]) -> set[ReplicaId]:
    """Return the replicas of which acknowledgements can be expected."""
    return {c.replica for c in candidates if c.replica is not None and c.fit and c.alive}


def common_level(present: Configuration, candidates: Iterable[Candidate]) -> int:
    """Return the feature level that every replica of the configuration understands; 0: not known."""
    levels = {candidate.replica: candidate.level for candidate in candidates}
    replicas = {*present.voters, *present.outgoing, *present.learners}
    return min((levels.get(replica, 0) for replica in replicas), default=0)


def _never_two(
    wanted: dict[bytes, ReplicaId], leader: ReplicaId, present: Collection[ReplicaId]
) -> set[ReplicaId]:
    """Return the voters: all that are wanted, but one alone instead of two, and never none."""
    voters = set(wanted.values())
    if not voters:
        return set(present)
    if len(voters) != 2:
        return voters
    # The leader has everything, so has whoever votes already in its place; else it is all one.
    return {min(voters, key=lambda voter: (voter != leader, voter not in present, voter))}


def _learners(
    present: Configuration, voters: Collection[ReplicaId], candidates: Sequence[Candidate]
) -> set[ReplicaId]:
    """Return who learns: of each member with a place, the replica that it announced, or else had."""
    learning = {member_of(replica): replica for replica in present.learners}
    places = {member_of(voter) for voter in voters}

    def replica_of(candidate: Candidate) -> ReplicaId | None:
        if candidate.replica is None:
            return learning.get(candidate.member)
        return candidate.replica if candidate.fit else None

    def turn(candidate: Candidate) -> tuple[bool, bool, int, bytes]:
        return not candidate.alive, candidate.member not in learning, candidate.joined, candidate.member

    others = [c for c in candidates if c.member not in places and replica_of(c) is not None]
    places |= {c.member for c in sorted(others, key=turn)[: MAX_VOTERS - len(places)]}
    replicas = {replica_of(c) for c in candidates if c.member in places}
    return {replica for replica in replicas if replica is not None and replica not in voters}
