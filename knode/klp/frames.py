"""The outermost layer: `kind (1 byte) || payload`, one frame of a link."""

from __future__ import annotations

from enum import IntEnum

from msgspec import Struct

from knode.errors import Code, KnodeError
from knode.klp import limits
from knode.klp.codec import Decoder, encode
from knode.klp.messages import CodeName, ErrorMessage, NextStep, error_fields, error_of


class Kind(IntEnum):
    """What a frame is; its first byte."""

    HELLO = 1
    WELCOME = 2
    PROOF = 3
    REFUSE = 4
    BUNDLE = 5
    DATA = 6
    KEEPALIVE = 7


_KINDS = {kind.value: kind for kind in Kind}


class Refusal(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """Why a node closes the link. It is not signed: it can only end what a cut wire could end too."""

    code: CodeName
    message: ErrorMessage
    next_step: NextStep


_REFUSAL = Decoder[Refusal](Refusal)


def kind_of(frame: bytes) -> Kind:
    """Return the kind of a frame; BAD_FRAME when it is empty or of no known kind."""
    kind = _KINDS.get(frame[0]) if frame else None
    if kind is None:
        raise KnodeError(Code.BAD_FRAME, "a frame of no known kind")
    return kind


def refusal(error: KnodeError) -> bytes:
    """Return the REFUSE frame to send before the link is closed."""
    return bytes([Kind.REFUSE]) + encode(Refusal(*error_fields(error)))


def refused(frame: bytes) -> KnodeError:
    """Return the error that a REFUSE frame tells; BAD_FRAME when it is malformed."""
    if len(frame) > limits.MAX_REFUSE_BYTES:
        return KnodeError(Code.TOO_LARGE, "a refusal over its size limit")
    try:
        told = _REFUSAL.decode(frame[1:])
    except KnodeError as error:
        return error
    return error_of(told.code, told.message, told.next_step)
