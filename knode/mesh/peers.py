"""A link to every member: listening, dialling, handshakes, and what each message is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

import trio

from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.frames import refusal
from knode.klp.handshake import Established, Initiator, Introduction, Responder
from knode.klp.messages import Acknowledge, Cancel, Context, Event, Failure, Load, Message, Request, Response
from knode.mesh.conversation import Conversation
from knode.mesh.membership import Membership
from knode.mesh.methods import Methods
from knode.mesh.peer import Peer
from knode.mesh.serving import PROGRESS_TOPIC, Serving
from knode.transport import Carrier, Link, LinkClosed, Listener
from knode.world import Log, World

HANDSHAKE_S = 10.0
HANDSHAKES_AT_ONCE = 64
CONVERSATIONS_AT_ONCE = 512
CONVERSATIONS_A_PEER = 4
BACKOFF_FIRST_S = 0.2
BACKOFF_LONGEST_S = 15.0
HEAD_START_S = 0.3

EventHandler = Callable[[PublicKey, bytes], None]


class Peers:
    """Everyone whom this node talks to."""

    def __init__(
        self,
        world: World,
        key: KeyPair,
        membership: Membership,
        methods: Methods,
        carriers: Mapping[str, Carrier],
        log: Log,
        *,
        keepalive_s: float,
        dead_after_s: float,
        load: Callable[[], Load],
    ) -> None:
        self.boot = world.randomness.token(16)
        self.refusals: Counter[str] = Counter()
        """How many handshakes each error refused, since the start."""
        self.on_conversation: list[Callable[[Peer, Conversation], None]] = []
        """Called when a conversation with a member was opened."""
        self._world = world
        self._key = key
        self._membership = membership
        self._carriers = carriers
        self._log = log
        self._keepalive_s = keepalive_s
        self._dead_after_s = dead_after_s
        self._load = load
        self._serving = Serving(self.boot, membership, methods, world.clock, log)
        self._peers: dict[bytes, Peer] = {}
        self._event_handlers: dict[str, EventHandler] = {}
        self._announcements: dict[str, bytes] = {}
        self._dialling: dict[bytes, trio.Event] = {}
        """For each member that is being kept: set to dial at once."""
        self._handshakes = 0
        self._nursery: trio.Nursery | None = None
        membership.changed.append(lambda _: self._follow_roster())

    def peer(self, key: PublicKey) -> Peer:
        """Return the peer with this key."""
        peer = self._peers.get(key.raw)
        if peer is None:
            peer = self._peers[key.raw] = Peer(self._key.public, key, self._world.clock, self._dead_after_s)
        return peer

    def members(self) -> list[Peer]:
        """Return a peer for every other member, in the order of their names."""
        if not self._membership.in_cell:
            return []
        members = self._membership.roster.members.values()
        return [self.peer(member.key) for member in members if member.key != self._key.public]

    def on_event(self, topic: str, handler: EventHandler) -> None:
        """Call `handler(peer, body)` for events of `topic`: quickly; a KnodeError of it ends the session."""
        self._event_handlers[topic] = handler

    def announce(self, topic: str, body: bytes) -> None:
        """Tell every member `body` now, and those who come later when they come. The latest counts."""
        if self._announcements.get(topic) != body:
            self._announcements[topic] = body
            self.broadcast(topic, body)

    def broadcast(self, topic: str, body: bytes, *, but: PublicKey | None = None) -> None:
        """Send an event to every member that is here now."""
        for peer in self.members():
            if peer.key != but:
                peer.send_event(topic, body, Context())

    def dial_now(self, key: PublicKey) -> None:
        """Dial this member without waiting any longer: an address of it was learned."""
        if key.raw in self._dialling:
            self._dialling[key.raw].set()

    async def listen(self, host: str, port: int) -> list[Listener]:
        """Bind every carrier.

        Raises:
            KnodeError: PORT_IN_USE or INVALID_ARGUMENT.
        """
        return [await carrier.listen(host, port) for carrier in self._carriers.values()]

    async def run(
        self, listeners: list[Listener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept, dial and answer until cancelled. `leave` says good-bye first."""
        try:
            async with trio.open_nursery() as self._nursery:
                await self._nursery.start(self._serving.run)
                for listener in listeners:
                    self._nursery.start_soon(listener.serve, self._accept)
                self._follow_roster()
                task_status.started()
        finally:
            self._nursery = None

    async def leave(self) -> None:
        """Say good-bye to everybody, waiting a second at most."""
        async with trio.open_nursery() as nursery:
            for peer in self._peers.values():
                for conversation in peer.conversations:
                    nursery.start_soon(conversation.say_good_bye, Code.UNAVAILABLE, "the node goes down")

    async def open_with_ticket(
        self, address: str, inviter: PublicKey, cell_id: bytes, ticket: KeyPair
    ) -> Conversation:
        """Dial an inviter and prove the ticket; the conversation lasts until it is closed.

        Raises:
            KnodeError: UNAVAILABLE, or what the inviter refused it with.
        """
        introduction = Introduction(cell_id, self.boot, bytes(32))
        link = await self._dial(address)
        established = await self._shake_hands(link, self._initiate(link, introduction, inviter, ticket))
        return self._converse(link, established)

    # Handshakes.

    async def _dial(self, address: str) -> Link:
        for carrier in self._carriers.values():
            return await carrier.dial(address)
        raise KnodeError(Code.UNAVAILABLE, "this node has no carrier")

    async def _initiate(
        self, link: Link, introduction: Introduction, peer: PublicKey, ticket: KeyPair | None
    ) -> Established:
        initiator = Initiator(
            self._key,
            introduction,
            expected_peer=peer,
            channel_binding=link.channel_binding,
            nonce=self._world.randomness.token(32),
            ticket=ticket,
        )
        await link.send_frame(initiator.hello())
        proof, established = initiator.receive(await link.receive_frame())
        await link.send_frame(proof)
        return established

    async def _respond(self, link: Link) -> Established:
        responder = Responder(
            self._key,
            self._introduction(),
            admit=self._membership.admit,
            channel_binding=link.channel_binding,
            nonce=self._world.randomness.token(32),
        )
        await link.send_frame(responder.receive_hello(await link.receive_frame()))
        return responder.receive_auth(await link.receive_frame())

    async def _shake_hands(self, link: Link, handshake: Awaitable[Established]) -> Established:
        """Await a handshake for ten seconds at most; a link whose handshake failed is told why and closed.

        Raises:
            KnodeError: what this end or the other refuses; UNAVAILABLE when the link was lost.
        """
        try:
            with trio.fail_after(HANDSHAKE_S):
                return await handshake
        except KnodeError as error:
            self.refusals[error.code] += 1
            self._log.warning(
                "handshake refused", code=error.code, why=str(error), address=link.remote_address
            )
            await _close_saying(link, error)
            raise
        except (LinkClosed, trio.TooSlowError) as error:
            await link.aclose()
            why = f"the handshake with {link.remote_address} was cut off"
            raise KnodeError(Code.UNAVAILABLE, why, "try again") from error
        except BaseException:
            await link.aclose()
            raise

    def _introduction(self) -> Introduction:
        roster = self._membership.roster
        return Introduction(roster.cell_id, self.boot, roster.digest)

    async def _accept(self, link: Link) -> None:
        carried = sum(len(peer.conversations) for peer in self._peers.values())
        if self._handshakes >= HANDSHAKES_AT_ONCE or carried >= CONVERSATIONS_AT_ONCE:
            self.refusals[Code.RATE_LIMITED] += 1
            return
        self._handshakes += 1
        try:
            established = await self._shake_hands(link, self._respond(link))
        except KnodeError as error:
            self._log.debug("link dropped", address=link.remote_address, why=error.message)
            return
        finally:
            self._handshakes -= 1
        conversation = self._converse(link, established)
        await conversation.ended.wait()

    # Keeping links.

    def _follow_roster(self) -> None:
        """Close what a revocation ended, and keep a link to whoever is new."""
        if self._nursery is None or not self._membership.in_cell:
            return
        roster = self._membership.roster
        for raw_key in roster.revoked:
            if raw_key in self._peers:
                for conversation in self._peers[raw_key].conversations:
                    conversation.close("revoked")
        if self._key.public.raw in roster.members:
            for peer in self.members():
                if peer.key.raw not in self._dialling:
                    self._dialling[peer.key.raw] = trio.Event()
                    self._nursery.start_soon(self._keep, peer)

    async def _keep(self, peer: Peer) -> None:
        """Keep a conversation with a member open for as long as it is one."""
        backoff_s = BACKOFF_FIRST_S
        if self._key.public.raw > peer.key.raw:
            await trio.sleep(HEAD_START_S)  # so that both seldom dial at once
        try:
            while peer.key.raw in self._membership.roster.members:
                if peer.conversation is not None:
                    backoff_s = BACKOFF_FIRST_S
                    await peer.changed.wait()
                    continue
                now = self._dialling[peer.key.raw] = trio.Event()
                await self._try_addresses(peer)
                if peer.conversation is None:
                    with trio.move_on_after(backoff_s * self._world.randomness.uniform(0.5, 1.5)):
                        await now.wait()
                    backoff_s = min(BACKOFF_LONGEST_S, backoff_s * 2)
        finally:
            del self._dialling[peer.key.raw]

    async def _try_addresses(self, peer: Peer) -> None:
        contact = self._membership.contacts.get(peer.key.raw)
        for address in contact.body.addresses if contact is not None else ():
            if peer.conversation is not None:
                return
            try:
                link = await self._dial(address)
                initiated = self._initiate(link, self._introduction(), peer.key, None)
                established = await self._shake_hands(link, initiated)
            except KnodeError as error:
                self._log.debug("dial failed", peer=peer.node_id, address=address, why=error.message)
            else:
                self._converse(link, established)
                return

    # Conversations.

    def _converse(self, link: Link, established: Established) -> Conversation:
        """Start the tasks of an established session; its peer uses it from now on."""
        assert self._nursery is not None
        peer = self.peer(established.peer)
        conversation = Conversation(
            link,
            self._key,
            established,
            clock=self._world.clock,
            log=self._log,
            keepalive_s=self._keepalive_s,
            dead_after_s=self._dead_after_s,
            admit=self._admit_again,
            deliver=lambda conversation, message: self._deliver(peer, conversation, message),
            load=self._load,
        )
        peer.attach(conversation)
        for surplus in peer.conversations[:-CONVERSATIONS_A_PEER]:
            surplus.close("too many links to one peer")
        self._nursery.start_soon(self._carry, peer, conversation)
        if not established.ticket:
            self._log.info(
                "peer connected", peer=peer.node_id, link=link.carrier, address=link.remote_address
            )
            for topic, body in self._announcements.items():
                conversation.send(Event(topic, Context(), body))
            for tell in self.on_conversation:
                tell(peer, conversation)
        return conversation

    async def _carry(self, peer: Peer, conversation: Conversation) -> None:
        try:
            await conversation.run()
        finally:
            peer.detach(conversation)
            if not conversation.established.ticket:
                self._log.info("peer disconnected", peer=peer.node_id, why=conversation.end_reason)

    def _admit_again(self, established: Established) -> None:
        """Check membership before each frame; whoever holds a ticket of ours, or the inviter, may finish."""
        if not established.ticket:
            self._membership.admit(established)

    def _deliver(self, peer: Peer, conversation: Conversation, message: Message) -> None:
        match message:
            case Request():
                self._serving.take(peer, conversation, message)
            case Response() | Failure():
                peer.take_answer(message)
                conversation.session.acknowledge(message.counter)
            case Acknowledge(counters=counters):
                self._serving.acknowledge(peer, conversation, counters)
            case Cancel(counter=counter):
                self._serving.cancel(peer, conversation, counter)
            case Event(topic=topic, context=context, body=body) if topic == PROGRESS_TOPIC:
                peer.take_progress(int.from_bytes(context.correlation, "big"), body)
            case Event(topic=topic, body=body) if (
                topic in self._event_handlers and not conversation.established.ticket
            ):
                peer.announced[topic] = body
                self._event_handlers[topic](peer.key, body)
            case _:
                self._log.debug("a message that nobody takes", peer=peer.node_id, kind=type(message).__name__)


async def _close_saying(link: Link, error: KnodeError) -> None:
    try:
        with trio.move_on_after(1):
            await link.send_frame(refusal(error))
    except LinkClosed:
        pass  # it was the other end that refused
    finally:
        await link.aclose()
