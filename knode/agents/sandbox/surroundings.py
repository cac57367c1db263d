"""What every sandbox shows of the machine, and the few variables that a program in it finds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from knode.agents.sandbox.sandbox import Command

SYSTEM_FILES = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/localtime",
)
"""Programs and libraries: what is needed to start something, and nothing that names a person."""

SCRATCH_NAME = ".tmp"


def python_program() -> Path:
    """Return the Python that runs agents: the one that runs the node, without its packages."""
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return base.resolve()


def python_files() -> list[Path]:
    """Return what must be readable for `python_program` to run; empty when the system has it."""
    prefix = Path(sys.base_prefix).resolve()
    return [] if prefix.is_relative_to("/usr") else [prefix]


def scratch_of(folder: Path) -> Path:
    """Return the attempt's folder for temporary files, made when it is not there."""
    scratch = folder / SCRATCH_NAME
    scratch.mkdir(mode=0o700, exist_ok=True)
    return scratch


def environment_of(command: Command, scratch: Path) -> dict[str, str]:
    """Return the whole environment of a command: nothing of the node's own."""
    folder, temporary = os.fspath(command.folder), os.fspath(scratch)
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": temporary,
        "LANG": "C.UTF-8",
        **command.environment,
    }
