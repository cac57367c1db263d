"""What every command is given: the options, the home, the daemon, and the two streams."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import typer

from knode.cli.options import Options
from knode.cli.render import printable
from knode.errors import Code, KnodeError

if TYPE_CHECKING:
    from knode.control.client import Client, OnProgress
    from knode.home.layout import Home

D = TypeVar("D")


class Session:
    """One run of the command line. Standard output is data, standard error is for people."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @cached_property
    def home(self) -> Home:
        """The home that is meant: `--home`, else `KNODE_HOME`, else the user's."""
        from knode.home.layout import locate_home

        if self.options.home == "":
            raise KnodeError(Code.INVALID_ARGUMENT, "--home is empty", "give it a path: --home PATH")
        return locate_home(self.options.home, os.environ)

    @property
    def interactive(self) -> bool:
        """Whether someone sits at a terminal, and may be shown things and kept waiting."""
        at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()
        return at_terminal and not self.options.json and not self.options.no_input

    def connect(self) -> Client:
        """Connect to the home's daemon; NOT_RUNNING when there is none."""
        from knode.control.client import Client

        return Client.connect(self.home)

    def call(
        self, method: str, params: dict[str, Any] | None = None, on_progress: OnProgress | None = None
    ) -> Any:
        """Ask the daemon once."""
        with self.connect() as client:
            return client.call(method, params, on_progress)

    def show(self, document: D, render: Callable[[D], str]) -> None:
        """Write the command's one document: as JSON with --json, else as `render` puts it for people."""
        if self.options.json:
            print(json.dumps(document, indent=2, ensure_ascii=not _is_utf8(sys.stdout)))
        elif text := render(document):
            print(text)

    def show_line(self, document: D, render: Callable[[D], str]) -> None:
        """Write one of many documents, a line each, at once."""
        if self.options.json:
            print(json.dumps(document, ensure_ascii=not _is_utf8(sys.stdout)), flush=True)
        else:
            print(render(document), flush=True)

    def note(self, text: str) -> None:
        """Tell people on standard error how it goes; --quiet leaves it out."""
        if not self.options.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Tell people on standard error what they must not miss, --quiet or not."""
        print(printable(text), file=sys.stderr, flush=True)


def session_of(context: typer.Context) -> Session:
    """Return the session that `main` put into the context."""
    session: Session = context.obj
    return session


def report(error: KnodeError, *, as_json: bool) -> int:
    """Say what, why and what next, and return the exit code.

    As JSON it is a document of one line on standard output, else a line or two on standard error.
    """
    if as_json:
        document = {"code": error.code.value, "message": error.message, "next": error.next_step}
        print(json.dumps({"error": document}, ensure_ascii=not _is_utf8(sys.stdout)), flush=True)
    else:
        word = "\x1b[31merror\x1b[0m" if _has_colour(sys.stderr) else "error"
        print(f"{word}: {printable(error.message)}", file=sys.stderr)
        if error.next_step:
            print(f"next: {printable(error.next_step)}", file=sys.stderr)
        sys.stderr.flush()
    return error.exit_code


def _is_utf8(stream: TextIO) -> bool:
    return stream.encoding.lower().replace("-", "") == "utf8"


def _has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
