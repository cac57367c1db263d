"""init, up, down, status, doctor: this machine's node."""

from __future__ import annotations

from typing import Annotated

import typer

from knode.cli import render
from knode.cli.session import Session, session_of

Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Listen on this port; 0 takes a free one.")]
Host = Annotated[str | None, typer.Option(help="Listen on this address.")]


def init(
    context: typer.Context,
    name: Annotated[str | None, typer.Option(help="The node's name; the machine's unless given.")] = None,
    port: Port = None,
    host: Host = None,
) -> None:
    """Make this machine's node, and a new cell with it; port and host are kept in its configuration."""
    from knode.control.client import command_for
    from knode.node import initialise

    session = session_of(context)
    document = initialise(session.home, name=name, flags=network_flags(port, host))
    session.show(document, render.initialised)
    session.note(f"next: {command_for(session.home, 'up', '--detach')}")


def up(
    context: typer.Context,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it answers.")] = False,
    port: Port = None,
    host: Host = None,
    background: Annotated[bool, typer.Option("--background", hidden=True)] = False,
) -> None:
    """Start the node's daemon; nothing happens when it runs already."""
    from knode.cli.daemon import answering, start_detached

    session = session_of(context)
    flags = network_flags(port, host)
    client = answering(session.home)
    if client is not None:
        with client:
            _show_running(session, client.daemon_pid, started=False)
    elif detach:
        _show_running(session, start_detached(session.home, flags), started=True)
    else:
        from knode.control.daemon import run_daemon

        raise typer.Exit(run_daemon(session.home, flags=flags, foreground=not background))


def down(context: typer.Context) -> None:
    """Stop the node's daemon and wait until it is gone."""
    from knode.cli.daemon import stop

    session = session_of(context)
    session.show(
        {"pid": stop(session.home), "running": False}, lambda ended: f"stopped (process {ended['pid']})"
    )


def status(context: typer.Context) -> None:
    """Show this node, the members of its cell, and what needs care."""
    session = session_of(context)
    session.show(session.call("status"), render.status)


def doctor(context: typer.Context) -> None:
    """Check this machine, this node, and how others reach it; exit 1 when something fails."""
    import os

    import msgspec

    from knode.control.doctor import examine
    from knode.node.health import Grade

    session = session_of(context)
    checks = examine(session.home, os.environ)
    is_ok = all(check.grade is not Grade.FAIL for check in checks)
    session.show({"ok": is_ok, "checks": msgspec.to_builtins(checks)}, render.doctor)
    if not is_ok:
        raise typer.Exit(1)


def network_flags(port: int | None, host: str | None) -> dict[str, str]:
    """Return the configuration values of --port and --host, by their keys."""
    given = {"node.port": port, "node.host": host}
    return {key: str(value) for key, value in given.items() if value is not None}


def _show_running(session: Session, pid: int, *, started: bool) -> None:
    document = {"pid": pid, "running": True, "started": started, "home": str(session.home.path)}
    text = f"started (process {pid})" if started else f"already running (process {pid})"
    session.show(document, lambda _: text)
