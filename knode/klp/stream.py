"""The two ends of one stream of bulk data.

DATA frames are not signed one by one: TLS carries them, and one signed digest at the end vouches for the
whole. Until then a receiver must not act on what it got. Credit is an absolute total, so that a grant
told twice or late means the same.
"""

from __future__ import annotations

import hashlib

from knode.errors import Code, KnodeError
from knode.klp import limits
from knode.klp.messages import Credit, StreamEnd


class SendingStream:
    """What one stream still has to send, within its credit."""

    __slots__ = ("_accepted", "_buffer", "_credit", "_digest", "_ended", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self._buffer = bytearray()
        self._credit = limits.FIRST_CREDIT_BYTES
        self._accepted = 0
        self._digest = hashlib.sha256()
        self._ended = False

    @property
    def writable(self) -> int:
        """Bytes that may be given now: the credit left, and room in the buffer."""
        if self._ended:
            return 0
        return min(self._credit - self._accepted, limits.UNSENT_BYTES - len(self._buffer))

    @property
    def has_data(self) -> bool:
        """Whether bytes wait; what waits always has credit."""
        return bool(self._buffer)

    @property
    def finished(self) -> bool:
        """Whether it was ended and all bytes are out."""
        return self._ended and not self._buffer

    def write(self, data: bytes | memoryview) -> None:
        """Take `data`, at most `writable` bytes; NO_CREDIT for more."""
        if len(data) > self.writable:
            raise KnodeError(Code.NO_CREDIT, f"stream {self.number} takes {self.writable} bytes now")
        self._buffer += data
        self._digest.update(data)
        self._accepted += len(data)

    def end(self) -> None:
        """Take nothing more."""
        self._ended = True

    def grant(self, total_bytes: int) -> None:
        """Take the receiver's credit; it never shrinks."""
        if total_bytes < self._credit:
            raise KnodeError(Code.BAD_FRAME, "a credit below an earlier one")
        self._credit = total_bytes

    def take(self) -> bytes:
        """Return and forget the next bytes, as many as one DATA frame carries."""
        data = bytes(self._buffer[: limits.DATA_BYTES])
        del self._buffer[: limits.DATA_BYTES]
        return data

    def closing(self) -> StreamEnd:
        """Return the message that ends the stream."""
        return StreamEnd(self.number, self._accepted, self._digest.digest())


class ReceivingStream:
    """What one stream may still bring, and the digest of what it brought."""

    __slots__ = ("_consumed", "_digest", "_granted", "_received", "discarding", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.discarding = False
        """We asked the sender to stop: what was on its way is dropped."""
        self._received = 0
        self._consumed = 0
        self._granted = limits.FIRST_CREDIT_BYTES
        self._digest = hashlib.sha256()

    def receive(self, data: bytes) -> None:
        """Count and digest `data`; NO_CREDIT when it is more than was granted."""
        self._received += len(data)
        if self._received > self._granted:
            raise KnodeError(Code.NO_CREDIT, f"stream {self.number} brought more than was granted")
        if not self.discarding:
            self._digest.update(data)

    def consume(self, count: int) -> Credit | None:
        """Note that `count` bytes were used up; return a new grant when half a window was."""
        self._consumed += count
        if self._consumed > self._received:
            raise KnodeError(Code.INVALID_ARGUMENT, "more bytes consumed than received")
        total = self._consumed + limits.FIRST_CREDIT_BYTES
        if total - self._granted < limits.FIRST_CREDIT_BYTES // 2:
            return None
        self._granted = total
        return Credit(self.number, total)

    def check(self, end: StreamEnd) -> None:
        """Raise BAD_SIGNATURE unless `end` signs exactly what was received."""
        if not self.discarding and (end.size, end.digest) != (self._received, self._digest.digest()):
            raise KnodeError(Code.BAD_SIGNATURE, f"stream {self.number} is not what its sender signed")
