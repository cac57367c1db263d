"""Answering what peers ask, each request at most once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial

import trio

from knode.errors import Code, KnodeError, LocalError
from knode.klp.answers import Answered, Answers, Fresh, Refused, Running
from knode.klp.codec import encode
from knode.klp.limits import MAX_BODY_BYTES
from knode.klp.messages import Answer, Context, Event, Failure, Request, Response
from knode.mesh.conversation import Conversation, IncomingStream
from knode.mesh.member_log import MemberLog
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peer import Peer
from knode.world import Clock, Monotonic

SERVED_AT_ONCE = 256
SERVED_A_PEER = 64
EXPIRE_EVERY_S = 10.0
PROGRESS_TOPIC = "progress"

Source = tuple[bytes, bytes, int]
"""A request, wherever it was heard: source key, source boot, counter."""


@dataclass(eq=False, slots=True)
class Work:
    """A request that runs, and the conversation that asked last: there its answer goes."""

    request: Request
    conversation: Conversation
    scope: trio.CancelScope
    stream: IncomingStream | None


class Serving:
    """Runs the methods that peers ask for and keeps the answers until they are acknowledged."""

    def __init__(
        self, boot: bytes, membership: Membership, methods: Methods, clock: Clock, log: MemberLog
    ) -> None:
        self.failures: Counter[str] = Counter()
        """How many requests were answered with each error, since the start."""
        self._answers = Answers(boot)
        self._membership = membership
        self._methods = methods
        self._clock = clock
        self._log = log
        self._running: dict[Source, Work] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks that answer, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            try:
                task_status.started()
                while True:
                    await trio.sleep(EXPIRE_EVERY_S)
                    self._answers.expire(self._clock.monotonic())
            finally:
                self._nursery = None

    def take(self, peer: Peer, conversation: Conversation, request: Request) -> None:
        """Answer a request, in a task of its own unless it was answered before."""
        if self._nursery is None:
            return  # the node goes down
        source = (peer.key.raw, conversation.established.peer_boot, request.counter)
        now = self._clock.monotonic()
        match self._answers.begin(source[0], source[1], request, now):
            case Fresh() if self._has_room(peer):
                work = self._running[source] = Work(
                    request,
                    conversation,
                    trio.CancelScope(deadline=now + request.ttl_ms / 1000),
                    conversation.stream_of(request.stream) if request.stream else None,
                )
                self._nursery.start_soon(self._answer, peer, source, work)
            case Fresh():
                busy = KnodeError(Code.RATE_LIMITED, "this node answers too many already", "try again later")
                refusal = self._failure(request, busy)
                self._answers.finish(*source, refusal, now)
                self._turn_away(conversation, request, refusal)
            case Running():
                work = self._running[source]
                if work.stream is None:  # one that has a stream is bound to the link that carries it
                    work.conversation = conversation
            case Answered(message=message):
                self._turn_away(conversation, request, message)
            case Refused(code=code, reason=reason):
                self._turn_away(conversation, request, self._failure(request, KnodeError(code, reason)))

    def cancel(self, peer: Peer, conversation: Conversation, counter: int) -> None:
        """Stop a request whose answer is not wanted any more."""
        work = self._running.get((peer.key.raw, conversation.established.peer_boot, counter))
        if work is not None:
            work.scope.cancel()

    def acknowledge(self, peer: Peer, conversation: Conversation, counters: tuple[int, ...]) -> None:
        """Forget answers that have arrived."""
        self._answers.acknowledge(peer.key.raw, conversation.established.peer_boot, counters)

    def _has_room(self, peer: Peer) -> bool:
        theirs = sum(key == peer.key.raw for key, _, _ in self._running)
        return theirs < SERVED_A_PEER and len(self._running) < SERVED_AT_ONCE

    @staticmethod
    def _turn_away(conversation: Conversation, request: Request, answer: Answer) -> None:
        """Answer without running anything; what would come on the request's stream is not wanted."""
        conversation.send_or_close(answer)
        if request.stream:
            conversation.refuse_stream(request.stream)

    async def _answer(self, peer: Peer, source: Source, work: Work) -> None:
        try:
            answer = await self._outcome(peer, work)
        finally:
            del self._running[source]
            if work.stream is not None:
                work.conversation.drop_stream(work.request.stream)
        self._answers.finish(*source, answer, self._clock.monotonic())
        current = _reachable(peer, work)
        if current is not None:
            current.send_or_close(answer)

    async def _outcome(self, peer: Peer, work: Work) -> Answer:
        """Run the method until its end, its deadline or its cancellation; what it raises is its answer."""
        request = work.request
        try:
            # All errors are caught outside the scope: what fails while it is cancelled raises both at once.
            with work.scope:
                return Response(request.counter, await self._run_method(peer, work))
            if self._clock.monotonic() >= work.scope.deadline:
                raise KnodeError(Code.EXPIRED, "its time was over")
            raise KnodeError(Code.CANCELLED, "cancelled")
        except KnodeError as error:
            if isinstance(error, LocalError):
                self._log.warning(
                    "a request failed here",
                    method=request.method,
                    peer=peer.node_id,
                    code=error.code,
                    why=str(error),
                )
            return self._failure(request, error)
        except Exception:
            self._log.error("a method failed", method=request.method, peer=peer.node_id, exc_info=True)
            fault = KnodeError(Code.INTERNAL, "the node failed", "its log has the details: 'knode logs tail'")
            return self._failure(request, fault)

    def _failure(self, request: Request, error: KnodeError) -> Failure:
        self.failures[error.code] += 1
        return Failure.of(request.counter, error)

    async def _run_method(self, peer: Peer, work: Work) -> bytes:
        """Check that the caller may ask this, ask it, and return the encoded answer."""
        request, established = work.request, work.conversation.established
        if not established.ticket and not self._methods.before_sync(request.method):
            await work.conversation.until_synchronised()
        role = None if established.ticket else self._membership.roster.admit(peer.key.raw).role
        method = self._methods.admitted(request.method, role)
        body = method.decoder.decode(request.body)
        call = Call(
            peer.key,
            established.session_id,
            established.ticket,
            request.context,
            Monotonic(work.scope.deadline),
            work.stream,
            partial(_tell_progress, peer, work),
        )
        result = await method.handle(call, body)
        answer = b"" if result is None else encode(result)
        if len(answer) > MAX_BODY_BYTES:
            raise KnodeError(Code.TOO_LARGE, f"an answer carries at most {MAX_BODY_BYTES // 1024} KiB")
        return answer


def _tell_progress(peer: Peer, work: Work, body: bytes) -> None:
    current = _reachable(peer, work)
    if current is not None:
        correlation = work.request.counter.to_bytes(16, "big")
        current.send_or_close(
            Event(PROGRESS_TOPIC, Context(correlation, b"", work.request.context.trace), body)
        )


def _reachable(peer: Peer, work: Work) -> Conversation | None:
    """Return where the asker hears: the conversation that asked last, else the one in use now."""
    if work.conversation.open:
        return work.conversation
    now = peer.conversation
    same = now is not None and now.established.peer_boot == work.conversation.established.peer_boot
    return now if same else None
