"""agent: what this node can run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knode.cli import render
from knode.cli.session import session_of
from knode.errors import Code, KnodeError

Agent = Annotated[str, typer.Argument(help="An agent, as in kExecutor:text.")]

agent = typer.Typer(help="The agents of the mesh, and those installed here.")


@agent.command("list")
def list_agents(context: typer.Context) -> None:
    """Show every agent and the nodes that have it."""
    session = session_of(context)
    session.show(session.call("agent.list"), render.agents)


@agent.command("show")
def show_agent(context: typer.Context, agent: Agent) -> None:
    """Show one agent: what it asks, who published it, where it is."""
    session = session_of(context)
    session.show(session.call("agent.show", {"agent": agent}), render.details)


@agent.command("install")
def install_agent(
    context: typer.Context, path: Annotated[Path, typer.Argument(help="The agent's folder.")]
) -> None:
    """Install an agent on this node from a folder with its manifest."""
    session = session_of(context)
    if not path.exists():
        raise KnodeError(Code.NOT_FOUND, f"there is no {path}", "give the folder that holds the manifest")
    session.show(session.call("agent.install", {"path": str(path.resolve())}), render.details)


@agent.command("start")
def start_agent(context: typer.Context, agent: Agent) -> None:
    """Let this node run the agent again."""
    session = session_of(context)
    session.show(session.call("agent.start", {"agent": agent}), render.details)


@agent.command("stop")
def stop_agent(context: typer.Context, agent: Agent) -> None:
    """Let this node run the agent no more."""
    session = session_of(context)
    session.show(session.call("agent.stop", {"agent": agent}), render.details)
