"""Answering what peers ask, each request at most once."""

from __future__ import annotations

import trio

from knode.errors import Code, KnodeError
from knode.klp.answers import Answered, Answers, Fresh, Refused, Running
from knode.klp.codec import encode
from knode.klp.messages import Answer, Context, Event, Failure, Request, Response
from knode.mesh.conversation import Conversation, IncomingStream
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peer import Peer
from knode.world import Clock, Log, Monotonic

SERVED_AT_ONCE = 256
EXPIRE_EVERY_S = 10.0
PROGRESS_TOPIC = "progress"

Source = tuple[bytes, bytes, int]
"""A request, wherever it was heard: source key, source boot, counter."""


class Serving:
    """Runs the methods that peers ask for and keeps the answers until they are acknowledged."""

    def __init__(self, boot: bytes, membership: Membership, methods: Methods, clock: Clock, log: Log) -> None:
        self._answers = Answers(boot)
        self._membership = membership
        self._methods = methods
        self._clock = clock
        self._log = log
        self._running: dict[Source, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks that answer, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                while True:
                    await trio.sleep(EXPIRE_EVERY_S)
                    self._answers.expire(self._clock.monotonic())
        finally:
            self._nursery = None

    def take(self, peer: Peer, conversation: Conversation, request: Request) -> None:
        """Answer a request, in a task of its own unless it was answered before."""
        boot = conversation.established.peer_boot
        if len(self._running) >= SERVED_AT_ONCE:
            busy = KnodeError(Code.RATE_LIMITED, "this node answers too many already", "try again later")
            conversation.send(Failure.of(request.counter, busy))
            return
        match self._answers.begin(peer.key.raw, boot, request, self._clock.monotonic()):
            case Fresh():
                stream = conversation.stream_of(request.stream) if request.stream else None
                assert self._nursery is not None
                self._nursery.start_soon(self._answer, peer, conversation, request, stream)
            case Running():
                pass  # its answer will come, over whatever link is there then
            case Answered(message=message):
                conversation.send(message)
            case Refused(code=code, reason=reason):
                conversation.send(Failure.of(request.counter, KnodeError(code, reason)))

    def cancel(self, peer: Peer, conversation: Conversation, counter: int) -> None:
        """Stop a request whose answer is not wanted any more."""
        scope = self._running.get((peer.key.raw, conversation.established.peer_boot, counter))
        if scope is not None:
            scope.cancel()

    def acknowledge(self, peer: Peer, conversation: Conversation, counters: tuple[int, ...]) -> None:
        """Forget answers that have arrived."""
        self._answers.acknowledge(peer.key.raw, conversation.established.peer_boot, counters)

    async def _answer(
        self, peer: Peer, conversation: Conversation, request: Request, stream: IncomingStream | None
    ) -> None:
        source = (peer.key.raw, conversation.established.peer_boot, request.counter)
        deadline = Monotonic(self._clock.monotonic() + request.ttl_ms / 1000)
        scope = self._running[source] = trio.CancelScope(deadline=deadline)
        answer: Answer | None = None
        try:
            with scope:
                answer = await self._run_method(peer, conversation, request, deadline, stream)
        finally:
            del self._running[source]
            if stream is not None:
                conversation.drop_stream(request.stream)
        if answer is None:
            over = self._clock.monotonic() >= deadline
            error = (
                KnodeError(Code.EXPIRED, "its time was over")
                if over
                else KnodeError(Code.CANCELLED, "cancelled")
            )
            answer = Failure.of(request.counter, error)
        self._answers.finish(*source, answer, self._clock.monotonic())
        current = conversation if conversation.open else peer.conversation
        if current is not None and current.established.peer_boot == source[1]:
            current.send_or_close(answer)

    async def _run_method(
        self,
        peer: Peer,
        conversation: Conversation,
        request: Request,
        deadline: Monotonic,
        stream: IncomingStream | None,
    ) -> Answer:
        established = conversation.established

        def progress(body: bytes) -> None:
            current = conversation if conversation.open else peer.conversation
            if current is not None:
                correlation = request.counter.to_bytes(16, "big")
                current.send_or_close(
                    Event(PROGRESS_TOPIC, Context(correlation, b"", request.context.trace), body)
                )

        try:
            if not established.ticket and not self._methods.before_sync(request.method):
                await conversation.synchronised.wait()
            role = None if established.ticket else self._membership.roster.admit(peer.key.raw).role
            method = self._methods.admitted(request.method, role)
            body = method.decoder.decode(request.body)
            call = Call(
                peer.key,
                established.session_id,
                established.ticket,
                request.context,
                deadline,
                stream,
                progress,
            )
            result = await method.handle(call, body)
            return Response(request.counter, b"" if result is None else encode(result))
        except KnodeError as error:
            return Failure.of(request.counter, error)
        except Exception:
            self._log.error("a method failed", method=request.method, peer=peer.node_id, exc_info=True)
            fault = KnodeError(Code.INTERNAL, "the node failed", "its log has the details: 'knode logs tail'")
            return Failure.of(request.counter, fault)
