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


def run_repeatably(main: Callable[[], Awaitable[T]], seed: int) -> T:
    """Run `main` under trio in virtual time; the same seed, the same run.

    Time stands still while any task can run and then jumps to the next deadline. Which of the tasks
    that can run goes first is drawn from `seed`.
    """
    with _seeded_scheduler(seed), _no_collector():
        return trio.run(main, clock=MockClock(autojump_threshold=0), strict_exception_groups=True)


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
