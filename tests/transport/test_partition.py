"""What a cut does to links: nothing passes, nothing is lost, and neither end learns what the other does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from link_kinds import SeededRandomness, open_pair
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.transport import Link, LinkClosed
from knode.transport.memory import MemoryNetwork, MemorySettings
from knode.transport.partition import GIVEN_UP_SECONDS, Partition, PartitionedCarrier, PartitionedLink

QUICK = MemorySettings(delay_seconds=(0.01, 0.01), buffer_frames=4)


@dataclass
class Two:
    """Two nodes with a link between them, which node a dialled."""

    a: Partition
    b: Partition
    near: PartitionedLink
    far: PartitionedLink
    carrier: PartitionedCarrier
    """Of node a."""

    def cut(self) -> None:
        self.a.set(["b"])
        self.b.set(["a"])

    def heal(self) -> None:
        self.a.set([])
        self.b.set([])


@asynccontextmanager
async def two_nodes() -> AsyncIterator[Two]:
    network = MemoryNetwork(SeededRandomness(1), QUICK)
    a, b = Partition(), Partition()
    a.owner_of = {"b:49152": "b"}.get
    carriers = [PartitionedCarrier(network.carrier(name), each) for name, each in (("a", a), ("b", b))]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.run)
        nursery.start_soon(b.run)
        async with open_pair(*carriers, "b") as (near, far):
            assert isinstance(near, PartitionedLink)
            assert isinstance(far, PartitionedLink)
            b.claim(far, "a")
            yield Two(a, b, near, far, carriers[0])
            a.set([])
            b.set([])
        nursery.cancel_scope.cancel()


async def stalls(work: Callable[[], Any]) -> None:
    """See that something does not end within an hour."""
    with trio.move_on_after(3600) as scope:
        await work()
    assert scope.cancelled_caught, "it went through the cut"


async def test_nothing_passes_a_cut_and_after_it_everything_that_was_sent(autojump_clock: MockClock) -> None:
    async with two_nodes() as two:
        await two.near.send_frame(b"on its way")
        two.cut()
        for link in (two.near, two.far):
            await stalls(link.receive_frame)
        await stalls(lambda: two.near.send_frame(b"given up"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.near.send_frame, b"held")
            await trio.sleep(60)
            two.heal()
        assert [await two.far.receive_frame() for _ in range(2)] == [b"on its way", b"held"]
        await two.far.send_frame(b"back")
        assert await two.near.receive_frame() == b"back"


async def test_a_frame_that_arrives_in_the_cut_is_kept_whoever_waits_for_it_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    async with two_nodes() as two:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def receive() -> None:
                await stalls(two.far.receive_frame)

            await trio.sleep(1)
            await two.near.send_frame(b"kept")
            two.b.set(["a"])
        two.heal()
        assert await two.far.receive_frame() == b"kept"


async def test_nothing_seems_to_be_read_while_it_is_cut(autojump_clock: MockClock) -> None:
    async with two_nodes() as two:
        await two.near.send_frame(b"12345")
        await two.far.receive_frame()
        assert two.far.statistics.bytes_read == 5
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def receive() -> None:
                assert await two.far.receive_frame() == b"678"

            await trio.sleep(1)
            two.b.set(["a"])
            await two.near.send_frame(b"678")
            await trio.sleep(1)
            assert two.far.statistics.bytes_read == 5
            two.heal()
        assert two.far.statistics.bytes_read == 8


async def test_the_other_end_learns_of_a_close_only_after_the_cut(autojump_clock: MockClock) -> None:
    async with two_nodes() as two:
        two.cut()
        begun = trio.current_time()
        await two.near.aclose()
        await two.near.aclose()
        assert trio.current_time() - begun == pytest.approx(4), (
            "two seconds each, as for a peer that is silent"
        )
        with pytest.raises(LinkClosed):
            await two.near.send_frame(b"x")
        with pytest.raises(LinkClosed):
            await two.near.receive_frame()
        await stalls(two.far.receive_frame)
        two.heal()
        with trio.fail_after(1), pytest.raises(LinkClosed):
            await two.far.receive_frame()


async def test_a_close_that_the_cut_outlives_by_a_moment_is_an_orderly_one(autojump_clock: MockClock) -> None:
    async with two_nodes() as two, trio.open_nursery() as nursery:
        two.cut()
        nursery.start_soon(two.near.aclose)
        await trio.sleep(1)
        two.heal()
        with pytest.raises(LinkClosed, match="closed by the other end"):
            await two.far.receive_frame()


async def test_the_end_of_the_other_side_is_noticed_only_after_the_cut(autojump_clock: MockClock) -> None:
    async with two_nodes() as two:
        two.a.set(["b"])
        await two.far.aclose()
        await stalls(two.near.receive_frame)
        two.heal()
        with pytest.raises(LinkClosed):
            await two.near.receive_frame()


async def test_closing_ends_who_waits_within_the_cut(autojump_clock: MockClock) -> None:
    async with two_nodes() as two:
        ended = []

        async def expect_closed(wait: Callable[[], Any]) -> None:
            with pytest.raises(LinkClosed):
                await wait()
            ended.append(wait)

        async def fill() -> None:
            while True:
                await two.near.send_frame(b"x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_closed, fill)
            nursery.start_soon(expect_closed, two.near.receive_frame)
            await trio.sleep(1)
            two.cut()
            await two.near.aclose()
        assert len(ended) == 2


async def test_a_dial_into_the_cut_takes_its_ten_seconds_and_one_that_is_healed_succeeds(
    autojump_clock: MockClock,
) -> None:
    async with two_nodes() as two:
        two.cut()
        begun = trio.current_time()
        with pytest.raises(KnodeError) as caught:
            await two.carrier.dial("b:49152")
        assert caught.value.code is Code.UNAVAILABLE
        assert trio.current_time() - begun == pytest.approx(10)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def dial() -> None:
                link = await two.carrier.dial("b:49152")
                assert trio.current_time() - begun == pytest.approx(15, abs=0.1)
                await link.aclose()

            await trio.sleep(5)
            two.heal()


async def test_a_link_that_was_dialled_is_cut_before_anybody_has_said_who_he_is(
    autojump_clock: MockClock,
) -> None:
    async with two_nodes() as two:
        assert (two.near.node, two.near.is_cut) == ("b", False)
        two.a.set(["b", "c"])
        assert two.near.is_cut
        two.a.set(["c"])
        assert not two.near.is_cut


async def test_others_are_reached_during_a_cut(autojump_clock: MockClock) -> None:
    async with two_nodes() as two:
        two.a.set(["c"])
        two.b.set(["c"])
        await two.near.send_frame(b"as ever")
        assert await two.far.receive_frame() == b"as ever"


async def test_what_was_accepted_and_closed_is_given_up_when_the_cut_lasts(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(SeededRandomness(1), QUICK)
    partition = Partition(["a"])
    listening = PartitionedCarrier(network.carrier("b"), partition)
    accepted: list[float] = []

    async def accept(link: Link) -> None:
        partition.claim(link, "a")
        accepted.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        listener = await listening.listen("b", 1)
        nursery.start_soon(listener.serve, accept)
        link = await network.carrier("a").dial("b:1")
        with suppress(LinkClosed):
            await link.receive_frame()
        assert trio.current_time() - accepted[0] == pytest.approx(GIVEN_UP_SECONDS + 2, abs=1)
        assert not partition._left_open
        await link.aclose()
        nursery.cancel_scope.cancel()
