"""What `knode simulate` runs, and the document that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from knode.simulation.run import Run
from knode.simulation.scenario import DEFAULT, load


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


def reproduction(seed: int, nodes: int, scenario: str | None) -> str:
    """Return the command that runs this again."""
    return f"knode simulate --scenario {scenario or DEFAULT} --nodes {nodes} --seed {seed}"
