"""The codec: one encoding for each value, and small memory whatever arrives."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from klp_pair import initiator, responder, sessions

from knode.errors import Code, KnodeError
from knode.klp import (
    Acknowledge,
    Cancel,
    Context,
    Credit,
    Decoder,
    Event,
    Failure,
    Goodbye,
    Message,
    Request,
    Response,
    StreamEnd,
    StreamReset,
    encode,
    limits,
)
from knode.klp.frames import Kind
from knode.klp.objects import Domain, sign

MESSAGE = Decoder[Message](Message)

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
counters = st.integers(1, 2**64 - 1)
stream_ids = st.integers(1, 2**32 - 1)


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def text(limit: int) -> st.SearchStrategy[str]:
    return st.text(max_size=limit)


ids = st.one_of(st.just(b""), exactly(16))
contexts = st.builds(Context, ids, ids, st.one_of(st.just(b""), exactly(25)))
bodies = st.binary(max_size=300)
MESSAGES = st.one_of(
    st.builds(
        Request,
        counters,
        exactly(16),
        text(limits.MAX_NAME),
        st.integers(1, limits.MAX_TTL_MS),
        u32,
        contexts,
        bodies,
    ),
    st.builds(Response, counters, bodies),
    st.builds(Failure, counters, text(32), text(100), text(100)),
    st.builds(Acknowledge, st.lists(counters, min_size=1, max_size=256).map(tuple)),
    st.builds(Cancel, counters),
    st.builds(Event, text(limits.MAX_NAME), contexts, bodies),
    st.builds(Credit, stream_ids, u64),
    st.builds(StreamEnd, stream_ids, u64, exactly(32)),
    st.builds(StreamReset, stream_ids, text(32)),
    st.builds(Goodbye, text(32), text(100)),
)


@given(MESSAGES)
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    assert MESSAGE.decode(encode(message)) == message


@given(MESSAGES)
def test_an_independent_messagepack_reads_the_same_fields_in_order(message: Message) -> None:
    def plain(value: object) -> object:
        if hasattr(value, "__struct_fields__"):
            return [plain(getattr(value, name)) for name in value.__struct_fields__]
        return list(value) if isinstance(value, tuple) else value

    tag, *fields = msgpack.unpackb(encode(message), raw=False)
    assert fields == plain(message)
    assert tag == type(message).__struct_config__.tag


@given(MESSAGES)
def test_no_shorter_encoding_exists(message: Message) -> None:
    """The minimal encoder of another library writes the same bytes: canonical means shortest."""
    data = encode(message)
    assert msgpack.packb(msgpack.unpackb(data, raw=False), use_bin_type=True) == data


def decoded_or_refused(data: bytes) -> Message | None:
    """Decode, or fail with one of the two errors that a decoder has; any other is the test's."""
    try:
        return MESSAGE.decode(data)
    except KnodeError as error:
        if error.code not in (Code.BAD_FRAME, Code.NON_CANONICAL):
            raise
        return None


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_what_decodes_encodes_to_the_same_bytes_and_the_rest_has_a_name(data: bytes) -> None:
    message = decoded_or_refused(data)
    assert message is None or encode(message) == data


@given(MESSAGES, st.data())
def test_one_changed_byte_is_another_message_or_refused(message: Message, data: st.DataObject) -> None:
    encoded = encode(message)
    index = data.draw(st.integers(0, len(encoded) - 1))
    changed = bytearray(encoded)
    changed[index] ^= data.draw(st.integers(1, 255))
    assert decoded_or_refused(bytes(changed)) != message


def _forms_of_one() -> list[bytes]:
    return [
        b"\xcc\x01",
        b"\xcd\x00\x01",
        b"\xce\x00\x00\x00\x01",
        b"\xcf" + bytes(7) + b"\x01",
        b"\xd0\x01",
        b"\xd1\x00\x01",
        b"\xd2\x00\x00\x00\x01",
        b"\xd3" + bytes(7) + b"\x01",
    ]


