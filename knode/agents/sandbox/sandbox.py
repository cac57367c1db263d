"""What every sandbox is: it runs one command with limits and tells how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from knode.agents.limits import Limits

STDERR_TAIL_BYTES = 8 * 1024
"""How much of standard error is kept: its end."""


class Ended(StrEnum):
    """Why a command is over. Everything but `exited` was a kill of all its processes."""

    EXITED = "exited"
    MEMORY = "memory"
    CPU = "cpu"
    WALL = "wall"
    OUTPUT = "output"
    PROCESSES = "processes"
    FILES = "files"


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and where."""

    argv: Sequence[str]
    """Program, looked up in the sandbox's PATH, and arguments."""
    folder: Path
    """The attempt's own folder: the working directory, and all that can be written."""
    stdin: bytes = b""
    read_only: Sequence[Path] = ()
    """Files and folders that can be read besides, at their own paths."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables added to the sandbox's few. Nothing is inherited from the node."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    ended: Ended
    exit_code: int
    """As a shell reports it: 128 + n after signal n. Without meaning when it was killed by a limit."""
    stdout: bytes
    """At most the limit's bytes."""
    stderr: bytes
    """The last 8 KiB, without the lines that report progress."""


OnProgress = Callable[[float | None, str], None]
"""Told a fraction from 0 to 1, or None, and a text. Must not block or raise."""


class Sandbox(Protocol):
    """A way to run code that nobody trusts."""

    @property
    def name(self) -> str:
        """`bubblewrap`, `sandlock`."""
        ...

    async def run(self, command: Command, limits: Limits, on_progress: OnProgress) -> Outcome:
        """Run `command` to its end, or to the first limit that it passes.

        Nothing of it is left running when this returns, raises or is cancelled: every process that
        it started, daemons too, is killed and waited for. Its files stay in `command.folder`.

        Raises:
            KnodeError: NO_SANDBOX when the sandbox itself cannot be started any more.
        """
        ...
