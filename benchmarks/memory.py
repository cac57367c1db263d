"""`python -m benchmarks.memory --tasks 100000`: what three processes take while durable tasks pass through.

No benchmark of `make bench`: it takes minutes. At the end stands a table with the resident memory of each
process; exit code 1 when one rose by more than its bound after the warm-up.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import trio

from benchmarks._cell import TOGETHER, cell_of_three, tasks_a_second
from benchmarks.node import resident_mib
from benchmarks.report import aligned
from knode.testnet.processes import daemons_of

SAMPLES = 20
WARM_UP = 0.3
"""Part of the run in which caches fill: SQLite's, and the tasks that the ledger keeps."""
BOUND_MIB = 8.0


async def _measure(folder: Path, tasks: int) -> list[tuple[int, float, list[float]]]:
    """Return tasks so far, tasks a second, and MiB of each process, after each part of the run."""
    samples: list[tuple[int, float, list[float]]] = []
    async with cell_of_three(folder) as (node, homes):
        pids = [os.getpid(), *sorted(daemons_of([home.path for home in homes]))]
        part = tasks // SAMPLES
        for number in range(1, SAMPLES + 1):
            rate = await tasks_a_second(node, part)
            samples.append((number * part, rate, [resident_mib(pid) for pid in pids]))
            print(f"{number * part} tasks", file=sys.stderr, flush=True)
    return samples


def main(tasks: int) -> int:
    """Run so many tasks; return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        samples = trio.run(_measure, Path(folder), tasks)
    headings = ("tasks", "a second", "leader, MiB", "second, MiB", "third, MiB")
    rows = [(str(n), f"{rate:.0f}", *(f"{mib:.1f}" for mib in resident)) for n, rate, resident in samples]
    print(aligned([headings, *rows]))
    warm = samples[round(WARM_UP * SAMPLES) :]
    rises = [warm[-1][2][process] - warm[0][2][process] for process in range(3)]
    is_flat = max(rises) <= BOUND_MIB
    print(f"rose after the warm-up by {', '.join(f'{rise:.1f}' for rise in rises)} MiB, {TOGETHER} in flight")
    print("good" if is_flat else f"bad: more than {BOUND_MIB:g} MiB")
    return 0 if is_flat else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000, help="how many, at least 1000")
    sys.exit(main(max(1000, parser.parse_args().tasks)))
