"""invite, join, peer, member: who belongs to the cell, and who is there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from knode.cli import render
from knode.cli.commands.node import Host, Port, network_flags
from knode.cli.session import Session, session_of

if TYPE_CHECKING:
    from knode.home.layout import Home

Node = Annotated[str, typer.Argument(help="A node's name, its id, or the beginning of its id.")]
UndoSince = Annotated[
    str | None,
    typer.Option(
        "--undo-since",
        metavar="TIME",
        help="Undo what this node heard of since then, as 2026-11-22T14:30; local time unless it says else.",
    ),
]
RoleName = Literal["admin", "worker", "voter", "observer"]

peer = typer.Typer(help="The nodes that this one talks to.")
member = typer.Typer(help="The members of the cell and their roles.")


def invite(
    context: typer.Context,
    role: Annotated[RoleName, typer.Option(help="What it may do.")] = "worker",
    wait: Annotated[
        bool | None,
        typer.Option("--wait/--no-wait", help="Wait for the new member; at a terminal unless told."),
    ] = None,
) -> None:
    """Make a ticket with which one machine can join the cell."""
    session = session_of(context)
    invitation = session.call("invite", {"role": role})
    waits = session.interactive if wait is None else wait
    if session.options.json:
        show = session.show_line if waits else session.show
        show(invitation, str)
    else:
        _show_ticket(session, invitation)
    if not waits:
        return
    session.note("waiting for the other machine (Ctrl-C: stop waiting)")
    try:
        arrived = session.call("invite.wait", {"ticket": invitation["ticket"]})
    except KeyboardInterrupt:
        session.note(f"the ticket stays valid until {invitation['expires_at']}")
        return
    session.show_line(
        arrived, lambda new: f"{render.printable(new['name'])} joined\n{render.words(new['words'])}"
    )


def join(
    context: typer.Context,
    ticket: Annotated[
        str, typer.Argument(help="What `knode invite` printed; - reads it from standard input.")
    ],
    name: Annotated[str | None, typer.Option(help="This node's name; the machine's unless given.")] = None,
    port: Port = None,
    host: Host = None,
) -> None:
    """Join a cell: make the home when there is none, start the daemon, present the ticket."""
    from knode.cli.daemon import answering, start_detached
    from knode.mesh.ticket import parse_ticket

    session = session_of(context)
    text = sys.stdin.read(4096) if ticket == "-" else ticket
    parse_ticket(text)
    flags = network_flags(port, host)
    with _nothing_half_made(session, name, flags):
        client = answering(session.home)
        if client is None:
            session.note("starting the daemon")
            start_detached(session.home, flags)
        else:
            client.close()
        session.note("joining")
        params = {"ticket": text} if name is None else {"ticket": text, "name": name}
        result = session.call("join", params)
    session.show(result, render.joined)


@peer.command("list")
def list_peers(context: typer.Context) -> None:
    """Show every peer: how it is reached, and how far it is."""
    session = session_of(context)
    session.show(session.call("peer.list"), render.peers)


@peer.command("show")
def show_peer(context: typer.Context, node: Node) -> None:
    """Show all that is known of one peer: who it is, every way to it, and the link in use."""
    session = session_of(context)
    session.show(session.call("peer.show", {"node": node}), render.peer)


@peer.command("ping")
def ping_peer(
    context: typer.Context,
    node: Node,
    count: Annotated[int, typer.Option("--count", "-c", min=1, max=100, help="How often.")] = 4,
) -> None:
    """Measure the round trip to a peer; exit 1 when no ping is answered."""
    session = session_of(context)
    result = session.call("peer.ping", {"node": node, "count": count})
    session.show(result, render.ping)
    if not result["rtt_ms"]:
        raise typer.Exit(1)


@member.command("list")
def list_members(context: typer.Context) -> None:
    """Show every member of the cell, there or not."""
    session = session_of(context)
    session.show(session.call("member.list"), render.members)


@member.command("role")
def change_role(
    context: typer.Context,
    node: Node,
    role: Annotated[RoleName, typer.Argument(help="What it may do from now on.")],
) -> None:
    """Give a member another role."""
    session = session_of(context)
    session.show(session.call("member.role", {"node": node, "role": role}), _done)


@member.command("revoke")
def revoke_member(context: typer.Context, node: Node, undo_since: UndoSince = None) -> None:
    """Take a member out of the cell for ever; with --undo-since also what it did as an admin."""
    session = session_of(context)
    params = {"node": node} if undo_since is None else {"node": node, "undo_since": undo_since}
    session.show(session.call("member.revoke", params), _done)


@member.command("rotate")
def rotate_key(
    context: typer.Context,
    force: Annotated[
        bool, typer.Option("--force", help="Although a member is away: others have to tell it.")
    ] = False,
) -> None:
    """Give this node another key: it restarts, and keeps its id, name and role."""
    from knode.cli.daemon import await_restart

    session = session_of(context)
    with session.connect() as client:
        begun = client.call("status")["uptime_s"]
        changed = client.call("member.rotate", {"force": force})
    session.note("restarting with the new key")
    await_restart(session.home, begun)
    session.show(changed, _done)


def _done(document: Any) -> str:
    return render.details(document) if isinstance(document, dict) and document else "done"


def _show_ticket(session: Session, invitation: dict[str, Any]) -> None:
    ticket = invitation["ticket"]
    if session.interactive:
        _show_code(ticket)
    print(ticket, flush=True)
    session.note(
        f"valid until {invitation['expires_at']}, for one machine; on it run:\n  knode join {ticket}"
    )


def _show_code(ticket: str) -> None:
    import segno

    code = segno.make(ticket, error="l")
    border = 2
    if code.symbol_size(border=border)[0] <= shutil.get_terminal_size().columns:
        code.terminal(out=sys.stderr, border=border, compact=True)


@contextmanager
def _nothing_half_made(session: Session, name: str | None, flags: dict[str, str]) -> Iterator[None]:
    """Make the home when there is none; when the body fails, stop and remove what was made or started."""
    from knode.cli.daemon import answering, stop
    from knode.world.real import named_disk_errors

    home = session.home
    with named_disk_errors(home.path):
        before = _entries(home)
        makes_home = not home.format_file.exists()
    client = answering(home)
    was_running = client is not None
    if client is not None:
        client.close()
    try:
        if makes_home:
            from knode.node import prepare_home

            session.note(f"making a node at {home.path}")
            prepare_home(home, name=name, flags=flags)
        yield
    except BaseException:
        if not was_running and (started := answering(home)) is not None:
            started.close()
            stop(home)
        if makes_home:
            _remove(home, before)
        raise


def _entries(home: Home) -> set[Path] | None:
    return set(home.path.iterdir()) if home.path.is_dir() else None


def _remove(home: Home, before: set[Path] | None) -> None:
    if before is None:
        shutil.rmtree(home.path, ignore_errors=True)
        return
    for entry in set(home.path.iterdir()) - before:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
