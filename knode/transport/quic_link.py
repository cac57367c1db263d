"""One end of a QUIC connection: frames in and out of its one stream.

The endpoint's tasks move the datagrams; the callers' tasks only write to the connection and take from it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import trio
from aioquic.quic.events import (
    HandshakeCompleted,
    QuicEvent,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
)
from aioquic.quic.packet import QuicErrorCode

from knode.transport.address import join_address
from knode.transport.certificate import channel_binding
from knode.transport.framing import PREFIX_BYTES, FrameReader, frame_prefix
from knode.transport.link import LinkClosed, LinkFault, LinkStatistics
from knode.transport.quic_connection import KEEPALIVE_SECONDS, STREAM, Connection
from knode.transport.udp import Path

CLOSE_SECONDS = 2
UNSENT_BYTES = 64 * 1024
"""A sender waits while more than this was not sent even once: what is urgent waits behind no more."""
UNDELIVERED_BYTES = 2 * 1024 * 1024
"""A sender waits while more than this is not acknowledged."""
OPENING_MARK = bytes(PREFIX_BYTES)
"""How the end that dialled begins its stream: an empty frame, so that the other end may speak first."""
FRAMES_A_TURN = 16
"""So many frames that wait already are taken before the loop gets its turn."""

TIMER_SLACK_SECONDS = 1e-6
"""Added to the core's timers: exactly at its time one may not be due, by the rounding of a sum."""

CLOSED_IN_ORDER = 0
CLOSED_AT_ONCE = 1
NO_FRAME = 2


