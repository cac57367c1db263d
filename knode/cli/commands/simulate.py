"""simulate: the real node in a simulated world."""

from __future__ import annotations

from typing import Annotated

import typer

from knode.cli import render
from knode.cli.session import session_of


def simulate(
    context: typer.Context,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="The same seed gives the same run.")] = 1,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="How many nodes.")] = 3,
    scenario: Annotated[str | None, typer.Option(metavar="X", help="Which scenario.")] = None,
) -> None:
    """Run nodes in a simulated world under faults; exit 1 when a promise is broken."""
    from knode.simulation.command import simulate as run

    session = session_of(context)
    outcome = run(seed=seed, nodes=nodes, scenario=scenario)
    session.show(outcome, render.details)
    if outcome["violations"]:
        raise typer.Exit(1)
