"""One KLP session over one link: the thin shell around `knode.klp.session`.

Two tasks own it: one reads, one writes what waits whenever the link takes more. Everybody else only
queues messages, the node's heartbeat too. When it ends, for whatever reason, every waiter is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable

import trio

from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.klp.handshake import Established
from knode.klp.keepalive import Keepalive, Load
from knode.klp.messages import Context, Event, Goodbye, Message, StreamEnd, StreamReset
from knode.klp.session import Received, Session, StreamData
from knode.mesh.liveness import Liveness, PeerState
from knode.transport import Link, LinkClosed, LinkFault
from knode.world import Clock

GOOD_BYE_S = 1.0
RETIRED_AT_MOST_S = 300.0
RETIRED_TOPIC = "retired"
"""The event that tells the other end: nothing new comes over this link, send nothing new over it."""


class IncomingStream:
    """Bulk data that a peer sends with a request; bounded by the credit that was given."""

    def __init__(self, consumed: Callable[[int], None]) -> None:
        self._chunks: deque[bytes] = deque()
        self._consumed = consumed
        self._arrived = trio.Event()
        self._complete = False
        self._error: KnodeError | None = None

    def feed(self, data: bytes) -> None:
        """Take a chunk from the link."""
        self._chunks.append(data)
        self._arrived.set()

    def finish(self) -> None:
        """Note that all has come and its digest was right."""
        self._complete = True
        self._arrived.set()

    def fail(self, error: KnodeError) -> None:
        """Note that no more will come."""
        if not self._complete:
            self._error = error.bare()
            self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Give the chunks, in order; ends only when the digest of the whole was verified.

        Raises:
            KnodeError: UNAVAILABLE when the link was lost, CANCELLED when the sender gave up.
        """
        while True:
            while self._chunks:
                chunk = self._chunks.popleft()
                yield chunk
                self._consumed(len(chunk))
            if self._error is not None:
                raise self._error.bare()
            if self._complete:
                return
            self._arrived = trio.Event()
            await self._arrived.wait()


