from __future__ import annotations

import os
import subprocess

import trio

from knode.agents.sandbox.supervise import _Run


def ended() -> tuple[subprocess.Popen[bytes], int]:
    """Return a process that has ended and was reaped, and a pidfd of it."""
    process = subprocess.Popen(["true"])
    handle = os.pidfd_open(process.pid)
    process.wait()
    return process, handle


async def test_a_namespace_that_has_ended_and_was_reaped_is_no_fault() -> None:
    # The system's first process reaps it: mostly after it is killed here, and not always.
    run = object.__new__(_Run)
    run._process, run._namespace = ended()
    try:
        with trio.fail_after(60):
            await run._kill_descendants()
    finally:
        os.close(run._namespace)
