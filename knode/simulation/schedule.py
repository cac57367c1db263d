"""Running trio so that a run is a function of its seed: in virtual time, with the dice given."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import trio
from trio._core import _run
from trio.testing import MockClock

T = TypeVar("T")

TURNS_WITHOUT_TIME = 100_000
"""So many turns of the loop at one moment are an endless loop: what is to be done at once takes hundreds."""


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
