"""How members come to the same roster and know each other's addresses.

When a conversation opens, both ends have told the digest of their roster in the handshake. If they
differ, each pulls what it lacks before it answers anything else, so a revocation arrives first. Later
news is pushed to everyone who is here.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import trio

from knode.errors import Code, KnodeError
from knode.identity import PublicKey
from knode.klp.codec import Decoder, encode
from knode.klp.messages import Context
from knode.mesh.contact import SignedContact, open_contact
from knode.mesh.conversation import Conversation
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peer import Peer
from knode.mesh.peers import Peers
from knode.mesh.roster import MAX_STATEMENTS, SignedStatement, StatementId, open_statement
from knode.world import Log, Monotonic, World

PULL_S = 10.0
ANSWER_BYTES = 192 * 1024
QUEUE = 256
DISK_AGAIN_S = 5.0
"""How long news waits before a full disk is asked again."""
STATEMENTS_TOPIC = "roster.statements"
CONTACTS_TOPIC = "roster.contacts"

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
        self._log = log
        # Events are taken in order by one task.
        self._send_work, self._work = trio.open_memory_channel[tuple[PublicKey, str, bytes]](QUEUE)
        self._opened, self._openings = trio.open_memory_channel[tuple[Peer, Conversation]](QUEUE)
        methods.add("roster.pull", Pull, self._answer_pull, before_sync=True)
        for topic in (STATEMENTS_TOPIC, CONTACTS_TOPIC):
            peers.on_event(topic, lambda key, body, topic=topic: self._queue(key, topic, body))  # type: ignore[misc]
        peers.on_conversation.append(self._on_conversation)
        membership.changed.append(self._push_statements)

    async def run(self) -> None:
        """Pull, and take what is pushed, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_events)
            async for peer, conversation in self._openings:
                nursery.start_soon(self._synchronise, peer, conversation)

    def push_contacts(self, contacts: list[SignedContact], *, but: PublicKey | None = None) -> None:
        """Tell everybody who is here about new addresses."""
        if contacts:
            self._peers.broadcast(CONTACTS_TOPIC, _packed([c.data for c in contacts])[0], but=but)

    def _push_statements(self, new: list[SignedStatement]) -> None:
        for body in _packed([s.data for s in new]):
            self._peers.broadcast(STATEMENTS_TOPIC, body)

    def _on_conversation(self, peer: Peer, conversation: Conversation) -> None:
        try:
            self._opened.send_nowait((peer, conversation))
        except trio.WouldBlock:
            conversation.close("too many conversations open at once")

    def _queue(self, key: PublicKey, topic: str, body: bytes) -> None:
        try:
            self._send_work.send_nowait((key, topic, body))
        except trio.WouldBlock:
            self._log.warning("roster news dropped: too much at once", peer=key.node_id)
            # The next handshake shows that something is missing here.
            for conversation in self._peers.peer(key).conversations:
                conversation.close("it tells more news than can be kept")

    async def _synchronise(self, peer: Peer, conversation: Conversation) -> None:
        try:
            while conversation.established.peer_roster_digest != self._membership.roster.digest:
                have = Pull(tuple(sorted(self._membership.roster.statements)))
                deadline = Monotonic(self._world.clock.monotonic() + PULL_S)
                answer = await peer.request("roster.pull", have, deadline=deadline)
                pulled = _pulled.decode(answer)
                new = await self._membership.add([open_statement(data) for data in pulled.statements])
                if not pulled.more or not new:
                    break
            if conversation.established.peer_roster_digest != self._membership.roster.digest:
                # What is new here since the handshake was told to nobody who was not connected yet, and
                # the peer, which knows our digest of then, does not ask for it.
                for body in _packed([s.data for s in self._membership.roster.statements.values()]):
                    peer.send_event(STATEMENTS_TOPIC, body, Context())
            contacts = [c.data for _, c in sorted(self._membership.contacts.items())]
            for body in _packed(contacts):
                peer.send_event(CONTACTS_TOPIC, body, Context())
            conversation.synchronised.set()
        except KnodeError as error:
            self._log.warning("roster not synchronised", peer=peer.node_id, why=str(error))
            conversation.close("its roster could not be had")

    async def _answer_pull(self, call: Call, pull: Pull) -> Pulled:
        have = set(pull.have)
        lacking = [s.data for i, s in self._membership.roster.statements.items() if i not in have]
        fitting: list[bytes] = []
        size = 0
        for data in lacking:
            size += len(data) + 5
            if size > ANSWER_BYTES:
                break
            fitting.append(data)
        return Pulled(tuple(fitting), len(fitting) < len(lacking))

    async def _take_events(self) -> None:
        async for key, topic, body in self._work:
            # News is told once, so what a full disk does not take is tried until it does.
            while True:
                if await self._take(key, topic, body):
                    break
                await trio.sleep(DISK_AGAIN_S)

    async def _take(self, key: PublicKey, topic: str, body: bytes) -> bool:
        """Keep news, or refuse it for good; False when the disk takes nothing now."""
        try:
            data = _objects.decode(body).data
            if topic == STATEMENTS_TOPIC:
                await self._membership.add([open_statement(item) for item in data])
            else:
                for contact in await self._membership.add_contacts([open_contact(item) for item in data]):
                    self._peers.dial_now(PublicKey(contact.body.key))
        except KnodeError as error:
            self._log.warning("roster news not taken", peer=key.node_id, why=str(error))
            return error.code not in (Code.DISK_FULL, Code.DISK_READ_ONLY)
        return True


def _packed(data: list[bytes]) -> list[bytes]:
    """Encode signed objects as event bodies of a bounded size."""
    bodies: list[bytes] = []
    waiting: list[bytes] = []
    size = 0
    for item in data:
        if size + len(item) > ANSWER_BYTES:
            bodies.append(encode(Objects(tuple(waiting))))
            waiting, size = [], 0
        waiting.append(item)
        size += len(item) + 5
    if waiting:
        bodies.append(encode(Objects(tuple(waiting))))
    return bodies
