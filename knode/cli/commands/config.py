"""config: the values in force, and where each came from.

These commands read and write the home's files themselves instead of asking the daemon: they must mend
the very value that keeps a daemon from starting.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from knode.cli import render
from knode.cli.session import Session, session_of
from knode.errors import Code, KnodeError

Key = Annotated[str, typer.Argument(help="A key, as in node.port.")]

config = typer.Typer(help="The node's configuration.")


@config.command("list")
def list_values(context: typer.Context) -> None:
    """Show every value in force and its source: default, file, environment."""
    session = session_of(context)
    session.show(_rows(session), render.settings)


@config.command("get")
def get_value(context: typer.Context, key: Key) -> None:
    """Show one value."""
    session = session_of(context)
    for row in _rows(session):
        if row["key"] == key:
            session.show(row, lambda found: render.printable(render.value(found["value"])))
            return
    raise KnodeError(Code.NOT_FOUND, f"there is no configuration key {key!r}", "knode config list")


@config.command("set")
def set_one(
    context: typer.Context,
    key: Key,
    value: Annotated[str, typer.Argument(help="The new value; a list is separated by commas.")],
) -> None:
    """Write one value to the user's configuration file, after checking the whole."""
    from knode.home.configuration import set_value
    from knode.world.real import real_world

    session = session_of(context)
    set_value(real_world(), session.home, key, value)
    session.note("written; it counts from the daemon's next start")
    session.show({"key": key, "value": value, "source": str(session.home.config_user)}, lambda _: "")


def _rows(session: Session) -> list[dict[str, object]]:
    from knode.home.configuration import load_configuration
    from knode.world.real import real_world

    configuration = load_configuration(real_world(), session.home, os.environ, {})
    return [row._asdict() for row in configuration.rows()]
