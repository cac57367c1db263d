"""What `knode --help` costs beside a bare typer program of three commands."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.report import ROUNDS, Row

TARGET = 1.5

_BARE = '''
import typer

app = typer.Typer()

@app.command()
def one(name: str = "a") -> None:
    """Do the first thing."""

@app.command()
def two(name: str = "b") -> None:
    """Do the second thing."""

@app.command()
def three(name: str = "c") -> None:
    """Do the third thing."""

app()
'''


def run() -> list[Row]:
    """Measure both programs in turn, each from start to exit, compiled modules warm."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bare.py"
        program.write_text(_BARE)
        bare = [sys.executable, str(program), "--help"]
        knode = [sys.executable, "-m", "knode", "--help"]
        for command in (bare, knode):
            _seconds(command)
        pairs = [(_seconds(bare), _seconds(knode)) for _ in range(ROUNDS)]
    floor_s, figure_s = median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)
    ratio = figure_s / floor_s
    return [
        Row(
            name="knode --help",
            figure=f"{figure_s * 1000:.0f} ms",
            floor=f"{floor_s * 1000:.0f} ms",
            ratio=ratio,
            target=f"at most {TARGET:g}",
            met=ratio <= TARGET,
        )
    ]


def _seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start
