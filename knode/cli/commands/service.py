"""service: the daemon as a service of systemd, that survives a reboot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from knode.cli import render
from knode.cli.session import Session, session_of

if TYPE_CHECKING:
    from knode.control.service import ServiceState

service = typer.Typer(help="The daemon as a service of this user's systemd.")


@service.command("install")
def install(
    context: typer.Context,
    only_print: Annotated[
        bool, typer.Option("--print", help="Only print the unit; nothing is changed.")
    ] = False,
) -> None:
    """Let systemd run the daemon: now, at every boot, and again when it fails."""
    from knode.cli.daemon import answering
    from knode.control import service as systemd
    from knode.home.folder import open_home
    from knode.world.real import real_world

    session = session_of(context)
    home = session.home
    if only_print:
        text = systemd.unit_text(systemd.command_of(home))
        session.show({"unit": str(systemd.unit_file()), "text": text}, lambda shown: shown["text"].rstrip())
        return
    open_home(real_world(), home)
    running = answering(home)
    if running is not None:
        running.close()
    state = systemd.install(home, start=running is None)
    _show(session, state)
    if not state.lingering:
        session.warn(
            "warning: after a reboot it waits for your login; so that it does not: loginctl enable-linger "
            "(or as root: loginctl enable-linger USER)"
        )
    if running is not None and not state.active:
        session.note(
            "the daemon that runs already stays; to hand it over: knode down, "
            "then systemctl --user start knode"
        )


@service.command("uninstall")
def uninstall(context: typer.Context) -> None:
    """Stop the service and take it away; the node's home stays."""
    from knode.control import service as systemd

    session = session_of(context)
    _show(session, systemd.uninstall())


@service.command("status")
def status(context: typer.Context) -> None:
    """Show what systemd knows of the service; exit 1 when it is not installed."""
    from knode.control import service as systemd

    session = session_of(context)
    state = systemd.state()
    _show(session, state)
    if not state.installed:
        raise typer.Exit(1)


def _show(session: Session, state: ServiceState) -> None:
    from dataclasses import asdict

    document: dict[str, Any] = asdict(state)
    session.show(document, render.details)