class QuicLink:
    """One end of a connection. See `Link` for the contract.

    Args:
        connection: the protocol, which the link and its endpoint alone touch.
        binding: the channel's; the end that dialled learns it in the handshake.
        pump: lets the endpoint send what the connection has to say.
        pump_soon: the same, in the next turn of the loop.
    """

    carrier = "quic"
    relayed = False

    def __init__(
        self,
        connection: Connection,
        binding: bytes,
        pump: Callable[[QuicLink], None],
        pump_soon: Callable[[QuicLink], None],
        now: float,
    ) -> None:
        self.connection = connection
        self.channel_binding = binding
        self.statistics = LinkStatistics()
        self.opened = trio.Event()
        """Set when frames can be sent, or when that will never be."""
        self.was_opened = False
        """Whether it came so far; it may be over already, with frames to be taken."""
        self.timer_at = math.inf
        """When the endpoint must look after it, in trio's time."""
        self._pump = pump
        self._pump_soon = pump_soon
        self._reader = FrameReader()
        self._mark_due = 0 if connection.configuration.is_client else len(OPENING_MARK)
        self._frames: deque[bytes] = deque()
        self._turns = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._is_closing = False
        self._fault: str | None = None
        self._closed_why: str | None = None
        self._ping_at = now + KEEPALIVE_SECONDS

    @property
    def remote_address(self) -> str:
        """Where the other end is now; see `Link.remote_address`."""
        return join_address(*self.connection.remote()[:2])

    @property
    def closed_why(self) -> str | None:
        """Why nothing more goes over it; None while it is open."""
        return self._closed_why

    # what the callers do

    async def send_frame(self, frame: bytes | bytearray | memoryview) -> None:
        """Send one frame; see `Link.send_frame`. A cancelled send has not begun."""
        prefix = frame_prefix(len(frame))
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        while (
            self.connection.unsent_bytes > UNSENT_BYTES
            or self.connection.undelivered_bytes > UNDELIVERED_BYTES
        ):
            await self._changed.park()
            self._check_open()
        self._send(prefix, bytes(frame))

    def send_at_once(self, frame: bytes) -> bool:
        """Send one frame if nothing waits before it; see `Link.send_at_once`."""
        if self._closed_why is not None or self._is_closing or self.connection.unsent_bytes:
            return False
        self._send(frame_prefix(len(frame)), frame)
        return True

    def _send(self, prefix: bytes, frame: bytes) -> None:
        self.connection.send_stream_data(STREAM, prefix)
        self.connection.send_stream_data(STREAM, frame)
        if self._frames:
            self._pump_soon(self)  # who answers what came in one datagram, answers in one
        else:
            self._pump(self)
        self.statistics.frames_sent += 1
        self.statistics.bytes_sent += len(frame)

    async def receive_frame(self) -> bytes:
        """Return the next frame; see `Link.receive_frame`."""
        self._turns += 1
        if self._turns % FRAMES_A_TURN == 0:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while self._is_closing or not self._frames:
            self._check_open()
            await self._changed.park()
        frame = self._frames.popleft()
        self.statistics.frames_received += 1
        self.statistics.bytes_received += len(frame)
        if self.connection.take(PREFIX_BYTES + len(frame)) and self._closed_why is None:
            self._pump(self)
        return frame

    async def aclose(self) -> None:
        """Close; see `Link.aclose`."""
        is_first, self._is_closing = not self._is_closing, True
        self._frames.clear()  # nobody wants them any more
        self._changed.unpark_all()
        code = CLOSED_AT_ONCE
        try:
            with trio.move_on_after(CLOSE_SECONDS):
                await trio.lowlevel.checkpoint()
                if is_first and self.was_opened and self._closed_why is None:
                    self.connection.send_stream_data(STREAM, b"", end_stream=True)
                    self._pump(self)
                while not (self.connection.delivered or self._closed_why):
                    await self._changed.park()
                code = CLOSED_IN_ORDER
        finally:
            self.drop("it was closed here", code)

    def drop(self, why: str, code: int) -> None:
        """Close the connection at once, telling the other end `code`. The first reason stays."""
        self._end(why)
        if self.connection.ending is None:
            self.connection.close(error_code=code)
            self._pump(self)

    def _check_open(self) -> None:
        if self._closed_why is not None:
            raise (LinkClosed if self._fault is None else LinkFault)(self._closed_why)
        if self._is_closing:
            raise LinkClosed("it was closed here")

    def _end(self, why: str) -> None:
        if self._closed_why is None:
            self._closed_why = why
        self.opened.set()
        self._changed.unpark_all()

    # what the endpoint does

    def receive_datagram(self, data: bytes, path: Path, now: float) -> None:
        """Take a datagram of this connection."""
        if self.connection.configuration.is_client:
            path = Path(path.remote)  # it never said from which address it would send
        self.connection.receive_datagram(data, path, now)
        self._ping_at = now + KEEPALIVE_SECONDS

    def tick(self, now: float) -> None:
        """Do what is due at `now`."""
        timer = self.connection.get_timer()
        if timer is not None and timer <= now:
            self.connection.handle_timer(now)
        if self._ping_at <= now:
            self.connection.send_ping(0)
            self._ping_at = now + KEEPALIVE_SECONDS

    def next_timer(self) -> float:
        """Say when `tick` is due next."""
        timer = self.connection.get_timer()
        if timer is None:
            return math.inf
        timer += TIMER_SLACK_SECONDS
        return timer if self.connection.ending is not None else min(timer, self._ping_at)

    def follow(self) -> None:
        """See what became of the connection since the last time."""
        self.statistics.bytes_read = self.connection.furthest_bytes
        ending = self.connection.ending
        if ending is not None and self._closed_why is None:
            self._end(_why_ended(ending.error_code, ending.frame_type, ending.reason_phrase))
        self._changed.unpark_all()

    def handle(self, event: QuicEvent) -> None:
        """Take an event of the connection."""
        match event:
            case HandshakeCompleted():
                if self.connection.configuration.is_client:
                    self.channel_binding = channel_binding(self.connection.peer_certificate())
                    self.connection.send_stream_data(STREAM, OPENING_MARK)
                    self._open()
            case StreamDataReceived(data=data, end_stream=end_stream):
                self._take(data)
                if end_stream and self._closed_why is None:
                    inside = self._reader.inside_frame or self._mark_due
                    self._end(f"it was closed by the other end{', inside a frame' if inside else ''}")
            case StreamReset() | StopSendingReceived():
                self.drop("the other end broke the stream off", CLOSED_AT_ONCE)
            case _:
                pass  # what the endpoint follows, and what nobody needs to know

    def _take(self, data: bytes) -> None:
        if self._is_closing or self._closed_why is not None:
            return
        if self._mark_due:
            data = self._take_mark(data)
        self._frames += self._reader.feed(data)
        if self._reader.fault is not None:
            self._refuse(f"the other end sent what is no frame ({self._reader.fault})")

    def _take_mark(self, data: bytes) -> bytes:
        """Take the opening mark, which is as many zeros; return what is behind it."""
        mark, rest = data[: self._mark_due], data[self._mark_due :]
        self._mark_due -= len(mark)
        self.connection.take(len(mark))
        if any(mark):
            self._refuse("the other end opened the stream with what is no empty frame")
            return b""
        if not self._mark_due:
            self._open()
        return rest

    def _open(self) -> None:
        self.was_opened = True
        self.opened.set()

    def _refuse(self, why: str) -> None:
        self._fault = why
        self.drop(why, NO_FRAME)


def _why_ended(code: int, frame_type: int | None, reason: str) -> str:
    if frame_type is None and code == CLOSED_IN_ORDER:
        return "it was closed by the other end"
    if frame_type is None:
        return f"it was broken off (code {code})"
    if reason == "Idle timeout":
        return "nothing was heard for too long"
    name = QuicErrorCode(code).name if code in set(QuicErrorCode) else f"0x{code:x}"
    return f"the connection failed ({name}: {reason[:80]!r})"
