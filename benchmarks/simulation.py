"""How fast the simulator is: fifty nodes, each with a link to every other, as `knode simulate` runs them."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median

import msgspec

from benchmarks.report import Row
from knode.simulation.run import Run
from knode.simulation.scenario import load

SCENARIO = "fifty"
PART_S = 12.0
"""Virtual seconds of which each tenth is measured; the hour that is promised is many times that."""
TOLD_S = 300.0
"""The hour, with founding the cell, in so many real seconds."""


def run() -> list[Row]:
    """Found the cell, then measure how its virtual time passes in ten parts."""
    scenario = load(SCENARIO)
    marks: list[float] = []
    short = msgspec.structs.replace(scenario, lasts_s=10 * PART_S)
    begun = time.perf_counter()
    outcome = Run(short, 1, scenario.nodes, progress=lambda text: marks.append(time.perf_counter())).run()
    assert not outcome.violations, outcome.violations
    _, *parts = marks[:-1]  # told when the founding begins, after each tenth, and when all is healed
    typical_s = median(later - before for before, later in pairwise(parts))
    founding_s = parts[0] - typical_s - begun
    hour_s = founding_s + scenario.lasts_s / PART_S * typical_s
    speed = PART_S / typical_s
    return [
        Row(
            f"{scenario.nodes} simulated nodes, full mesh, quiet",
            f"{speed:.1f} virtual s a second",
            "",
            TOLD_S / hour_s,
            f"an hour within {TOLD_S:.0f} s: {hour_s:.0f} s, {founding_s:.0f} of them for founding",
            hour_s <= TOLD_S,
        )
    ]
