"""The tree of commands, in the order in which the help shows them."""

from __future__ import annotations

from typing import Annotated

import typer

from knode import __version__
from knode.cli.commands import agents, config, logs, mesh, node, recover, service, simulate, tasks, testnet
from knode.cli.session import session_of

app = typer.Typer(
    help="The machines that you own, as one private mesh of AI agents.",
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(context: typer.Context, asked: bool) -> None:
    if asked:
        session_of(context).show({"version": __version__}, lambda document: f"knode {document['version']}")
        raise typer.Exit


@app.callback()
def everywhere(
    home: Annotated[
        str | None, typer.Option("--home", metavar="PATH", help="The node's home folder.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Write one JSON document to standard output.")] = False,
    no_input: Annotated[
        bool, typer.Option("--no-input", help="Never ask and never wait for a person.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Say which knode this is."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Declare, for the help, the options that `hoist` took out of the line before typer saw it."""


app.command()(node.init)
app.command()(node.up)
app.command()(node.down)
app.command()(node.status)
app.command()(node.doctor)
app.command()(mesh.invite)
app.command()(mesh.join)
mesh.member.command("recover")(recover.recover)
app.add_typer(mesh.peer, name="peer")
app.add_typer(mesh.member, name="member")
app.add_typer(agents.agent, name="agent")
app.add_typer(tasks.task, name="task")
app.add_typer(config.config, name="config")
app.add_typer(logs.logs, name="logs")
app.add_typer(service.service, name="service")
app.add_typer(testnet.testnet, name="testnet")
app.command()(simulate.simulate)
