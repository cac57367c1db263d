"""How members come to the same roster and know each other's addresses.

When a conversation opens, both ends have told the digest of their roster in the handshake. If they
differ, each pulls what it lacks before it answers anything else, so a revocation arrives first. A node that
was alone first hears everybody whom it can reach: it may be the revoked one who finds it first. Later
news is pushed to everyone who is here, and passed on by whoever did not know it yet. News that cannot be
taken in ends the session that brought it, so that the next handshake repairs what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, TypeVar

import msgspec
import trio

from knode.errors import Code, KnodeError
from knode.identity import PublicKey
from knode.klp.codec import Decoder, encode
from knode.klp.messages import Context, Event
from knode.mesh.contact import SignedContact, open_contact
from knode.mesh.conversation import Conversation
from knode.mesh.member_log import MemberLog
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peer import Peer
from knode.mesh.peers import Peers
from knode.mesh.roster import MAX_STATEMENTS, Roster
from knode.mesh.statements import (
    Add,
    BeginIncarnation,
    Genesis,
    KeepIncarnation,
    Recover,
    Revoke,
    Rotate,
    SetRole,
    SignedStatement,
    StatementId,
    open_statement,
)
from knode.world import Log, Monotonic, World

PULL_S = 10.0
ANSWER_BYTES = 192 * 1024
FRAMING_BYTES = 5
QUEUE = 256
QUEUE_OF_A_PEER = 64
DISK_AGAIN_S = 5.0
"""How long news waits before a full disk is asked again."""
ALONE_S = 10.0
"""For how long a node must have had no peer to have been alone; one that starts was."""
SETTLE_S = 2.0
"""How long a node that was alone waits at most for the others' rosters before it answers anybody."""
STATEMENTS_TOPIC = "roster.statements"
CONTACTS_TOPIC = "roster.contacts"

T = TypeVar("T")
Signed = Annotated[bytes, msgspec.Meta(min_length=65, max_length=64 * 1024)]


class Pull(msgspec.Struct, frozen=True, array_like=True):
    """What the asking node has."""

    have: Annotated[tuple[StatementId, ...], msgspec.Meta(max_length=MAX_STATEMENTS)]


class Pulled(msgspec.Struct, frozen=True, array_like=True):
    """What it lacks, as much as fits; `more` says that it should ask again."""

    statements: Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_STATEMENTS)]
    more: bool


class Objects(msgspec.Struct, frozen=True, array_like=True):
    """Signed statements or contacts, pushed."""

    data: Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_STATEMENTS)]


_pulled: Decoder[Pulled] = Decoder(Pulled)
_objects: Decoder[Objects] = Decoder(Objects)


