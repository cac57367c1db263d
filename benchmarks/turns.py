"""`python -m benchmarks.turns`: what a lone commit and a lone durable task make a cell of three do.

Counts instead of times, for they hardly depend on what else the machine does: how often the leader's loop
goes round, how often it resumes a task, how many frames it sends; and the processor time of each process.
The process that measures leads, as in `benchmarks tasks`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from benchmarks._cell import cell_of_three, run_one
from benchmarks.report import aligned
from benchmarks.tasks import commit_s
from knode.node import Node
from knode.testnet.processes import daemons_of

WARM_UP = 30


class _Loop(trio.abc.Instrument):
    """Counts what the loop of this process does."""

    def __init__(self) -> None:
        self.turns = 0
        self.steps = 0

    def before_io_wait(self, timeout: float) -> None:
        """Count a turn."""
        self.turns += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count a task that goes on."""
        self.steps += 1


def _processor_ms(pid: int) -> float:
    """Return the processor time of a process so far; of threads that live: pools keep theirs."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


def _frames(node: Node) -> int:
    conversations = [peer.conversation for peer in node.peers.members()]
    return sum(one.link.statistics.frames_sent for one in conversations if one is not None)


async def _measure(folder: Path, count: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    async with cell_of_three(folder) as (node, homes):
        pids = [os.getpid(), *sorted(daemons_of([home.path for home in homes]))]
        loop = _Loop()
        trio.lowlevel.add_instrument(loop)
        works: list[tuple[str, Callable[[Node], Awaitable[object]]]] = [
            ("commit", commit_s),
            ("task", run_one),
        ]
        for name, work in works:
            for _ in range(WARM_UP):
                await work(node)
            before = [loop.turns, loop.steps, _frames(node), *map(_processor_ms, pids)]
            for _ in range(count):
                await work(node)
            after = [loop.turns, loop.steps, _frames(node), *map(_processor_ms, pids)]
            each = [(end - begin) / count for begin, end in zip(before, after, strict=True)]
            rows.append((name, *(f"{one:.1f}" for one in each)))
    return rows


def main(count: int) -> int:
    """Do so many of each; return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        rows = trio.run(_measure, Path(folder), count)
    headings = ("one", "turns", "steps", "frames sent", "leader, ms", "second, ms", "third, ms")
    print(aligned([headings, *rows]))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="how many of each")
    sys.exit(main(parser.parse_args().count))
