"""The program `knode`, also called `kai`."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback
from pathlib import Path

from knode.cli.options import hoist
from knode.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, Code, KnodeError


def main() -> int:
    """Run the command line in `sys.argv` and return its exit code.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no daemon runs, 4 not allowed, 5 not found, 6 no node
    can run it, 130 interrupted. A reader of standard output that goes away ends the program quietly.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    # A name or path of odd bytes must not stop a command: it is shown with escapes.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        return EXIT_INTERRUPTED  # a nursery wraps what interrupted it
    except OSError as error:
        _discard_output()
        return _unwritable(error)
    return code


def _run(words: list[str]) -> int:
    from knode.cli.session import Session, report

    as_json = "--json" in words
    try:
        options, words = hoist(words)
        as_json = options.json
        if not words and not as_json:
            words = ["--help"]
        return _invoke(Session(options), words)
    except KnodeError as error:
        return report(error, as_json=as_json)
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # of standard output: whatever writes to a disk names its own
        traceback.print_exc()
        fault = KnodeError(Code.INTERNAL, f"a fault of knode itself ({type(error).__name__}: {error})")
        return report(fault, as_json=as_json)


def _invoke(session: object, words: list[str]) -> int:
    import typer

    from knode.cli.app import app

    program = Path(sys.argv[0]).name
    command = typer.main.get_command(app)
    try:
        code = command.main(
            args=words,
            prog_name=program if program in ("knode", "kai") else "knode",
            standalone_mode=False,
            obj=session,
        )
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "knode"
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        raise KnodeError(Code.INVALID_ARGUMENT, message, f"{path} --help") from error
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    return code if isinstance(code, int) else EXIT_OK


def _unwritable(error: OSError) -> int:
    from knode.cli.session import report

    full = KnodeError(
        Code.DISK_FULL,
        f"the answer could not be written to standard output: {error.strerror}",
        "make room, or write it elsewhere; what the command did is done",
    )
    return report(full, as_json=False)


def _discard_output() -> None:
    # What is still buffered would fail again when the interpreter flushes it at its end.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
