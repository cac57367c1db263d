"""One session: signed bundles of messages in order, and streams of bulk data beside them.

Pure: `send`, `write` and `receive` change the state, `next_frame` says what goes out next. Messages go
before bulk data, and all that wait go together: one signature for up to 64 of them. Each bundle names its
first sequence number, which is exactly the next one, so nothing can be replayed, dropped or reordered.

A stream belongs to the Request that names it and carries bytes from the requester to the node it asks.
Its sender closes it, by a StreamEnd or a StreamReset; a receiver that wants no more sends a StreamReset
and drops what is on its way until the sender has closed. So both ends count open streams alike.

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
from knode.klp.streams import ReceivingStream, SendingStream

MESSAGE_LANE = 0
"""The ordered lane of messages; the header has room for more."""
_ADDRESS_BYTES = 96  # source, destination, session
_LANE_END = _ADDRESS_BYTES + 4
HEADER_BYTES = _LANE_END + 8
MAX_BUNDLE_FRAME_BYTES = 1 + SIGNATURE_BYTES + HEADER_BYTES + 3 + limits.MAX_BUNDLE_BYTES
_MIN_BUNDLE_FRAME_BYTES = 1 + SIGNATURE_BYTES + HEADER_BYTES + 2
_DATA_HEADER_BYTES = 5  # kind, stream
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


Received: TypeAlias = Message | StreamData


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
        lane = MESSAGE_LANE.to_bytes(4, "big")
        self._outgoing_header = ours + theirs + session + lane
        self._incoming_address = theirs + ours + session
        self._incoming_lane = lane
        self._next_outgoing = 1
        self._next_incoming = 1
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._acknowledged: deque[int] = deque(maxlen=limits.ANSWERS)  # an answer also goes by its time
        self._credits: dict[int, Credit] = {}
        self._opened = -1 if established.initiator else 0  # last id given out: odd for the initiator
        self._named = 0  # last of our ids that a Request named
        self._named_by_peer = 0
        self._sending: dict[int, SendingStream] = {}
        self._receiving: dict[int, ReceivingStream] = {}
        self._ready: deque[SendingStream] = deque()  # streams with bytes to send, in turn
        self._failure: KnodeError | None = None

    # -- messages out ---------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Queue a message.

        Raises:
            KnodeError: RATE_LIMITED when the outbox is full or MAX_STREAMS are open, TOO_LARGE or
                INVALID_ARGUMENT when the message is not one that a peer would take (nothing is queued),
                or what ended the session.
        """
        self._check_alive()
        encoded = self._encode(message)
        if (
            len(self._outbox) >= limits.OUTBOX_MESSAGES
            or self._outbox_bytes + len(encoded) > limits.OUTBOX_BYTES
        ):
            raise KnodeError(Code.RATE_LIMITED, "too much waits to be sent to this node", "try again later")
        if isinstance(message, Request) and message.stream:
            self._begin_sending(message.stream)
        self._queue(encoded)

    def acknowledge(self, counter: int) -> None:
        """Tell, with the next bundle, that an answer arrived; 256 of them go without waiting for one."""
        self._acknowledged.append(counter)

    @property
    def has_output(self) -> bool:
        """Whether `next_frame` has something."""
        return self._failure is None and bool(
            self._outbox or self._ready or self._credits or len(self._acknowledged) >= limits.MAX_ACKNOWLEDGED
        )

    def next_frame(self) -> bytes | None:
        """Return the next frame to send, or None: a bundle of what waits, else data of one stream."""
        if self._failure is not None:
            return None
        if self._outbox or self._credits or len(self._acknowledged) >= limits.MAX_ACKNOWLEDGED:
            return self._bundle()
        if self._ready:
            return self._data()
        return None

    # -- streams out ----------------------------------------------------------------------------

    def open_stream(self) -> int:
        """Return a new stream's id. It is open once a sent Request names it, before the next id is named."""
        self._opened += 2
        return self._opened

    def writable(self, stream: int) -> int:
        """Return how many bytes `write` takes now; CANCELLED when the stream was reset."""
        return self._sender(stream).writable

    def write(self, stream: int, data: bytes | memoryview) -> None:
        """Give bytes to a stream; NO_CREDIT for more than `writable`, CANCELLED when it was reset."""
        sending = self._sender(stream)
        waited = sending.has_data
        sending.write(data)
        if not waited and sending.has_data:
            self._ready.append(sending)

    def end(self, stream: int) -> None:
        """End a stream after its last byte; CANCELLED when it was reset."""
        sending = self._sender(stream)
        sending.end()
        if sending.finished:
            self._close(sending)

    def reset(self, stream: int, code: str) -> None:
        """Stop a stream of either direction; nothing happens when it is closed already."""
        if stream in self._sending:
            self._drop_sender(stream)
        elif stream in self._receiving and not self._receiving[stream].discarding:
            self._receiving[stream].discarding = True
            self._credits.pop(stream, None)
        else:
            return
        self._queue(encode(StreamReset(stream, code)))

    def consumed(self, stream: int, count: int) -> None:
        """Give back credit for bytes that were used up; nothing happens when the stream is closed."""
        receiving = self._receiving.get(stream)
        if receiving is None or receiving.discarding:
            return
        credit = receiving.consume(count)
        if credit is not None:
            self._credits[stream] = credit

    # -- in -------------------------------------------------------------------------------------

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
                case Kind.REFUSE:
                    raise refused(frame)
                case kind:
                    raise KnodeError(Code.BAD_FRAME, f"a {kind.name} frame has no place in a session")
        except KnodeError as error:
            self._failure = error
            raise

    def _receive_bundle(self, frame: bytes) -> list[Received]:
        if len(frame) > MAX_BUNDLE_FRAME_BYTES:
            raise KnodeError(Code.TOO_LARGE, "a bundle over its size limit")
        if len(frame) < _MIN_BUNDLE_FRAME_BYTES:
            raise KnodeError(Code.BAD_FRAME, "a bundle too short to be one")
        header_start = 1 + SIGNATURE_BYTES
        if not frame.startswith(self._incoming_address, header_start):
            raise KnodeError(Code.NOT_RECIPIENT, "a bundle for another node or session")
        if not frame.startswith(self._incoming_lane, header_start + _ADDRESS_BYTES):
            raise KnodeError(Code.BAD_FRAME, "a bundle on an unknown lane")
        body = open_signed(self._peer, Domain.BUNDLE, frame[1:])
        sequence = int.from_bytes(body[_LANE_END:HEADER_BYTES], "big")
        if sequence != self._next_incoming:
            raise KnodeError(Code.REPLAY, f"sequence {sequence} came, {self._next_incoming} is next")
        messages = _MESSAGES.decode(body[HEADER_BYTES:])
        self._next_incoming += len(messages)
        return [message for message in messages if self._take(message)]

    def _take(self, message: Message) -> bool:
        """Keep the streams' books; False for what concerns a stream that is closed on this side."""
        match message:
            case Request(stream=stream) if stream:
                self._begin_receiving(stream)
            case Credit(stream=stream, total_bytes=total_bytes):
                sending = self._sending_or_closed(stream)
                if sending is None:
                    return False
                sending.grant(total_bytes)
            case StreamEnd(stream=stream):
                receiving = self._close_receiver(stream)
                receiving.check(message)
                return not receiving.discarding
            case StreamReset(stream=stream, code=code):
                if self._is_ours(stream):
                    if self._sending_or_closed(stream) is None:
                        return False
                    self.reset(stream, code)
                else:
                    return not self._close_receiver(stream).discarding
        return True

    def _receive_data(self, frame: bytes) -> list[Received]:
        if len(frame) > _DATA_HEADER_BYTES + limits.DATA_BYTES:
            raise KnodeError(Code.TOO_LARGE, "a DATA frame over its size limit")
        if len(frame) <= _DATA_HEADER_BYTES:
            raise KnodeError(Code.BAD_FRAME, "a DATA frame without data")
        stream = int.from_bytes(frame[1:_DATA_HEADER_BYTES], "big")
        receiving = self._receiving.get(stream)
        if receiving is None:
            raise KnodeError(Code.BAD_FRAME, f"data for stream {stream}, which is not open")
        data = frame[_DATA_HEADER_BYTES:]
        receiving.receive(data)
        return [] if receiving.discarding else [StreamData(stream, data)]

    # -- inner parts ----------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure

    @staticmethod
    def _encode(message: Message) -> bytes:
        if isinstance(message, (Credit, StreamEnd, StreamReset)):
            raise KnodeError(Code.INVALID_ARGUMENT, "the session itself speaks of streams")
        if isinstance(message, (Request, Response, Event)) and len(message.body) > limits.MAX_BODY_BYTES:
            raise KnodeError(Code.TOO_LARGE, f"a body of more than {limits.MAX_BODY_BYTES} bytes")
        encoded = encode(message)
        try:
            _MESSAGE.decode(encoded)  # what the peer would refuse is refused here
        except KnodeError as error:
            raise KnodeError(Code.INVALID_ARGUMENT, f"no message of the protocol: {error}") from error
        return encoded

    def _queue(self, encoded: bytes) -> None:
        self._outbox.append(encoded)
        self._outbox_bytes += len(encoded)

    def _bundle(self) -> bytes:
        waiting: list[bytes] = []
        if self._acknowledged:
            count = min(len(self._acknowledged), limits.MAX_ACKNOWLEDGED)
            waiting.append(encode(Acknowledge(tuple(self._acknowledged.popleft() for _ in range(count)))))
        size = len(waiting[0]) if waiting else 0
        while self._credits and len(waiting) < limits.MAX_BUNDLE_MESSAGES:
            waiting.append(encode(self._credits.pop(next(iter(self._credits)))))
            size += len(waiting[-1])
        while self._outbox and len(waiting) < limits.MAX_BUNDLE_MESSAGES:
            size += len(self._outbox[0])
            if size > limits.MAX_BUNDLE_BYTES:
                break
            waiting.append(self._outbox.popleft())
            self._outbox_bytes -= len(waiting[-1])
        body = self._outgoing_header + self._next_outgoing.to_bytes(8, "big") + encode_array(waiting)
        self._next_outgoing += len(waiting)
        return _BUNDLE_KIND + sign(self._key, Domain.BUNDLE, body)

    def _data(self) -> bytes:
        sending = self._ready.popleft()
        frame = b"".join((_DATA_KIND, sending.number.to_bytes(4, "big"), sending.take()))
        if sending.has_data:
            self._ready.append(sending)
        elif sending.finished:
            self._close(sending)
        return frame

    def _is_ours(self, stream: int) -> bool:
        return stream % 2 == self._opened % 2

    def _begin_sending(self, stream: int) -> None:
        if not self._is_ours(stream) or not self._named < stream <= self._opened:
            raise KnodeError(Code.INVALID_ARGUMENT, f"stream {stream} is not the one opened last")
        if len(self._sending) >= limits.MAX_STREAMS:
            raise KnodeError(Code.RATE_LIMITED, f"{limits.MAX_STREAMS} streams are open", "try again later")
        self._named = stream
        self._sending[stream] = SendingStream(stream)

    def _begin_receiving(self, stream: int) -> None:
        if self._is_ours(stream) or stream <= self._named_by_peer:
            raise KnodeError(Code.BAD_FRAME, f"stream {stream} is not a new one of its sender")
        if len(self._receiving) >= limits.MAX_STREAMS:
            raise KnodeError(Code.RATE_LIMITED, f"more than {limits.MAX_STREAMS} streams at once")
        self._named_by_peer = stream
        self._receiving[stream] = ReceivingStream(stream)

    def _sender(self, stream: int) -> SendingStream:
        self._check_alive()
        sending = self._sending.get(stream)
        if sending is None:
            raise KnodeError(Code.CANCELLED, f"stream {stream} is not open: it was ended or reset")
        return sending

    def _sending_or_closed(self, stream: int) -> SendingStream | None:
        """Return our stream that the peer speaks of; None when it is closed, an error when it never was."""
        if not self._is_ours(stream) or stream > self._named:
            raise KnodeError(Code.BAD_FRAME, f"stream {stream} was never opened")
        return self._sending.get(stream)

    def _close(self, sending: SendingStream) -> None:
        del self._sending[sending.number]
        self._queue(encode(sending.closing()))

    def _drop_sender(self, stream: int) -> None:
        sending = self._sending.pop(stream)
        if sending.has_data:
            self._ready.remove(sending)

    def _close_receiver(self, stream: int) -> ReceivingStream:
        receiving = self._receiving.pop(stream, None)
        if receiving is None:
            raise KnodeError(Code.BAD_FRAME, f"stream {stream} is not open")
        self._credits.pop(stream, None)
        return receiving
