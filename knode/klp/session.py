"""One session: signed bundles of messages in order, and streams of bulk data beside them.

Pure: `send`, `write` and `receive` change the state, `next_frame` says what goes out next. Messages go
before bulk data, and all that wait go together: one signature for up to 64 of them. Each bundle names its
first sequence number, which is exactly the next one, so nothing can be replayed, dropped or reordered.
A keepalive goes before both; of several only the latest waits.

The caller checks membership before it gives a frame to `receive`.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.klp import limits
from knode.klp.codec import Decoder, encode, encode_array
from knode.klp.frames import Kind, kind_of, refused
from knode.klp.handshake import Established
from knode.klp.keepalive import Keepalive, read_keepalive
from knode.klp.messages import (
    Acknowledge,
    Credit,
    Event,
    Message,
    Request,
    Response,
    StreamEnd,
    StreamReset,
)
from knode.klp.objects import SIGNATURE_BYTES, Domain, open_signed, sign
from knode.klp.streams import Streams

MESSAGE_LANE = 0
"""The ordered lane of messages; the header has room for more."""
_ADDRESS_BYTES = 96  # source, destination, session
_LANE_END = _ADDRESS_BYTES + 4
HEADER_BYTES = _LANE_END + 8
_HEADER_START = 1 + SIGNATURE_BYTES
_MESSAGES_START = _HEADER_START + HEADER_BYTES
MAX_BUNDLE_FRAME_BYTES = _MESSAGES_START + 3 + limits.MAX_BUNDLE_BYTES
_MIN_BUNDLE_FRAME_BYTES = _MESSAGES_START + 2
_DATA_START = 5  # kind, stream
_BUNDLE_KIND = bytes([Kind.BUNDLE])
_DATA_KIND = bytes([Kind.DATA])

_MESSAGE = Decoder[Message](Message)
_MESSAGES = Decoder[tuple[Message, ...]](
    Annotated[tuple[Message, ...], Meta(min_length=1, max_length=limits.MAX_BUNDLE_MESSAGES)]
)


class StreamData(Struct, frozen=True, gc=False):
    """Bytes that came on a stream, in order; not vouched for before the stream's `StreamEnd`."""

    stream: int
    data: bytes


Received: TypeAlias = Message | StreamData | Keepalive


