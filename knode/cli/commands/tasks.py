"""task: ask an agent for something, and follow it."""

from __future__ import annotations

import os
import stat
import sys
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from knode.cli import render
from knode.cli.session import Session, session_of
from knode.errors import EXIT_FAILED, EXIT_OK, TABLE, Code, KnodeError

INPUT_LIMIT_BYTES = 192 * 1024
"""The largest input of a task; it travels in one message, and what is larger is an artifact."""

_NO_MAJORITY = "no majority of the voters could take it yet"
_PENDING = "pending: {why}; it is kept here and submitted as soon as it can be\nnext: knode task watch {task}"

_PENDING_CANCEL = (
    "pending: the voters may have it without this node knowing, so it is cancelled as soon as they take it\n"
    "next: knode task watch {task}"
)

Task = Annotated[str, typer.Argument(help="A task's id, or the beginning of it.")]

task = typer.Typer(help="Ask an agent of the mesh to do something.")


@task.command("submit")
def submit_task(
    context: typer.Context,
    agent: Annotated[str, typer.Argument(help="An agent, as in kExecutor:text.")],
    text: Annotated[
        str, typer.Option("--input", metavar="TEXT|@FILE|-", help="What it works on; - is standard input.")
    ] = "",
    artifact: Annotated[
        list[Path] | None,
        typer.Option("--artifact", metavar="PATH", help="A file it works on; may be repeated."),
    ] = None,
    on: Annotated[str | None, typer.Option("--on", metavar="NODE", help="The node that runs it.")] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Ask a node directly: quick, at most once, never retried.")
    ] = False,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="K", help="The same key again is the same task, done once."),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", metavar="S", help="Give up after this many seconds.")
    ] = None,
    no_outbox: Annotated[
        bool, typer.Option("--no-outbox", help="Fail when it cannot be committed now, instead of keeping it.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow it and print its result; exit 1 unless it succeeded.")
    ] = False,
) -> None:
    """Submit a task."""
    session = session_of(context)
    params: dict[str, Any] = {
        "agent": agent,
        "input": _input(text, agent),
        "artifacts": [_artifact(path) for path in artifact or []],
        "direct": direct,
        "deadline_s": _deadline(deadline),
        "outbox": not no_outbox,
        "wait": wait,
    }
    params |= {name: given for name, given in (("on", on), ("key", key)) if given is not None}
    known: list[str] = []

    def step(progress: dict[str, Any]) -> None:
        known.extend([progress["task"]] if "task" in progress else [])
        session.note(render.progress(progress))

    try:
        submitted = session.call("task.submit", params, step)
    except KeyboardInterrupt:
        if direct:
            session.note("interrupted: a direct task that was waited for is cancelled")
        elif known:
            session.note(f"interrupted: the task goes on; follow it with 'knode task watch {known[0]}'")
        else:
            session.note("interrupted before it was known whether the task is taken: 'knode task list'")
        raise
    if not wait:
        session.show(submitted, lambda new: render.printable(new["id"]))
        if submitted["state"] == "pending":
            error = submitted["error"]
            why = _NO_MAJORITY if error is None else error["message"]
            session.note(_PENDING.format(why=why, task=submitted["id"]))
        return
    session.show(submitted, _result)
    raise typer.Exit(_settled(session, submitted))


@task.command("list")
def list_tasks(context: typer.Context) -> None:
    """Show the tasks, in all states."""
    session = session_of(context)
    session.show(session.call("task.list", on_progress=partial(_warn, session)), render.tasks)


@task.command("show")
def show_task(context: typer.Context, task: Task) -> None:
    """Show one task."""
    session = session_of(context)
    found = session.call("task.show", {"task": task}, partial(_warn, session))
    session.show(found, render.task)


@task.command("explain")
def explain_task(context: typer.Context, task: Task) -> None:
    """Say why a task runs where it runs, or what it waits for."""
    session = session_of(context)
    session.show(session.call("task.explain", {"task": task}), render.explanation)


