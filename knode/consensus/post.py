"""What one replica and those of other members say to each other, and whose word counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import trio

from knode.consensus.configuration import everyone
from knode.consensus.driver import Driver
from knode.consensus.envelope import (
    REFUSED_TOPIC,
    TOPIC,
    Envelope,
    Offer,
    Refused,
    envelopes,
    refusals,
)
from knode.consensus.inbox import Inbox, share_of
from knode.consensus.messages import InstallSnapshot, Message, ReplicaId
from knode.consensus.standing import Standing
from knode.consensus.transfer import Transfers
from knode.consensus.voters import VOTING_ROLES, member_of
from knode.errors import Code, KnodeError
from knode.identity import PublicKey
from knode.klp.codec import encode
from knode.klp.messages import Context
from knode.mesh.member_log import MemberLog
from knode.mesh.membership import Membership
from knode.mesh.methods import Call
from knode.mesh.peer import Peer
from knode.mesh.peers import Peers
from knode.world import Log, World

UNRECORDED = 64
UNRECORDED_BYTES = 1024 * 1024
"""Messages of one replica that wait until it is recorded what their senders have shown."""
TOLD_AGAIN_S = 1.0


class Post:
    """Takes messages to and from one replica, for as long as it takes part.

    A message counts when it is from a member that may vote and owns the replica that speaks, of the
    incarnation in force, for this replica, and of no old copy of its sender's home.
    """

    def __init__(
        self,
        world: World,
        membership: Membership,
        peers: Peers,
        standing: Standing,
        driver: Driver,
        files: Path,
        log: Log,
        dropped: Counter[str],
    ) -> None:
        self._world = world
        self._membership = membership
        self._peers = peers
        self._standing = standing
        self._driver = driver
        self._log = log
        self._member_log = MemberLog(world.clock, log)
        self._dropped = dropped
        self._transfers = Transfers(world, files, driver, log, peer_of=self._peer_of, envelope=self._envelope)
        self._unrecorded: Inbox[Envelope | Refused] = Inbox(UNRECORDED, UNRECORDED_BYTES)
        self._record_work = trio.Event()
        self._tell_at: dict[bytes, float] = {}
        """By raw key: when it may be told again why it is refused."""

    async def run(self) -> None:
        """Send states, and record what senders show, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._transfers.run)
            nursery.start_soon(self._record)

    def send(self, messages: Sequence[Message]) -> None:
        """Send what can be sent; the rest is lost, which Raft bears."""
        for message in messages:
            if isinstance(message, InstallSnapshot):
                self._transfers.send(message)
                continue
            peer = self._peer_of(message.target)
            body = encode(self._envelope(message))
            if peer is None or not peer.offer_event(TOPIC, body, Context()):
                self._dropped["not sent"] += 1

    def stop_sending(self) -> None:
        """Send no more states: this replica does not lead now."""
        self._transfers.stop_sending()

    def take(self, key: PublicKey, body: bytes) -> None:
        """Take a message of a peer.

        Raises:
            KnodeError: what no honest member sends; it ends the session.
        """
        envelope = envelopes.decode(body)
        message = envelope.message
        if isinstance(message, InstallSnapshot):
            raise KnodeError(Code.BAD_FRAME, "a state comes with its bytes")
        if not self._counts(key, envelope):
            return
        match self._standing.admits(message.source, envelope.start, envelope.boot):
            case True:
                self._driver.receive(message, len(body))
            case None:
                envelope.started.check(key, envelope.proof)
                self._queue(message.source, envelope, len(body))
            case False:
                self._refuse(key, message.source)

    def take_refusal(self, key: PublicKey, body: bytes) -> None:
        """Take a peer's proof that it has seen a later start of this home than this one.

        Raises:
            KnodeError: BAD_SIGNATURE: it is none; it ends the session.
        """
        refused = refusals.decode(body)
        if refused.replica == self._standing.replica_id and refused.start >= self._standing.start:
            refused.started.check(self._membership.key.public, refused.proof)
            self._queue(refused.replica, refused, len(body))

    async def take_state(self, call: Call, offer: Offer) -> None:
        """Take a whole state that comes on a request's stream; see `Transfers.receive`.

        Raises:
            KnodeError: NOT_ALLOWED when it does not count; INVALID_ARGUMENT, BAD_SIGNATURE; or as
                `Transfers.receive`.
        """
        envelope = offer.envelope
        message = envelope.message
        if call.stream is None or not isinstance(message, InstallSnapshot):
            raise KnodeError(Code.INVALID_ARGUMENT, "a state comes on a stream, with its snapshot")
        if not self._counts(call.caller, envelope):
            raise not_taken()
        envelope.started.check(call.caller, envelope.proof)
        if not await self._standing.note(message.source, envelope.start, envelope.boot, envelope.proof):
            raise not_taken()
        await self._transfers.receive(offer, message, aiter(call.stream))

    def lose(self, peer: Peer) -> None:
        """Tell the core that the last link to a member has ended."""
        for replica in everyone(self._driver.raft.configuration):
            if replica != self._standing.replica_id and self._peer_of(replica) is peer:
                self._driver.lost(replica)

    def _envelope(self, message: Message) -> Envelope:
        standing = self._standing
        return Envelope(standing.incarnation.hash, standing.start, standing.boot, standing.proof, message)

    def _peer_of(self, replica: ReplicaId) -> Peer | None:
        member = self._membership.roster.holders.get(member_of(replica))
        return self._peers.peer(member.key) if member is not None else None

    def _is_heard(self, key: PublicKey) -> bool:
        """Tell whether this member may vote, or is named still: whoever is heard could lead."""
        member = self._membership.roster.holders.get(key.raw)
        if member is None or member.role in VOTING_ROLES:
            return member is not None
        return member.id.raw in map(member_of, everyone(self._driver.raft.configuration))

    def _counts(self, key: PublicKey, envelope: Envelope) -> bool:
        """Tell whether it is from who is heard, of this incarnation, and for this replica.

        Raises:
            KnodeError: NOT_ALLOWED: it speaks for another member's replica.
        """
        member = self._membership.roster.holders.get(key.raw)
        if member is None or member.id.raw != member_of(envelope.message.source):
            raise KnodeError(Code.NOT_ALLOWED, "a member speaks for another one's replica")
        if not self._is_heard(key):
            self._dropped["no voting role"] += 1
            return False
        if envelope.incarnation != self._standing.incarnation.hash:
            self._dropped["another incarnation"] += 1
            return False
        if envelope.message.target != self._standing.replica_id:
            self._dropped["another replica"] += 1
            return False
        return True

    def _queue(self, about: ReplicaId, item: Envelope | Refused, size_bytes: int) -> None:
        if self._unrecorded.put(share_of(self._driver.raft.configuration, about), item, size_bytes):
            self._record_work.set()
        else:
            self._dropped["not recorded"] += 1

    async def _record(self) -> None:
        """Record what others have shown, or say to have been shown, in order."""
        while True:
            while self._unrecorded:
                try:
                    await self._take_recorded(self._unrecorded.take())
                except KnodeError as error:
                    self._dropped["not recorded"] += 1
                    self._log.warning("a replica's start cannot be recorded", why=str(error))
            self._record_work = trio.Event()
            await self._record_work.wait()

    async def _take_recorded(self, item: Envelope | Refused) -> None:
        """Let a message in once what its sender has shown is durable; end when this home is an old copy."""
        match item:
            case Envelope(message=message):
                if await self._standing.note(message.source, item.start, item.boot, item.proof):
                    self._driver.receive(message, len(encode(message)))
            case Refused(start=start, boot=boot):
                if await self._standing.told(start, boot):
                    self._driver.fail(unfit(self._standing.unfit or ""))

    def _refuse(self, key: PublicKey, source: ReplicaId) -> None:
        """Drop it, and tell its sender, once a second, what it is refused for."""
        self._dropped["refused"] += 1
        shown, now = self._standing.shown(source), self._world.clock.monotonic()
        if shown is None or not shown.proof or now < self._tell_at.get(key.raw, now):
            return
        self._tell_at[key.raw] = now + TOLD_AGAIN_S
        self._member_log.warning("an old copy of a replica is refused", peer=key.node_id)
        self._peers.peer(key).offer_event(REFUSED_TOPIC, encode(Refused(source, *shown)), Context())


def not_taken() -> KnodeError:
    """Return the error of whoever speaks for, or to, a replica that is not in force."""
    return KnodeError(Code.NOT_ALLOWED, "another replica or incarnation is in force here")


def unfit(why: str) -> KnodeError:
    """Return the error of a replica that neither votes nor acknowledges any more."""
    return KnodeError(
        Code.HOME_DAMAGED,
        f"this node's copy of the ledger cannot be trusted any more ({why})",
        "see 'knode status' on another member",
    )
