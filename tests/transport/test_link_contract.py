"""What every link keeps, whatever carries it. A new kind joins by one entry in `link_kinds.KINDS`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from link_kinds import Kind, Pair, open_pair
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.transport import MAX_FRAME_BYTES, Link, LinkClosed, LinkFault

LIMIT_SECONDS = 300
"""Far beyond what anything here takes, also on a clock ten times as fast: only a hang gets there."""

EDGE_SIZES = [1, 2, 125, 126, 127, 65_535, 65_536, 65_537, 200_000, MAX_FRAME_BYTES - 1, MAX_FRAME_BYTES]


def numbered(number: int, size: int) -> bytes:
    """A frame that shows when anything in it is torn, moved or mixed with another."""
    return random.Random(number).randbytes(size)


def port_of(address: str) -> int:
    """The port in `host:port` or in `/ip4/…/tcp/port/p2p/…`."""
    return int(address.split("/")[4] if address.startswith("/") else address.rpartition(":")[2])


async def receive_until_closed(link: Link) -> list[bytes]:
    frames = []
    with trio.fail_after(LIMIT_SECONDS):
        while True:
            try:
                frames.append(await link.receive_frame())
            except LinkClosed:
                return frames


async def send_until_closed(link: Link) -> None:
    with trio.fail_after(LIMIT_SECONDS):
        while True:
            try:
                await link.send_frame(b"is anyone there?")
            except LinkClosed:
                return
            await trio.sleep(0.001)


async def fill(link: Link) -> None:
    """Send until the link takes no more; cancelled, it is in the middle of a send."""
    while True:
        await link.send_frame(bytes(64 * 1024))


async def until_blocked(link: Link) -> int:
    """Wait until a sender makes no more progress; return the bytes that it sent."""
    seen = -1
    while seen != link.statistics.bytes_sent:
        seen = link.statistics.bytes_sent
        await trio.sleep(0.3)
    return seen


async def test_frames_of_all_sizes_arrive_whole_and_in_order(pair: Pair) -> None:
    near, far = pair
    frames = [numbered(number, size) for number, size in enumerate(EDGE_SIZES * 2)]
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            for frame in frames:
                await near.send_frame(frame)

        with trio.fail_after(LIMIT_SECONDS):
            for frame in frames:
                received = await far.receive_frame()
                assert type(received) is bytes
                assert received == frame


async def test_both_ends_send_at_once(pair: Pair) -> None:
    frames = [numbered(number, 50_000) for number in range(100)]

    async def send(link: Link) -> None:
        for frame in frames:
            await link.send_frame(frame)

    async def receive(link: Link) -> None:
        for frame in frames:
            assert await link.receive_frame() == frame

    with trio.fail_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:
            for link in pair:
                nursery.start_soon(send, link)
                nursery.start_soon(receive, link)


async def test_what_is_sent_at_once_arrives_whole_and_in_its_place(pair: Pair) -> None:
    near, far = pair
    frames = [numbered(number, 32) for number in range(200)]
    sent_at_once = 0
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            nonlocal sent_at_once
            for number, frame in enumerate(frames):
                if number % 3 and near.send_at_once(frame):
                    sent_at_once += 1
                else:
                    await near.send_frame(frame)
                if number % 50 == 0:
                    await trio.lowlevel.checkpoint()

        with trio.fail_after(LIMIT_SECONDS):
            assert [await far.receive_frame() for _ in frames] == frames
    assert near.statistics.frames_sent == len(frames)
    assert near.statistics.bytes_sent == 32 * len(frames)
    assert sent_at_once > 0 or near.carrier == "libp2p"


async def test_a_full_or_closed_link_sends_nothing_at_once(tenfold_clock: MockClock, pair: Pair) -> None:
    near, far = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill, near)
        await until_blocked(near)
        nursery.cancel_scope.cancel()
    sent = near.statistics.frames_sent
    taken = sum(near.send_at_once(bytes(60_000)) for _ in range(1000))
    assert taken < 100
    assert near.statistics.frames_sent == sent + taken
    await near.aclose()
    assert not near.send_at_once(b"x")
    await far.aclose()
    assert not far.send_at_once(b"x")


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
async def test_any_buffer_can_be_sent_and_may_change_after_the_send(
    pair: Pair, buffer: Callable[[bytes], Any]
) -> None:
    near, far = pair
    original = numbered(1, 5000)
    frame = buffer(bytearray(original)) if buffer is memoryview else buffer(original)
    await near.send_frame(frame)
    if buffer is not bytes:
        frame[:] = bytes(5000)
    assert await far.receive_frame() == original


@pytest.mark.parametrize("size", [0, MAX_FRAME_BYTES + 1])
async def test_a_frame_beyond_the_limits_is_refused_and_the_link_stays_usable(pair: Pair, size: int) -> None:
    near, far = pair
    with pytest.raises(ValueError, match="1 to 1048576"):
        await near.send_frame(bytes(size))
    await near.send_frame(b"next")
    assert await far.receive_frame() == b"next"


async def test_a_peer_that_does_not_read_stops_the_sender(tenfold_clock: MockClock, pair: Pair) -> None:
    near, far = pair
    frames = [numbered(number, 64 * 1024) for number in range(16)]
    async with trio.open_nursery() as nursery:
        frames_sent = 0

        @nursery.start_soon
        async def send() -> None:
            nonlocal frames_sent
            while frames_sent < 320:
                await near.send_frame(frames[frames_sent % len(frames)])
                frames_sent += 1

        sent_bytes = await until_blocked(near)
        assert sent_bytes < 16 * 1024 * 1024, "20 MiB were to be sent, and nobody read"
        with trio.fail_after(LIMIT_SECONDS):
            for number in range(320):
                assert await far.receive_frame() == frames[number % len(frames)]


async def test_a_cancelled_receive_loses_nothing(pair: Pair) -> None:
    near, far = pair
    frames = [
        numbered(number, random.Random(number).choice([1, 200, 70_000, 900_000])) for number in range(60)
    ]
    received: list[bytes] = []
    cancelled = 0

    async def cancel_after(turns: int, scope: trio.CancelScope) -> None:
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def receive(nursery: trio.Nursery, turns: int) -> None:
        nonlocal cancelled
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_after, turns, scope)
            received.append(await far.receive_frame())
        cancelled += scope.cancelled_caught

    with trio.fail_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:
            for turns in range(8):
                await receive(nursery, turns)  # nothing has been sent: each of them is cancelled

            @nursery.start_soon
            async def send() -> None:
                for frame in frames:
                    await near.send_frame(frame)

            turns = 0
            while len(received) < len(frames):
                await receive(nursery, turns)
                turns = (turns + 1) % 8
    assert received == frames
    assert cancelled >= 8


async def test_a_cancelled_send_has_not_begun_or_closes_the_link_and_nothing_is_torn(
    opener: Callable[[], Any],
) -> None:
    outcomes = set()
    for turns in range(0, 60, 5):
        async with opener() as (near, far):
            whole = [numbered(number, 300_000) for number in range(40)]
            sent: list[bytes] = []
            cancelled: list[bytes] = []
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def cancel(turns: int = turns, scope: trio.CancelScope = scope) -> None:
                        for _ in range(turns):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()

                    nursery.start_soon(cancel)
                    for frame in whole:
                        cancelled = [frame]
                        await near.send_frame(frame)
                        sent.append(frame)
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                received: list[bytes] = []

                async def receive(link: Link = far, into: list[bytes] = received) -> None:
                    into += await receive_until_closed(link)

                nursery.start_soon(receive)
                try:
                    await near.send_frame(b"the next one")
                    usable = True
                    await near.aclose()
                except LinkClosed:
                    usable = False
            outcomes.add(usable)
            if usable:
                assert received == [*sent, b"the next one"]
            else:
                assert received == sent[: len(received)], "a prefix of what was sent"
            assert cancelled[0] not in received
    assert outcomes, "no send was cancelled"


async def test_a_send_that_is_cancelled_before_it_begins_leaves_the_link_usable(pair: Pair) -> None:
    near, far = pair
    with trio.CancelScope() as scope:
        scope.cancel()
        await near.send_frame(b"never")
    assert scope.cancelled_caught
    await near.send_frame(b"next")
    assert await far.receive_frame() == b"next"
    assert near.statistics.frames_sent == 1


async def test_a_blocked_send_can_be_cancelled(tenfold_clock: MockClock, pair: Pair) -> None:
    near, far = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill, near)
        await until_blocked(near)
        nursery.cancel_scope.cancel()
    sent = near.statistics.frames_sent
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.aclose)
        assert await receive_until_closed(far) == [bytes(64 * 1024)] * sent


async def test_a_peer_that_dies_without_a_word_closes_the_link(
    tenfold_clock: MockClock, pair: Pair, kind: Kind
) -> None:
    near, far = pair
    await far.send_frame(b"my last words")
    with trio.fail_after(LIMIT_SECONDS):
        assert await near.receive_frame() == b"my last words"
        kind.sever(far)
        with pytest.raises(LinkClosed):
            await near.receive_frame()
        await send_until_closed(near)
        with pytest.raises(LinkClosed):
            await near.receive_frame()
        await near.aclose()


async def test_a_peer_that_dies_is_noticed_by_who_waits_to_send(
    tenfold_clock: MockClock, pair: Pair, kind: Kind
) -> None:
    near, far = pair
    with trio.fail_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                with pytest.raises(LinkClosed):
                    await fill(near)

            await until_blocked(near)
            kind.sever(far)


async def test_what_is_no_frame_closes_the_link_behind_the_frames_before_it(pair: Pair, kind: Kind) -> None:
    if kind.garble is None:
        pytest.skip("nothing but frames can be said over this link")
    near, far = pair
    await far.send_frame(b"good")
    await kind.garble(far)
    assert await receive_until_closed(near) == [b"good"]
    with pytest.raises(LinkFault):
        await near.receive_frame()
    await send_until_closed(near)


async def test_an_orderly_close_comes_behind_all_frames(pair: Pair) -> None:
    near, far = pair
    frames = [numbered(number, 1000) for number in range(20)]
    for frame in frames:
        await near.send_frame(frame)
    with trio.fail_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.aclose)
            assert await receive_until_closed(far) == frames
    for link in pair:
        with pytest.raises(LinkClosed):
            await link.send_frame(b"too late")
        with pytest.raises(LinkClosed):
            await link.receive_frame()
        await link.aclose()


async def test_closing_waits_at_most_two_seconds_for_a_peer_that_does_nothing(
    tenfold_clock: MockClock, pair: Pair
) -> None:
    near, _ = pair
    started = trio.current_time()
    await near.aclose()
    assert trio.current_time() - started < 8
    with pytest.raises(LinkClosed):
        await near.send_frame(b"too late")


async def test_a_cancelled_close_closes_at_once(pair: Pair) -> None:
    near, far = pair
    started = trio.current_time()
    with trio.CancelScope() as scope:
        scope.cancel()
        await near.aclose()
    assert trio.current_time() - started < 1
    assert await receive_until_closed(far) == []
    with pytest.raises(LinkClosed):
        await near.receive_frame()


async def test_two_tasks_may_close_one_end_at_once(tenfold_clock: MockClock, pair: Pair) -> None:
    near, _ = pair
    with trio.fail_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(near.aclose)
        await near.aclose()


async def test_both_ends_may_close_at_once(pair: Pair) -> None:
    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        for link in pair:
            nursery.start_soon(link.aclose)
    assert trio.current_time() - started < 1


async def test_closing_ends_a_send_and_a_receive_that_wait(tenfold_clock: MockClock, pair: Pair) -> None:
    near, _ = pair
    closed = []

    async def expect_closed(wait: Callable[[Link], Any]) -> None:
        with pytest.raises(LinkClosed):
            await wait(near)
        closed.append(wait)

    with trio.fail_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_closed, fill)
            nursery.start_soon(expect_closed, receive_one)
            await until_blocked(near)
            started = trio.current_time()
            await near.aclose()
            assert trio.current_time() - started < 8
    assert len(closed) == 2


async def test_who_receives_while_the_link_is_closed_here_sees_no_gap(
    tenfold_clock: MockClock, pair: Pair
) -> None:
    near, far = pair
    received: list[bytes] = []

    async def send() -> None:
        with suppress(LinkClosed):
            for number in range(65_536):
                await far.send_frame(number.to_bytes(2))

    async def receive() -> None:
        with suppress(LinkClosed):
            while True:
                received.append(await near.receive_frame())
                await trio.sleep(0.002)

    with trio.fail_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
            await trio.sleep(0.1)
            await near.aclose()
    assert received == [number.to_bytes(2) for number in range(len(received))]


async def test_a_peer_that_closes_while_both_send_ends_everything_with_link_closed(pair: Pair) -> None:
    _, far = pair
    with trio.fail_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:
            for link in pair:
                nursery.start_soon(send_until_closed, link)
                nursery.start_soon(receive_until_closed, link)
            await trio.sleep(0.05)
            await far.aclose()


async def receive_one(link: Link) -> bytes:
    return await link.receive_frame()


async def test_64_mib_arrive_with_their_digest(kind: Kind, certificate: Path) -> None:
    piece = numbered(7, 256 * 1024)
    pieces = 64 * 1024 * 1024 // len(piece)
    sent, received = hashlib.sha256(), hashlib.sha256()
    with trio.fail_after(LIMIT_SECONDS):
        async with open_pair(*kind.carriers(certificate), kind.listen_host) as (near, far):

            async def send() -> None:
                for number in range(pieces):
                    frame = number.to_bytes(4) + piece[4:]
                    sent.update(frame)
                    await near.send_frame(frame)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                for _ in range(pieces):
                    received.update(await far.receive_frame())
    assert received.digest() == sent.digest()


async def test_statistics_count_frames_and_their_bytes(pair: Pair) -> None:
    near, far = pair
    for size in (1, 10, 1000):
        await near.send_frame(bytes(size))
        await far.receive_frame()
    await far.send_frame(b"answer")
    await near.receive_frame()
    assert (near.statistics.frames_sent, near.statistics.bytes_sent) == (3, 1011)
    assert (far.statistics.frames_received, far.statistics.bytes_received) == (3, 1011)
    assert (near.statistics.frames_received, near.statistics.bytes_received) == (1, 6)
    assert (far.statistics.frames_sent, far.statistics.bytes_sent) == (1, 6)


async def test_both_ends_see_the_same_channel(pair: Pair, kind: Kind) -> None:
    near, far = pair
    assert near.channel_binding == far.channel_binding
    assert len(near.channel_binding) == 32
    assert near.carrier == far.carrier == kind.name
    assert near.remote_address
    assert far.remote_address


async def test_a_dial_to_nobody_says_why(kind: Kind, certificate: Path) -> None:
    dialling, listening = kind.carriers(certificate)
    listener = await listening.listen(kind.listen_host, 0)
    [address] = listener.addresses
    await listener.aclose()
    await listener.aclose()
    for nowhere in (address, "no address", "[::1", "host:99999", ":1"):
        with pytest.raises(KnodeError, match="no link to") as raised:
            await dialling.dial(nowhere)
        assert raised.value.code is Code.UNAVAILABLE


async def test_a_port_is_bound_once_and_free_after(kind: Kind, certificate: Path) -> None:
    _, listening = kind.carriers(certificate)
    listener = await listening.listen(kind.listen_host, 0)
    port = port_of(listener.addresses[0])
    with pytest.raises(KnodeError) as raised:
        await listening.listen(kind.listen_host, port)
    assert raised.value.code is Code.PORT_IN_USE
    await listener.aclose()
    await (await listening.listen(kind.listen_host, port)).aclose()


async def test_only_addresses_of_this_machine_can_be_listened_on(kind: Kind, certificate: Path) -> None:
    _, listening = kind.carriers(certificate)
    with pytest.raises(KnodeError) as raised:
        await listening.listen("203.0.113.7", 0)
    assert raised.value.code is Code.INVALID_ARGUMENT


async def test_who_dials_before_serving_begins_is_served_then(kind: Kind, certificate: Path) -> None:
    dialling, listening = kind.carriers(certificate)
    listener = await listening.listen(kind.listen_host, 0)

    async def greet(link: Link) -> None:
        await link.send_frame(b"hello")
        await receive_until_closed(link)

    with trio.fail_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def dial() -> None:
                link = await dialling.dial(listener.addresses[0])
                assert await link.receive_frame() == b"hello"
                await link.aclose()
                nursery.cancel_scope.cancel()

            await trio.sleep(0.05)
            nursery.start_soon(listener.serve, greet)
    await listener.aclose()


async def test_a_link_that_closes_ends_neither_the_listener_nor_others(kind: Kind, certificate: Path) -> None:
    dialling, listening = kind.carriers(certificate)
    listener = await listening.listen(kind.listen_host, 0)

    async def echo(link: Link) -> None:
        while True:  # ends by LinkClosed
            await link.send_frame(await link.receive_frame())

    with trio.fail_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, echo)
            staying = await dialling.dial(listener.addresses[0])
            leaving = await dialling.dial(listener.addresses[0])
            await leaving.aclose()
            await listener.aclose()
            await staying.send_frame(b"still here")
            assert await staying.receive_frame() == b"still here"
            await staying.aclose()
