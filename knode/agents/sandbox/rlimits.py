"""The limits that the kernel holds for each process, set by `prlimit` (util-linux) inside a sandbox."""

from __future__ import annotations

import shutil

from knode.agents.limits import Limits
from knode.errors import Code, KnodeError


def find_program(name: str, package: str) -> str:
    """Return the path of a program.

    Raises:
        KnodeError: NO_SANDBOX when it is not installed.
    """
    path = shutil.which(name)
    if path is None:
        raise KnodeError(Code.NO_SANDBOX, f"there is no {name} on this machine", f"install {package}")
    return path


def prlimit_arguments(prlimit: str, limits: Limits) -> list[str]:
    """Return the command that sets `limits` and then becomes the command appended to it."""
    return [
        prlimit,
        f"--as={limits.memory_bytes}",
        f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}",
        f"--nofile={limits.open_files}",
        f"--fsize={limits.file_bytes}",
        "--core=0",
        "--memlock=0",
        "--msgqueue=0",
    ]
