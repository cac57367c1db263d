"""One end of a libp2p link: frames on a stream of protocol `/klp/1.0.0`.

A frame is its length, 4 bytes big-endian, and its bytes.
"""

from __future__ import annotations

import hashlib
import struct

import base58
import trio

from knode.transport.libp2p_connection import Connection, MuxedStream, StreamEnded
from knode.transport.link import MAX_FRAME_BYTES, LinkClosed, LinkStatistics

PROTOCOL = "/klp/1.0.0"
CLOSE_SECONDS = 2

_LENGTH = struct.Struct("!I")
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
        self._incoming = bytearray()
        self._closed_why: str | None = None
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
        size = len(frame)
        if not 0 < size <= MAX_FRAME_BYTES:
            raise ValueError(f"a frame has 1 to {MAX_FRAME_BYTES} bytes, not {size}")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        sent_before = self._stream.sent_bytes
        try:
            await self._stream.write(_LENGTH.pack(size) + frame)
        except StreamEnded as error:
            self._drop(error.reason)
            raise LinkClosed(self._closed_why or "") from error
        except BaseException:
            if self._stream.sent_bytes != sent_before:
                # the other end has part of a frame, and nobody will send the rest
                self._drop("a frame was cancelled while it was sent")
            raise
        self._statistics.frames_sent += 1
        self._statistics.bytes_sent += size

    async def receive_frame(self) -> bytes:
        """Return the next frame; see `Link.receive_frame`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        missing = self._missing_bytes()
        while missing > 0:
            try:
                self._incoming += await self._stream.read(_READ_BYTES)
            except StreamEnded as error:
                self._end(error)
                raise LinkClosed(self._closed_why or "it was closed here") from error
            missing = self._missing_bytes()
        size = _LENGTH.unpack_from(self._incoming)[0]
        end = _LENGTH.size + size
        frame = bytes(memoryview(self._incoming)[_LENGTH.size : end])
        del self._incoming[:end]
        self._statistics.frames_received += 1
        self._statistics.bytes_received += size
        return frame

    async def aclose(self) -> None:
        """Close; see `Link.aclose`."""
        self._is_closing = True
        try:
            with trio.move_on_after(CLOSE_SECONDS):
                await trio.lowlevel.checkpoint()
                if self._closed_why is None:
                    self._stream.finish()
                    await self._stream.discard()
                if self._ends_connection:
                    await self._stream.connection.aclose()
        finally:
            self._drop("it was closed here")

    def _missing_bytes(self) -> int:
        """Return how much of the next frame has not come, at least; raises LinkClosed when it is none."""
        if len(self._incoming) < _LENGTH.size:
            return _LENGTH.size - len(self._incoming)
        size = _LENGTH.unpack_from(self._incoming)[0]
        if not 0 < size <= MAX_FRAME_BYTES:
            self._drop("the other end sent what is no frame")
            raise LinkClosed(self._closed_why or "")
        return int(_LENGTH.size + size - len(self._incoming))

    def _end(self, ended: StreamEnded) -> None:
        """The other end says nothing more: say good-bye too, when it did."""
        if self._is_closing:
            return
        if not ended.in_order:
            self._drop(f"the connection broke ({ended.reason})")
        elif self._incoming:
            self._drop("the other end finished in the middle of a frame")
        else:
            self._stream.finish()
            self._closed_why = "the other end closed it"

    def _check_open(self) -> None:
        if self._closed_why is not None:
            raise LinkClosed(self._closed_why)
        if self._is_closing:
            raise LinkClosed("it was closed here")

    def _drop(self, why: str) -> None:
        """End the stream, without a good-bye. The first reason stays."""
        if self._closed_why is None:
            self._closed_why = why
        self._incoming.clear()
        self._stream.abort()
        if self._ends_connection:
            self._stream.connection.abort()
