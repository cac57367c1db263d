"""When a cell has lost the majority of its voters for good: going on from what one of them has.

It is run on the survivor, by whoever owns the cell. What others had and the survivor has not is lost, so what
is known of that is said before, and whoever else is here is asked whether it has more.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

import trio
from msgspec import Meta, Struct

from knode.consensus.electorate import Electorate
from knode.consensus.envelope import Asked
from knode.consensus.raft import Raft
from knode.consensus.replica import Replica
from knode.consensus.voters import VOTING_ROLES
from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.klp.codec import Decoder
from knode.mesh.incarnations import Incarnation, Verdict
from knode.mesh.liveness import PeerState
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peer import Peer
from knode.mesh.peers import Peers
from knode.mesh.roster import Member
from knode.world import Log, Monotonic, WallTime, World

METHOD = "consensus.log"
ANSWER_S = 3.0

Position = Annotated[int, Meta(ge=0, le=2**62)]


class LogEnd(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, order=True):
    """Where a replica's log ends. A greater one has all that was ever acknowledged in a smaller one (Raft
    paper, section 5.4.1: the later term, then the longer log)."""

    term: Position
    index: Position


_decoder: Decoder[LogEnd] = Decoder(LogEnd)


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known, before anything is done."""

    end: LogEnd
    """Where the log of this node ends."""
    committed: int
    """Up to where it knows that its entries are safe."""
    missing: tuple[str, ...]
    """Names of the voters that are not here."""
    leaderless_since: WallTime | None
    """Since when nobody leads, as far as this node knows."""
    more: tuple[tuple[Member, LogEnd], ...]
    """Others that are here and have more."""
    founds: bool = False
    """Whether nobody who is here knows of any ledger, so that the cell's first one is to begin; then
    `missing` are all who could have one and do not say what they have."""


class Recovery:
    """Recovers the cell on this node."""

    def __init__(
        self,
        world: World,
        membership: Membership,
        peers: Peers,
        methods: Methods,
        replica: Replica,
        electorate: Electorate,
        log: Log,
    ) -> None:
        self._world = world
        self._membership = membership
        self._peers = peers
        self._replica = replica
        self._electorate = electorate
        self._log = log
        methods.add(METHOD, Asked, self._answer)

    async def survey(self, lost: Collection[Member] = ()) -> Survey:
        """Say what is known, asking everybody who is here; three seconds at most.

        Args:
            lost: members that are to be revoked in the same step: whether they are here does not matter.

        Raises:
            KnodeError: UNAVAILABLE when this node has no log to go on with, though some member has;
                NOT_ALLOWED while the voters that are here, without `lost`, are a majority.
        """
        standing, raft = self._replica.standing, self._replica.raft
        founds = raft is not None and self._would_found(raft)
        if standing is None or raft is None or not (self._replica.is_named or founds):
            raise KnodeError(
                Code.UNAVAILABLE,
                "this node has no copy of the ledger to go on with",
                "run it on a voter or learner: 'knode member list' shows them",
            )
        verdict = self._membership.roster.incarnations.judge(standing.incarnation, standing.replica_id)
        if verdict is not Verdict.IN_FORCE:
            raise KnodeError(
                Code.UNAVAILABLE,
                f"this node's ledger is {verdict}",
                "'knode status' says what to do about it",
            )
        missing = [] if founds else self._electorate.missing(but=lost)
        if missing is None:
            raise KnodeError(
                Code.NOT_ALLOWED,
                "most voters are here, so the cell can decide as it is: there is nothing to recover",
                "'knode status' shows them; whoever is to go: 'knode member revoke NODE'",
            )
        end = LogEnd(raft.last_term, raft.last_index)
        others = await self._ask_others(but=lost)
        if founds:
            missing = self._silent(said=[member for member, _ in others], but=lost)
        return Survey(
            end,
            raft.committed,
            tuple(missing),
            self._electorate.leaderless_since,
            tuple((member, other) for member, other in others if other > end),
            founds,
        )

    async def begin(
        self,
        *,
        recovery: KeyPair | None = None,
        lost: Collection[Member] = (),
        though_others_have_more: bool = False,
    ) -> Incarnation:
        """Go on as the only voter, with the log as it is here; all others begin with nothing.

        Stopped in between, this node goes on at its next start as if it had not been.

        Raises:
            KnodeError: as `survey`, `Membership.check_last_word` and `Membership.begin_incarnation`;
                NOT_ALLOWED when somebody who is here has more. Then nothing has changed.
        """
        survey = await self.survey(lost)
        if survey.more and (survey.founds or not though_others_have_more):
            member, end = max(survey.more, key=lambda each: each[1])
            raise KnodeError(
                Code.NOT_ALLOWED,
                f"{member.name} is here and has more of the ledger (up to {end.index}, this node up to "
                f"{survey.end.index})",
                f"run it on {member.name}"
                + ("" if survey.founds else "; with --force what only that one has is lost"),
            )
        self._membership.check_last_word(recovery)
        async with self._replica.suspended() as (term, index):
            standing = self._replica.standing
            assert standing is not None
            begun = await self._membership.begin_incarnation(
                standing.replica_id, index, term, recovery=recovery, lost=lost
            )
        self._log.warning("the cell's ledger begins anew here", incarnation=begun.number, index=index)
        return begun

    def _would_found(self, raft: Raft) -> bool:
        """Tell whether there is no ledger, as far as is known here. So it is in a cell of before there were
        any, when its founder, who begins the first one unasked, had gone before.

        That nobody who is here has one does not mean that nobody has: a member that was away would bring a
        second one. So no rule can choose who founds it, and somebody must say so.
        """
        if self._replica.is_named or raft.last_index > 0 or self._electorate.configuration is not None:
            return False
        return self._membership.own.role in VOTING_ROLES

    def _silent(self, *, said: Collection[Member], but: Collection[Member]) -> list[str]:
        """Return who could have a ledger and did not say that it has none: away, or here with a full disk."""
        roster, own = self._membership.roster, self._membership.own
        return [
            member.name
            for member in roster.members.values()
            if member not in (own, *said, *but) and member.role in VOTING_ROLES
        ]

    async def _ask_others(self, *, but: Collection[Member]) -> list[tuple[Member, LogEnd]]:
        roster, ends = self._membership.roster, list[tuple[Member, LogEnd]]()
        deadline = Monotonic(self._world.clock.monotonic() + ANSWER_S)

        async def ask(peer: Peer, member: Member) -> None:
            assert self._replica.standing is not None
            asked = Asked(self._replica.standing.incarnation.hash)
            try:
                answer = await peer.request(METHOD, asked, deadline=deadline)
                ends.append((member, _decoder.decode(answer)))
            except KnodeError as error:
                self._log.info("a member does not say what it has", peer=peer.node_id, why=str(error))

        async with trio.open_nursery() as nursery:
            for peer in self._peers.members():
                member = roster.members[peer.key.raw]
                if peer.state is PeerState.ALIVE and member not in but:
                    nursery.start_soon(ask, peer, member)
        return sorted(ends, key=lambda each: each[0].name)

    async def _answer(self, call: Call, asked: Asked) -> LogEnd:
        standing, raft = self._replica.standing, self._replica.raft
        if standing is None or raft is None or standing.incarnation.hash != asked.incarnation:
            raise KnodeError(Code.UNAVAILABLE, "this node has nothing of that ledger")
        return LogEnd(raft.last_term, raft.last_index)
