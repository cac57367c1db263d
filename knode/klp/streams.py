"""All streams of one session, both ways: which are open, who closes them, whose turn it is.

A stream belongs to the Request that names it and carries bytes from the requester to the node it asks.
Its sender closes it, by a StreamEnd or a StreamReset; a receiver that wants no more sends a StreamReset
and drops what is on its way until the sender has closed. So both ends count open streams alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from knode.errors import Code, KnodeError
from knode.klp import limits
from knode.klp.messages import Credit, Message, Request, StreamEnd, StreamReset
from knode.klp.stream import ReceivingStream, SendingStream


class Streams:
    """The books of a session's streams.

    Args:
        initiator: whether this end opened the session; its streams are odd.
        tell: queues a message for the other end, after all that is queued already.
    """

    def __init__(self, *, initiator: bool, tell: Callable[[StreamEnd | StreamReset], None]) -> None:
        self._tell = tell
        self._parity = 1 if initiator else 0
        self._handed_out = -1 if initiator else 0
        self._named = 0  # the last of ours that a Request named
        self._named_by_peer = 0
        self._sending: dict[int, SendingStream] = {}
        self._receiving: dict[int, ReceivingStream] = {}
        self._ready: deque[SendingStream] = deque()  # with bytes to send, in turn
        self._credits: dict[int, Credit] = {}

    # What this end does.

    def new(self) -> int:
        """Return an id that was not used yet."""
        self._handed_out += 2
        return self._handed_out

    def begin_sending(self, number: int) -> None:
        """Open one of ours, because a Request that names it is sent.

        Raises:
            KnodeError: RATE_LIMITED when MAX_STREAMS are open, INVALID_ARGUMENT when it is not new.
        """
        if not self._is_ours(number) or not self._named < number <= self._handed_out:
            raise KnodeError(Code.INVALID_ARGUMENT, f"stream {number} is not the one opened last")
        if len(self._sending) >= limits.MAX_STREAMS:
            raise KnodeError(Code.RATE_LIMITED, f"{limits.MAX_STREAMS} streams are open", "try again later")
        self._named = number
        self._sending[number] = SendingStream(number)

    def sender(self, number: int) -> SendingStream:
        """Return one of ours; CANCELLED when it is not open any more."""
        sending = self._sending.get(number)
        if sending is None:
            raise KnodeError(Code.CANCELLED, f"stream {number} is not open: it was ended or reset")
        return sending

    def write(self, number: int, data: bytes | memoryview) -> None:
        """Take bytes to send; NO_CREDIT for more than is writable."""
        sending = self.sender(number)
        waited = sending.has_data
        sending.write(data)
        if not waited and sending.has_data:
            self._ready.append(sending)

    def end(self, number: int) -> None:
        """End one of ours after its last byte."""
        sending = self.sender(number)
        sending.end()
        if sending.finished:
            self._close(sending)

    def reset(self, number: int, code: str) -> None:
        """Stop a stream of either direction; nothing happens when it is closed or stopped already."""
        sending, receiving = self._sending.pop(number, None), self._receiving.get(number)
        if sending is not None:
            if sending.has_data:
                self._ready.remove(sending)
        elif receiving is not None and not receiving.discarding:
            receiving.discarding = True
            self._credits.pop(number, None)
        else:
            return
        self._tell(StreamReset(number, code))

    def consumed(self, number: int, count: int) -> None:
        """Give back credit; nothing happens when the stream is closed or stopped."""
        receiving = self._receiving.get(number)
        if receiving is None or receiving.discarding:
            return
        credit = receiving.consume(count)
        if credit is not None:
            self._credits[number] = credit

    @property
    def has_data(self) -> bool:
        """Whether bytes wait to be sent."""
        return bool(self._ready)

    def next_data(self) -> tuple[int, bytes]:
        """Return the next bytes to send, of the stream whose turn it is."""
        sending = self._ready.popleft()
        data = sending.take()
        if sending.has_data:
            self._ready.append(sending)
        elif sending.finished:
            self._close(sending)
        return sending.number, data

    @property
    def has_credits(self) -> bool:
        """Whether a grant waits to be sent."""
        return bool(self._credits)

    def next_credit(self) -> Credit:
        """Return a grant to send; of each stream only the latest waits."""
        return self._credits.pop(next(iter(self._credits)))

    # What the other end did. Every error ends the session.

    def take(self, message: Message) -> bool:
        """Keep the books; False for a message that is no news, since the stream is closed on this side."""
        match message:
            case Request(stream=number) if number:
                self._begin_receiving(number)
            case Credit(stream=number, total_bytes=total_bytes):
                sending = self._sending_or_closed(number)
                if sending is None:
                    return False
                sending.grant(total_bytes)
            case StreamEnd(stream=number):
                receiving = self._close_receiver(number)
                receiving.check(message)
                return not receiving.discarding
            case StreamReset(stream=number, code=code) if self._is_ours(number):
                if self._sending_or_closed(number) is None:
                    return False
                self.reset(number, code)
            case StreamReset(stream=number):
                return not self._close_receiver(number).discarding
        return True

    def take_data(self, number: int, data: bytes) -> bool:
        """Count and digest data; False when they are dropped."""
        receiving = self._receiving.get(number)
        if receiving is None:
            raise KnodeError(Code.BAD_FRAME, f"data for stream {number}, which is not open")
        receiving.receive(data)
        return not receiving.discarding

    def _is_ours(self, number: int) -> bool:
        return number % 2 == self._parity

    def _begin_receiving(self, number: int) -> None:
        if self._is_ours(number) or number <= self._named_by_peer:
            raise KnodeError(Code.BAD_FRAME, f"stream {number} is not a new one of its sender")
        if len(self._receiving) >= limits.MAX_STREAMS:
            raise KnodeError(Code.RATE_LIMITED, f"more than {limits.MAX_STREAMS} streams at once")
        self._named_by_peer = number
        self._receiving[number] = ReceivingStream(number)

    def _sending_or_closed(self, number: int) -> SendingStream | None:
        """Return one of ours that the other end speaks of, None when it is closed; it must have been open."""
        if not self._is_ours(number) or number > self._named:
            raise KnodeError(Code.BAD_FRAME, f"stream {number} was never opened")
        return self._sending.get(number)

    def _close(self, sending: SendingStream) -> None:
        del self._sending[sending.number]
        self._tell(sending.closing())

    def _close_receiver(self, number: int) -> ReceivingStream:
        receiving = self._receiving.pop(number, None)
        if receiving is None:
            raise KnodeError(Code.BAD_FRAME, f"stream {number} is not open")
        self._credits.pop(number, None)
        return receiving
