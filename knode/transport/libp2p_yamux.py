"""Yamux: many streams over one connection (hashicorp/yamux `spec.md`, libp2p specification `yamux`).

Pure: bytes of the connection go in by `receive`, bytes for it come out by `take_outgoing`; nothing waits
here. py-libp2p has a Yamux too, but that one takes any amount of data beyond a stream's window, gives up a
write that waits five seconds for credit, and drops what was not read yet when a connection ends.

A stream is open in each direction until that side finishes it; a reset ends both at once. What arrived
before the end stays readable.
"""

from __future__ import annotations

import struct
from collections import deque

PROTOCOL = "/yamux/1.0.0"
WINDOW_BYTES = 256 * 1024
"""What either side may send on a new stream before the other side has read anything (the specification)."""
GROWN_WINDOW_BYTES = 1024 * 1024
"""The window of a stream whose reader has taken a whole first one: only work that is done grows it."""
STREAMS_AT_ONCE = 32
"""How many streams the other side may have open."""
DATA_BYTES = 65_519 - 12
"""The data of one frame, at most: with its header, as much as one Noise message holds."""

_HEADER = struct.Struct("!BBHII")
_DATA, _WINDOW_UPDATE, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_PROTOCOL_ERROR = 1
_LARGEST_WINDOW = 2**31


class YamuxError(Exception):
    """The other side broke the protocol; the connection is of no more use."""


