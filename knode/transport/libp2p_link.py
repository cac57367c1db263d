"""One end of a libp2p link: frames on a stream of protocol `/klp/1.0.0`."""

from __future__ import annotations

import hashlib
from collections import deque

import base58
import trio

from knode.transport.framing import FrameReader, frame_prefix
from knode.transport.libp2p_connection import Connection, MuxedStream, StreamEnded
from knode.transport.link import LinkClosed, LinkFault, LinkStatistics

PROTOCOL = "/klp/1.0.0"
CLOSE_SECONDS = 2

_READ_BYTES = 1024 * 1024
_BINDING_DOMAIN = b"KLP/1 libp2p channel\0"


def channel_binding(dialler: str, listener: str) -> bytes:
    """Return the 32 bytes that name a channel between two PeerIds, which Noise has proven to each other."""
    return hashlib.sha256(_BINDING_DOMAIN + base58.b58decode(dialler) + base58.b58decode(listener)).digest()


class Libp2pLink:
    """One end of an open stream. See `Link` for the contract.

    Args:
        stream: negotiated, and used by nobody else.
        own_id: the PeerId of this end.
        ends_connection: whether the connection was opened for this link and closes with it.
    """

    carrier = "libp2p"

    def __init__(self, stream: MuxedStream, own_id: str, *, ends_connection: bool) -> None:
        connection = stream.connection
        ends = (own_id, connection.peer_id) if connection.initiator else (connection.peer_id, own_id)
        self.channel_binding = channel_binding(*ends)
        self.remote_address = connection.remote_address
        self.relayed = connection.relayed
        self._stream = stream
        self._ends_connection = ends_connection
        self._statistics = LinkStatistics()
        self._reader = FrameReader()
        self._frames: deque[bytes] = deque()
        self._closed: LinkClosed | None = None
        self._is_closing = False

    @property
    def connection(self) -> Connection:
        """What it runs over."""
        return self._stream.connection

    @property
    def statistics(self) -> LinkStatistics:
        """What it has carried."""
        self._statistics.bytes_read = self._stream.received_bytes
        return self._statistics

    async def send_frame(self, frame: bytes | bytearray | memoryview) -> None:
        """Send one frame; see `Link.send_frame`."""
        prefix = frame_prefix(len(frame))
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        sent_before = self._stream.sent_bytes
        try:
            await self._stream.write(prefix + frame)
        except StreamEnded as error:
            self._drop(LinkClosed(error.reason))
            raise LinkClosed(error.reason) from error
        except BaseException:
            if self._stream.sent_bytes != sent_before:
                # the other end has part of a frame, and nobody will send the rest
                self._drop(LinkClosed("a frame was cancelled while it was sent"))
            raise
        self._statistics.frames_sent += 1
        self._statistics.bytes_sent += len(frame)

    def send_at_once(self, frame: bytes) -> bool:
        """Never; see `Link.send_at_once`. Its streams are written to by tasks alone."""
        return False

    async def receive_frame(self) -> bytes:
        """Return the next frame; see `Link.receive_frame`."""
        if self._frames:
            await trio.lowlevel.checkpoint()
        while self._is_closing or not self._frames:
            self._check_open()
            await self._read()
        frame = self._frames.popleft()
        self._statistics.frames_received += 1
        self._statistics.bytes_received += len(frame)
        return frame

    async def aclose(self) -> None:
        """Close; see `Link.aclose`."""
        self._is_closing = True
        self._frames.clear()  # nobody wants them any more
        try:
            with trio.move_on_after(CLOSE_SECONDS):
                await trio.lowlevel.checkpoint()
                if self._closed is None:
                    self._stream.finish()
                    await self._stream.discard()
                if self._ends_connection:
                    await self._stream.connection.aclose()
        finally:
            self._drop(LinkClosed("it was closed here"))

    async def _read(self) -> None:
        """Take what comes next: frames, or the end."""
        try:
            self._frames += self._reader.feed(await self._stream.read(_READ_BYTES))
        except StreamEnded as ended:
            self._end(ended)
        if self._reader.fault is not None:
            self._drop(LinkFault(self._reader.fault))

    def _end(self, ended: StreamEnded) -> None:
        """The other end says nothing more: say good-bye too, when it did."""
        if self._is_closing:
            return
        if not ended.in_order:
            self._drop(LinkClosed(f"the connection broke ({ended.reason})"))
        elif self._reader.inside_frame:
            self._drop(LinkFault("the other end finished inside a frame"))
        else:
            self._stream.finish()
            self._closed = LinkClosed("it was closed by the other end")

    def _check_open(self) -> None:
        if self._closed is not None:
            raise type(self._closed)(self._closed.reason)
        if self._is_closing:
            raise LinkClosed("it was closed here")

    def _drop(self, why: LinkClosed) -> None:
        """End the stream, without a good-bye. The first reason stays."""
        if self._closed is None:
            self._closed = why
        self._stream.abort()
        if self._ends_connection:
            self._stream.connection.abort()
