"""Keepalives: one frame of one size, ahead of all else, and nothing odd is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from klp_pair import frames_of, request, sessions

from knode.errors import Code, KnodeError
from knode.klp import Keepalive, Load, StreamData
from knode.klp.frames import Kind
from knode.klp.keepalive import KEEPALIVE_BYTES, read_keepalive

IDLE = Load(0, 0, 1, 0)
u16, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 64))
LOADS = st.builds(Load, u16, u16, u16, st.integers(0, 100))


@given(st.builds(Keepalive, st.integers(1, 2**64 - 1), u64, u64, LOADS))
def test_every_keepalive_comes_back_as_it_was_in_32_bytes(keepalive: Keepalive) -> None:
    frame = keepalive.frame()
    assert len(frame) == KEEPALIVE_BYTES == 32
    assert read_keepalive(frame) == keepalive


@given(st.binary(max_size=40))
def test_what_is_read_writes_the_same_bytes_and_the_rest_is_no_frame(payload: bytes) -> None:
    frame = bytes([Kind.KEEPALIVE]) + payload
    assert written_again(frame) == frame


def written_again(frame: bytes) -> bytes:
    """Read a frame and write it; as it is when it is refused by name."""
    try:
        return read_keepalive(frame).frame()
    except KnodeError as error:
        if error.code is not Code.BAD_FRAME:
            raise
        return frame


@pytest.mark.parametrize(
    "wrong",
    [
        Keepalive(0, 0, 0, IDLE),
        Keepalive(-1, 0, 0, IDLE),
        Keepalive(2**64, 0, 0, IDLE),
        Keepalive(1, -1, 0, IDLE),
        Keepalive(1, 0, 0, Load(65_536, 0, 0, 0)),
        Keepalive(1, 0, 0, Load(0, 0, 0, 101)),
    ],
)
def test_what_a_peer_would_refuse_is_refused_before_it_is_sent(wrong: Keepalive) -> None:
    a, _ = sessions()
    with pytest.raises(KnodeError) as caught:
        a.keep_alive(wrong)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert not a.has_output


def test_a_keepalive_goes_first_and_only_the_latest_waits() -> None:
    a, b = sessions()
    stream = a.open_stream()
    a.send(request(1, stream=stream))
    a.write(stream, b"data")
    for at in (5, 6):
        a.keep_alive(Keepalive(at, 0, 0, IDLE))
    assert a.has_output
    items = [b.receive(frame) for frame in frames_of(a)]
    assert items == [[Keepalive(6, 0, 0, IDLE)], [request(1, stream=stream)], [StreamData(stream, b"data")]]


def test_times_that_cannot_be_end_the_session() -> None:
    a, b = sessions()
    a.keep_alive(Keepalive(7, 0, 0, IDLE))
    assert b.receive(a.next_frame() or b"") == [Keepalive(7, 0, 0, IDLE)]
    b.keep_alive(Keepalive(1, 7, 9, IDLE))
    assert a.receive(b.next_frame() or b"") == [Keepalive(1, 7, 9, IDLE)]
    for wrong, source, destination in (
        (Keepalive(6, 1, 0, IDLE), a, b),  # the clock went back
        (Keepalive(2, 8, 0, IDLE), b, a),  # an echo of what was never sent
    ):
        source.keep_alive(wrong)
        frame = source.next_frame() or b""
        for _ in range(2):
            with pytest.raises(KnodeError) as caught:
                destination.receive(frame)
            assert caught.value.code is Code.BAD_FRAME
