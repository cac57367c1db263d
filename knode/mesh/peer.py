"""One other node, whatever link reaches it: which conversation is used, and the requests that wait.

A request belongs to the peer, not to the link. When a link dies it is asked again over the next one,
and the other node's memory of answers (`knode.klp.answers`) keeps it from being run twice. When the
other node has restarted in between, nobody can say whether the request was run, and the asker is told
so: UNKNOWN.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import trio

from knode.errors import NO_MEMBER, Code, KnodeError
from knode.identity import NodeId, PublicKey
from knode.klp.codec import encode
from knode.klp.keepalive import Load
from knode.klp.limits import MAX_BODY_BYTES, MAX_TTL_MS
from knode.klp.messages import Answer, Cancel, Context, Event, Failure, Request, Response
from knode.mesh.bulletins import Heard
from knode.mesh.conversation import Conversation
from knode.mesh.liveness import PeerState
from knode.mesh.ways import quality_of
from knode.world import Clock, Monotonic

PENDING_AT_ONCE = 1024
LOST_GRACE_S = 10.0
"""How long a request that was sent waits for a lost peer to come back before its fate is unknown."""


@dataclass(eq=False, slots=True)
class Pending:
    """A request of ours that waits for its answer."""

    on_progress: Callable[[bytes], None] | None
    request: Request | None = None
    """As it was first sent; None until then. Asked again, it is the same."""
    answer: Answer | None = None
    error: Exception | None = None
    news: trio.Event = field(default_factory=trio.Event)
    """Set when it is done, and when another conversation is used, or none."""

    @property
    def done(self) -> bool:
        """Whether it has its answer or will get none."""
        return self.answer is not None or self.error is not None

    def settle(self, answer: Answer) -> None:
        """Take the answer; a second one changes nothing."""
        if not self.done:
            self.answer = answer
            self.news.set()

    def fail(self, error: Exception) -> None:
        """End it without an answer."""
        if not self.done:
            self.error = error
            self.news.set()

    def take_error(self) -> Exception:
        """Let go of the error, to raise it: kept here, it would hold itself by the frames on its way."""
        error, self.error = self.error, None
        assert error is not None
        return error


class Peer:
    """Another node, as this one sees it."""

    def __init__(
        self, own: PublicKey, key: PublicKey, clock: Clock, dead_after_s: float, counters: Iterator[int]
    ) -> None:
        self.key = key
        self.conversation: Conversation | None = None
        """The one that new messages go over."""
        self.conversations: list[Conversation] = []
        self.refusal: KnodeError | None = None
        """Why it did not let this node in when it was dialled last; None once it does."""
        self.changed = trio.Event()
        """Set, and replaced, whenever another conversation is used, or none."""
        self.heard = Heard()
        """Which of its bulletins."""
        self._own = own
        self._clock = clock
        self._dead_after_s = dead_after_s
        self._left = False
        self._heard_at = Monotonic(float("-inf"))
        self._pending: dict[int, Pending] = {}
        self._counters = counters

    @property
    def node_id(self) -> NodeId:
        """Its PeerId."""
        return self.key.node_id

    @property
    def state(self) -> PeerState:
        """What to think of the peer now."""
        now = self._clock.monotonic()
        if self.conversation is not None:
            return self.conversation.liveness.state(now)
        if self._left:
            return PeerState.LEFT
        return PeerState.SUSPECT if now < self._heard_at + self._dead_after_s else PeerState.FAILED

    @property
    def heard_at(self) -> Monotonic:
        """When it was heard last; minus infinity when it never was."""
        heard = self.conversation.liveness.heard_at if self.conversation is not None else self._heard_at
        return Monotonic(heard)

    @property
    def shuts_out(self) -> bool:
        """Whether it does not take this node for a member, as far as is known."""
        return self.refusal is not None and self.refusal.code in NO_MEMBER

    @property
    def load(self) -> Load | None:
        """What it last said of its load; None while it is not here."""
        return self.conversation.peer_load if self.conversation is not None else None

    def attach(self, conversation: Conversation) -> None:
        """Take a conversation that was just opened."""
        self.refusal = None
        self.conversations.append(conversation)
        self._left = False
        self.choose()

    def detach(self, conversation: Conversation) -> None:
        """Let go of a conversation that has ended."""
        self.conversations.remove(conversation)
        self._heard_at = max(self._heard_at, Monotonic(conversation.liveness.heard_at))
        if not self.conversations:
            self._left = conversation.liveness.good_bye
        self.choose()

    def send_event(self, topic: str, body: bytes, context: Context) -> None:
        """Send an event, if the peer is here and takes it; events may get lost."""
        if self.conversation is not None:
            self.conversation.send_or_close(Event(topic, context, body))

    def offer_event(self, topic: str, body: bytes, context: Context) -> bool:
        """Send an event that may as well be lost: not when too much waits for the peer already.

        Returns:
            Whether it is on its way.
        """
        if self.conversation is None:
            return False
        try:
            self.conversation.send(Event(topic, context, body))
        except KnodeError:
            return False
        return True

    async def request(
        self,
        method: str,
        body: msgspec.Struct,
        *,
        deadline: Monotonic,
        context: Context | None = None,
        chunks: AsyncIterator[bytes] | None = None,
        on_progress: Callable[[bytes], None] | None = None,
    ) -> bytes:
        """Ask once, over whatever link is best, and wait for the answer.

        Args:
            method: its name in the peer's table of methods.
            body: at most 256 KiB encoded.
            deadline: monotonic; it counts as 5 minutes ahead when it lies further.
            context: trace and causation, for both logs.
            chunks: bulk data to send along; such a request is not asked again over another link.
            on_progress: called with the body of each progress event; must not raise.

        Raises:
            KnodeError: UNAVAILABLE: the peer is not here and nothing was sent, or not all `chunks`.
                UNKNOWN: it restarted or was lost, so nobody can say whether the request was run.
                TIMEOUT: it may still run. RATE_LIMITED, TOO_LARGE: nothing was sent. Else what the peer
                answered.
            Exception: what `chunks` raised.

        Cancelling leaves the link usable and tells the peer to stop.
        """
        encoded = encode(body)
        if len(encoded) > MAX_BODY_BYTES:
            raise KnodeError(Code.TOO_LARGE, f"a request carries at most {MAX_BODY_BYTES // 1024} KiB")
        if len(self._pending) >= PENDING_AT_ONCE:
            raise KnodeError(Code.RATE_LIMITED, f"{PENDING_AT_ONCE} requests wait for this node already")
        now = self._clock.monotonic()
        if deadline <= now:
            raise KnodeError(Code.TIMEOUT, "the time was over before it began; nothing was sent")
        deadline = min(deadline, Monotonic(now + MAX_TTL_MS / 1000))
        counter = next(self._counters)
        pending = self._pending[counter] = Pending(on_progress)
        try:
            with trio.move_on_at(deadline):
                conversation = self.conversation or await self._come_back()
                request = Request(
                    counter=counter,
                    destination_boot=conversation.established.peer_boot,
                    method=method,
                    ttl_ms=max(1, round((deadline - self._clock.monotonic()) * 1000)),
                    stream=0 if chunks is None else conversation.session.open_stream(),
                    context=context or Context(),
                    body=encoded,
                )
                conversation.send(request)
                pending.request = request
                if chunks is None:
                    await self._answered(pending)
                else:
                    await self._upload(conversation, pending, request.stream, chunks)
            return _result(pending)
        finally:
            del self._pending[counter]
            if pending.request is not None and pending.answer is None and self.conversation is not None:
                self.conversation.send_or_close(Cancel(counter))

    def take_answer(self, answer: Answer) -> None:
        """Hand an answer to whoever waits for it."""
        pending = self._pending.get(answer.counter)
        if pending is not None:
            pending.settle(answer)

    def take_progress(self, counter: int, body: bytes) -> None:
        """Hand a progress event to whoever waits for the request's answer."""
        pending = self._pending.get(counter)
        if pending is not None and pending.on_progress is not None:
            pending.on_progress(body)

    async def _upload(
        self, conversation: Conversation, pending: Pending, stream: int, chunks: AsyncIterator[bytes]
    ) -> None:
        """Send the data of a request, and wait for its answer: it comes over the same link or not at all."""

        async def send() -> None:
            try:
                await conversation.upload(stream, chunks)
            except KnodeError as error:
                # Stopped by the receiver: it says why in its answer.
                if error.code is not Code.CANCELLED:
                    pending.fail(error)
            except Exception as error:
                pending.fail(error)
            await conversation.ended.wait()
            pending.fail(_fate_unknown("the node was lost while it worked"))

        conversation.hold(stream)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await self._answered(pending)
                nursery.cancel_scope.cancel()
        finally:
            conversation.let_go(stream)

    def choose(self) -> None:
        """Use the best conversation, and ask again there what waits.

        The node with the smaller key alone retires the others: the two may judge a link differently, and
        must not retire each the one that the other keeps. When the one that it chose is lost, and the peer
        had lost it before and so has kept a retired one, that one serves again.
        """
        usable = [c for c in self.conversations if c.open and c.retired_at is None]
        kept_there = [c for c in self.conversations if c.open and not c.peer_retired]
        best = max(usable or kept_there, key=self._rank, default=None)
        if best is not None:
            best.retired_at = None
        for conversation in usable:
            if conversation is not best and (conversation.peer_retired or self._own.raw < self.key.raw):
                conversation.retire()
        if best is self.conversation:
            return
        self.conversation = best
        for pending in self._pending.values():
            pending.news.set()
            if best is not None:
                self._ask_again(best, pending)
        self.changed.set()
        self.changed = trio.Event()

    def _rank(self, conversation: Conversation) -> tuple[bool, bool, bool, int, bool, float]:
        """Rank by the quality of the way; of equals comes first what the smaller key opened, then the newest.

        One that has been silent for long, or was held with a former process of the peer, comes last: the
        peer would not have dialled if it still had it. So does one that the peer has retired: its own
        better link is about to arrive here.
        """
        established = conversation.established
        opener = self._own.raw if established.initiator else self.key.raw
        return (
            established.peer_boot == self.conversations[-1].established.peer_boot,
            conversation.liveness.state(self._clock.monotonic()) is PeerState.ALIVE,
            not conversation.peer_retired,
            quality_of(conversation.link),
            opener == min(self._own.raw, self.key.raw),
            conversation.opened_at,
        )

    def _ask_again(self, conversation: Conversation, pending: Pending) -> None:
        request = pending.request
        if request is None or pending.done:
            return
        if request.destination_boot != conversation.established.peer_boot:
            pending.fail(_fate_unknown("the node restarted while it worked"))
        elif not request.stream:
            conversation.send_or_close(request)

    async def _come_back(self) -> Conversation:
        """Wait for a peer that was lost a moment ago; fail at once when it is gone."""
        while self.conversation is None:
            if self.state is not PeerState.SUSPECT:
                raise KnodeError(
                    Code.UNAVAILABLE, "the node cannot be reached now", "'knode peer list' shows who is here"
                )
            with trio.move_on_at(self._heard_at + self._dead_after_s):
                await self.changed.wait()
        return self.conversation

    async def _answered(self, pending: Pending) -> None:
        """Wait for the answer; a peer that stays away too long leaves the request's fate unknown."""
        while not pending.done:
            pending.news = trio.Event()
            if self.conversation is not None:
                await pending.news.wait()
                continue
            # Who said good-bye has stopped its work and will not come back as the same boot.
            with trio.move_on_after(0 if self.state is PeerState.LEFT else LOST_GRACE_S) as grace:
                await pending.news.wait()
            if grace.cancelled_caught:
                pending.fail(_fate_unknown("the node was lost while it worked"))


def _result(pending: Pending) -> bytes:
    match pending.answer:
        case Response(body=body):
            return body
        case Failure() as failure:
            raise failure.error()
        case None if pending.error is not None:
            raise pending.take_error()
        case None if pending.request is not None:
            raise KnodeError(Code.TIMEOUT, "no answer in time; it may still have been done")
        case None:
            raise KnodeError(Code.TIMEOUT, "the time was over before the node was here; nothing was sent")


def _fate_unknown(why: str) -> KnodeError:
    return KnodeError(
        Code.UNKNOWN, f"{why}: nobody can say whether it was done", "look for its effects, then decide"
    )
