"""Durable tasks in a cell of three processes: one at a time, and many at once; etcd's put beside it.

One of the three is the measuring process, which founds the cell and leads it; the others are daemons that
joined it. The floor is one empty commit over the same links: an entry that changes nothing, acknowledged
when a majority has synced it and it is applied.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import trio

from benchmarks import _etcd
from benchmarks._cell import TOGETHER, WITHIN_S, cell_of_three, run_one, tasks_a_second
from benchmarks.report import ROUNDS, Row
from knode.klp.codec import encode
from knode.node import Node
from knode.tasks.commands import Forget
from knode.world import Monotonic

TASKS = 50
SYNCS = 100
MANY = 1_000
PUTS = 100
SMALL_BYTES = 200
AT_MOST_S = 0.010
AT_LEAST_A_SECOND = 500


def run() -> list[Row]:
    """Measure the disk, empty commits, tasks one at a time and many at once, then etcd."""
    with tempfile.TemporaryDirectory() as folder:
        measured = trio.run(_measure, Path(folder))
        put_s = _etcd_puts(Path(folder)) if _etcd.is_installed() else []
    commit, task = median(measured.commits), median(measured.tasks)
    p99 = quantiles(measured.tasks, n=100)[98]
    disk = median(measured.syncs)
    rows = [
        Row(
            "durable no-op task, three processes, one at a time",
            _milliseconds(task),
            f"{_milliseconds(commit)} one empty commit",
            task / commit,
            "at most 3.00",
            task <= 3 * commit,
        ),
        Row(
            "the same, 99th percentile",
            _milliseconds(p99),
            f"{_milliseconds(task)} its median",
            p99 / task,
            "at most 4.00",
            p99 <= 4 * task,
        ),
        Row(
            "the same, in time",
            _milliseconds(task),
            f"{_milliseconds(disk)} one fdatasync",
            task / AT_MOST_S,
            "at most 10 ms where fdatasync is under 1 ms",
            task <= AT_MOST_S or disk >= 0.001,
        ),
        Row(
            f"durable no-op tasks, {TOGETHER} in flight",
            f"{measured.a_second:.0f}/s",
            f"{1 / task:.0f}/s one at a time",
            measured.a_second / AT_LEAST_A_SECOND,
            f"at least {AT_LEAST_A_SECOND}/s",
            measured.a_second >= AT_LEAST_A_SECOND,
        ),
    ]
    if put_s:
        put = median(put_s)
        rows.append(
            Row(
                "one empty commit beside etcd's put",
                _milliseconds(commit),
                f"{_milliseconds(put)} etcd, three members",
                commit / put,
                "no target",
                True,
            )
        )
    return rows


class _Measured:
    """Seconds of each, over all rounds."""

    def __init__(self) -> None:
        self.syncs: list[float] = []
        self.commits: list[float] = []
        self.tasks: list[float] = []
        self.rates: list[float] = []

    @property
    def a_second(self) -> float:
        """Tasks a second, many at once."""
        return median(self.rates)


async def _measure(folder: Path) -> _Measured:
    measured = _Measured()
    async with cell_of_three(folder) as (node, _):
        for _ in range(ROUNDS):
            measured.syncs.append(_sync_s(folder / "probe"))
            for _ in range(TASKS):
                measured.commits.append(await commit_s(node))
                measured.tasks.append(await _task_s(node))
            measured.rates.append(await tasks_a_second(node, MANY))
    return measured


async def commit_s(node: Node) -> float:
    """Return what an empty commit takes."""
    started = time.perf_counter()
    outcome = await node.replica.propose(encode(Forget(node.world.clock.wall())), deadline=_deadline(node))
    outcome.check()
    return time.perf_counter() - started


async def _task_s(node: Node) -> float:
    started = time.perf_counter()
    await run_one(node)
    return time.perf_counter() - started


def _deadline(node: Node) -> Monotonic:
    return Monotonic(node.world.clock.monotonic() + WITHIN_S)


def _sync_s(path: Path) -> float:
    """Return what one small append and its fdatasync take."""
    seconds = []
    with path.open("wb", buffering=0) as file:
        for _ in range(SYNCS):
            started = time.perf_counter()
            file.write(bytes(SMALL_BYTES))
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - started)
    return median(seconds)


def _etcd_puts(folder: Path) -> list[float]:
    with _etcd.cluster(folder) as members:
        leader = next(member for member in members if member.is_leader())
        seconds = []
        for number in range(ROUNDS * PUTS):
            started = time.perf_counter()
            leader.put(f"key {number}", "x" * SMALL_BYTES)
            seconds.append(time.perf_counter() - started)
    return seconds


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
