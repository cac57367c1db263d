"""What is said on one hop, in a session. Never forwarded, never stored.

Each message is a MessagePack array: its tag, then its fields in this order. docs/klp.md has the table.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from knode.errors import TABLE, Code, KnodeError, LocalError
from knode.klp import limits

U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
U64 = Annotated[int, Meta(ge=0)]  # MessagePack itself ends at 2^64 - 1
Counter = Annotated[int, Meta(ge=1)]
"""A request's number, unique for a source's boot; a later request has a greater one."""
StreamId = Annotated[int, Meta(ge=1, le=0xFFFF_FFFF)]
Boot = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""Random for each start of a process: tells whether it is still the one that was asked."""
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Body = Annotated[bytes, Meta(max_length=limits.MAX_BODY_BYTES)]
Name = Annotated[str, Meta(max_length=limits.MAX_NAME)]
CodeName = Annotated[str, Meta(max_length=limits.MAX_CODE)]
ErrorMessage = Annotated[str, Meta(max_length=limits.MAX_ERROR_MESSAGE)]
NextStep = Annotated[str, Meta(max_length=limits.MAX_NEXT_STEP)]

_CORRELATION_BYTES = (0, 16)
_TRACE_BYTES = (0, 25)


class Context(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """What a message belongs to. Each field is empty or of its one length.

    Args:
        correlation: 16 bytes, the same for all that one piece of work causes.
        causation: 16 bytes, what caused this very message.
        trace: 25 bytes, the W3C traceparent in binary: trace id 16, parent id 8, flags 1.
    """

    correlation: bytes = b""
    causation: bytes = b""
    trace: bytes = b""

    def __post_init__(self) -> None:
        if (
            len(self.correlation) not in _CORRELATION_BYTES
            or len(self.causation) not in _CORRELATION_BYTES
            or len(self.trace) not in _TRACE_BYTES
        ):
            raise ValueError("a context has ids of 0 or 16 bytes and a trace of 0 or 25")


class Request(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=1):
    """Ask for something to be done at most once. Asked again, it is the same but for its stream.

    Args:
        counter: its number, from 1; see `knode.klp.answers`.
        destination_boot: the boot that is asked; any other answers UNKNOWN.
        ttl_ms: how long, from its arrival, it may take; milliseconds.
        stream: the stream whose data come with it; 0 for none.
    """

    counter: Counter
    destination_boot: Boot
    method: Name
    ttl_ms: Annotated[int, Meta(ge=1, le=limits.MAX_TTL_MS)]
    stream: U32
    context: Context
    body: Body


class Response(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=2):
    """The request was done."""

    counter: Counter
    body: Body


class Failure(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=3):
    """The request was not done, or not to its end; `code` of the error table says how."""

    counter: Counter
    code: CodeName
    message: ErrorMessage
    next_step: NextStep

    @staticmethod
    def of(counter: int, error: KnodeError) -> Failure:
        """Return the failure that tells `error`, cut to the limits."""
        return Failure(counter, *error_fields(error))

    def error(self) -> KnodeError:
        """Return the error that it tells. A code that is not in the table becomes INTERNAL."""
        return error_of(self.code, self.message, self.next_step)


class Acknowledge(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=4):
    """These answers have arrived: the receiver may forget them."""

    counters: Annotated[tuple[Counter, ...], Meta(min_length=1, max_length=limits.MAX_ACKNOWLEDGED)]


class Cancel(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=5):
    """The answer to this request is no longer wanted; one still comes, often a Failure CANCELLED."""

    counter: Counter


class Event(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=6):
    """Something happened. Told once, not answered, lost with its session."""

    topic: Name
    context: Context
    body: Body


class Credit(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=8):
    """A stream may carry `total_bytes` since its start."""

    stream: StreamId
    total_bytes: U64


class StreamEnd(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=9):
    """All of a stream was sent: its size, and the SHA-256 that signs what DATA frames carried."""

    stream: StreamId
    size: U64
    digest: Hash


class StreamReset(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=10):
    """A stream ends before its end. From its receiver: please stop. From its sender: nothing follows."""

    stream: StreamId
    code: CodeName


class Goodbye(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True, tag=11):
    """The session is closed in order; the last message."""

    code: CodeName
    message: ErrorMessage


Message: TypeAlias = (
    Request | Response | Failure | Acknowledge | Cancel | Event | Credit | StreamEnd | StreamReset | Goodbye
)
Answer: TypeAlias = Response | Failure


def error_fields(error: KnodeError) -> tuple[str, str, str]:
    """Return code, message and next step of an error, cut to what travels."""
    if isinstance(error, LocalError):
        return error.code.value, TABLE[error.code].text, "that node's log has the details"
    return (
        error.code.value,
        _printable(error.message, limits.MAX_ERROR_MESSAGE),
        _printable(error.next_step, limits.MAX_NEXT_STEP),
    )


def error_of(code: str, message: str, next_step: str) -> KnodeError:
    """Return the error that another node told; a code that is not in the table becomes INTERNAL."""
    known = Code(code) if code in Code.__members__ else Code.INTERNAL
    return KnodeError(
        known,
        _printable(message, limits.MAX_ERROR_MESSAGE),
        _printable(next_step, limits.MAX_NEXT_STEP),
    )


def _printable(text: str, limit: int) -> str:
    # Another node's words end in terminals and logs: no control characters, no lone surrogates.
    return "".join(char if char.isprintable() else "�" for char in text[:limit])
