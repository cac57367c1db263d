"""Running trio so that a run is a function of its seed: in virtual time, with the dice given."""

from __future__ import annotations

import contextlib
import gc
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import trio
from trio._core import _run

T = TypeVar("T")

LOOKS_WITHOUT_TIME = 1_000_000
"""The time is looked at once a turn of the loop, and for each deadline that is set. So many looks at one
moment are an endless loop: what is to be done at once takes thousands."""


MACHINE: ContextVar[str] = ContextVar("machine")
"""The machine that a task runs on; its child tasks inherit it."""


class Stalled(Exception):
    """Tasks keep running and the virtual time stands still."""


def run_repeatably(main: Callable[[], Awaitable[T]], seed: int) -> T:
    """Run `main` under trio in virtual time; the same seed, the same run.

    Time stands still while any task can run and then jumps to the next deadline. Which of the tasks
    that can run goes first is drawn from `seed`.

    Raises:
        Stalled: with the time at which it stands, and who keeps running.
    """

    clock = _VirtualClock()

    async def watched() -> T:
        with clock.watchdog:
            return await main()
        raise Stalled(clock.complaint)

    with _seeded_scheduler(seed), _no_collector():
        # Ctrl-C within a callback of SQLite would become an error of its disk, and be lost.
        return trio.run(
            watched,
            clock=clock,
            restrict_keyboard_interrupt_to_checkpoints=True,
            strict_exception_groups=True,
        )


@contextlib.contextmanager
def running_on(machine: str) -> Iterator[None]:
    """Let what this task does meanwhile, and the tasks that come of it, be the machine's."""
    token = MACHINE.set(machine)
    try:
        yield
    finally:
        MACHINE.reset(token)


def put_to_sleep(machine: str) -> None:
    """Let no task of this machine run, though time goes on: as SIGSTOP does. Twice is an error."""
    runner = _run.GLOBAL_RUN_CONTEXT.runner
    if not isinstance(runner.runq, _WakefulTasks):
        runner.runq = _WakefulTasks(runner.runq)
    runner.runq.hold(machine)


def wake(machine: str) -> None:
    """Let the machine's tasks go on, in the order in which they became able to."""
    tasks = _run.GLOBAL_RUN_CONTEXT.runner.runq
    assert isinstance(tasks, _WakefulTasks), "nothing sleeps"
    tasks.release(machine)


class _WakefulTasks(deque[trio.lowlevel.Task]):
    """The tasks that trio runs in its next turn; those of sleeping machines wait beside it."""

    def __init__(self, tasks: deque[trio.lowlevel.Task]) -> None:
        super().__init__(tasks)
        self._held: dict[str, list[trio.lowlevel.Task]] = {}

    def append(self, task: trio.lowlevel.Task) -> None:
        """Take a task that can run."""
        held = self._held.get(task.context.get(MACHINE, "")) if self._held else None
        if held is None:
            super().append(task)
        else:
            held.append(task)

    def hold(self, machine: str) -> None:
        """Keep the machine's tasks back from now on."""
        assert machine not in self._held, f"{machine} sleeps already"
        self._held[machine] = []

    def release(self, machine: str) -> None:
        """Let them run."""
        self.extend(self._held.pop(machine))


class _VirtualClock(trio.abc.Clock):
    """Time that jumps to the next deadline when no task can run, and stands still meanwhile.

    It does what trio's `MockClock` does with an `autojump_threshold` of 0, in one turn of the loop for
    each jump instead of two, and it notices when time does not go on.
    """

    def __init__(self) -> None:
        self.watchdog = trio.CancelScope()
        self.complaint = ""
        self._now = 0.0
        self._looks = 0

    def start_clock(self) -> None:
        """Begin at 0."""

    def current_time(self) -> float:
        """Tell the virtual time, in seconds."""
        self._looks += 1
        if self._looks == LOOKS_WITHOUT_TIME:
            names = {task.name for task in _run.GLOBAL_RUN_CONTEXT.runner.runq}
            with contextlib.suppress(RuntimeError):  # between two turns no task is the current one
                names.add(trio.lowlevel.current_task().name)
            self.complaint = (
                f"time stands still at {self._now:.6f} s, while these run: {', '.join(sorted(names))}"
            )
            self.watchdog.cancel()
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Jump to the deadline: trio asks only when no task can run, and need not sleep then."""
        if deadline == math.inf:  # trio ends a run by waking itself through a socket
            return math.inf
        if deadline > self._now:
            self._now = deadline
            self._looks = 0
        return 0.0


@contextlib.contextmanager
def _seeded_scheduler(seed: int) -> Iterator[None]:
    # Private, and there is no public way: a test holds that it does what it does here.
    scheduler, state, sorted_before = _run._r, _run._r.getstate(), _run._ALLOW_DETERMINISTIC_SCHEDULING
    scheduler.seed(seed)
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    try:
        yield
    finally:
        scheduler.setstate(state)
        _run._ALLOW_DETERMINISTIC_SCHEDULING = sorted_before  # type: ignore[misc]


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Collect no cycles: when that happens depends on what the process did before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
