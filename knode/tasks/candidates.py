"""The members as candidates for a task, as this node sees them now."""

from __future__ import annotations

from collections.abc import Callable

from knode.klp.keepalive import Load
from knode.mesh.liveness import PeerState
from knode.mesh.membership import Membership
from knode.mesh.peers import Peers
from knode.mesh.roster import Member
from knode.tasks.offers import Offers
from knode.tasks.routing import Candidate

_NO_LOAD = Load(0, 0, 1, 0)
_FAR_S = 1.0
"""The round trip that is taken for a peer's until it was measured."""


class Candidates:
    """Who is here, what they have and how busy they are."""

    def __init__(
        self, membership: Membership, peers: Peers, offers: Offers, own_load: Callable[[], Load]
    ) -> None:
        self._membership = membership
        self._peers = peers
        self._offers = offers
        self._own_load = own_load

    def everyone(self) -> dict[bytes, Candidate]:
        """Return what is known of every member, by its raw id, in the order of their names."""
        return {member.id.raw: self.of(member) for member in self._membership.roster.members.values()}

    def of(self, member: Member) -> Candidate:
        """Return what is known of a member."""
        if member.key == self._membership.key.public:
            state, load, rtt_s = PeerState.ALIVE, self._own_load(), 0.0
        else:
            peer = self._peers.peer(member.key)
            measured = None if peer.conversation is None else peer.conversation.rtt_s
            state, load = peer.state, peer.load or _NO_LOAD
            rtt_s = _FAR_S if measured is None else measured
        return Candidate(
            node_id=member.node_id,
            name=member.name,
            role=member.role,
            state=state,
            agents=self._offers.of(member.key),
            running=load.running,
            queued=load.queued,
            capacity=load.capacity,
            rtt_s=rtt_s,
            cpu_percent=load.cpu_percent,
        )
