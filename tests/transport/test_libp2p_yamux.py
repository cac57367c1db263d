"""Yamux on values: what goes in on one side comes out on the other, and nothing beyond what was allowed."""

from __future__ import annotations

import random
import struct
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.transport.libp2p_yamux import (
    DATA_BYTES,
    GROWN_WINDOW_BYTES,
    STREAMS_AT_ONCE,
    WINDOW_BYTES,
    Stream,
    Yamux,
    YamuxError,
)

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


def frame(kind: int, flags: int, number: int, length: int, data: bytes = b"", version: int = 0) -> bytes:
    return struct.pack("!BBHII", version, kind, flags, number, length) + data


def pair() -> tuple[Yamux, Yamux]:
    return Yamux(initiator=True), Yamux(initiator=False)


def exchange(a: Yamux, b: Yamux) -> None:
    """Carry everything that either side has to say."""
    while a.outgoing_bytes or b.outgoing_bytes:
        b.receive(a.take_outgoing())
        a.receive(b.take_outgoing())


def opened(a: Yamux, b: Yamux) -> tuple[Stream, Stream]:
    stream = a.open()
    exchange(a, b)
    return stream, b.accepted.popleft()


def take_all(side: Yamux, stream: Stream) -> bytes:
    taken = []
    while data := side.take(stream, 2**31):
        taken.append(data)
    return b"".join(taken)


def test_the_first_frames_are_those_of_the_specification() -> None:
    a, b = pair()
    stream = a.open()
    a.send(stream, memoryview(b"hello"))
    a.finish(stream)
    assert a.take_outgoing() == (
        frame(WINDOW_UPDATE, SYN, 1, 0) + frame(DATA, 0, 1, 5, b"hello") + frame(WINDOW_UPDATE, FIN, 1, 0)
    )
    assert b.open().number == 2


@given(st.integers(0, 2**32), st.lists(st.integers(1, 400_000), max_size=4))
def test_what_is_sent_on_many_streams_arrives_in_pieces_of_any_size(seed: int, sizes: list[int]) -> None:
    random_of_case = random.Random(seed)
    a, b = pair()
    said: dict[int, bytes] = {}
    for size in sizes:
        stream = a.open()
        said[stream.number] = random_of_case.randbytes(size)
        rest = memoryview(said[stream.number])
        while sent := a.send(stream, rest):
            rest = rest[sent:]
        a.finish(stream)
        said[stream.number] = said[stream.number][: size - len(rest)]
    wire = memoryview(a.take_outgoing())
    while wire:
        cut = random_of_case.choice([1, 11, 12, 13, 5000, 50_000])
        b.receive(bytes(wire[:cut]))
        wire = wire[cut:]
    heard = {stream.number: take_all(b, stream) for stream in b.accepted}
    assert heard == said
    assert all(stream.finished_there for stream in b.accepted)


def test_a_sender_stops_at_the_window_and_goes_on_when_the_reader_has_read() -> None:
    a, b = pair()
    near, far = opened(a, b)
    data = memoryview(bytes(2 * WINDOW_BYTES))
    sent = 0
    while more := a.send(near, data[sent:]):
        sent += more
    assert sent == WINDOW_BYTES
    exchange(a, b)
    assert len(take_all(b, far)) == WINDOW_BYTES
    exchange(a, b)
    assert near.credit_bytes >= WINDOW_BYTES // 2
    credit_bytes = near.credit_bytes
    while more := a.send(near, data[:credit_bytes]):
        credit_bytes -= more
    exchange(a, b)
    take_all(b, far)
    exchange(a, b)
    assert near.credit_bytes > GROWN_WINDOW_BYTES // 2, "work that was done grows the window"


def test_a_window_does_not_grow_for_data_that_nobody_takes() -> None:
    a, b = pair()
    near, _ = opened(a, b)
    while a.send(near, memoryview(bytes(DATA_BYTES))):
        exchange(a, b)
    assert near.credit_bytes == 0


def test_a_byte_keeps_nothing_of_what_came_with_it() -> None:
    a, b = pair()
    near, far = opened(a, b)
    passed_over = frame(DATA, 0, 99, 60_000, bytes(60_000))  # of a stream that is over
    tracemalloc.start()
    for _ in range(100):
        a.send(near, memoryview(b"x"))
        b.receive(a.take_outgoing() + passed_over)
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held_bytes < 1_000_000
    assert take_all(b, far) == b"x" * 100


