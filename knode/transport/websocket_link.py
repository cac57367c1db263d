"""One end of a WebSocket connection, once it is open.

There is no task inside: the callers' tasks move the bytes between the socket and the sans-I/O core of
`websockets`. A binary message is a frame of the link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import trio
from websockets.client import ClientProtocol
from websockets.frames import DATA_OPCODES, CloseCode, Frame, Opcode
from websockets.protocol import Event, State
from websockets.server import ServerProtocol

from knode.transport.link import MAX_FRAME_BYTES, LinkClosed, LinkFault, LinkStatistics
from knode.transport.tls import TlsStream
from knode.world import Turns

CLOSE_SECONDS = 2


async def send_queued(stream: TlsStream, protocol: ClientProtocol | ServerProtocol) -> None:
    """Hand what `protocol` has to say to the kernel; see `TlsStream.flush`."""
    for data in protocol.data_to_send():
        if data:  # an empty one asks to end the TCP connection, which closing it does
            stream.queue(data)
    await stream.flush()


class WebSocketLink:
    """One end of an open connection. See `Link` for the contract."""

    carrier = "websocket"
    relayed = False

    def __init__(
        self,
        stream: TlsStream,
        protocol: ClientProtocol | ServerProtocol,
        remote_address: str,
        binding: bytes,
        behind: Sequence[Event],
    ) -> None:
        self.remote_address = remote_address
        self.channel_binding = binding
        self.statistics = LinkStatistics()
        self._stream = stream
        self._protocol = protocol
        self._pumping = Turns()
        self._frames: deque[bytes] = deque()
        self._fragments = bytearray()
        self._fault: str | None = None
        self._is_closing = False
        self._closed_why: str | None = None
        self._take(behind)  # what came right behind the opening

    async def send_frame(self, frame: bytes | bytearray | memoryview) -> None:
        """Send one frame; see `Link.send_frame`."""
        size = len(frame)
        if not 0 < size <= MAX_FRAME_BYTES:
            raise ValueError(f"a frame has 1 to {MAX_FRAME_BYTES} bytes, not {size}")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        if self._protocol.state is not State.OPEN:
            raise LinkClosed("it is being closed")
        self._protocol.send_binary(frame)
        try:
            await self._flush()
        except BaseException:
            # the other end has half a message, and nobody will send the rest
            self._drop("a frame was cancelled while it was sent")
            raise
        self.statistics.frames_sent += 1
        self.statistics.bytes_sent += size

    def send_at_once(self, frame: bytes) -> bool:
        """Send one frame if nothing waits before it; see `Link.send_at_once`."""
        is_open = self._closed_why is None and not self._is_closing and self._protocol.state is State.OPEN
        if not (is_open and self._stream.is_idle and not self._protocol.writes):
            return False
        self._protocol.send_binary(frame)
        for data in self._protocol.data_to_send():
            self._stream.queue(data)
        try:
            self._stream.flush_at_once()
        except OSError as error:
            self._drop(f"the connection broke ({error})")
        self.statistics.frames_sent += 1
        self.statistics.bytes_sent += len(frame)
        return True

    async def receive_frame(self) -> bytes:
        """Return the next frame; see `Link.receive_frame`."""
        if self._frames:
            await trio.lowlevel.checkpoint()
        while self._is_closing or not self._frames:
            self._check_open()
            await self._pump()
        frame = self._frames.popleft()
        self.statistics.frames_received += 1
        self.statistics.bytes_received += len(frame)
        return frame

    async def aclose(self) -> None:
        """Close; see `Link.aclose`."""
        self._is_closing = True
        try:
            with trio.move_on_after(CLOSE_SECONDS), suppress(LinkClosed):
                await trio.lowlevel.checkpoint()
                if self._protocol.state is State.OPEN:
                    self._protocol.send_close(CloseCode.NORMAL_CLOSURE)
                    await self._flush()
                while self._closed_why is None:
                    await self._pump()
                    self._frames.clear()  # nobody wants them any more
        finally:
            self._frames.clear()
            self._drop("it was closed here")

    def _check_open(self) -> None:
        if self._closed_why is not None:
            raise (LinkClosed if self._fault is None else LinkFault)(self._closed_why)
        if self._is_closing:
            raise LinkClosed("it was closed here")

    def _drop(self, why: str) -> None:
        """Close the socket, without a good-bye. The first reason stays."""
        if self._closed_why is None:
            self._closed_why = why
        self._stream.close()

    async def _flush(self) -> None:
        """Hand what the protocol has to say to the kernel. Raises LinkClosed."""
        try:
            await send_queued(self._stream, self._protocol)
        except (OSError, trio.ClosedResourceError) as error:
            self._drop(f"the connection broke ({error})")
            raise LinkClosed(self._closed_why or "") from error

    async def _pump(self) -> None:
        """Read once, keep the frames that came, answer pings and a close.

        When nothing more will come, `_closed_why` says why. Cancelling loses nothing: what was read is in
        `_frames`, what is unsent stays queued.
        """
        async with self._pumping:  # `aclose` reads as well as the task that receives
            if self._closed_why is None:
                await self._read_once()

    async def _read_once(self) -> None:
        try:
            pieces = await self._stream.receive()
        except (OSError, trio.ClosedResourceError) as error:
            self._drop(f"the connection broke ({error})")
            return
        for piece in pieces:
            self.statistics.bytes_read += len(piece)
            self._protocol.receive_data(piece)
        if not pieces:
            self._protocol.receive_eof()
        self._take(self._protocol.events_received())
        if (why := self._ending()) is not None:
            try:
                with trio.move_on_after(CLOSE_SECONDS), suppress(LinkClosed):
                    await self._flush()  # our part of the good-bye
            finally:
                self._drop(why)
        elif self._protocol.writes:
            with suppress(LinkClosed):  # `_closed_why` says it, behind the frames that came
                await self._flush()

    def _ending(self) -> str | None:
        """Tell why nothing more is read; None while the connection is good."""
        if self._fault is not None:
            return self._fault
        match self._protocol.parser_exc:
            case None:
                if self._protocol.close_rcvd is None:
                    return None
                return (
                    "it was closed by the other end"
                    if self._protocol.close_rcvd_then_sent
                    else "it was closed here"
                )
            case EOFError():
                return "the connection ended without a good-bye"
            case error:
                self._fault = f"the other end sent what is no frame ({error})"
                return self._fault

    def _take(self, events: Sequence[Event]) -> None:
        """Put messages together from what the protocol gave."""
        for event in events:
            if self._fault is not None:
                return
            if not isinstance(event, Frame) or event.opcode not in DATA_OPCODES:
                continue
            if event.opcode is Opcode.TEXT:
                self._refuse(CloseCode.UNSUPPORTED_DATA, "the other end sent text")
            elif event.opcode is Opcode.BINARY and event.fin:
                self._take_message(event.data)
            else:
                self._fragments += event.data
                if event.fin:
                    self._take_message(self._fragments)
                    self._fragments = bytearray()

    def _take_message(self, data: bytes | bytearray | memoryview) -> None:
        if data:
            self._frames.append(bytes(data))
        else:
            self._refuse(CloseCode.PROTOCOL_ERROR, "the other end sent an empty frame")

    def _refuse(self, code: CloseCode, why: str) -> None:
        self._fault = why
        self._protocol.fail(code, why)
