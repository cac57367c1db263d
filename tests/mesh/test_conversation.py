from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from mesh_cell import KEEPALIVE_S, MovableClock, SeededRandomness, key_of, refused, until

from knode.errors import Code, KnodeError
from knode.klp import limits
from knode.klp.frames import Kind
from knode.klp.handshake import Initiator, Introduction, Responder
from knode.klp.keepalive import Load
from knode.klp.messages import Context, Event, Message, Request
from knode.mesh.conversation import Conversation, IncomingStream
from knode.mesh.handshakes import close_saying
from knode.mesh.heartbeat import Heartbeat
from knode.mesh.liveness import PeerState
from knode.transport.memory import MemoryNetwork

A, B = key_of("a"), key_of("b")


class Side:
    """One end: its conversation, and what it was given."""

    def __init__(self, link: Any, key: Any, established: Any) -> None:
        self.taken: list[Message] = []
        self.streams: dict[int, IncomingStream] = {}
        self.refuse: KnodeError | None = None
        self.conversation = Conversation(
            link,
            key,
            established,
            clock=MovableClock(),
            dead_after_s=3.0,
            admit=self._admit,
            deliver=self._deliver,
        )
        self.heartbeat = Heartbeat(MovableClock(), KEEPALIVE_S, 3.0, lambda: Load(1, 2, 3, 4))

    def _deliver(self, conversation: Conversation, message: Message) -> None:
        self.taken.append(message)
        if isinstance(message, Request):
            self.streams[message.stream] = conversation.stream_of(message.stream)

    def _admit(self, established: object) -> None:
        if self.refuse is not None:
            raise self.refuse

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.heartbeat.run)
            with self.heartbeat.keeping(self.conversation):
                error = await self.conversation.run()
            nursery.cancel_scope.cancel()
        await close_saying(self.conversation.link, error)


@asynccontextmanager
async def talking() -> AsyncIterator[tuple[Side, Side]]:
    """Two ends of one session, at work."""
    network = MemoryNetwork(SeededRandomness("network"))
    accepted, accepting = trio.open_memory_channel[Any](1)

    async def accept(link: Any) -> None:
        await accepted.send(link)
        await trio.sleep_forever()

    listener = await network.carrier("b").listen("", 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, accept)
        near = await network.carrier("a").dial(listener.addresses[0])
        far = await accepting.receive()
        says = Introduction(bytes(32), bytes(16), bytes(32))
        binding = near.channel_binding
        initiator = Initiator(A, says, expected_peer=B.public, channel_binding=binding, nonce=bytes(32))
        responder = Responder(B, says, admit=lambda hello: None, channel_binding=binding, nonce=bytes(32))
        proof, of_a = initiator.receive(responder.receive_hello(initiator.hello()))
        sides = Side(near, A, of_a), Side(far, B, responder.receive_auth(proof))
        for side in sides:
            nursery.start_soon(side.run)
        yield sides
        nursery.cancel_scope.cancel()


def open_stream(a: Side, b: Side) -> int:
    """Let a's request name a stream."""
    stream = a.conversation.session.open_stream()
    a.conversation.send(Request(stream, bytes(16), "test", 1000, stream, Context(), b""))
    return stream


async def arrived(b: Side, stream: int) -> IncomingStream:
    await until(lambda: stream in b.streams)
    return b.streams[stream]


async def never(frame: object) -> None:
    await trio.sleep_forever()


async def chunks(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield bytes(64 * 1024)


async def test_messages_arrive_in_order(autojump_clock: object) -> None:
    async with talking() as (a, b):
        sent = [Event("test", Context(), str(n).encode()) for n in range(500)]
        for event in sent:
            a.conversation.send(event)
        await until(lambda: b.taken == sent)


async def test_an_upload_waits_for_whoever_reads(autojump_clock: object) -> None:
    async with talking() as (a, b):
        stream = open_stream(a, b)
        done = trio.Event()

        async def upload() -> None:
            await a.conversation.upload(stream, chunks(100))
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload)
            incoming = await arrived(b, stream)
            await trio.sleep(1)
            waiting = sum(map(len, incoming._chunks))
            assert waiting <= limits.FIRST_CREDIT_BYTES
            assert not done.is_set()
            got = 0
            async for chunk in incoming:
                got += len(chunk)
        assert got == 100 * 64 * 1024
        assert done.is_set()


async def test_whoever_wants_no_more_stops_the_upload(autojump_clock: object) -> None:
    async with talking() as (a, b):
        stream = open_stream(a, b)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused, Code.CANCELLED, a.conversation.upload, stream, chunks(1000))
            await arrived(b, stream)
            b.conversation.drop_stream(stream)
        assert a.conversation.open
        assert b.conversation.open


async def test_a_sender_that_gives_up_tells_the_reader(autojump_clock: object) -> None:
    async with talking() as (a, b):
        stream = open_stream(a, b)

        async def read() -> None:
            async for _ in await arrived(b, stream):
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused, Code.CANCELLED, read)
            with trio.move_on_after(0.5):
                await a.conversation.upload(stream, endless())
        assert b.conversation.open


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x"
        await trio.sleep(0.1)