class Session:
    """One end of an established session.

    Args:
        key: this node's.
        established: what the handshake gave.

    Limits: `limits.OUTBOX_MESSAGES` and `OUTBOX_BYTES` wait to be sent, `MAX_STREAMS` streams a direction.
    """

    def __init__(self, key: KeyPair, established: Established) -> None:
        self.established = established
        self._key = key
        self._peer = established.peer
        ours, theirs, session = key.public.raw, established.peer.raw, established.session_id
        self._lane = MESSAGE_LANE.to_bytes(4, "big")
        self._outgoing_header = ours + theirs + session + self._lane
        self._incoming_address = theirs + ours + session
        self._next_outgoing = 1
        self._next_incoming = 1
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._acknowledged: deque[int] = deque(maxlen=limits.ANSWERS)  # answers also go by their time
        self._streams = Streams(
            initiator=established.initiator, tell=lambda message: self._queue(encode(message))
        )
        self._keepalive: bytes | None = None  # the frame that waits
        self._keepalive_told_us = 0
        self._keepalive_heard_us = 0
        self._failure: KnodeError | None = None

    def send(self, message: Message) -> None:
        """Queue a message.

        Raises:
            KnodeError: RATE_LIMITED when the outbox is full or MAX_STREAMS are open, TOO_LARGE or
                INVALID_ARGUMENT when the message is not one that a peer would take (nothing is queued),
                or what ended the session.
        """
        self._check_alive()
        encoded = _encoded(message)
        if (
            len(self._outbox) >= limits.OUTBOX_MESSAGES
            or self._outbox_bytes + len(encoded) > limits.OUTBOX_BYTES
        ):
            raise KnodeError(Code.RATE_LIMITED, "too much waits to be sent to this node", "try again later")
        if isinstance(message, Request) and message.stream:
            self._streams.begin_sending(message.stream)
        self._queue(encoded)

    def acknowledge(self, counter: int) -> None:
        """Tell, with the next bundle, that an answer arrived; 256 of them go without waiting for one."""
        self._acknowledged.append(counter)

    def keep_alive(self, keepalive: Keepalive) -> None:
        """Let `keepalive` go out next, instead of one that still waits.

        Raises:
            KnodeError: INVALID_ARGUMENT when it is not one that a peer would take.
        """
        self._keepalive = keepalive.frame()
        self._keepalive_told_us = keepalive.sent_us

    @property
    def has_output(self) -> bool:
        """Whether `next_frame` has something."""
        return self._failure is None and (
            self._keepalive is not None or self._has_messages() or self._streams.has_data
        )

    def next_frame(self) -> bytes | None:
        """Return the next frame to send: a keepalive, a bundle of what waits, or data of one stream."""
        if self._failure is not None:
            return None
        if self._keepalive is not None:
            frame, self._keepalive = self._keepalive, None
            return frame
        if self._has_messages():
            return self._bundle()
        if self._streams.has_data:
            number, data = self._streams.next_data()
            return b"".join((_DATA_KIND, number.to_bytes(4, "big"), data))
        return None

    def receive(self, frame: bytes) -> list[Received]:
        """Check a frame and return what it brought, in order.

        Checked in order: kind, bounds, addressing, signature, sequence, encoding; then streams.
        StreamReset and Credit are returned so that a waiting writer can be woken.

        Raises:
            KnodeError: what is wrong, or what a REFUSE frame tells. The session is then dead: nothing
                goes out, and every later call raises the same error.
        """
        self._check_alive()
        try:
            match kind_of(frame):
                case Kind.BUNDLE:
                    return self._receive_bundle(frame)
                case Kind.DATA:
                    return self._receive_data(frame)
                case Kind.KEEPALIVE:
                    return [self._receive_keepalive(frame)]
                case Kind.REFUSE:
                    raise refused(frame)
                case kind:
                    raise KnodeError(Code.BAD_FRAME, f"a {kind.name} frame has no place in a session")
        except KnodeError as error:
            self._failure = error.bare()
            raise

    def open_stream(self) -> int:
        """Return a new stream's id.

        It is open once a Request that names it was sent, and before a later id is named.
        """
        return self._streams.new()

    def writable(self, stream: int) -> int:
        """Return how many bytes `write` takes now; CANCELLED when the stream was ended or reset."""
        self._check_alive()
        return self._streams.sender(stream).writable

    def write(self, stream: int, data: bytes | memoryview) -> None:
        """Give bytes to a stream; NO_CREDIT for more than `writable`, CANCELLED when it was reset."""
        self._check_alive()
        self._streams.write(stream, data)

    def end(self, stream: int) -> None:
        """End a stream after its last byte; CANCELLED when it was reset."""
        self._check_alive()
        self._streams.end(stream)

    def reset(self, stream: int, code: str) -> None:
        """Stop a stream of either direction; nothing happens when it is closed already."""
        self._streams.reset(stream, code)

    def consumed(self, stream: int, count: int) -> None:
        """Give back credit for bytes that were used up; nothing happens when the stream is closed."""
        self._streams.consumed(stream, count)

    def _receive_bundle(self, frame: bytes) -> list[Received]:
        if len(frame) > MAX_BUNDLE_FRAME_BYTES:
            raise KnodeError(Code.TOO_LARGE, "a bundle over its size limit")
        if len(frame) < _MIN_BUNDLE_FRAME_BYTES:
            raise KnodeError(Code.BAD_FRAME, "a bundle too short to be one")
        if not frame.startswith(self._incoming_address, _HEADER_START):
            raise KnodeError(Code.NOT_RECIPIENT, "a bundle for another node or session")
        if not frame.startswith(self._lane, _HEADER_START + _ADDRESS_BYTES):
            raise KnodeError(Code.BAD_FRAME, "a bundle on an unknown lane")
        body = open_signed(self._peer, Domain.BUNDLE, frame[1:])
        sequence = int.from_bytes(body[_LANE_END:HEADER_BYTES], "big")
        if sequence != self._next_incoming:
            raise KnodeError(Code.REPLAY, f"sequence {sequence} came, {self._next_incoming} is next")
        messages = _MESSAGES.decode(body[HEADER_BYTES:])
        self._next_incoming += len(messages)
        return [message for message in messages if self._streams.take(message)]

    def _receive_data(self, frame: bytes) -> list[Received]:
        if len(frame) > _DATA_START + limits.DATA_BYTES:
            raise KnodeError(Code.TOO_LARGE, "a DATA frame over its size limit")
        if len(frame) <= _DATA_START:
            raise KnodeError(Code.BAD_FRAME, "a DATA frame without data")
        number, data = int.from_bytes(frame[1:_DATA_START], "big"), frame[_DATA_START:]
        return [StreamData(number, data)] if self._streams.take_data(number, data) else []

    def _receive_keepalive(self, frame: bytes) -> Keepalive:
        keepalive = read_keepalive(frame)
        if keepalive.sent_us < self._keepalive_heard_us or keepalive.echo_us > self._keepalive_told_us:
            raise KnodeError(Code.BAD_FRAME, "a KEEPALIVE frame with times that cannot be")
        self._keepalive_heard_us = keepalive.sent_us
        return keepalive

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure.bare()

    def _has_messages(self) -> bool:
        return bool(
            self._outbox or self._streams.has_credits or len(self._acknowledged) >= limits.MAX_ACKNOWLEDGED
        )

    def _queue(self, encoded: bytes) -> None:
        self._outbox.append(encoded)
        self._outbox_bytes += len(encoded)

    def _bundle(self) -> bytes:
        messages: list[bytes] = []
        if self._acknowledged:
            count = min(len(self._acknowledged), limits.MAX_ACKNOWLEDGED)
            counters = tuple(self._acknowledged.popleft() for _ in range(count))
            messages.append(encode(Acknowledge(counters)))
        while self._streams.has_credits and len(messages) < limits.MAX_BUNDLE_MESSAGES:
            messages.append(encode(self._streams.next_credit()))
        size = sum(map(len, messages))
        while self._outbox and len(messages) < limits.MAX_BUNDLE_MESSAGES:
            size += len(self._outbox[0])
            if size > limits.MAX_BUNDLE_BYTES:
                break
            messages.append(self._outbox.popleft())
            self._outbox_bytes -= len(messages[-1])
        sequence = self._next_outgoing.to_bytes(8, "big")
        self._next_outgoing += len(messages)
        body = b"".join((self._outgoing_header, sequence, encode_array(messages)))
        return _BUNDLE_KIND + sign(self._key, Domain.BUNDLE, body)


def _encoded(message: Message) -> bytes:
    """Return a message's bytes; what the peer would refuse is refused here."""
    if isinstance(message, (Credit, StreamEnd, StreamReset)):
        raise KnodeError(Code.INVALID_ARGUMENT, "the session itself speaks of streams")
    if isinstance(message, (Request, Response, Event)) and len(message.body) > limits.MAX_BODY_BYTES:
        raise KnodeError(Code.TOO_LARGE, f"a body of more than {limits.MAX_BODY_BYTES} bytes")
    encoded = encode(message)
    try:
        _MESSAGE.decode(encoded)
    except KnodeError as error:
        raise KnodeError(Code.INVALID_ARGUMENT, f"no message of the protocol: {error}") from error
    return encoded
