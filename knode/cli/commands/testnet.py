"""testnet: several real nodes on this machine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from knode.cli import render
from knode.cli.session import session_of

Folder = Annotated[Path, typer.Option("--dir", metavar="D", help="The testnet's folder.")]
Node = Annotated[str, typer.Argument(metavar="N", help="A node's number or name: 2 or node2.")]

testnet = typer.Typer(help="Several real nodes on this machine, for trying things.")


@testnet.command("up")
def up(
    context: typer.Context,
    dir: Folder,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", help="How many, 1 to 32; 3.")] = None,
    netns: Annotated[bool, typer.Option("--netns", help="Each in a network namespace, on one LAN.")] = False,
    topology: Annotated[
        str | None,
        typer.Option("--topology", metavar="FILE", help="Which networks: a name, or a .toml file."),
    ] = None,
) -> None:
    """Make and start N nodes in an empty folder, one cell; return when each sees all alive."""
    from knode.testnet import Testnet
    from knode.testnet.topology import choose

    session = session_of(context)
    chosen = choose(nodes=nodes, netns=netns, name=topology)
    # Being told to end is treated as Ctrl-C: what was started is stopped and what was made removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    made = Testnet.build(dir, chosen, tell=session.note)
    session.show(made.status(), render.testnet)


@testnet.command("down")
def down(context: typer.Context, dir: Folder) -> None:
    """Stop all nodes and remove them."""
    from knode.testnet import Testnet

    session = session_of(context)
    stopped = Testnet.open(dir)
    names = [node.name for node in stopped.nodes]
    stopped.down()
    session.show({"removed": names}, lambda document: f"removed {', '.join(document['removed'])}")


@testnet.command("status")
def status(context: typer.Context, dir: Folder) -> None:
    """Show which nodes run, whom each sees, and who is cut off from whom."""
    from knode.testnet import Testnet

    session_of(context).show(Testnet.open(dir).status(), render.testnet)


@testnet.command("kill")
def kill(context: typer.Context, node: Node, dir: Folder) -> None:
    """Kill a node's daemon with SIGKILL, as a power cut would."""
    from knode.testnet import Testnet

    opened = Testnet.open(dir)
    opened.kill(node)
    session_of(context).show(opened.status(), render.testnet)


@testnet.command("restart")
def restart(context: typer.Context, node: Node, dir: Folder) -> None:
    """Start a node again, stopping it first when it runs."""
    from knode.testnet import Testnet

    opened = Testnet.open(dir)
    opened.restart(node)
    session_of(context).show(opened.status(), render.testnet)


@testnet.command("partition")
def partition(
    context: typer.Context,
    nodes: Annotated[list[str], typer.Argument(metavar="N…", help="Numbers or names: 2 node3.")],
    dir: Folder,
) -> None:
    """Cut these nodes off from the others, until 'heal'."""
    from knode.testnet import Testnet

    opened = Testnet.open(dir)
    opened.cut(nodes)
    session_of(context).show(opened.status(), render.testnet)


@testnet.command("heal")
def heal(context: typer.Context, dir: Folder) -> None:
    """Let every node reach every other again."""
    from knode.testnet import Testnet

    opened = Testnet.open(dir)
    opened.heal()
    session_of(context).show(opened.status(), render.testnet)