@pytest.mark.parametrize("tag", [b"\x05", b"\xcc\x05", b"\xd0\x05"])
@pytest.mark.parametrize("array", [b"\x92", b"\xdc\x00\x02", b"\xdd\x00\x00\x00\x02"])
@pytest.mark.parametrize("number", [b"\x01", *_forms_of_one()])
def test_every_other_form_of_a_message_is_refused(tag: bytes, array: bytes, number: bytes) -> None:
    data = array + tag + number
    if data == encode(Cancel(1)):
        assert MESSAGE.decode(data) == Cancel(1)
        return
    with pytest.raises(KnodeError) as caught:
        MESSAGE.decode(data)
    assert caught.value.code in (Code.NON_CANONICAL, Code.BAD_FRAME)


@pytest.mark.parametrize(
    "data",
    [
        msgpack.packb([1, 2.0]),
        msgpack.packb([5, float("nan")]),
        msgpack.packb([5, None]),
        msgpack.packb([5, True]),
        msgpack.packb([5, "1"]),
        msgpack.packb([5, {}]),
        msgpack.packb({"counter": 1}),
        msgpack.packb([5, msgpack.ExtType(1, b"x")]),
        msgpack.packb([5, msgpack.Timestamp(1)]),
        msgpack.packb([5]),
        msgpack.packb([5, 1, 1]),
        msgpack.packb([5, 0]),
        msgpack.packb([5, -1]),
        msgpack.packb([]),
        msgpack.packb([2, 1, "text is no body"]),
        msgpack.packb([10, 1, b"bytes are no code"]),
        b"\x93\x0a\x01\xa1\xff",
        b"\x93\x0a\x01\xa3\xed\xa0\x80",
        msgpack.packb([4, []]),
        msgpack.packb([4, [1] * 257]),
        msgpack.packb([6, "t", [b"x", b"", b""], b""]),
        encode(Cancel(1)) + b"\x00",
        b"",
    ],
    ids=bytes.hex,
)
def test_what_is_no_message_is_a_bad_frame(data: bytes) -> None:
    with pytest.raises(KnodeError) as caught:
        MESSAGE.decode(data)
    assert caught.value.code is Code.BAD_FRAME


def test_a_context_cut_short_is_not_canonical() -> None:
    with pytest.raises(KnodeError) as caught:
        MESSAGE.decode(msgpack.packb([6, "t", [], b""]))
    assert caught.value.code is Code.NON_CANONICAL


# -- hostile bytes ------------------------------------------------------------------------------

HUGE = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdd\x00\x10\x00\x00",
    b"\xdc\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\x92\x04\xdd\xff\xff\xff\xff",
    b"\x92\x04\xdd\x00\x07\xff\xff",
    b"\x93\x02\x01\xc6\x7f\xff\xff\xff",
    b"\x91" * 400_000,
    b"\x92\x04" + b"\x91" * 400_000,
    b"\x92\x04\xdd\x00\x06\x00\x00" + b"\x01" * 0x60000,
    b"\xdd\x00\x06\x00\x00" + b"\x92\x05\x01" * 0x20000,
    b"\xdd\x00\x00\x00\x40" + (b"\x92\x04\xdd\x00\x00\x1f\xff" + b"\x01" * 0x1FFF) * 64,
]


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(KnodeError) as caught:
            action()
        assert caught.value.code in (Code.BAD_FRAME, Code.NON_CANONICAL, Code.TOO_LARGE)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("payload", HUGE, ids=lambda payload: payload[:8].hex())
def test_hostile_lengths_and_depths_stay_within_a_few_copies_of_the_frame(payload: bytes) -> None:
    a, b = sessions()
    member = bytes([Kind.BUNDLE]) + sign(
        a._key, Domain.BUNDLE, a._outgoing_header + struct.pack(">Q", 1) + payload
    )
    assert peak_bytes(lambda: b.receive(member)) < 6 * len(member) + 100_000
    stranger = bytes([Kind.HELLO]) + payload
    assert peak_bytes(lambda: responder().receive_hello(stranger)) < 100_000
    end = initiator()
    end.hello()
    refusing = bytes([Kind.REFUSE]) + payload
    assert peak_bytes(lambda: end.receive(refusing)) < 100_000


def test_every_kind_of_frame_of_any_length_of_zeros_has_a_named_end() -> None:
    for kind, length in itertools.product(range(256), (0, 1, 5, 64, 174, 175, 300)):
        _, b = sessions()
        with pytest.raises(KnodeError):
            b.receive(bytes([kind]) + bytes(length))
