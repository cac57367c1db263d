"""The queue of the leader: order of submission among equals, and nobody waits behind whom nobody can run."""

from __future__ import annotations

from msgspec.structs import replace

from knode.tasks.lifecycle import State
from knode.tasks.queue import Need, Queue, need_of
from knode.tasks.records import LedgerTask

TEXT, PYTHON = Need("kExecutor:text", b""), Need("kExecutor:python", b"")


def task(number: int, need: Need = TEXT, not_before: int = 0) -> LedgerTask:
    return LedgerTask(
        number=number,
        id=number.to_bytes(16, "big"),
        submitter=bytes(32),
        key=str(number),
        digest=bytes(32),
        not_after=10**9,
        agent=need.agent,
        on=need.on,
        attempts=3,
        deadline=10**9,
        submitted=0,
        parent=b"",
        depth=0,
        holders=(),
        size=0,
        file_bytes=0,
        state=State.QUEUED,
        not_before=not_before,
    )


def drain(queue: Queue, need: Need) -> list[int]:
    numbers = []
    while (first := queue.first(need)) is not None:
        numbers.append(first.number)
        queue.remove(first.id)
    return numbers


def test_tasks_come_in_the_order_of_submission_whenever_they_were_queued_again() -> None:
    queue = Queue()
    for number in (3, 1, 2):
        queue.add(task(number))
    queue.advance(0)
    assert drain(queue, TEXT) == [1, 2, 3]
    assert queue.needs() == []
    assert len(queue) == 0


def test_a_task_waits_for_its_time_and_holds_up_nobody() -> None:
    queue = Queue()
    queue.add(task(1, not_before=500))
    queue.add(task(2))
    assert queue.next_at == 0
    queue.advance(499)
    assert queue.next_at == 500
    assert drain(queue, TEXT) == [2]
    queue.advance(500)
    assert (queue.next_at, drain(queue, TEXT)) == (None, [1])


def test_a_later_time_that_was_given_counts() -> None:
    queue = Queue()
    queue.add(task(1), not_before=100)
    queue.advance(99)
    assert queue.first(TEXT) is None
    queue.advance(100)
    assert drain(queue, TEXT) == [1]


def test_needs_are_told_apart_and_the_oldest_task_s_comes_first() -> None:
    queue, attic = Queue(), Need(TEXT.agent, b"a" * 32)
    for number, need in ((1, PYTHON), (2, attic), (3, TEXT), (4, PYTHON)):
        assert need_of(task(number, need)) == need
        queue.add(task(number, need))
    queue.advance(0)
    assert queue.needs() == [PYTHON, attic, TEXT]
    queue.remove(task(1).id)
    assert queue.needs() == [attic, TEXT, PYTHON]
    assert drain(queue, PYTHON) == [4]
    assert queue.needs() == [attic, TEXT]


def test_what_was_taken_out_comes_back_changed() -> None:
    queue = Queue()
    queue.add(task(1))
    queue.remove(task(1).id)
    assert (queue.next_at, len(queue)) == (None, 0)
    queue.add(replace(task(1), attempt=1, not_before=7))
    queue.advance(10)
    first = queue.first(TEXT)
    assert first is not None
    assert first.attempt == 1
    assert drain(queue, TEXT) == [1]


def test_what_is_taken_out_behind_one_that_nobody_can_run_does_not_gather() -> None:
    queue = Queue()
    for number in range(1, 5_000):
        queue.add(task(number))
        queue.advance(0)
        if number > 1:
            queue.remove(task(number).id)
        assert queue.first(TEXT) == task(1)
    assert len(queue._ready[TEXT]) < 100
