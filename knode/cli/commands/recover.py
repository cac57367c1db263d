"""member recover: when the owner's key, most voters, or the agreement on one ledger is lost."""

from __future__ import annotations

import sys
from getpass import getpass
from typing import Annotated, Any

import typer

from knode.cli import render
from knode.cli.commands.mesh import UndoSince
from knode.cli.session import Session, session_of
from knode.errors import Code, KnodeError


def recover(
    context: typer.Context,
    revoke: Annotated[
        list[str] | None,
        typer.Option(
            "--revoke", metavar="NODE", help="Revoke this member in the same step; may be repeated."
        ),
    ] = None,
    undo_since: UndoSince = None,
    lost_majority: Annotated[
        bool,
        typer.Option(
            "--lost-majority",
            help="Begin the ledger anew with what this node has of it: most voters are gone.",
        ),
    ] = False,
    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar="LEDGER", help="Of two ledgers that were begun anew, keep this one."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether to lose what may be lost.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Although another member that is here has more of the ledger.")
    ] = False,
) -> None:
    """Make this the owner's node, with the recovery key: asked for, or read from standard input.

    With --lost-majority or --keep the owner stays, and whoever holds the owner's key needs no other.
    """
    session = session_of(context)
    if lost_majority and keep is not None:
        raise _not_together("--lost-majority and --keep")
    if undo_since is not None and (lost_majority or keep is not None):
        raise _not_together("--undo-since and --lost-majority or --keep")
    if lost_majority:
        _begin_anew(session, revoke or [], yes=yes, force=force)
    elif keep is not None:
        _keep(session, keep, yes=yes)
    else:
        params: dict[str, Any] = {"recovery_key": _recovery_key(session), "revoke": revoke or []}
        if undo_since is not None:
            params["undo_since"] = undo_since
        session.show(session.call("member.recover", params), render.recovered)


def _begin_anew(session: Session, revoke: list[str], *, yes: bool, force: bool) -> None:
    survey = session.call("member.survey", {"revoke": revoke})
    _confirm(session, render.survey(survey), yes=yes)
    params: dict[str, Any] = {"revoke": revoke, "force": force}
    if not survey["owner"]:
        params["recovery_key"] = _recovery_key(session)
    session.show(session.call("member.survive", params), render.survived)


def _keep(session: Session, ledger: str, *, yes: bool) -> None:
    found = session.call("member.ledger", {"ledger": ledger})
    _confirm(session, render.ledger_to_keep(found), yes=yes)
    params: dict[str, Any] = {"ledger": found["ledger"]}
    if not found["owner"]:
        params["recovery_key"] = _recovery_key(session)
    session.show(session.call("member.keep", params), render.survived)


def _confirm(session: Session, what: str, *, yes: bool) -> None:
    """Say what may be lost, and go on only when somebody agrees."""
    session.warn(what)
    if yes:
        return
    if session.options.no_input or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise KnodeError(
            Code.INVALID_ARGUMENT, "nobody can be asked whether to go on", "add --yes once you have read this"
        )
    if not typer.confirm("Go on?", default=False, err=True):
        raise KnodeError(Code.CANCELLED, "nothing was changed")


def _recovery_key(session: Session) -> str:
    """Return the recovery key as text: never an argument, which others on the machine could see."""
    if not sys.stdin.isatty():
        return sys.stdin.read(1024)
    if session.options.no_input:
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            "the recovery key was not given",
            "put it on standard input: 'knode member recover < FILE'",
        )
    return getpass("recovery key (not shown): ")


def _not_together(what: str) -> KnodeError:
    return KnodeError(Code.INVALID_ARGUMENT, f"{what} are different things", "knode member recover --help")
