"""Messages of libp2p's protocols on a stream: protobuf, each behind its length as a varint."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from libp2p.exceptions import BaseLibp2pError
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited

from knode.transport.libp2p_connection import MuxedStream, StreamEnded

M = TypeVar("M", bound=Message)


async def read_message(stream: MuxedStream, kind: type[M], limit_bytes: int) -> M:
    """Read one message, and nothing behind it.

    Raises:
        StreamEnded: the stream ended.
        ValueError: it is longer than `limit_bytes`, or none of this kind.
    """
    message = kind()
    try:
        message.ParseFromString(await read_varint_prefixed_bytes_limited(stream, limit_bytes))
    except StreamEnded:
        raise
    except (BaseLibp2pError, DecodeError) as error:
        raise ValueError(f"no {kind.__name__}: {error}") from error
    return message


async def write_message(stream: MuxedStream, message: Message) -> None:
    """Write one message; raises StreamEnded."""
    await stream.write(encode_varint_prefixed(message.SerializeToString()))
