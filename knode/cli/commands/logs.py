"""logs: what the daemon writes down."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from knode.cli import render
from knode.cli.session import session_of

logs = typer.Typer(help="What the daemon writes down.")


@logs.command("tail")
def tail(
    context: typer.Context,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=1000, help="How many lines back.")] = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes (Ctrl-C ends).")
    ] = False,
) -> None:
    """Show the log's last lines; with --json as they stand in the file, an object a line."""
    session = session_of(context)

    def show(progress: dict[str, Any]) -> None:
        if progress.get("dropped"):
            session.warn(f"{progress['dropped']} lines left out: they came faster than they were read")
        print(progress["line"] if session.options.json else _for_people(progress["line"]), flush=True)

    session.call("logs.tail", {"lines": lines, "follow": follow}, show)


def _for_people(line: str) -> str:
    from knode.home.logging import to_text

    try:
        return render.printable(to_text(json.loads(line)))
    except (ValueError, KeyError, TypeError):
        return render.printable(line)  # a torn or foreign line is shown as it is
