"""The sandbox by bubblewrap: namespaces of its own for everything, and a filter on system calls.

The attempt sees a read-only `/usr`, its own folder, and nothing else of the machine: no home, no
network but an empty one, no process but its own.
"""

from __future__ import annotations

import os
from pathlib import Path

from knode.agents.limits import Limits
from knode.agents.sandbox.rlimits import find_program, prlimit_arguments
from knode.agents.sandbox.sandbox import Command, OnProgress, Outcome
from knode.agents.sandbox.seccomp import bubblewrap_filter
from knode.agents.sandbox.supervise import supervise
from knode.agents.sandbox.surroundings import SYSTEM_FILES, environment_of, python_files, scratch_of

# The kernel counts processes per user namespace since 5.14, which makes the limit this sandbox's own;
# before, it would count every process of the user.
_PER_NAMESPACE_COUNT = (5, 14)
_NOBODY = "65534"
# bubblewrap's own process inside, which reaps
_OWN_PROCESSES = 1


class Bubblewrap:
    """Runs commands by `bwrap`, with `prlimit` inside it."""

    name = "bubblewrap"

    def __init__(self) -> None:
        self._bwrap = find_program("bwrap", "bubblewrap")
        self._prlimit = find_program("prlimit", "util-linux")
        self._filter = bubblewrap_filter(os.uname().machine)
        self._counts_per_namespace = _kernel_version() >= _PER_NAMESPACE_COUNT

    async def run(self, command: Command, limits: Limits, on_progress: OnProgress) -> Outcome:
        """Run `command`; see `Sandbox.run`."""
        scratch = scratch_of(command.folder)
        filter_descriptor = os.memfd_create("knode-seccomp")
        os.write(filter_descriptor, self._filter)
        os.lseek(filter_descriptor, 0, os.SEEK_SET)
        information, informing = os.pipe()
        arguments = [
            *self.arguments(command, scratch),
            *("--seccomp", str(filter_descriptor), "--info-fd", str(informing), "--"),
            *self._limited(limits),
        ]
        return await supervise(
            [*arguments, *command.argv],
            environment=environment_of(command, scratch),
            pass_fds=[filter_descriptor, informing],
            stdin=command.stdin,
            folder=command.folder,
            limits=limits,
            own_processes=_OWN_PROCESSES,
            on_progress=on_progress,
            information=information,
        )

    def arguments(self, command: Command, scratch: Path) -> list[str]:
        """Return bubblewrap and its arguments for namespaces and mounts."""
        folder = os.fspath(command.folder)
        arguments = [self._bwrap, "--unshare-all", "--die-with-parent", "--new-session"]
        # Root would keep its capabilities and its rights over /proc/sys without these two lines.
        arguments += ["--unshare-user", "--uid", _NOBODY, "--gid", _NOBODY, "--cap-drop", "ALL"]
        arguments += ["--proc", "/proc", "--remount-ro", "/proc"]
        arguments += ["--dev", "/dev", "--bind", os.fspath(scratch), "/dev/shm", "--remount-ro", "/dev"]
        for path in SYSTEM_FILES:
            if os.path.islink(path) and path.count("/") == 1:
                arguments += ["--symlink", os.readlink(path), path]
            else:
                arguments += ["--ro-bind-try", path, path]
        if not command.folder.is_relative_to("/tmp"):
            arguments += ["--symlink", os.fspath(scratch), "/tmp"]
        for readable in (*python_files(), *command.read_only):
            arguments += ["--ro-bind", os.fspath(readable), os.fspath(readable)]
        # The root is a memory disk: left writable, it would hold bytes that no limit counts.
        return [*arguments, "--bind", folder, folder, "--chdir", folder, "--remount-ro", "/"]

    def _limited(self, limits: Limits) -> list[str]:
        arguments = prlimit_arguments(self._prlimit, limits)
        if self._counts_per_namespace:
            arguments.append(f"--nproc={limits.processes + _OWN_PROCESSES}")
        return [*arguments, "--"]


def _kernel_version() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)
