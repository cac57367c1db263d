"""Who votes, kept up by whoever leads: what members announce of their replicas, and the steps that follow.

Every member announces which replica it has, whether that is fit, and whether it votes. The leader makes the
configuration follow the roster (`knode.consensus.voters`). A replica that must be replaced, since it is unfit
or its incarnation is over, removes what it has only when it has heard a voter of the incarnation in force:
until then nobody knows that what it has is held elsewhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from enum import IntEnum
from typing import Annotated

import trio
from msgspec import Meta, Struct

from knode.consensus.configuration import everyone, gets_log, may_vote
from knode.consensus.messages import Configuration, ReplicaId
from knode.consensus.raft import Raft
from knode.consensus.replica import Replica
from knode.consensus.standing import RANDOM_BYTES
from knode.consensus.voters import (
    MEMBER_BYTES,
    VOTING_ROLES,
    Candidate,
    common_level,
    has_majority,
    keeps_quorum,
    living_replicas,
    member_of,
    next_configuration,
)
from knode.errors import Code, KnodeError
from knode.identity import PublicKey
from knode.identity.names import node_id_of
from knode.klp.codec import Decoder, encode
from knode.mesh.liveness import PeerState
from knode.mesh.membership import Membership
from knode.mesh.peers import Peers
from knode.mesh.roster import Member
from knode.world import Log, WallTime, World

TOPIC = "consensus.standing"
STEP_S = 0.25
ID_CHARACTERS = 16
"""Of the id of somebody whose name is not known any more."""
CAUGHT_UP_ENTRIES = 256
"""A learner that lacks no more has caught up; the rest comes with what follows."""


class Votes(IntEnum):
    """What part a replica has, as far as it knows itself."""

    NOT = 0
    LEARNER = 1
    VOTER = 2


class Announcement(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What a member says of its replica."""

    replica: Annotated[
        bytes, Meta(min_length=MEMBER_BYTES + RANDOM_BYTES, max_length=MEMBER_BYTES + RANDOM_BYTES)
    ]
    incarnation: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """Of its log."""
    fit: bool
    """Whether it takes part."""
    votes: Votes
    level: Annotated[int, Meta(ge=1, le=2**31)]
    """Up to which feature level it understands the ledger's commands."""


_decoder: Decoder[Announcement] = Decoder(Announcement)


