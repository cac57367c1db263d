from __future__ import annotations

import threading
import time

import pytest
import trio

from knode.world.real import BLOCKING_AT_ONCE, real_world


async def test_the_clocks_agree_with_trio_and_the_system() -> None:
    clock = real_world().clock
    assert abs(clock.monotonic() - trio.current_time()) < 1
    assert abs(clock.wall() - time.time() * 1000) < 5000


def test_tokens_differ_and_have_the_size_that_was_asked() -> None:
    randomness = real_world().randomness
    tokens = {randomness.token(32) for _ in range(100)}
    assert len(tokens) == 100
    assert {len(token) for token in tokens} == {32}
    assert all(2.0 <= randomness.uniform(2.0, 3.0) <= 3.0 for _ in range(100))


async def test_blocking_work_runs_beside_the_loop_and_gives_back_its_result_or_error() -> None:
    blocking = real_world().blocking
    assert await blocking.run(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await blocking.run(lambda: 1 // 0)


async def test_at_most_sixteen_run_at_once() -> None:
    blocking = real_world().blocking
    running = 0
    most = 0
    guard = threading.Lock()
    all_started = threading.Semaphore(0)
    go_on = threading.Event()

    def work() -> None:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        all_started.release()
        assert go_on.wait(60)
        with guard:
            running -= 1

    def release_when_full() -> None:
        for _ in range(BLOCKING_AT_ONCE):
            assert all_started.acquire(timeout=60)
        go_on.set()

    async with trio.open_nursery() as nursery:
        for _ in range(BLOCKING_AT_ONCE * 2):
            nursery.start_soon(blocking.run, work)
        await trio.to_thread.run_sync(release_when_full)
    assert most == BLOCKING_AT_ONCE


async def test_cancelling_waits_for_the_work_that_runs() -> None:
    done: list[int] = []
    started = threading.Event()
    go_on = threading.Event()

    def work() -> None:
        started.set()
        assert go_on.wait(60)
        done.append(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(real_world().blocking.run, work)
        await trio.to_thread.run_sync(started.wait)
        nursery.cancel_scope.cancel()
        go_on.set()
    assert done == [1]
