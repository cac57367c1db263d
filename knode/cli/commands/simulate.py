"""simulate: the real node in a simulated world."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from knode.cli import render
from knode.cli.session import session_of
from knode.errors import EXIT_FAILED


def simulate(
    context: typer.Context,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="The same seed gives the same run.")] = 1,
    seeds: Annotated[
        str | None, typer.Option(metavar="A-B", help="Run all these seeds, one after the other.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=64, help="How many nodes; the scenario says.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(metavar="X", help="Its name, or a file that ends in .toml.")
    ] = None,
) -> None:
    """Run nodes in a simulated world under faults; exit 1 when a promise is broken."""
    from knode.simulation.command import parse_seeds, reproduction, simulate_seeds
    from knode.simulation.command import simulate as run

    session = session_of(context)
    if seeds is not None:
        found = simulate_seeds(
            seeds=parse_seeds(seeds), nodes=nodes, scenario=scenario, progress=session.note
        )
        session.show(found, _summary_of_seeds)
        if found["broken"]:
            raise typer.Exit(EXIT_FAILED)
        return
    outcome = run(seed=seed, nodes=nodes, scenario=scenario, progress=session.note)
    session.show(outcome, _summary)
    if outcome["violations"]:
        again = reproduction(seed, outcome["nodes"], scenario)
        session.warn(f"again: {again}")
        raise typer.Exit(EXIT_FAILED)


def _summary_of_seeds(found: render.Document) -> str:
    """Show how many seeds were run, and the command that shows again each that broke a promise."""
    broken: list[dict[str, Any]] = found["broken"]
    head = render.fields(
        {
            "scenario": f"{found['scenario']}, {found['nodes']} nodes",
            "seeds": f"{found['first_seed']} to {found['last_seed']}",
            "promises": f"broken by {len(broken)} of {found['runs']} seeds" if broken else "all kept",
        }
    )
    lines = [f"{each['again']}\n    {each['invariant']}: {each['what']}" for each in broken]
    return "\n".join((head, *(render.printable(part) for line in lines for part in line.split("\n"))))


def _summary(outcome: render.Document) -> str:
    """Show what was run, what came of the tasks, and each promise that was broken."""
    tasks: dict[str, int] = outcome["tasks"]
    violations: list[dict[str, Any]] = outcome["violations"]
    head = render.fields(
        {
            "scenario": f"{outcome['scenario']}, seed {outcome['seed']}, {outcome['nodes']} nodes",
            "time": f"{outcome['virtual_s']:.1f} virtual seconds, {outcome['events']} events",
            "tasks": ", ".join(f"{count} {state}" for state, count in tasks.items()) or "none",
            "trace": outcome["trace_hash"],
            "promises": f"{len(violations)} broken" if violations else "all kept",
        }
    )
    broken = (f"{each['at_s']:9.3f} s  {each['invariant']}: {each['what']}" for each in violations)
    return "\n".join((head, *map(render.printable, broken)))
