"""Virtual time, drawn randomness and the scheduler that is told its dice."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from knode.simulation.disk import SimulatedDisk
from knode.simulation.schedule import Stalled, put_to_sleep, run_repeatably, running_on, wake
from knode.simulation.world import EPOCH_MS, SimulatedBlocking, SimulatedClock, SimulatedRandomness
from knode.world.real import BLOCKING_AT_ONCE


async def order_of_tasks() -> list[int]:
    order: list[int] = []

    async def append(number: int) -> None:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            order.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(append, number)
    return order


def test_the_scheduler_runs_tasks_in_an_order_that_the_seed_decides() -> None:
    orders = [run_repeatably(order_of_tasks, seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_hours_pass_at_once() -> None:
    async def sleep() -> float:
        await trio.sleep(7200)
        return trio.current_time()

    assert run_repeatably(sleep, 1) == 7200


def test_a_sleeping_machine_does_nothing_while_time_goes_on_and_then_all_that_was_due() -> None:
    async def main() -> tuple[list[tuple[str, float]], ...]:
        done: dict[str, list[tuple[str, float]]] = {"a": [], "b": []}
        news = trio.Event()

        async def work(machine: str) -> None:
            with running_on(machine):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(tick, machine)
                    nursery.start_soon(wait_for_news, machine)

        async def tick(machine: str) -> None:
            for _ in range(4):
                await trio.sleep(1)
                done[machine].append(("tick", trio.current_time()))

        async def wait_for_news(machine: str) -> None:
            with trio.move_on_after(2.5) as waited:
                await news.wait()
            done[machine].append(("too late" if waited.cancelled_caught else "news", trio.current_time()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, "a")
            nursery.start_soon(work, "b")
            await trio.sleep(1.5)
            put_to_sleep("a")
            await trio.sleep(8.5)
            news.set()
            wake("a")
        return done["a"], done["b"]

    asleep, awake = run_repeatably(main, 1)
    assert sorted(asleep, key=lambda each: each[1]) == [
        ("tick", 1.0),
        *sorted([("tick", 10.0), ("too late", 10.0)], key=lambda each: asleep.index(each)),
        ("tick", 11.0),
        ("tick", 12.0),
    ]
    assert awake == [("tick", 1.0), ("tick", 2.0), ("too late", 2.5), ("tick", 3.0), ("tick", 4.0)]


def test_a_run_in_which_time_stands_still_ends_and_names_who_keeps_running() -> None:
    async def busy_for_ever() -> None:
        while True:
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy_for_ever)

    with pytest.raises(Stalled, match="busy_for_ever"):
        run_repeatably(main, 1)


def test_a_wall_clock_begins_at_the_epoch_of_simulations_is_skewed_and_may_jump() -> None:
    async def read() -> list[int]:
        right, wrong = SimulatedClock(), SimulatedClock(-2.5)
        await trio.sleep(10)
        before = wrong.wall()
        wrong.skew_s += 3600
        assert right.monotonic() == wrong.monotonic() == 10
        return [right.wall() - EPOCH_MS, before - EPOCH_MS, wrong.wall() - EPOCH_MS]

    assert run_repeatably(read, 1) == [10_000, 7_500, 3_607_500]


def test_randomness_is_a_function_of_seed_and_owner() -> None:
    drawn = [SimulatedRandomness(seed, owner).token(16) for seed in (1, 2) for owner in ("a", "b")]
    assert len(set(drawn)) == 4
    # A hash of Python's own would differ from process to process.
    assert drawn[0].hex() == "4926e124b0eb6314606a10f66d4f7663"


def test_blocking_work_takes_virtual_time_and_sixteen_run_at_once() -> None:
    async def main() -> list[float]:
        blocking = SimulatedBlocking(SimulatedRandomness(1, "a"), lambda: (1.0, 1.0))
        ends: list[float] = []
        async with trio.open_nursery() as nursery:
            for _ in range(BLOCKING_AT_ONCE + 1):
                nursery.start_soon(blocking.run, lambda: ends.append(trio.current_time()))
        return ends

    assert run_repeatably(main, 1) == [1.0] * BLOCKING_AT_ONCE + [2.0]


def test_cancelled_blocking_work_is_done_to_its_end() -> None:
    async def main() -> list[str]:
        done: list[str] = []
        blocking = SimulatedBlocking(SimulatedRandomness(1, "a"), lambda: (1.0, 1.0))
        with trio.move_on_after(0.5):
            await blocking.run(lambda: done.append("work"))
        return done

    assert run_repeatably(main, 1) == ["work"]


def test_a_part_of_a_file_can_be_read() -> None:
    disk, path = SimulatedDisk(), Path("/folder/file")
    disk.make_folder(path.parent)
    disk.write(path, b"0123456789")
    assert [disk.read_at(path, offset, 4) for offset in (0, 8, 10)] == [b"0123", b"89", b""]
