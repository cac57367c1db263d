"""What `knode simulate` runs, and the document that it gives."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from knode.errors import Code, KnodeError
from knode.simulation.run import Run
from knode.simulation.scenario import DEFAULT, load

MAX_SEEDS_TEXT = 40


def simulate(
    *,
    seed: int,
    nodes: int | None = None,
    scenario: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
    show: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a scenario and return what came of it, as JSON has it: a function of the arguments alone.

    Args:
        seed: from 0 on.
        nodes: 1 to 64; None: as many as the scenario says.
        scenario: a name, or a file that ends in `.toml`; None: the one where nothing goes wrong.
        progress: called with a line for people now and then.
        show: called with each line of all nodes' logs.

    Raises:
        KnodeError: NOT_FOUND or INVALID_ARGUMENT for the scenario.
        TouchedRealWorld: the node reached past its world.
    """
    name = scenario or DEFAULT
    loaded = load(name)
    count = nodes or loaded.nodes
    outcome = Run(loaded, seed, count, show=show, progress=progress).run()
    return {
        "seed": seed,
        "scenario": name.rsplit("/", 1)[-1].removesuffix(".toml"),
        "nodes": count,
        "virtual_s": outcome.virtual_s,
        "events": outcome.events,
        "trace_hash": outcome.trace_hash,
        "tasks": outcome.tasks,
        "violations": [
            {"at_s": violation.at_s, "invariant": violation.invariant, "what": violation.what}
            for violation in outcome.violations
        ],
    }


def simulate_seeds(
    *,
    seeds: range,
    nodes: int | None = None,
    scenario: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run a scenario with one seed after the other; return which broke promises, and what each broke first.

    Args:
        seeds: which; the others as `simulate`. `progress` is called with a line for each seed.

    Raises:
        KnodeError: as `simulate`.
    """
    broken: list[dict[str, Any]] = []
    count = 0
    for seed in seeds:
        outcome = simulate(seed=seed, nodes=nodes, scenario=scenario)
        gc.collect()  # a run collects nothing
        count = outcome["nodes"]
        first = next(iter(outcome["violations"]), None)
        if first is not None:
            again = reproduction(seed, count, scenario)
            broken.append({"seed": seed, "again": again, **first})
        progress(f"seed {seed}: " + ("kept" if first is None else f"{first['invariant']}: {first['what']}"))
    name = scenario or DEFAULT
    return {
        "scenario": name.rsplit("/", 1)[-1].removesuffix(".toml"),
        "nodes": count,
        "first_seed": seeds[0],
        "last_seed": seeds[-1],
        "runs": len(seeds),
        "broken": broken,
    }


def parse_seeds(text: str) -> range:
    """Read `FIRST-LAST`; raises KnodeError: INVALID_ARGUMENT."""
    first, dash, last = text.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and len(text) <= MAX_SEEDS_TEXT:
        seeds = range(int(first), int(last) + 1)
        if seeds:
            return seeds
    raise KnodeError(
        Code.INVALID_ARGUMENT, f"{text[:40]!r} names no seeds", "give the first and the last: '--seeds 1-100'"
    )


def reproduction(seed: int, nodes: int, scenario: str | None) -> str:
    """Return the command that runs this again."""
    return f"knode simulate --scenario {scenario or DEFAULT} --nodes {nodes} --seed {seed}"
