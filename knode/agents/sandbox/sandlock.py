"""The sandbox by sandlock: Landlock and seccomp, for machines without bubblewrap or user namespaces."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

from knode.agents.limits import Limits
from knode.agents.sandbox.rlimits import find_program, prlimit_arguments
from knode.agents.sandbox.sandbox import Command, OnProgress, Outcome
from knode.agents.sandbox.seccomp import sandlock_filter
from knode.agents.sandbox.supervise import supervise
from knode.agents.sandbox.surroundings import SYSTEM_FILES, environment_of, python_files, scratch_of
from knode.errors import Code, KnodeError

_CHILD = Path(__file__).with_name("sandlock_child.py")
_DEVICES_READ = ("/dev/zero", "/dev/urandom", "/dev/random")
_DEVICES_WRITTEN = ("/dev/null",)
_NOBODY = 65534

# What Landlock does not govern (kernel documentation, userspace-api/landlock.rst, "Current
# limitations"), and so would be open on every file and process of the node's user.
_REFUSED_CALLS = (
    # mode, owner, times and attributes of files
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
    *("utime", "utimes", "futimesat", "utimensat", "setxattr", "lsetxattr", "fsetxattr", "setxattrat"),
    *("removexattr", "lremovexattr", "fremovexattr", "removexattrat", "file_setattr"),
    # what happens in folders
    *("inotify_add_watch", "fanotify_init"),
    # priorities of other processes
    *("setpriority", "ioprio_set", "sched_setaffinity"),
    *("sched_setparam", "sched_setscheduler", "sched_setattr"),
    # memory that no process owns, so that no limit would see it
    *("memfd_create", "memfd_secret", "shmget", "semget", "msgget", "mq_open"),
    # parts of the kernel that no agent needs
    *("add_key", "request_key", "keyctl", "bpf", "perf_event_open", "userfaultfd"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register"),
)


class Sandlock:
    """Runs commands by sandlock, each under a small process of its own."""

    name = "sandlock"

    def __init__(self) -> None:
        if importlib.util.find_spec("sandlock") is None:
            raise KnodeError(Code.NO_SANDBOX, "sandlock is not installed", "run 'make setup'")
        self._prlimit = find_program("prlimit", "util-linux")
        self._filter = sandlock_filter(os.uname().machine)
        self._readable = [path for path in (*SYSTEM_FILES, *_DEVICES_READ) if os.path.exists(path)]

    async def run(self, command: Command, limits: Limits, on_progress: OnProgress) -> Outcome:
        """Run `command`; see `Sandbox.run`."""
        scratch = scratch_of(command.folder)
        return await supervise(
            [
                *(sys.executable, "-I", os.fspath(_CHILD), self.policy(command, limits)),
                *(*prlimit_arguments(self._prlimit, limits), "--", *command.argv),
            ],
            environment=environment_of(command, scratch),
            pass_fds=(),
            stdin=command.stdin,
            folder=command.folder,
            limits=limits,
            own_processes=0,
            on_progress=on_progress,
        )

    def policy(self, command: Command, limits: Limits) -> str:
        """Return what the child process needs to know, as JSON."""
        policy: dict[str, object] = {
            "fs_readable": [*self._readable, *map(os.fspath, (*python_files(), *command.read_only))],
            "fs_writable": [os.fspath(command.folder), *_DEVICES_WRITTEN],
            "cwd": os.fspath(command.folder),
            # A last resort, which kills without a word: the other memory limits speak first.
            "max_memory": 2 * limits.memory_bytes,
            "max_processes": limits.processes,
            "extra_deny_syscalls": _REFUSED_CALLS,
            "no_coredump": True,
            "filter": self._filter.hex(),
            "parent": os.getpid(),
        }
        if os.geteuid() == 0:  # Landlock does not take root's capabilities away; a user namespace does
            policy |= {"uid": _NOBODY, "gid": _NOBODY}
        return json.dumps(policy)
