"""Laws of a session: whatever the interleaving, all arrives, in order, whole, once."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from klp_pair import BOB_BOOT, sessions

from knode.errors import KnodeError
from knode.klp import (
    Context,
    Event,
    Request,
    Session,
    StreamData,
    StreamEnd,
    StreamReset,
    limits,
)


@dataclass
class End:
    """One side: its session, what it sent, and what came from the other side."""

    session: Session
    sent: list[bytes] = field(default_factory=list)
    came: list[bytes] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)
    reset: set[int] = field(default_factory=set)
    arrived: dict[int, int] = field(default_factory=dict)
    whole: dict[int, int] = field(default_factory=dict)
    counter: int = 0

    def say(self, size: int) -> None:
        body = len(self.sent).to_bytes(4, "big") + bytes(size % 3000)
        self.session.send(Event("law", Context(), body))
        self.sent.append(body)

    def open(self) -> None:
        stream = self.session.open_stream()
        self.counter += 1
        self.session.send(Request(self.counter, BOB_BOOT, "law", 1, stream, Context(), b""))
        self.written[stream] = 0

    def write(self, size: int) -> None:
        for stream in self.written:
            try:
                room = min(size, self.session.writable(stream))
                self.session.write(stream, bytes([stream]) * room)
            except KnodeError:
                continue  # ended or reset
            self.written[stream] += room

    def end(self, size: int) -> None:
        for stream in list(self.written)[size % 3 :: 3]:
            if stream not in self.reset:
                try:
                    self.session.end(stream)
                except KnodeError:
                    continue

    def refuse(self, size: int) -> None:
        """Reset a stream that the other side sends."""
        for stream in list(self.arrived)[size % 5 :: 5]:
            self.session.reset(stream, "CANCELLED")
            self.reset.add(stream)

    def take(self, frame: bytes) -> None:
        for item in self.session.receive(frame):
            match item:
                case Event(body=body):
                    self.came.append(body)
                case Request(stream=stream):
                    self.arrived[stream] = 0
                case StreamData(stream=stream, data=data):
                    assert data == bytes([stream]) * len(data)
                    self.arrived[stream] += len(data)
                    self.session.consumed(stream, len(data))
                case StreamEnd(stream=stream, size=size):
                    self.whole[stream] = size
                case StreamReset(stream=stream):
                    self.reset.add(stream)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("say", "say", "open", "write", "write", "end", "refuse", "carry", "carry")),
        st.booleans(),
        st.integers(0, 300_000),
    ),
    min_size=15,
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_all_that_was_sent_arrives_in_order_and_whole(steps: list[tuple[str, bool, int]]) -> None:
    a, b = (End(session) for session in sessions())
    on_the_wire: dict[bool, list[bytes]] = {True: [], False: []}
    for action, from_a, size in steps:
        here, there = (a, b) if from_a else (b, a)
        match action:
            case "say":
                here.say(size)
            case "open":
                here.open()
            case "write":
                here.write(size)
            case "end":
                here.end(size)
            case "refuse":
                here.refuse(size)
            case _:
                frame = here.session.next_frame()
                if frame is not None:
                    on_the_wire[from_a].append(frame)
                if size % 2 and on_the_wire[from_a]:
                    there.take(on_the_wire[from_a].pop(0))
    settle(a, b, on_the_wire)
    for here, there in ((a, b), (b, a)):
        for stream in here.written:
            try:
                here.session.end(stream)
            except KnodeError:
                assert stream in here.reset | there.reset or stream in there.whole
    settle(a, b, on_the_wire)
    for here, there in ((a, b), (b, a)):
        assert there.came == here.sent
        for stream, size in here.written.items():
            assert stream in there.reset or there.whole[stream] == there.arrived[stream] == size
        assert not here.session._streams._sending
        assert not here.session._streams._receiving


def settle(a: End, b: End, on_the_wire: dict[bool, list[bytes]]) -> None:
    """Carry everything, both ways, until both are silent."""
    while a.session.has_output or b.session.has_output or any(on_the_wire.values()):
        for here, there, from_a in ((a, b, True), (b, a, False)):
            while (frame := here.session.next_frame()) is not None:
                assert len(frame) <= 1024 * 1024
                on_the_wire[from_a].append(frame)
            for frame in on_the_wire[from_a]:
                there.take(frame)
            on_the_wire[from_a].clear()


def test_a_transfer_of_many_windows_arrives_whole() -> None:
    a, b = (End(session) for session in sessions())
    wire: dict[bool, list[bytes]] = {True: [], False: []}
    a.open()
    (stream,) = a.written
    while a.written[stream] < 8 * limits.FIRST_CREDIT_BYTES:
        a.write(limits.UNSENT_BYTES)
        settle(a, b, wire)
    a.session.end(stream)
    settle(a, b, wire)
    assert b.whole == {stream: a.written[stream]}