class Gossip:
    """Keeps this node's roster and contacts equal to everybody's."""

    def __init__(
        self, world: World, membership: Membership, peers: Peers, methods: Methods, log: Log
    ) -> None:
        self._world = world
        self._membership = membership
        self._peers = peers
        self._log = MemberLog(world.clock, log)
        # Events are taken in order by one task.
        self._send_work, self._work = trio.open_memory_channel[tuple[PublicKey, str, bytes]](QUEUE)
        self._waiting: Counter[bytes] = Counter()
        """How many events of each peer wait, by its raw key."""
        self._here = 0
        """How many conversations with members are open."""
        self._alone_since = Monotonic(float("-inf"))
        self._settles_until = Monotonic(float("-inf"))
        self._compared: set[bytes] = set()
        """Raw keys of those whose roster was compared with this node's since it was alone."""
        self._one_more_compared = trio.Event()
        self._opened, self._openings = trio.open_memory_channel[tuple[Peer, Conversation]](QUEUE)
        methods.add("roster.pull", Pull, self._answer_pull, before_sync=True)
        for topic in (STATEMENTS_TOPIC, CONTACTS_TOPIC):
            peers.on_event(topic, partial(self._queue, topic))
        peers.on_conversation.append(self._on_conversation)
        membership.changed.append(self._push_statements)

    async def run(self) -> None:
        """Pull, and take what is pushed, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_events)
            async for peer, conversation in self._openings:
                nursery.start_soon(self._synchronise_while_open, peer, conversation)

    def push_contacts(self, contacts: list[SignedContact], *, but: PublicKey | None = None) -> None:
        """Tell everybody who is here about new addresses."""
        for body in _packed([c.data for c in contacts]):
            self._peers.broadcast(CONTACTS_TOPIC, body, but=but)

    def _push_statements(self, new: list[SignedStatement]) -> None:
        for body in _packed([s.data for s in new]):
            self._peers.broadcast(STATEMENTS_TOPIC, body)
            # Whoever was revoked by them hears it before it is sent away, and stops its work.
            for peer in self._peers.dismissed():
                peer.send_event(STATEMENTS_TOPIC, body, Context())

    def _on_conversation(self, peer: Peer, conversation: Conversation) -> None:
        try:
            self._opened.send_nowait((peer, conversation))
        except trio.WouldBlock:
            conversation.refuse(KnodeError(Code.RATE_LIMITED, "too many links are opened here at once"))

    def _queue(self, topic: str, key: PublicKey, body: bytes) -> None:
        """Let news wait for its turn; RATE_LIMITED, which ends the session, when too much waits."""
        too_much = KnodeError(Code.RATE_LIMITED, "more news at once than this node takes")
        if self._waiting[key.raw] >= QUEUE_OF_A_PEER:
            raise too_much
        try:
            self._send_work.send_nowait((key, topic, body))
        except trio.WouldBlock:
            raise too_much from None
        self._waiting[key.raw] += 1

    async def _synchronise_while_open(self, peer: Peer, conversation: Conversation) -> None:
        """Leave the peer's later conversations to themselves: each has its own digest."""
        clock = self._world.clock
        if self._here == 0 and clock.monotonic() - self._alone_since > ALONE_S:
            self._settles_until = Monotonic(clock.monotonic() + SETTLE_S)
            self._compared.clear()
        self._here += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._synchronise, peer, conversation)
                await conversation.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._here -= 1
            self._alone_since = clock.monotonic()

    async def _synchronise(self, peer: Peer, conversation: Conversation) -> None:
        try:
            while conversation.established.peer_roster_digest != self._membership.roster.digest:
                have = Pull(tuple(sorted(self._membership.roster.statements)))
                deadline = Monotonic(self._world.clock.monotonic() + PULL_S)
                answer = await peer.request("roster.pull", have, deadline=deadline)
                pulled = _pulled.decode(answer)
                new = await self._membership.add(await _opened(open_statement, pulled.statements))
                if not pulled.more or not new:
                    break
            if conversation.established.peer_roster_digest != self._membership.roster.digest:
                # What is new here since the handshake was told to nobody who was not connected yet, and
                # the peer, which knows our digest of then, does not ask for it.
                for body in _packed([s.data for s in telling_order(self._membership.roster)]):
                    conversation.send_or_close(Event(STATEMENTS_TOPIC, Context(), body))
            contacts = [c.data for _, c in sorted(self._membership.contacts.items())]
            for body in _packed(contacts):
                conversation.send_or_close(Event(CONTACTS_TOPIC, Context(), body))
            await self._settle(peer)
            conversation.synchronised.set()
        except KnodeError as error:
            self._log.warning("roster not synchronised", peer=peer.node_id, why=str(error))
            conversation.refuse(KnodeError(error.code, f"its roster could not be had: {error.message}"))

    async def _settle(self, peer: Peer) -> None:
        """Wait until everybody who can be reached in time has told its roster."""
        self._compared.add(peer.key.raw)
        self._one_more_compared.set()
        self._one_more_compared = trio.Event()
        while any(other.key.raw not in self._compared for other in self._peers.members()):
            with trio.move_on_at(self._settles_until) as too_late:
                await self._one_more_compared.wait()
            if too_late.cancelled_caught:
                return

    async def _answer_pull(self, call: Call, pull: Pull) -> Pulled:
        have, roster = set(pull.have), self._membership.roster
        lacking = [s.data for s in telling_order(roster) if s.id not in have]
        told = fitting(lacking)
        return Pulled(tuple(told), len(told) < len(lacking))

    async def _take_events(self) -> None:
        async for key, topic, body in self._work:
            # News is told once, so what a full disk does not take is tried until it does.
            while True:
                if await self._take(key, topic, body):
                    break
                await trio.sleep(DISK_AGAIN_S)
            self._waiting -= Counter([key.raw])

    async def _take(self, key: PublicKey, topic: str, body: bytes) -> bool:
        """Keep news, or refuse it for good; False when the disk takes nothing now."""
        try:
            data = self._news(topic, _objects.decode(body).data)
            if topic == STATEMENTS_TOPIC and data:
                await self._membership.add(await _opened(open_statement, data))
            elif data:
                newer = await self._membership.add_contacts(await _opened(open_contact, data))
                self.push_contacts(newer, but=key)
                for contact in newer:
                    self._peers.dial_now(self._membership.roster.holders[contact.body.key].key)
        except KnodeError as error:
            self._log.warning("roster news not taken", peer=key.node_id, why=str(error))
            return error.code not in (Code.DISK_FULL, Code.DISK_READ_ONLY)
        return True

    def _news(self, topic: str, data: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Return what is not known byte for byte: that was verified once, and everybody passes it on."""
        objects: Iterable[SignedStatement | SignedContact] = (
            self._membership.roster.statements.values()
            if topic == STATEMENTS_TOPIC
            else self._membership.contacts.values()
        )
        known = {each.data for each in objects}
        return tuple(item for item in data if item not in known)


def telling_order(roster: Roster) -> list[SignedStatement]:
    """Return the statements such that what ends a right comes first, and each after what it rests on.

    An admin's statements count only where the owner's, and the admin's own rotations, are known, and one
    message may not hold all.
    """
    bodies = [statement.body for statement in roster.statements.values()]
    of_owner = {known.member for b in bodies if isinstance(b, Recover) for known in b.members}
    of_owner |= {b.member for b in bodies if isinstance(b, Add | SetRole) and b.signer == roster.owner.raw}

    def turn(statement: SignedStatement) -> int:
        match statement.body:
            case Genesis():
                return 0
            case Recover():
                return 1
            case Revoke():
                return 2
            case Rotate(member=member):
                return 4 if member in of_owner else 6
            case Add(signer=signer) | SetRole(signer=signer):
                return 3 if signer == roster.owner.raw else 5
            case BeginIncarnation():
                return 7
            case KeepIncarnation():
                return 8

    return sorted(roster.statements.values(), key=turn)


async def _opened(open_one: Callable[[bytes], T], data: tuple[bytes, ...]) -> list[T]:
    """Decode and verify objects, letting other tasks run in between."""
    opened: list[T] = []
    for item in data:
        opened.append(open_one(item))
        await trio.lowlevel.checkpoint()
    return opened


def fitting(data: list[bytes], *, beside_bytes: int = 0) -> list[bytes]:
    """Return as many, from the first on, as fit into one message beside so much else."""
    size = beside_bytes
    for count, item in enumerate(data):
        size += len(item) + FRAMING_BYTES
        if size > ANSWER_BYTES:
            return data[:count]
    return data


def _packed(data: list[bytes]) -> list[bytes]:
    """Encode signed objects as event bodies of a bounded size."""
    bodies: list[bytes] = []
    while data:
        first = fitting(data)
        bodies.append(encode(Objects(tuple(first))))
        data = data[len(first) :]
    return bodies