class Stream:
    """One stream, as the core keeps it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.credit_bytes = WINDOW_BYTES
        """How much may be sent now."""
        self.received_bytes = 0
        """All that ever arrived."""
        self.taken_bytes = 0
        """All that ever was taken of it."""
        self.finished_here = False
        self.finished_there = False
        self.reset = False
        self.arrived = bytearray()
        """What arrived and was not taken; a copy: a byte must not keep all that came with it."""
        self.window_bytes = WINDOW_BYTES
        self.allowed_bytes = WINDOW_BYTES
        """How much the other side may still send."""
        self.untold_bytes = 0
        """What was taken since the other side was last allowed more."""

    @property
    def is_over(self) -> bool:
        """Whether nothing can be sent or arrive any more."""
        return self.reset or (self.finished_here and self.finished_there)


class Yamux:
    """One side of a connection.

    Args:
        initiator: whether this side opened the connection: its streams have odd numbers.
    """

    def __init__(self, *, initiator: bool) -> None:
        self.streams: dict[int, Stream] = {}
        self.accepted: deque[Stream] = deque()
        """Streams that the other side opened and nobody has taken from here yet."""
        self.refused = 0
        """How many streams of the other side were one too many."""
        self.outgoing_bytes = 0
        """What waits to be taken."""
        self._outgoing: list[bytes] = []
        self._next_number = 1 if initiator else 2
        self._header = bytearray()
        self._receiving: Stream | None = None
        self._left_bytes = 0  # of the data frame whose header was read
        self._ending = 0  # its flags, which count once it is whole

    def open(self) -> Stream:
        """Open a stream; the other side need not agree before data are sent."""
        stream = self.streams[self._next_number] = Stream(self._next_number)
        self._next_number += 2
        self._queue(_WINDOW_UPDATE, _SYN, stream.number, 0)
        return stream

    def send(self, stream: Stream, data: memoryview) -> int:
        """Queue as much of `data` as one frame and the stream's credit take; return how many bytes."""
        size = min(len(data), stream.credit_bytes, DATA_BYTES)
        if size:
            stream.credit_bytes -= size
            self._queue(_DATA, 0, stream.number, size, data[:size])
        return size

    def take(self, stream: Stream, most_bytes: int) -> bytes:
        """Return what has arrived, at most so much; empty when there is nothing. Allows more to be sent."""
        data = bytes(memoryview(stream.arrived)[:most_bytes])
        if not data:
            return b""
        del stream.arrived[:most_bytes]
        stream.taken_bytes += len(data)
        stream.untold_bytes += len(data)
        if stream.untold_bytes >= stream.window_bytes // 2 and not (stream.finished_there or stream.reset):
            more, stream.untold_bytes = stream.untold_bytes, 0
            if stream.taken_bytes >= WINDOW_BYTES:
                more += GROWN_WINDOW_BYTES - stream.window_bytes
                stream.window_bytes = GROWN_WINDOW_BYTES
            stream.allowed_bytes += more
            self._queue(_WINDOW_UPDATE, 0, stream.number, more)
        return data

    def finish(self, stream: Stream) -> None:
        """Say that no more comes from here; twice is no error."""
        if not (stream.finished_here or stream.reset):
            stream.finished_here = True
            self._queue(_WINDOW_UPDATE, _FIN, stream.number, 0)
            self._forget_when_over(stream)

    def abort(self, stream: Stream) -> None:
        """End both directions at once; twice is no error."""
        if not stream.is_over:
            stream.reset = True
            self._queue(_WINDOW_UPDATE, _RST, stream.number, 0)
            self._forget_when_over(stream)

    def go_away(self) -> None:
        """Say that this side closes the connection."""
        self._queue(_GO_AWAY, 0, 0, 0)

    def end(self) -> None:
        """The connection carries nothing more: every stream ends where it is."""
        for stream in list(self.streams.values()):
            stream.reset = True
        self.streams.clear()
        self._outgoing.clear()
        self.outgoing_bytes = 0

    def take_outgoing(self) -> bytes:
        """Return all that is to be written to the connection next."""
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        self.outgoing_bytes = 0
        return data

    def receive(self, data: bytes) -> None:
        """Take what came from the connection, in pieces of any size.

        Raises:
            YamuxError: the other side broke the protocol; a go-away that says so is queued.
        """
        rest = memoryview(data)
        try:
            while rest:
                if self._left_bytes:
                    rest = self._receive_data(rest)
                    continue
                missing = _HEADER.size - len(self._header)
                self._header += rest[:missing]
                rest = rest[missing:]
                if len(self._header) == _HEADER.size:
                    header = _HEADER.unpack(self._header)
                    self._header.clear()
                    self._receive_header(*header)
        except YamuxError:
            self._queue(_GO_AWAY, 0, 0, _PROTOCOL_ERROR)
            raise

    def _receive_data(self, rest: memoryview) -> memoryview:
        chunk = rest[: self._left_bytes]
        self._left_bytes -= len(chunk)
        if self._receiving is not None and not self._receiving.reset:
            self._receiving.arrived += chunk
            self._receiving.received_bytes += len(chunk)
        if not self._left_bytes and self._receiving is not None:
            self._receive_ending(self._receiving, self._ending)
        return rest[len(chunk) :]

    def _receive_header(self, version: int, kind: int, flags: int, number: int, length: int) -> None:
        if version != 0:
            raise YamuxError(f"version {version} of Yamux")
        match kind:
            case 0 | 1:  # data, window update
                self._receive_stream_frame(kind, flags, number, length)
            case 2:  # ping
                if flags & _SYN:
                    self._queue(_PING, _ACK, 0, length)
            case 3:  # go away: open streams may go on, and the connection's end follows
                pass
            case _:
                raise YamuxError(f"a frame of type {kind}")

    def _receive_stream_frame(self, kind: int, flags: int, number: int, length: int) -> None:
        if flags & _SYN:
            self._receive_opening(number)
        stream = self.streams.get(number)
        if kind == _DATA:
            if stream is not None:
                if length > stream.allowed_bytes or (length and stream.finished_there):
                    raise YamuxError("data beyond what was allowed")
                stream.allowed_bytes -= length
            elif length > GROWN_WINDOW_BYTES:
                raise YamuxError("data beyond what any stream allows")
            self._receiving, self._left_bytes, self._ending = stream, length, flags
            if length:
                return
        elif stream is not None:
            stream.credit_bytes += length
            if stream.credit_bytes > _LARGEST_WINDOW:
                raise YamuxError("a window beyond all bounds")
        if stream is not None:  # else it is over here: its last frames cross our reset
            self._receive_ending(stream, flags)

    def _receive_ending(self, stream: Stream, flags: int) -> None:
        if flags & _RST:
            stream.reset = True
        if flags & _FIN:
            stream.finished_there = True
        self._forget_when_over(stream)

    def _receive_opening(self, number: int) -> None:
        if number == 0 or number % 2 == self._next_number % 2 or number in self.streams:
            raise YamuxError(f"a stream with the number {number}")
        theirs = sum(1 for known in self.streams if known % 2 != self._next_number % 2)
        if theirs >= STREAMS_AT_ONCE:
            self.refused += 1
            self._queue(_WINDOW_UPDATE, _RST, number, 0)
            return
        stream = self.streams[number] = Stream(number)
        self.accepted.append(stream)
        self._queue(_WINDOW_UPDATE, _ACK, number, 0)

    def _forget_when_over(self, stream: Stream) -> None:
        if stream.is_over:
            self.streams.pop(stream.number, None)

    def _queue(self, kind: int, flags: int, number: int, length: int, data: memoryview | None = None) -> None:
        self._outgoing.append(_HEADER.pack(0, kind, flags, number, length))
        self.outgoing_bytes += _HEADER.size
        if data is not None:
            self._outgoing.append(bytes(data))  # the caller may change it after the send
            self.outgoing_bytes += length
