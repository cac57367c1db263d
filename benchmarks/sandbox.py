"""The start of a sandbox, beside the bare tool with the same walls."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio

from benchmarks.report import ROUNDS, Row
from knode.agents.limits import Limits
from knode.agents.sandbox import Command, Ended
from knode.agents.sandbox.bubblewrap import Bubblewrap
from knode.agents.sandbox.sandlock import Sandlock
from knode.agents.sandbox.surroundings import python_program, scratch_of
from knode.errors import KnodeError
from knode.world.real import real_world

TARGET = 2.0
PROGRAMS = {"true": ["true"], "python": [os.fspath(python_program()), "-I", "-c", "pass"]}

# What a program that uses sandlock by itself would be: one process, no limits but sandlock's own.
_BARE_SANDLOCK = """
import json, sys, warnings
from sandlock import Sandbox, StdioMode
warnings.simplefilter("ignore")
policy = json.loads(sys.argv[1])
streams = dict.fromkeys(("stdin", "stdout", "stderr"), StdioMode.NULL)
sys.exit(Sandbox(**policy, clean_env=True).popen(sys.argv[2:], **streams).wait().exit_code)
"""


def run() -> list[Row]:
    """Return a row for each sandbox that can be started here and each program."""
    rows = []
    for bare, make in ((bare_bubblewrap, Bubblewrap), (bare_sandlock, Sandlock)):
        try:
            sandbox = make()
        except KnodeError:
            continue
        for name, argv in PROGRAMS.items():
            rows.append(trio.run(measure, sandbox, f"{sandbox.name}, start of {name}", argv, bare))
    return rows


async def measure(
    sandbox: Bubblewrap | Sandlock, name: str, argv: list[str], bare: Callable[[Command], list[str]]
) -> Row:
    """Measure sandbox and bare tool in turn; the median counts."""
    folder = Path(tempfile.mkdtemp())
    command = Command(argv=argv, folder=folder)
    figures, floors = [], []
    try:
        scratch_of(folder)
        bare_argv = bare(command)
        for _ in range(ROUNDS + 1):
            begun = time.perf_counter()
            outcome = await sandbox.run(command, Limits(), lambda fraction, text: None)
            figures.append(time.perf_counter() - begun)
            assert outcome.ended is Ended.EXITED
            assert outcome.exit_code == 0, outcome.stderr
            floors.append(time_of(bare_argv))
    finally:
        real_world().disk.remove(folder)
    figure, floor = statistics.median(figures[1:]), statistics.median(floors[1:])  # the first warms up
    return Row(
        name=name,
        figure=f"{figure * 1000:.1f} ms",
        floor=f"{floor * 1000:.1f} ms",
        ratio=figure / floor,
        target=f"at most {TARGET}",
        met=figure / floor <= TARGET,
    )


def time_of(argv: list[str]) -> float:
    """Return the seconds that a command takes, with nothing else going on in this process."""
    begun = time.perf_counter()
    subprocess.run(argv, check=True)
    return time.perf_counter() - begun


def bare_bubblewrap(command: Command) -> list[str]:
    """Return bubblewrap's command line with the same namespaces and mounts, without filter and limits."""
    return [*Bubblewrap().arguments(command, scratch_of(command.folder)), "--", *command.argv]


def bare_sandlock(command: Command) -> list[str]:
    """Return a program that runs the command by sandlock's own interface, with the same policy."""
    policy = json.loads(Sandlock().policy(command, Limits()))
    for ours in ("filter", "parent"):
        del policy[ours]
    return [sys.executable, "-I", "-c", _BARE_SANDLOCK, json.dumps(policy), *command.argv]
