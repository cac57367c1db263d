"""A session delivers what was sent, in order, once, and dies of anything else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from klp_pair import ALICE, BOB, BOB_BOOT, deliver, frames_of, initiator, request, responder, sessions, shake

from knode.errors import Code, KnodeError
from knode.klp import (
    Acknowledge,
    Cancel,
    Context,
    Credit,
    Event,
    Failure,
    Goodbye,
    Message,
    Request,
    Response,
    Session,
    StreamData,
    StreamEnd,
    StreamReset,
    limits,
    refusal,
)
from knode.klp.codec import encode, encode_array
from knode.klp.frames import Kind
from knode.klp.objects import Domain, sign
from knode.klp.session import HEADER_BYTES, MAX_BUNDLE_FRAME_BYTES

EVERY_MESSAGE: list[Message] = [
    request(1, body=b"do it"),
    Response(1, b"done"),
    Failure(2, "NO_AGENT", "there is none", "knode agent list"),
    Acknowledge((1, 2)),
    Cancel(3),
    Event("progress", Context(b"c" * 16, b"d" * 16, b"t" * 25), b"half"),
    Goodbye("UNAVAILABLE", "going down"),
]


def refuses(code: Code, action: Callable[[], object]) -> None:
    with pytest.raises(KnodeError) as caught:
        action()
    assert caught.value.code is code, caught.value


def forged(messages: list[bytes], *, sequence: int = 1, header: bytes | None = None) -> bytes:
    a, _ = sessions()
    start = header or a._outgoing_header
    body = start + sequence.to_bytes(8, "big") + encode_array(messages)
    return bytes([Kind.BUNDLE]) + sign(ALICE, Domain.BUNDLE, body)


def test_every_message_arrives_as_it_was_sent() -> None:
    a, b = sessions()
    for message in EVERY_MESSAGE:
        a.send(message)
    assert deliver(a, b) == EVERY_MESSAGE
    b.send(Response(1, b"yes"))
    assert deliver(b, a) == [Response(1, b"yes")]


def test_what_waits_goes_in_one_bundle_of_at_most_64() -> None:
    a, b = sessions()
    for counter in range(1, 131):
        a.send(request(counter))
    frames = frames_of(a)
    assert [len(b.receive(frame)) for frame in frames] == [64, 64, 2]
    assert not a.has_output


def test_a_bundle_stays_within_its_bytes_and_takes_the_largest_body() -> None:
    a, b = sessions()
    for counter in range(1, 6):
        a.send(request(counter, body=bytes(limits.MAX_BODY_BYTES)))
    frames = frames_of(a)
    assert all(len(frame) <= MAX_BUNDLE_FRAME_BYTES for frame in frames)
    assert [item.counter for frame in frames for item in b.receive(frame)] == [1, 2, 3, 4, 5]


def test_a_full_outbox_refuses_and_queues_nothing() -> None:
    a, _ = sessions()
    for counter in range(1, limits.OUTBOX_MESSAGES + 1):
        a.send(request(counter))
    refuses(Code.RATE_LIMITED, lambda: a.send(request(5000)))
    a, _ = sessions()
    body = bytes(limits.MAX_BODY_BYTES)
    for counter in range(1, limits.OUTBOX_BYTES // limits.MAX_BODY_BYTES):
        a.send(request(counter, body=body))
    refuses(Code.RATE_LIMITED, lambda: a.send(request(5000, body=body)))
    assert len(frames_of(a)) == 31


def test_what_was_sent_makes_room_in_the_outbox() -> None:
    a, _ = sessions()
    body = bytes(limits.MAX_BODY_BYTES)
    for counter in range(1, 2 * limits.OUTBOX_BYTES // limits.MAX_BODY_BYTES):
        a.send(request(counter, body=body))
        assert a.next_frame() is not None


def test_an_error_of_any_length_travels_as_a_failure_cut_to_the_limits() -> None:
    a, b = sessions()
    b.send(Failure.of(1, KnodeError(Code.DISK_FULL, "m" * 5000, "n" * 5000)))
    (failure,) = deliver(b, a)
    assert isinstance(failure, Failure)
    assert (len(failure.message), len(failure.next_step)) == (1024, 512)
    assert failure.error().code is Code.DISK_FULL


def test_what_a_peer_would_refuse_is_refused_before_it_is_sent() -> None:
    a, _ = sessions()
    refuses(Code.TOO_LARGE, lambda: a.send(request(body=bytes(limits.MAX_BODY_BYTES + 1))))
    refuses(Code.INVALID_ARGUMENT, lambda: a.send(request(0)))
    refuses(Code.INVALID_ARGUMENT, lambda: a.send(request(ttl_ms=limits.MAX_TTL_MS + 1)))
    refuses(Code.INVALID_ARGUMENT, lambda: a.send(Request(1, b"short", "m", 1, 0, Context(), b"")))
    refuses(Code.INVALID_ARGUMENT, lambda: a.send(Credit(1, 2)))
    assert not a.has_output


def test_an_acknowledgement_rides_with_the_next_bundle() -> None:
    a, b = sessions()
    a.acknowledge(7)
    assert not a.has_output
    a.send(request(8))
    assert deliver(a, b) == [Acknowledge((7,)), request(8)]


def test_256_acknowledgements_go_alone() -> None:
    a, b = sessions()
    for counter in range(1, 257):
        a.acknowledge(counter)
    assert a.has_output
    assert deliver(a, b) == [Acknowledge(tuple(range(1, 257)))]
    assert not a.has_output


# -- what ends a session ------------------------------------------------------------------------


def test_a_bundle_that_comes_twice_is_a_replay() -> None:
    a, b = sessions()
    a.send(request())
    (frame,) = frames_of(a)
    b.receive(frame)
    refuses(Code.REPLAY, lambda: b.receive(frame))


def test_a_bundle_that_is_left_out_is_noticed() -> None:
    a, b = sessions()
    a.send(request(1))
    a.next_frame()
    a.send(request(2))
    later = a.next_frame()
    refuses(Code.REPLAY, lambda: b.receive(later))


def test_a_bundle_of_another_session_is_not_for_us() -> None:
    a, _ = sessions()
    other = shake(initiator(channel=bytes(32)), responder(channel=bytes(32)))
    b = Session(BOB, other[1])
    a.send(request())
    refuses(Code.NOT_RECIPIENT, lambda: b.receive(a.next_frame()))


def test_our_own_bundle_sent_back_is_not_for_us() -> None:
    a, _ = sessions()
    a.send(request())
    refuses(Code.NOT_RECIPIENT, lambda: a.receive(a.next_frame()))


def test_every_flipped_byte_of_a_bundle_is_refused_with_the_same_name_each_time() -> None:
    a, b = sessions()
    for message in EVERY_MESSAGE:
        a.send(message)
    (frame,) = frames_of(a)
    codes = set()
    for index in range(len(frame)):
        _, b = sessions()
        with pytest.raises(KnodeError) as caught:
            b.receive(frame[:index] + bytes([frame[index] ^ 0x01]) + frame[index + 1 :])
        codes.add(caught.value.code)
    assert codes == {Code.BAD_FRAME, Code.BAD_SIGNATURE, Code.NOT_RECIPIENT}


def test_a_bundle_cut_anywhere_is_refused() -> None:
    a, _ = sessions()
    a.send(request(body=b"x" * 40))
    (frame,) = frames_of(a)
    for length in range(len(frame)):
        _, b = sessions()
        with pytest.raises(KnodeError):
            b.receive(frame[:length])


def test_a_dead_session_stays_dead() -> None:
    a, b = sessions()
    b.send(Response(1, b""))
    refuses(Code.BAD_FRAME, lambda: b.receive(b"\xff"))
    a.send(request())
    frame = a.next_frame()
    refuses(Code.BAD_FRAME, lambda: b.receive(frame))
    refuses(Code.BAD_FRAME, lambda: b.send(Response(1, b"")))
    assert b.next_frame() is None
    assert not b.has_output


def test_a_refusal_ends_the_session_with_its_error() -> None:
    a, _ = sessions()
    refuses(Code.KEY_REVOKED, lambda: a.receive(refusal(KnodeError(Code.KEY_REVOKED, "revoked"))))


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.WELCOME, Kind.PROOF])
def test_a_handshake_frame_has_no_place_in_a_session(kind: Kind) -> None:
    a, _ = sessions()
    refuses(Code.BAD_FRAME, lambda: a.receive(bytes([kind]) + bytes(200)))


def test_a_signed_bundle_that_breaks_the_rules_is_refused() -> None:
    def receiving(messages: list[bytes], **how: object) -> Callable[[], object]:
        return lambda: sessions()[1].receive(forged(messages, **how))

    one = encode(Cancel(1))
    assert sessions()[1].receive(forged([one])) == [Cancel(1)]
    refuses(Code.BAD_FRAME, receiving([]))
    refuses(Code.BAD_FRAME, receiving([one] * 65))
    refuses(Code.BAD_FRAME, receiving([one + one]))
    refuses(Code.BAD_FRAME, receiving([b"\x92\x05\xd3" + b"\xff" * 8]))  # Cancel(-1)
    refuses(Code.NON_CANONICAL, receiving([b"\x92\x05\xcc\x01"]))  # Cancel(1), a byte too long
    refuses(Code.NON_CANONICAL, receiving([b"\xdc\x00\x02\x05\x01"]))
    refuses(Code.BAD_FRAME, receiving([b"\x92\x05\xcb" + bytes(8)]))  # a float
    refuses(Code.BAD_FRAME, receiving([b"\x92\x63\x01"]))  # an unknown tag
    refuses(Code.BAD_FRAME, receiving([b"\x93\x05\x01\x01"]))  # a field too many
    refuses(Code.REPLAY, receiving([one], sequence=0))
    refuses(Code.REPLAY, receiving([one], sequence=2))
    header = sessions()[0]._outgoing_header
    refuses(Code.BAD_FRAME, receiving([one], header=header[:-1] + b"\x01"))


def test_a_frame_over_the_limit_is_too_large() -> None:
    _, b = sessions()
    a, _ = sessions()
    frame = bytes([Kind.BUNDLE]) + bytes(64) + a._outgoing_header + bytes(MAX_BUNDLE_FRAME_BYTES)
    refuses(Code.TOO_LARGE, lambda: b.receive(frame))
    assert HEADER_BYTES == 108


# -- streams ------------------------------------------------------------------------------------


def opened() -> tuple[Session, Session, int]:
    a, b = sessions()
    stream = a.open_stream()
    a.send(request(1, stream=stream))
    deliver(a, b)
    return a, b, stream


def test_a_stream_arrives_whole_and_signed() -> None:
    a, b, stream = opened()
    assert a.writable(stream) == limits.UNSENT_BYTES
    a.write(stream, b"x" * 100_000)
    a.end(stream)
    items = deliver(a, b)
    assert b"".join(item.data for item in items if isinstance(item, StreamData)) == b"x" * 100_000
    assert isinstance(items[-1], StreamEnd)
    assert items[-1].size == 100_000
    refuses(Code.CANCELLED, lambda: a.write(stream, b"more"))


def test_an_empty_stream_ends_at_once() -> None:
    a, b, stream = opened()
    a.end(stream)
    (end,) = deliver(a, b)
    assert isinstance(end, StreamEnd)
    assert end.size == 0


def test_initiator_streams_are_odd_and_responder_streams_even() -> None:
    a, b = sessions()
    assert [a.open_stream(), a.open_stream()] == [1, 3]
    assert [b.open_stream(), b.open_stream()] == [2, 4]


def test_streams_take_turns_and_messages_go_first() -> None:
    a, b = sessions()
    for counter in (1, 2):
        a.send(request(counter, stream=a.open_stream()))
    deliver(a, b)
    for stream in (1, 3):
        a.write(stream, bytes(2 * limits.DATA_BYTES))
    a.send(Cancel(9))
    order = [item.stream if isinstance(item, StreamData) else item for item in deliver(a, b)]
    assert order == [Cancel(9), 1, 3, 1, 3]


def test_a_sender_stops_at_its_credit_and_goes_on_with_more() -> None:
    a, b, stream = opened()
    sent = 0
    while room := a.writable(stream):
        a.write(stream, bytes(room))
        sent += room
        deliver(a, b)
    assert sent == limits.FIRST_CREDIT_BYTES
    refuses(Code.NO_CREDIT, lambda: a.write(stream, b"x"))
    b.consumed(stream, limits.FIRST_CREDIT_BYTES // 2 - 1)
    assert not b.has_output
    b.consumed(stream, 1)
    assert deliver(b, a) == [Credit(stream, limits.FIRST_CREDIT_BYTES * 3 // 2)]
    assert a.writable(stream) == limits.UNSENT_BYTES


def data_frame(stream: int, data: bytes) -> bytes:
    return bytes([Kind.DATA]) + stream.to_bytes(4, "big") + data


def test_data_beyond_the_credit_ends_the_session() -> None:
    _, b, stream = opened()
    for _ in range(limits.FIRST_CREDIT_BYTES // limits.DATA_BYTES):
        b.receive(data_frame(stream, bytes(limits.DATA_BYTES)))
    refuses(Code.NO_CREDIT, lambda: b.receive(data_frame(stream, b"x")))


def test_data_that_no_stream_takes_ends_the_session() -> None:
    refuses(Code.BAD_FRAME, lambda: opened()[1].receive(data_frame(3, b"x")))
    refuses(Code.BAD_FRAME, lambda: opened()[1].receive(data_frame(1, b"")))
    refuses(Code.BAD_FRAME, lambda: opened()[0].receive(data_frame(1, b"x")))
    refuses(Code.TOO_LARGE, lambda: opened()[1].receive(data_frame(1, bytes(limits.DATA_BYTES + 1))))


def test_every_flipped_byte_of_a_data_frame_is_noticed_at_the_latest_at_the_end() -> None:
    a, _, stream = opened()
    a.write(stream, b"some bulk data")
    a.end(stream)
    data, end = frames_of(a)
    for index in range(len(data)):
        _, b, _ = opened()

        def receive(frame: bytes, b: Session = b) -> None:
            b.receive(frame)
            b.receive(end)

        refuses(
            Code.BAD_FRAME if index < 5 else Code.BAD_SIGNATURE,
            lambda receive=receive, index=index: receive(
                data[:index] + bytes([data[index] ^ 0x01]) + data[index + 1 :]
            ),
        )


def test_data_that_are_left_out_are_noticed_at_the_end() -> None:
    a, b, stream = opened()
    a.write(stream, b"some")
    a.end(stream)
    _, end = frames_of(a)
    refuses(Code.BAD_SIGNATURE, lambda: b.receive(end))


def test_a_receiver_that_resets_drops_what_is_on_its_way() -> None:
    a, b, stream = opened()
    a.write(stream, b"on its way")
    b.reset(stream, "NO_AGENT")
    b.reset(stream, "NO_AGENT")  # again is nothing
    assert deliver(a, b) == []
    assert deliver(b, a) == [StreamReset(stream, "NO_AGENT")]
    refuses(Code.CANCELLED, lambda: a.writable(stream))
    assert deliver(a, b) == []  # the sender's reset, which closes the stream here, is not news
    refuses(Code.BAD_FRAME, lambda: b.receive(data_frame(stream, b"x")))


def test_a_receiver_that_resets_still_holds_the_sender_to_its_credit() -> None:
    _, b, stream = opened()
    b.reset(stream, "CANCELLED")
    for _ in range(limits.FIRST_CREDIT_BYTES // limits.DATA_BYTES):
        assert b.receive(data_frame(stream, bytes(limits.DATA_BYTES))) == []
    refuses(Code.NO_CREDIT, lambda: b.receive(data_frame(stream, b"x")))


def test_a_sender_that_resets_ends_the_stream_without_the_rest() -> None:
    a, b, stream = opened()
    a.write(stream, b"never sent")
    a.reset(stream, "CANCELLED")
    assert deliver(a, b) == [StreamReset(stream, "CANCELLED")]


def test_resets_and_ends_that_cross_are_no_error() -> None:
    a, b, stream = opened()
    a.end(stream)
    b.reset(stream, "CANCELLED")
    a_frames, b_frames = frames_of(a), frames_of(b)
    assert [item for frame in a_frames for item in b.receive(frame)] == []
    assert [item for frame in b_frames for item in a.receive(frame)] == []
    assert not a.has_output
    assert not b.has_output


def test_a_credit_that_crosses_the_end_is_dropped() -> None:
    a, b, stream = opened()
    a.write(stream, bytes(limits.UNSENT_BYTES))
    deliver(a, b)
    a.write(stream, bytes(limits.UNSENT_BYTES))
    deliver(a, b)
    b.consumed(stream, 2 * limits.UNSENT_BYTES)
    a.end(stream)
    assert deliver(b, a) == []


def with_credit_waiting() -> tuple[Session, Session, int]:
    a, b, stream = opened()
    for _ in range(2):
        a.write(stream, bytes(limits.UNSENT_BYTES))
        deliver(a, b)
    b.consumed(stream, 2 * limits.UNSENT_BYTES)
    assert b.has_output
    return a, b, stream


def test_credit_that_waits_is_not_sent_for_a_stream_that_ended() -> None:
    a, b, stream = with_credit_waiting()
    a.end(stream)
    deliver(a, b)
    assert not b.has_output


def test_credit_that_waits_is_not_sent_for_a_stream_that_is_refused() -> None:
    a, b, stream = with_credit_waiting()
    b.reset(stream, "CANCELLED")
    assert deliver(b, a) == [StreamReset(stream, "CANCELLED")]


def test_64_streams_at_once_and_not_one_more() -> None:
    a, b = sessions()
    for counter in range(1, limits.MAX_STREAMS + 1):
        a.send(request(counter, stream=a.open_stream()))
    refuses(Code.RATE_LIMITED, lambda: a.send(request(99, stream=a.open_stream())))
    deliver(a, b)
    a.end(1)
    a.send(request(100, stream=a.open_stream()))
    assert len(deliver(a, b)) == 2


def test_a_peer_that_opens_more_streams_than_allowed_is_refused() -> None:
    _, b = sessions()
    many = [encode(request(n, stream=2 * n - 1)) for n in range(1, limits.MAX_STREAMS + 1)]
    b.receive(forged(many))
    more = forged([encode(request(65, stream=129))], sequence=65)
    refuses(Code.RATE_LIMITED, lambda: b.receive(more))


def test_stream_ids_of_the_wrong_side_or_used_before_are_refused() -> None:
    for streams in ([2], [3, 1], [1, 1]):
        requests = [encode(request(n, stream=stream)) for n, stream in enumerate(streams, 1)]
        refuses(Code.BAD_FRAME, lambda requests=requests: sessions()[1].receive(forged(requests)))


@pytest.mark.parametrize(
    "message",
    [Credit(2, 5), Credit(1, 5), StreamEnd(1, 0, bytes(32)), StreamReset(1, "x"), StreamReset(2, "x")],
)
def test_words_about_a_stream_that_never_was_end_the_session(message: Message) -> None:
    refuses(Code.BAD_FRAME, lambda: sessions()[1].receive(forged([encode(message)])))


def test_a_credit_that_shrinks_ends_the_session() -> None:
    a, b, _ = opened()
    a_of_b = b.open_stream()
    b.send(Request(1, BOB_BOOT, "m", 1, a_of_b, Context(), b""))
    deliver(b, a)
    frame = forged([encode(Credit(a_of_b, 10))], sequence=2)
    refuses(Code.BAD_FRAME, lambda: b.receive(frame))


def test_more_consumed_than_received_is_a_mistake_of_the_caller() -> None:
    _, b, stream = opened()
    refuses(Code.INVALID_ARGUMENT, lambda: b.consumed(stream, 1))
