"""Running trio so that a run is a function of its seed: in virtual time, with the dice given."""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import trio
from trio._core import _run
from trio.testing import MockClock

T = TypeVar("T")

TURNS_WITHOUT_TIME = 100_000
"""So many turns of the loop at one moment are an endless loop: what is to be done at once takes hundreds."""


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

    async def watched() -> T:
        with trio.CancelScope() as scope:
            turns = _Turns(scope)
            trio.lowlevel.add_instrument(turns)
            try:
                return await main()
            finally:
                trio.lowlevel.remove_instrument(turns)
        raise Stalled(turns.complaint)

    with _seeded_scheduler(seed), _no_collector():
        return trio.run(watched, clock=MockClock(autojump_threshold=0), strict_exception_groups=True)


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


class _Turns(trio.abc.Instrument):
    """Counts the turns of trio's loop at one moment, and stops a run that does not get beyond it."""

    def __init__(self, scope: trio.CancelScope) -> None:
        self.complaint = ""
        self._scope = scope
        self._now = 0.0
        self._turns = 0

    def before_io_wait(self, timeout: float) -> None:
        """Take note of a turn."""
        now = trio.current_time()
        self._turns = self._turns + 1 if now == self._now else 0
        self._now = now
        if self._turns == TURNS_WITHOUT_TIME:
            names = sorted({task.name for task in _run.GLOBAL_RUN_CONTEXT.runner.runq})
            self.complaint = f"time stands still at {now:.6f} s, while these run: {', '.join(names)}"
            self._scope.cancel()


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
