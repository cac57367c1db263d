"""The members that run attempts, as the leader speaks to them; this node itself is one."""

from __future__ import annotations

import trio

from knode.errors import Code, KnodeError
from knode.mesh.liveness import PeerState
from knode.mesh.membership import Membership
from knode.mesh.peers import Peers
from knode.mesh.roster import Member
from knode.tasks.attempts import Attempts
from knode.tasks.messages import AssignAttempt, StopAttempt
from knode.world import Monotonic, World

ANSWER_S = 10.0
"""How long a worker's answer is waited for."""


class Workers:
    """Whoever runs attempts, by the raw ids of members."""

    def __init__(self, world: World, membership: Membership, peers: Peers, attempts: Attempts) -> None:
        self._world = world
        self._membership = membership
        self._peers = peers
        self._attempts = attempts

    def state(self, member: Member) -> PeerState:
        """Return whether a member is here; this node is."""
        if member.key == self._membership.key.public:
            return PeerState.ALIVE
        return self._peers.peer(member.key).state

    def next_change(self, member: bytes) -> trio.Event:
        """Return an event that is set when a member comes or goes; never for this node."""
        holder = self._membership.roster.holders.get(member)
        if holder is None or holder.key == self._membership.key.public:
            return trio.Event()
        return self._peers.peer(holder.key).changed

    async def send(self, member: bytes, request: AssignAttempt | StopAttempt) -> bytes:
        """Ask a worker; return which process of it has answered.

        Raises:
            KnodeError: UNAVAILABLE: it is not here. UNKNOWN, TIMEOUT: it may have taken it. Else what it
                answered.
        """
        holder = self._membership.roster.holders.get(member)
        if holder is None:
            raise KnodeError(Code.UNAVAILABLE, "it is no member any more")
        if holder.key == self._membership.key.public:
            if isinstance(request, AssignAttempt):
                await self._attempts.assign(request)
            else:
                await self._attempts.stop(request.fence)
            return self._peers.boot
        peer = self._peers.peer(holder.key)
        conversation = peer.conversation
        if conversation is None:
            raise KnodeError(Code.UNAVAILABLE, "it is not here")
        method = "task.assign" if isinstance(request, AssignAttempt) else "task.stop"
        deadline = Monotonic(self._world.clock.monotonic() + ANSWER_S)
        await peer.request(method, request, deadline=deadline)
        return conversation.established.peer_boot