def test_data_beyond_the_window_ends_the_connection_and_the_other_side_is_told() -> None:
    _, b = pair()
    b.receive(frame(WINDOW_UPDATE, SYN, 1, 0))
    b.receive(frame(DATA, 0, 1, WINDOW_BYTES, bytes(WINDOW_BYTES)))
    b.take_outgoing()
    with pytest.raises(YamuxError, match="beyond what was allowed"):
        b.receive(frame(DATA, 0, 1, 1, b"x"))
    assert b.take_outgoing() == frame(GO_AWAY, 0, 0, 1)
    assert len(b.accepted[0].arrived) == WINDOW_BYTES


@pytest.mark.parametrize(
    "wrong",
    [
        frame(DATA, 0, 1, 0, version=1),
        frame(4, 0, 1, 0),
        frame(WINDOW_UPDATE, SYN, 2, 0),
        frame(WINDOW_UPDATE, SYN, 0, 0),
        frame(WINDOW_UPDATE, SYN, 1, 0) * 2,
        frame(DATA, SYN, 1, WINDOW_BYTES + 1),
        frame(DATA, 0, 99, GROWN_WINDOW_BYTES + 1),
        frame(WINDOW_UPDATE, SYN, 1, 2**32 - 1),
        frame(WINDOW_UPDATE, SYN, 1, 0) + frame(DATA, FIN, 1, 1, b"x") + frame(DATA, 0, 1, 1, b"y"),
    ],
    ids=[
        "version",
        "type",
        "our number",
        "number 0",
        "twice",
        "too much",
        "too much of nothing",
        "window",
        "after",
    ],
)
def test_what_breaks_the_protocol_is_refused(wrong: bytes) -> None:
    _, b = pair()
    with pytest.raises(YamuxError):
        b.receive(wrong)


@given(st.binary(max_size=300))
def test_no_bytes_do_anything_but_be_refused(data: bytes) -> None:
    side = Yamux(initiator=False)
    with suppress(YamuxError):
        side.receive(data)
    assert side.outgoing_bytes <= 12 * (len(data) // 12 + 1)


def test_streams_of_the_other_side_are_limited_and_those_that_end_make_room() -> None:
    a, b = pair()
    streams = [a.open() for _ in range(STREAMS_AT_ONCE + 1)]
    exchange(a, b)
    assert (len(b.accepted), b.refused) == (STREAMS_AT_ONCE, 1)
    assert streams[-1].reset
    a.abort(streams[0])
    stream = a.open()
    exchange(a, b)
    assert not stream.reset


def test_what_arrived_before_the_end_stays_readable() -> None:
    a, b = pair()
    near, far = opened(a, b)
    a.send(near, memoryview(b"last words"))
    a.abort(near)
    exchange(a, b)
    assert far.reset
    assert take_all(b, far) == b"last words"
    near, far = opened(a, b)
    a.send(near, memoryview(b"and these"))
    exchange(a, b)
    b.end()
    assert take_all(b, far) == b"and these"


def test_the_end_counts_only_behind_the_data_of_its_frame() -> None:
    _, b = pair()
    b.receive(frame(WINDOW_UPDATE, SYN, 1, 0) + frame(DATA, FIN, 1, 4, b"ha"))
    [stream] = b.accepted
    assert not stream.finished_there
    b.receive(b"lf")
    assert stream.finished_there
    assert take_all(b, stream) == b"half"


def test_a_stream_that_both_finish_is_forgotten_and_its_late_frames_do_nothing() -> None:
    a, b = pair()
    near, far = opened(a, b)
    a.finish(near)
    exchange(a, b)
    b.finish(far)
    exchange(a, b)
    assert not a.streams
    assert not b.streams
    b.receive(frame(DATA, 0, near.number, 3, b"old") + frame(WINDOW_UPDATE, RST, near.number, 0))
    assert not b.outgoing_bytes


def test_pings_are_answered_with_their_value() -> None:
    side = Yamux(initiator=False)
    side.receive(frame(PING, SYN, 0, 7))
    assert side.take_outgoing() == frame(PING, ACK, 0, 7)
    side.receive(frame(PING, ACK, 0, 7))
    assert not side.outgoing_bytes