async def test_a_lost_link_ends_reader_and_writer(autojump_clock: object) -> None:
    async with talking() as (a, b):
        stream = open_stream(a, b)

        async def read() -> None:
            async for _ in await arrived(b, stream):
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused, Code.UNAVAILABLE, read)
            nursery.start_soon(refused, Code.UNAVAILABLE, a.conversation.upload, stream, endless())
            await trio.sleep(0.5)
            a.conversation.link.vanish("cut by the test")  # type: ignore[attr-defined]
        await refused(Code.UNAVAILABLE, a.conversation.upload, stream, chunks(1))  # and nobody waits for ever
        assert not a.conversation.open
        assert not b.conversation.open


async def test_what_had_arrived_before_the_loss_is_still_read(autojump_clock: object) -> None:
    stream = IncomingStream(lambda count: None)
    stream.feed(b"one")
    stream.feed(b"two")
    stream.finish()
    stream.fail(KnodeError(Code.UNAVAILABLE, "too late to matter"))
    assert [chunk async for chunk in stream] == [b"one", b"two"]


async def test_a_good_bye_is_sent_before_the_end(autojump_clock: object) -> None:
    async with talking() as (a, b):
        for n in range(200):
            a.conversation.send(Event("test", Context(), bytes(5000)))
            if n == 150:
                await trio.lowlevel.checkpoint()
        await a.conversation.say_good_bye(Code.UNAVAILABLE, "the node goes down")
        await b.conversation.ended.wait()
        assert len(b.taken) == 200
        assert b.conversation.liveness.state(trio.current_time()) is PeerState.LEFT
        assert "the node goes down" in b.conversation.end_reason


async def test_a_good_bye_waits_a_second_at_most(autojump_clock: object) -> None:
    async with talking() as (a, b):
        a.conversation.link.send_frame = never  # type: ignore[method-assign]
        begun = trio.current_time()
        await a.conversation.say_good_bye(Code.UNAVAILABLE, "the node goes down")
        assert trio.current_time() - begun <= 1
        await a.conversation.say_good_bye(Code.UNAVAILABLE, "twice is no error")
        assert b.taken == []


async def test_whoever_ends_the_session_says_why(autojump_clock: object) -> None:
    async with talking() as (a, b):
        b.refuse = KnodeError(Code.KEY_REVOKED, "this node was revoked")
        a.conversation.send(Event("test", Context(), b""))
        await a.conversation.ended.wait()
        assert a.conversation.end_reason == "KEY_REVOKED: this node was revoked"
        assert b.conversation.end_reason == a.conversation.end_reason
        assert b.taken == []


async def test_a_frame_that_is_none_ends_the_session_by_name(autojump_clock: object) -> None:
    async with talking() as (a, _):
        await a.conversation.link.send_frame(bytes([Kind.DATA, 0, 0, 0, 9, 1]))
        await a.conversation.ended.wait()
        assert a.conversation.end_reason.startswith("BAD_FRAME")


async def test_a_full_outbox_is_refused_by_name_and_a_hopeless_one_ends_the_session(
    autojump_clock: object,
) -> None:
    async with talking() as (a, b):
        b.conversation.link.receive_frame = trio.sleep_forever  # type: ignore[method-assign]
        for _ in range(limits.OUTBOX_MESSAGES - len(a.conversation.session._outbox)):
            a.conversation.send(Event("test", Context(), b""))
        with pytest.raises(KnodeError) as caught:
            a.conversation.send(Event("test", Context(), b""))
        assert caught.value.code is Code.RATE_LIMITED
        assert a.conversation.open
        a.conversation.send_or_close(Event("test", Context(), b""))
        await a.conversation.ended.wait()
        await until(lambda: not a.conversation.link.is_open)  # type: ignore[attr-defined]


async def test_who_waits_for_both_rosters_to_be_the_same_is_told_of_the_end(autojump_clock: object) -> None:
    async with talking() as (a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused, Code.UNAVAILABLE, a.conversation.until_synchronised)
            await trio.sleep(0.1)
            a.conversation.close("by the test")
        b.conversation.synchronised.set()
        await b.conversation.until_synchronised()
        await b.conversation.ended.wait()
        await b.conversation.until_synchronised()


async def test_a_retired_conversation_ends_once_both_have_retired_it_and_no_request_holds_it(
    autojump_clock: object,
) -> None:
    async with talking() as (a, b):
        a.conversation.hold(7)
        a.conversation.retire()
        await trio.sleep(10)
        assert b.conversation.peer_retired
        assert a.conversation.open
        a.conversation.let_go(7)
        await trio.sleep(10)
        assert a.conversation.open  # what b sent before it knew may still be on its way
        b.conversation.retire()
        await trio.sleep(2)
        assert not a.conversation.open


async def test_a_retired_conversation_says_all_that_waits_before_it_ends(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with talking() as (a, b):
        a.conversation.hold(7)  # it waits for an answer here
        for side in (a, b):
            side.conversation.retire()
        await trio.sleep(0.2)
        send_frame = b.conversation.link.send_frame

        async def slowly(frame: bytes) -> None:
            await trio.sleep(2.5)
            await send_frame(frame)

        monkeypatch.setattr(b.conversation.link, "send_frame", slowly)
        last = Event("last", Context(), b"")
        b.conversation.send(last)
        await b.conversation.ended.wait()
        assert last in a.taken