class Conversation:
    """A session at work."""

    def __init__(
        self,
        link: Link,
        key: KeyPair,
        established: Established,
        *,
        clock: Clock,
        dead_after_s: float,
        admit: Callable[[Established], None],
        deliver: Callable[[Conversation, Message], None],
    ) -> None:
        now = clock.monotonic()
        self.link = link
        self.established = established
        self.session = Session(key, established)
        self.liveness = Liveness(dead_after_s, heard_at=now)
        self.opened_at = now
        self.rtt_s: float | None = None
        self.peer_load: Load | None = None
        self.peer_load_at: float = now
        self.synchronised = trio.Event()
        self.ended = trio.Event()
        self.end_reason = ""
        self._refusal: KnodeError | None = None
        self.retired_at: float | None = None
        self.peer_retired = False
        """Whether the peer prefers another link to it, and so sends nothing new over this one."""
        self._incoming: dict[int, IncomingStream] = {}
        self._held: set[int] = set()
        self._clock = clock
        self._admit = admit
        self._deliver = deliver
        self._wake = trio.Event()
        self._flow = trio.lowlevel.ParkingLot()
        self._stop = trio.CancelScope()
        self._sending = False
        self._was_synchronised = False
        self._bytes_read = link.statistics.bytes_read
        self._heard_ping: tuple[int, float] = (0, 0.0)

    @property
    def open(self) -> bool:
        """Whether it still carries messages."""
        return not self.ended.is_set()

    def send(self, message: Message) -> None:
        """Queue a message; nothing happens when the conversation has ended.

        Raises:
            KnodeError: RATE_LIMITED when too much waits already.
        """
        if self.open:
            self.session.send(message)
            self._wake.set()

    def send_or_close(self, message: Message) -> None:
        """Queue a message; a peer that lets too much pile up is let go."""
        try:
            self.send(message)
        except KnodeError as error:
            self.refuse(error)

    def hold(self, stream: int) -> None:
        """Stay open, though retired, until the request that this stream belongs to is answered."""
        self._held.add(stream)

    def let_go(self, stream: int) -> None:
        """Undo `hold`."""
        self._held.discard(stream)

    def stream_of(self, stream: int) -> IncomingStream:
        """Return the stream that a request of the peer just opened. Held until `drop_stream`."""
        incoming = IncomingStream(lambda count: self._consumed(stream, count))
        self._incoming[stream] = incoming
        self.hold(stream)
        return incoming

    def refuse_stream(self, stream: int) -> None:
        """Tell the peer that a stream which its request opened is not wanted."""
        if self.open:
            self.session.reset(stream, Code.CANCELLED)
            self._wake.set()

    def drop_stream(self, stream: int) -> None:
        """Forget an incoming stream whose request was answered; tell the peer to stop when it has not."""
        self.let_go(stream)
        if self._incoming.pop(stream, None) is not None:
            self.refuse_stream(stream)

    async def upload(self, stream: int, chunks: AsyncIterator[bytes]) -> None:
        """Send all `chunks` as one stream, as fast as link and credit allow.

        Cancelling, or an error of `chunks`, tells the peer that the rest will not come.

        Raises:
            KnodeError: UNAVAILABLE when the conversation ended, CANCELLED when the peer wants no more.
        """
        try:
            async for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    self._check_open()
                    room = self.session.writable(stream)
                    if room > 0:
                        self.session.write(stream, rest[:room])
                        rest = rest[room:]
                        self._wake.set()
                    else:
                        await self._flow.park()
            self._check_open()
            self.session.end(stream)
        except BaseException:
            if self.open:
                self.session.reset(stream, Code.CANCELLED)
            raise
        finally:
            self._wake.set()

    async def until_synchronised(self) -> None:
        """Wait until both ends have the same roster.

        Raises:
            KnodeError: UNAVAILABLE when the conversation ended before that.
        """
        await self.synchronised.wait()
        if not self._was_synchronised:
            self._check_open()

    def retire(self) -> None:
        """Take no part in new requests; close once the peer does not either, and no stream runs.

        What either end sent before it knew is behind its own event by then, so nothing is cut off.
        """
        if self.retired_at is None:
            self.retired_at = self._clock.monotonic()
            self.send_or_close(Event(RETIRED_TOPIC, Context(), b""))

    def close(self, reason: str) -> None:
        """End at once."""
        self.end_reason = self.end_reason or reason
        self._stop.cancel()

    def refuse(self, error: KnodeError) -> None:
        """End at once, and have the peer told why."""
        if self._refusal is None:
            self._refusal = error.bare()
        self.close(error.message)

    async def say_good_bye(self, code: Code, message: str) -> None:
        """Tell the peer why, wait a second at most until it is sent, then end."""
        self.send_or_close(Goodbye(code, message))
        with trio.move_on_after(GOOD_BYE_S):
            while self.open and self._has_unsent:
                await self._flow.park()
        self.close(message)

    def beat(self, now: float, load: Load) -> None:
        """Tell the peer that this node is here and how busy it is; end when the peer is dead.

        Called by the node's heartbeat; nothing happens when the conversation has ended.
        """
        if self.link.statistics.bytes_read != self._bytes_read:
            self._heard(now)  # a part of a frame, which may take longer than a silence may
        if self.liveness.state(now) is PeerState.FAILED:
            self.close(f"nothing heard for {self.liveness.dead_after_s:g} s")
        is_of_use = not self.peer_retired or self._held or self._has_unsent
        if self.retired_at is not None and (not is_of_use or now - self.retired_at > RETIRED_AT_MOST_S):
            self.close("a better link serves this peer")
        echo, heard_at = self._heard_ping
        held = max(0, round((now - heard_at) * 1e6)) if echo else 0
        if self.open:
            self._keep_alive(Keepalive(max(1, round(now * 1e6)), echo, held, load))

    @property
    def _has_unsent(self) -> bool:
        return self._sending or self.session.has_output

    def _keep_alive(self, keepalive: Keepalive) -> None:
        """Send a keepalive, mostly without waking the task that writes: a node has one for each peer."""
        try:
            self.session.keep_alive(keepalive)
            if not self._sending:
                frame = self.session.next_frame()
                if frame is None or self.link.send_at_once(frame):
                    return
                self.session.keep_alive(keepalive)
        except KnodeError as error:
            self.close(error.message)
        self._wake.set()

    async def run(self) -> KnodeError | None:
        """Carry messages until the link or the session ends. Whoever calls it closes the link.

        Returns:
            The error that ended the session, for the peer to be told.
        """
        error: KnodeError | None = None
        try:
            with self._stop:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    error = await self._read()
                    nursery.cancel_scope.cancel()
        finally:
            self._end()
        return error or self._refusal

    def _end(self) -> None:
        self._was_synchronised = self.synchronised.is_set()
        self.ended.set()
        self.synchronised.set()
        lost = KnodeError(Code.UNAVAILABLE, f"the link was lost ({self.end_reason})", "try again")
        for stream in self._incoming.values():
            stream.fail(lost)
        self._incoming.clear()
        self._flow.unpark_all()

    async def _read(self) -> KnodeError | None:
        """Take what comes until the link ends; return the error when it is the session that ends."""
        try:
            while True:
                frame = await self.link.receive_frame()
                self._admit(self.established)
                received = self.session.receive(frame)
                now = self._clock.monotonic()
                self._heard(now)
                for item in received:
                    self._take(item, now)
                if self.session.has_output:
                    self._wake.set()
        except LinkFault as fault:
            self.end_reason = self.end_reason or fault.reason
            return KnodeError(Code.BAD_FRAME, fault.reason)
        except LinkClosed as closed:
            self.end_reason = self.end_reason or closed.reason
            return None
        except KnodeError as error:
            self.end_reason = self.end_reason or f"{error.code}: {error.message}"
            return error

    def _take(self, item: Received, now: float) -> None:
        match item:
            case StreamData(stream=stream, data=data):
                incoming = self._incoming.get(stream)
                if incoming is None:
                    self._consumed(stream, len(data))
                else:
                    incoming.feed(data)
            case StreamEnd(stream=stream):
                finished = self._incoming.pop(stream, None)
                if finished is not None:
                    finished.finish()
            case StreamReset(stream=stream, code=code):
                incoming = self._incoming.pop(stream, None)
                if incoming is not None:
                    incoming.fail(KnodeError(Code.CANCELLED, f"the sender gave up ({code})"))
            case Keepalive():
                self._heard_ping = (item.sent_us, now)
                self.peer_load, self.peer_load_at = item.load, now
                if item.echo_us:
                    self.rtt_s = max(0.0, now - item.echo_us / 1e6 - item.held_us / 1e6)
            case Event(topic=topic) if topic == RETIRED_TOPIC:
                self.peer_retired = True
                self._deliver(self, item)
            case Goodbye(message=message):
                self.liveness.left()
                self.close(f"the peer said good-bye: {message}")
            case _:
                self._deliver(self, item)
        self._flow_on()

    async def _write(self) -> None:
        try:
            while True:
                frame = self.session.next_frame()
                if frame is None:
                    self._flow_on()
                    self._wake = trio.Event()
                    await self._wake.wait()
                    continue
                self._sending = True
                await self.link.send_frame(frame)
                self._sending = False
                self._flow_on()
        except LinkClosed as closed:
            # The reader still takes what had arrived before, and then ends the conversation.
            self.end_reason = self.end_reason or closed.reason

    def _heard(self, now: float) -> None:
        self._bytes_read = self.link.statistics.bytes_read
        self.liveness.heard(now)

    def _consumed(self, stream: int, count: int) -> None:
        if self.open:
            self.session.consumed(stream, count)
            if self.session.has_output:
                self._wake.set()

    def _flow_on(self) -> None:
        """Let those look again who wait until more can be sent; mostly there are none."""
        if self._flow:
            self._flow.unpark_all()

    def _check_open(self) -> None:
        if not self.open:
            raise KnodeError(Code.UNAVAILABLE, f"the link was lost ({self.end_reason})", "try again")
