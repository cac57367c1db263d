from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from knode.world import Turns


async def test_a_free_place_is_taken_without_a_turn_of_the_loop() -> None:
    seen: list[str] = []

    async def other() -> None:
        seen.append("other")

    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        async with turns:
            assert turns.locked()
            assert seen == []
        assert not turns.locked()


async def test_who_waits_goes_in_the_order_in_which_it_came_and_nobody_goes_before() -> None:
    turns, went = Turns(), list[int]()
    go_on = [trio.Event() for _ in range(4)]

    async def go(number: int) -> None:
        async with turns:
            went.append(number)
            await go_on[number].wait()

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(go, number)
            await wait_all_tasks_blocked()
        assert went == [0]
        go_on[0].set()
        nursery.start_soon(go, 3)
        await wait_all_tasks_blocked()
        assert went == [0, 1]
        for each in go_on:
            each.set()
    assert went == [0, 1, 2, 3]


async def test_who_is_cancelled_while_it_waits_takes_no_place() -> None:
    turns = Turns()
    async with turns:
        with trio.move_on_after(0) as waiting:
            async with turns:
                raise AssertionError("two at once")
        assert waiting.cancelled_caught
    assert not turns.locked()
    async with turns:
        pass
