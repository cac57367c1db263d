"""MessagePack with one encoding for each value: typed, bounded, canonical.

Values are msgspec Structs encoded as arrays: no maps, floats or extension types. MessagePack knows
several encodings of one value, so what is decoded is encoded again and must give the same bytes.
Untrusted bytes are never decoded without a type: one megabyte can become seventy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from knode.errors import Code, KnodeError

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()

encode = _encoder.encode
"""`encode(value) -> bytes`: the one encoding of a value."""


def encode_array(items: Sequence[bytes]) -> bytes:
    """Return the encoding of an array of at most 65,535 items that are encoded already."""
    count = len(items)
    header = bytes([0x90 | count]) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    return header + b"".join(items)


class Decoder(Generic[T]):
    """Decodes one type. `kind` is the type with its bounds, as `Annotated[…, Meta(…)]` or a Struct."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)

    def decode(self, data: bytes) -> T:
        """Return the value that `data` encodes.

        Raises:
            KnodeError: BAD_FRAME when it does not fit the type or its bounds, NON_CANONICAL when the
                value has another encoding.
        """
        try:
            value = self._decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise KnodeError(Code.BAD_FRAME, f"bytes that do not decode: {error}") from error
        if encode(value) != data:
            raise KnodeError(Code.NON_CANONICAL, "a value that is not in its one encoding")
        return value
