"""A link to every member: listening, dialling, and what each message is for."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import trio

from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.handshake import Established
from knode.klp.keepalive import Load
from knode.klp.limits import MAX_BODY_BYTES
from knode.klp.messages import Acknowledge, Cancel, Context, Event, Failure, Message, Request, Response
from knode.mesh.bulletins import Bulletins
from knode.mesh.conversation import RETIRED_TOPIC, Conversation
from knode.mesh.dialling import Dialling
from knode.mesh.handshakes import Handshakes, close_saying
from knode.mesh.heartbeat import Heartbeat
from knode.mesh.member_log import MemberLog
from knode.mesh.membership import Membership
from knode.mesh.methods import Methods
from knode.mesh.peer import Peer
from knode.mesh.serving import PROGRESS_TOPIC, Serving
from knode.mesh.ways import Way, ways_to
from knode.transport import Carrier, Link, Listener
from knode.transport.address import is_host_and_port, split_address
from knode.world import Log, World

CONVERSATIONS_AT_ONCE = 512
PORTS_TRIED = 20
"""When any port will do, until one is free for every kind of link."""
JOINING_AT_ONCE = 16
CONVERSATIONS_A_PEER = 4
CLOSING_A_PEER = 4
JOIN_S = 30.0
"""How long a conversation with a joining node may last."""

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
        self.handshakes = Handshakes(world, key, self.boot, membership, log)
        self.on_conversation: list[Callable[[Peer, Conversation], None]] = []
        """Called when a conversation with a member was opened."""
        self.on_lost: list[Callable[[Peer], None]] = []
        """Called when the last conversation with a peer has ended."""
        self._world = world
        self._key = key
        self._membership = membership
        self._carriers = carriers
        self._log = MemberLog(world.clock, log)
        self._dead_after_s = dead_after_s
        self._heartbeat = Heartbeat(world.clock, keepalive_s, dead_after_s, load)
        self._serving = Serving(self.boot, membership, methods, world.clock, self._log)
        self._peers: dict[bytes, Peer] = {}
        self._event_handlers: dict[str, EventHandler] = {}
        self._bulletin_handlers: dict[str, EventHandler] = {}
        self._bulletins = Bulletins()
        self.dialling = Dialling(
            world,
            key.public.raw,
            membership,
            carriers,
            log,
            open_conversation=self._open,
            is_wanted=self._is_wanted,
            let_go=self._forget_stranger,
        )
        self._counters = itertools.count(1)  # of requests, whomever they ask: unique for this boot
        self._refusals: Counter[str] = Counter()
        """Of links over a limit, and of sessions that an error ended."""
        self._closing: Counter[bytes] = Counter()
        """How many links of each peer, or of each ticket, are being closed."""
        self._conversations = 0
        self._joining = 0
        self._leaving = False
        self._nursery: trio.Nursery | None = None
        membership.changed.append(lambda _: self._follow_roster())

    def peer(self, key: PublicKey) -> Peer:
        """Return the peer with this key."""
        peer = self._peers.get(key.raw)
        if peer is None:
            peer = self._peers[key.raw] = self._new_peer(key)
        return peer

    @property
    def refusals(self) -> Mapping[str, int]:
        """How many handshakes and links each error refused, and sessions it ended, since the start."""
        return self.handshakes.refusals + self._refusals

    @property
    def failures(self) -> Mapping[str, int]:
        """How many requests were answered with each error, since the start."""
        return self._serving.failures

    def members(self) -> list[Peer]:
        """Return a peer for every other member, in the order of their names."""
        if not self._membership.in_cell:
            return []
        members = self._membership.roster.members.values()
        return [self.peer(member.key) for member in members if member.key != self._key.public]

    def dismissed(self) -> list[Peer]:
        """Return those that are no members any more and whose links are about to be closed."""
        members = self._membership.roster.members
        return [peer for peer in self._peers.values() if peer.conversations and peer.key.raw not in members]

    def on_event(self, topic: str, handler: EventHandler) -> None:
        """Call `handler(peer, body)` for events of `topic`: quickly; a KnodeError of it ends the session."""
        self._event_handlers[topic] = handler

    def on_bulletin(self, topic: str, handler: EventHandler) -> None:
        """Call `handler(peer, body)` for what a member announces, as `on_event`; never the older after the
        later."""
        self._bulletin_handlers[topic] = handler

    def announce(self, topic: str, body: bytes) -> None:
        """Tell every member `body` now, and those who come later when they come. The latest counts.

        Raises:
            KnodeError: TOO_LARGE over 256 KiB.
        """
        if len(body) > MAX_BODY_BYTES:
            raise KnodeError(Code.TOO_LARGE, f"an event carries at most {MAX_BODY_BYTES // 1024} KiB")
        bulletin = self._bulletins.replace(topic, body)
        if bulletin is not None:
            for peer in self.members():
                peer.send_event(bulletin.topic, bulletin.body, bulletin.context)

    def broadcast(self, topic: str, body: bytes, *, but: PublicKey | None = None) -> None:
        """Send an event to every member that is here now."""
        for peer in self.members():
            if peer.key != but:
                peer.send_event(topic, body, Context())

    def dial_now(self, key: PublicKey) -> None:
        """Dial this member without waiting any longer: an address of it was learned."""
        self.dialling.dial_now(key.raw)

    def discovered(self, node_id: str, addresses: Sequence[str]) -> None:
        """Note where somebody claims that a node can be reached. Grants nothing: who is no member is ignored,
        and who answers there must prove the member's key."""
        for peer in self.members():
            if peer.node_id == node_id:
                self.dialling.claim(peer.key.raw, addresses)

    async def listen(self, host: str, port: int) -> list[Listener]:
        """Bind every carrier; all that dial `host:port` to one port, so that one address stands for them.

        Raises:
            KnodeError: PORT_IN_USE or INVALID_ARGUMENT. Then nothing is bound.
        """
        for _ in range(PORTS_TRIED - 1):
            try:
                return await self._listen(host, port)
            except KnodeError as error:
                if port or error.code is not Code.PORT_IN_USE:
                    raise  # else: what was free for the first was not for the next
        return await self._listen(host, port)

    async def _listen(self, host: str, port: int) -> list[Listener]:
        listeners: list[Listener] = []
        try:
            for carrier in self._carriers.values():
                listener = await carrier.listen(host, port)
                listeners.append(listener)
                if not port and is_host_and_port(listener.addresses[0]):
                    _, port = split_address(listener.addresses[0])
        except BaseException:
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()
            raise
        return listeners

    async def run(
        self, listeners: list[Listener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept, dial and answer until cancelled. `leave` says good-bye first."""
        async with trio.open_nursery() as self._nursery:
            try:
                await self._nursery.start(self._serving.run)
                self._nursery.start_soon(self._heartbeat.run)
                for listener in listeners:
                    self._nursery.start_soon(listener.serve, self._accept)
                self._follow_roster()
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def leave(self) -> None:
        """Say good-bye to everybody, waiting a second at most; from now on nobody is dialled or let in."""
        self._leaving = True
        async with trio.open_nursery() as nursery:
            for peer in self._peers.values():
                for conversation in peer.conversations:
                    nursery.start_soon(conversation.say_good_bye, Code.UNAVAILABLE, "the node goes down")

    def ways_to(self, addresses: Sequence[str]) -> list[Way]:
        """Return every way that this node can take to one of `addresses`, best first."""
        return ways_to(addresses, self._carriers)

    async def identify(self, way: Way, key: PublicKey) -> None:
        """Take a way and see that the node with `key` is at its end; nothing stays open.

        Raises:
            KnodeError: UNAVAILABLE, or why whoever is there is not that node.
        """
        await self.handshakes.identify(await self._carriers[way.carrier].dial(way.address), key)

    async def open_with_ticket(
        self, way: Way, inviter: PublicKey, cell_id: bytes, ticket: KeyPair
    ) -> tuple[Peer, Conversation]:
        """Take a way to an inviter and prove the ticket.

        Returns:
            The inviter, for this one conversation, which lasts until it is closed.

        Raises:
            KnodeError: UNAVAILABLE, or what the inviter refused it with.
        """
        link = await self._carriers[way.carrier].dial(way.address)
        established = await self.handshakes.with_ticket(link, inviter, cell_id, ticket)
        try:
            return self._converse(link, established)
        except KnodeError:
            await link.aclose()
            raise

    def _new_peer(self, key: PublicKey) -> Peer:
        return Peer(self._key.public, key, self._world.clock, self._dead_after_s, self._counters)

    async def _accept(self, link: Link) -> None:
        if self._leaving:
            return
        if self._conversations >= CONVERSATIONS_AT_ONCE:
            busy = f"this node has {CONVERSATIONS_AT_ONCE} links already"
            await self._turn_away(link, KnodeError(Code.RATE_LIMITED, busy, "try again later"))
            return
        try:
            established = await self.handshakes.answer(link)
        except KnodeError:
            return  # logged and counted there
        if established.ticket:
            await self._accept_joining(link, established)
        else:
            _, conversation = self._converse(link, established)
            await conversation.ended.wait()

    async def _accept_joining(self, link: Link, established: Established) -> None:
        """Serve whoever holds a ticket, for as long as joining takes; one ticket may be shown by many."""
        if self._joining >= JOINING_AT_ONCE:
            busy = KnodeError(Code.RATE_LIMITED, "too many nodes are joining here", "try again in a minute")
            await self._turn_away(link, busy)
            return
        self._joining += 1
        try:
            _, conversation = self._converse(link, established)
            with trio.move_on_after(JOIN_S):
                await conversation.ended.wait()
            conversation.refuse(KnodeError(Code.TIMEOUT, "joining took too long", "try again"))
            await conversation.ended.wait()
        finally:
            self._joining -= 1

    async def _turn_away(self, link: Link, error: KnodeError) -> None:
        self._refusals[error.code] += 1
        await close_saying(link, error)

    def _follow_roster(self) -> None:
        """Close what a revocation ended, and keep a link to whoever is new."""
        if self._nursery is None or not self._membership.in_cell:
            return
        roster = self._membership.roster
        for raw_key, peer in self._peers.items():
            try:
                roster.admit(raw_key)
            except KnodeError as error:
                for conversation in peer.conversations:
                    self._nursery.start_soon(conversation.say_good_bye, error.code, error.message)
        for peer in self.members():
            self.dialling.follow(peer, self._nursery)

    def _is_wanted(self, peer: Peer) -> bool:
        members = self._membership.roster.members
        return peer.key.raw in members and self._key.public.raw in members and not self._leaving

    async def _open(self, peer: Peer, way: Way) -> None:
        link = await self._carriers[way.carrier].dial(way.address)
        self._converse(link, await self.handshakes.with_member(link, peer.key))

    def _converse(self, link: Link, established: Established) -> tuple[Peer, Conversation]:
        """Start the tasks of an established session; its peer uses it from now on.

        A joining node is no peer yet: it, and its inviter for it, exists for this conversation alone.

        Raises:
            KnodeError: UNAVAILABLE when this node goes down.
        """
        if self._nursery is None:
            raise KnodeError(Code.UNAVAILABLE, "this node is not running")
        peer = self._new_peer(established.peer) if established.ticket else self.peer(established.peer)
        conversation = Conversation(
            link,
            self._key,
            established,
            clock=self._world.clock,
            dead_after_s=self._dead_after_s,
            admit=self._admit_again,
            deliver=lambda conversation, message: self._deliver(peer, conversation, message),
        )
        self._conversations += 1
        peer.attach(conversation)
        for surplus in peer.conversations[:-CONVERSATIONS_A_PEER]:
            surplus.refuse(KnodeError(Code.RATE_LIMITED, "too many links to one peer"))
        self._nursery.start_soon(self._carry, peer, conversation)
        if not established.ticket:
            self._log.info(
                "peer connected", peer=peer.node_id, link=link.carrier, address=link.remote_address
            )
            self._tell_bulletins(conversation)
            for tell in self.on_conversation:
                tell(peer, conversation)
        return peer, conversation

    async def _carry(self, peer: Peer, conversation: Conversation) -> None:
        error: KnodeError | None = None
        try:
            with self._heartbeat.keeping(conversation):
                error = await conversation.run()
        finally:
            self._conversations -= 1
            if error is not None:
                self._refusals[error.code] += 1
            peer.detach(conversation)
            if not conversation.established.ticket:
                self._log.info("peer disconnected", peer=peer.node_id, why=conversation.end_reason)
                if peer.conversation is not None:
                    self._tell_bulletins(peer.conversation)  # the last may have been lost with this link
                if not peer.conversations:
                    for tell in self.on_lost:
                        tell(peer)
                self._forget_stranger(peer)
            await self._close(conversation.link, error, conversation.established.ticket or peer.key.raw)

    def _tell_bulletins(self, conversation: Conversation) -> None:
        for bulletin in self._bulletins.latest:
            conversation.send_or_close(bulletin)

    async def _close(self, link: Link, error: KnodeError | None, whose: bytes) -> None:
        """Close in order, so that what was said last arrives; at once when many of one end are."""
        with trio.CancelScope(shield=True) as scope:  # it takes three seconds at most
            if self._closing[whose] >= CLOSING_A_PEER:
                scope.cancel()
            self._closing[whose] += 1
            try:
                await close_saying(link, error)
            finally:
                self._closing -= Counter([whose])

    def _forget_stranger(self, peer: Peer) -> None:
        if not peer.conversations and peer.key.raw not in self._membership.roster.members:
            self._peers.pop(peer.key.raw, None)

    def _admit_again(self, established: Established) -> None:
        """Check membership before each frame; whoever holds a ticket of ours, or the inviter, may finish."""
        if not established.ticket:
            self._membership.admit(established)

    def _deliver(self, peer: Peer, conversation: Conversation, message: Message) -> None:
        try:
            self._take(peer, conversation, message)
        except KnodeError:
            raise
        except Exception as error:
            # A fault of ours ends this session; no peer may end the node.
            self._log.error("a message could not be taken", peer=peer.node_id, exc_info=True)
            raise KnodeError(Code.INTERNAL, "the node failed to take a message") from error

    def _take(self, peer: Peer, conversation: Conversation, message: Message) -> None:
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
            case Event(topic=topic) if topic == RETIRED_TOPIC:
                peer.choose()
            case Event(topic=topic, body=body) if (
                topic in self._event_handlers and not conversation.established.ticket
            ):
                self._event_handlers[topic](peer.key, body)
            case Event(topic=topic, body=body) if (
                topic in self._bulletin_handlers and not conversation.established.ticket
            ):
                if peer.heard.is_news(message, conversation.established.peer_boot):
                    self._bulletin_handlers[topic](peer.key, body)
            case _:
                self._log.debug("a message that nobody takes", peer=peer.node_id, kind=type(message).__name__)