class Electorate:
    """Who votes in this node's cell."""

    def __init__(
        self,
        world: World,
        membership: Membership,
        peers: Peers,
        replica: Replica,
        log: Log,
        *,
        level: int,
        on_level: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        """Put it together.

        Args:
            level: up to which feature level this node understands commands.
            on_level: called on the leader, again and again, with the level that all replicas understand.
        """
        self.leaderless_since: WallTime | None = None
        """Since when no leader is known here; None: one is, or this node has no replica."""
        self.voterless_since: WallTime | None = None
        """Since when no voter is known here, nor who leads; None: one is."""
        self._world = world
        self._membership = membership
        self._peers = peers
        self._replica = replica
        self._log = log
        self._level = level
        self._on_level = on_level
        self._heard: dict[bytes, Announcement] = {}
        """What each member announced last, by its raw id."""
        peers.on_bulletin(TOPIC, self._take)

    async def run(self) -> None:
        """Announce, and take the steps that follow while this node leads, until cancelled."""
        while True:
            if self._membership.in_cell and self._replica.standing is not None:
                self._announce()
                self._note_leader()
                self._renew_when_safe()
                await self._step()
            await trio.sleep(STEP_S)

    # What people ask.

    @property
    def configuration(self) -> Configuration | None:
        """Whose vote counts: as this replica knows, or else as those who vote and learn say themselves."""
        raft = self._replica.raft
        if raft is not None and self._replica.is_named:
            return raft.configuration
        said = [a for a in self._announcements().values() if a.incarnation == self._incarnation]
        voters = sorted(a.replica for a in said if a.votes is Votes.VOTER)
        learners = sorted(a.replica for a in said if a.votes is Votes.LEARNER)
        return Configuration(tuple(voters), (), tuple(learners)) if voters else None

    def votes(self, member: Member) -> Votes:
        """Return what part this member's replica has, as far as is known here."""
        configuration = self.configuration or Configuration()
        if any(member_of(r) == member.id.raw and may_vote(configuration, r) for r in everyone(configuration)):
            return Votes.VOTER
        learns = any(member_of(replica) == member.id.raw for replica in configuration.learners)
        return Votes.LEARNER if learns else Votes.NOT

    def missing(self, *, but: Collection[Member] = ()) -> list[str] | None:
        """Return the names of the voters that are not here, or among `but`; None: the rest is a majority."""
        configuration = self.configuration
        if configuration is None:
            return None
        gone = {member.id.raw for member in but}
        living = {r for r in living_replicas(self._candidates()) if member_of(r) not in gone}
        halves = [half for half in (configuration.voters, configuration.outgoing) if half]
        if all(has_majority(half, living) for half in halves):
            return None
        return self._missing_voters(configuration, living)

    def unfit(self) -> list[Member]:
        """Return the other members whose replica, in the configuration, takes no part or is replaced."""
        configuration, said = self.configuration or Configuration(), self._heard
        named = {member_of(replica) for replica in everyone(configuration)}
        return [
            m
            for m in self._membership.roster.members.values()
            if m.id.raw in named
            and m.id.raw in said
            and (not said[m.id.raw].fit or not gets_log(configuration, said[m.id.raw].replica))
        ]

    def check_revocation(self, member: Member) -> None:
        """Check that the cell can go on when this member is revoked.

        Raises:
            KnodeError: UNAVAILABLE, with the way out.
        """
        configuration, living = self.configuration, living_replicas(self._candidates())
        if configuration is None or keeps_quorum(configuration, member.id.raw, living):
            return
        away = ", ".join(n for n in self._missing_voters(configuration, living) if n != member.name)
        raise KnodeError(
            Code.UNAVAILABLE,
            f"without {member.name} the voters that are here are no majority"
            + (f" ({away} is away)" if away else "")
            + ", so the cell could do no task any more",
            (f"revoke first who never comes back ({away}); or " if away else "")
            + "begin the ledger anew on the member that stays: 'knode member recover --lost-majority "
            f"--revoke {member.name}'",
        )

    def _missing_voters(self, configuration: Configuration, living: set[ReplicaId]) -> list[str]:
        gone = {member_of(v) for v in (*configuration.voters, *configuration.outgoing) if v not in living}
        roster = self._membership.roster
        here = [m.name for m in roster.members.values() if m.id.raw in gone]
        return here + sorted(
            roster.revoked[raw] or node_id_of(raw)[:ID_CHARACTERS] for raw in gone & set(roster.revoked)
        )

    # What members say.

    @property
    def _incarnation(self) -> bytes:
        return self._membership.roster.incarnations.present.hash

    def _take(self, key: PublicKey, body: bytes) -> None:
        announcement = _decoder.decode(body)
        member = self._membership.roster.holders.get(key.raw)
        if member is None or member_of(announcement.replica) != member.id.raw:
            raise KnodeError(Code.NOT_ALLOWED, "a member speaks for another one's replica")
        self._heard[member.id.raw] = announcement

    def _own(self) -> Announcement:
        standing, raft = self._replica.standing, self._replica.raft
        assert standing is not None
        replica, votes = standing.replica_id, Votes.NOT
        if raft is not None and self._replica.is_named:
            votes = Votes.VOTER if may_vote(raft.configuration, replica) else Votes.LEARNER
        fit = raft is not None and standing.unfit is None
        return Announcement(replica, standing.incarnation.hash, fit, votes, self._level)

    def _announce(self) -> None:
        self._peers.announce(TOPIC, encode(self._own()))

    def _announcements(self) -> dict[bytes, Announcement]:
        """Return, by raw id, what each member says of its replica, this one too."""
        standing = self._replica.standing
        if standing is None:
            return self._heard
        return self._heard | {member_of(standing.replica_id): self._own()}

    def _candidates(self) -> list[Candidate]:
        roster, said = self._membership.roster, self._announcements()
        return [
            self._candidate(member, said.get(member.id.raw))
            for member in roster.members.values()
            if member.role in VOTING_ROLES
        ]

    def _candidate(self, member: Member, said: Announcement | None) -> Candidate:
        own = member.key == self._membership.key.public
        alive = own or self._peers.peer(member.key).state is PeerState.ALIVE
        if said is None or said.incarnation != self._incarnation:
            return Candidate(member.id.raw, member.joined, None, False, alive, 0)
        return Candidate(member.id.raw, member.joined, said.replica, said.fit, alive, said.level)

    # What follows.

    def _note_leader(self) -> None:
        if self._replica.leader() is not None or self.configuration is not None:
            self.voterless_since = None
        elif self.voterless_since is None:
            self.voterless_since = self._world.clock.wall()
        if self._replica.leader() is not None or not self._replica.is_named:
            self.leaderless_since = None
        elif self.leaderless_since is None:
            self.leaderless_since = self._world.clock.wall()

    def _renew_when_safe(self) -> None:
        """Let this node's replica begin anew, if it must, once somebody else surely has the ledger."""
        if not self._replica.must_be_renewed:
            return
        if any(self._surely_votes(member) for member in self._membership.roster.members.values()):
            self._replica.renew()

    def _surely_votes(self, member: Member) -> bool:
        """Tell whether this other member is here, and votes in the incarnation in force."""
        said = self._heard.get(member.id.raw)
        return (
            said is not None
            and said.fit
            and said.votes is Votes.VOTER
            and said.incarnation == self._incarnation
            and member.role in VOTING_ROLES
            and self._peers.peer(member.key).state is PeerState.ALIVE
        )

    async def _step(self) -> None:
        raft, standing = self._replica.raft, self._replica.standing
        if raft is None or standing is None or not self._replica.is_leader:
            return
        candidates, present = self._candidates(), raft.configuration
        target = next_configuration(present, standing.replica_id, candidates, _caught_up(raft))
        try:
            if target is not None:
                self._go_to(raft, standing.replica_id, target, living_replicas(candidates))
            elif self._on_level is not None and not present.outgoing:
                await self._on_level(common_level(present, candidates))
        except KnodeError as error:  # another leads by now, or a change is under way: it follows later
            self._log.debug("the voters stay for now", why=str(error))

    def _go_to(self, raft: Raft, own: ReplicaId, target: Configuration, living: set[ReplicaId]) -> None:
        heirs = [v for v in target.voters if v in raft.configuration.voters and v in living]
        if own not in target.voters and heirs:
            # Whoever leads then takes the step: no election has to wait for a timeout.
            self._replica.transfer(max(heirs, key=lambda heir: (raft.progress[heir].match, heir)))
            return
        self._replica.change(target)
        self._log.info(
            "who votes is being changed",
            voters=[replica.hex() for replica in target.voters],
            learners=[replica.hex() for replica in target.learners],
        )


def _caught_up(raft: Raft) -> set[ReplicaId]:
    return {
        replica
        for replica, status in raft.progress.items()
        if status.active and status.match > 0 and status.match + CAUGHT_UP_ENTRIES >= raft.last_index
    }