@task.command("effects")
def list_effects(
    context: typer.Context,
    task: Annotated[str | None, typer.Argument(help="A task's id, or the beginning of it; else all.")] = None,
    after: Annotated[int, typer.Option(min=0, help="Only what took effect behind this place.")] = 0,
) -> None:
    """Show what tasks have left, in the order in which it took effect, each once."""
    session = session_of(context)

    def note(progress: dict[str, Any]) -> None:
        if "dropped" in progress:
            since = progress["since"]
            kept = "none is kept" if since is None else f"kept are those since {render.moment(since)}"
            session.warn(f"note: the first {progress['dropped']} operations are dropped; {kept}")
        if "next" in progress:
            session.warn(f"note: there are more: '--after {progress['next']}' shows them")

    params: dict[str, Any] = {"after": after} if task is None else {"task": task, "after": after}
    session.show(session.call("task.effects", params, note), render.effects)


@task.command("watch")
def watch_task(context: typer.Context, task: Task) -> None:
    """Follow a task until it is settled; with --json each step is a line, the task the last."""
    session = session_of(context)

    def step(progress: dict[str, Any]) -> None:
        session.show_line(progress, render.progress)

    try:
        settled = session.call("task.watch", {"task": task}, step)
    except KeyboardInterrupt:
        session.note("interrupted: the task goes on")
        raise
    session.show_line(settled, render.task)
    raise typer.Exit(_settled(session, settled))


@task.command("cancel")
def cancel_task(context: typer.Context, task: Task) -> None:
    """Stop a task."""
    session = session_of(context)
    cancelled = session.call("task.cancel", {"task": task})
    session.show(cancelled, render.task)
    if cancelled["state"] == "pending":
        session.note(_PENDING_CANCEL.format(task=cancelled["id"]))


def _warn(session: Session, progress: dict[str, Any]) -> None:
    session.warn(f"note: {progress.get('note', '')}")


def _deadline(seconds: float | None) -> float | None:
    if seconds is not None and not (isfinite(seconds) and seconds > 0):
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            f"a deadline of {seconds:g} seconds does not lie ahead",
            "give seconds from now: '--deadline 60'",
        )
    return seconds


def _input(text: str, agent: str) -> str:
    """Return the input itself: the text, the content of a file, or standard input."""
    if text == "-":
        data, source = sys.stdin.buffer.read(INPUT_LIMIT_BYTES + 1), "standard input"
    elif text.startswith("@"):
        data, source = _read(Path(text[1:])), text[1:]
    else:
        data, source = os.fsencode(text), "--input"
    if len(data) > INPUT_LIMIT_BYTES:
        raise KnodeError(
            Code.TOO_LARGE,
            f"the input from {source} is over {INPUT_LIMIT_BYTES // 1024} KiB",
            f"give it as a file: knode task submit {agent} --artifact PATH",
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            f"the input from {source} is not UTF-8 text ({error.reason} at byte {error.start})",
            f"give it as a file: knode task submit {agent} --artifact PATH",
        ) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(INPUT_LIMIT_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error.strerror) from error


def _artifact(path: Path) -> str:
    try:
        kind = path.stat().st_mode
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    if not stat.S_ISREG(kind):
        raise _unreadable(path, "it is not a file")
    if not os.access(path, os.R_OK):
        raise _unreadable(path, "it may not be read")
    return os.path.abspath(path)  # not resolved: a link's own name is the one that was given


def _unreadable(path: Path, reason: str | None) -> KnodeError:
    return KnodeError(Code.NOT_FOUND, f"{path} cannot be read: {reason}", "check the path")


def _result(document: dict[str, Any]) -> str:
    """Return the result as the agent gave it; a terminal is spared its control characters."""
    result = document["result"]
    if result is None:
        return ""
    text = render.value(result).removesuffix("\n")  # what prints it ends the line
    return render.printable(text) if sys.stdout.isatty() else text


def _settled(session: Session, document: dict[str, Any]) -> int:
    """Say on standard error why a task has not succeeded, and return the exit code."""
    state = document["state"]
    if state == "succeeded":
        return EXIT_OK
    error = document["error"] or {}
    session.warn(
        f"task {document['id']} {state}: {error.get('code', '')} {error.get('message', '')}".rstrip(" :")
    )
    if state == "unknown":
        session.warn(
            "Nobody can say whether it ran: the answer of its node was lost, or the node started anew.\n"
            "next: submit it again only if running it twice does no harm"
        )
    if not document.get("direct"):
        return EXIT_FAILED
    code = error.get("code", "")
    return TABLE[Code(code)].exit_code if code in Code.__members__ else EXIT_FAILED
