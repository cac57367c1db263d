"""The program that stands between a node and a command in sandlock: `python -I sandlock_child.py`.

Sandlock supervises from threads of the process that starts the command, and blocks it. Here that
process is a small one of its own, so that it can be killed whatever state it is in. It is run by path,
without the package, to start fast.

Its arguments: the policy as JSON (`filter` as hexadecimal), then the command. Its environment and its
standard streams are the command's.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from sandlock import Sandbox, StdioMode

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_FAILED = 125


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def main() -> int:
    """Run the command in sandlock; return its exit code as a shell would."""
    policy = json.loads(sys.argv[1])
    events, event = os.pipe()
    _write_signal_to(event, signal.SIGTERM)
    _control(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _control(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != policy.pop("parent"):
        return _FAILED  # the node died before it could be watched
    _install_filter(bytes.fromhex(policy.pop("filter")))
    started, codes = threading.Event(), list[int]()
    threading.Thread(target=_run, args=(policy, sys.argv[2:], started, codes, event), daemon=True).start()
    os.read(events, 1)  # the command has ended, or the node wants its end, or has died
    started.wait()  # before it, a process could still be on its way
    _kill_descendants()
    return codes[0] if codes else _FAILED


def _run(
    policy: dict[str, Any], command: list[str], started: threading.Event, codes: list[int], event: int
) -> None:
    """Run the command to its end, then tell the main thread."""
    try:
        # It warns that `gid` is not passed on, which it is, together with `uid`.
        warnings.filterwarnings("ignore", message="Policy field 'gid'", category=UserWarning)
        sandbox = Sandbox(**policy, clean_env=True, env=dict(os.environ))
        stdio = StdioMode.INHERIT
        process = sandbox.popen(command, stdin=stdio, stdout=stdio, stderr=stdio)
        started.set()
        result = process.wait()
        killed = result.signal if result.signal > 0 else signal.SIGKILL
        codes.append(result.exit_code if result.exit_code >= 0 else 128 + killed)
    finally:
        started.set()
        os.write(event, b"\0")


def _write_signal_to(descriptor: int, number: int) -> None:
    """Have a signal write to `descriptor`, whichever thread takes it.

    It is not blocked, since the command would inherit that.
    """
    os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(descriptor)
    signal.signal(number, lambda number, frame: None)


def _install_filter(program: bytes) -> None:
    _control(_PR_SET_NO_NEW_PRIVS, 1)
    filter_program = _FilterProgram(len(program) // 8, program)
    _control(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_program))


def _control(option: int, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    padded = [*arguments, *[0] * (4 - len(arguments))]
    if libc.prctl(option, *[ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded]) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _kill_descendants() -> None:
    """Kill the children until there are none: whoever loses its parent becomes a child of this one."""
    while children := _children():
        for child in children:
            os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    children: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        try:
            children += map(int, (thread / "children").read_text().split())
        except FileNotFoundError:
            continue  # a thread of sandlock's that has ended
    return children


if __name__ == "__main__":
    sys.exit(main())
