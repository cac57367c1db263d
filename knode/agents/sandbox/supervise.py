"""Run one process and all that it starts: feed it, read it, watch it, and leave nothing behind.

What confines the process is the caller's: this module starts the confining program, holds the
limits that are held from outside, and kills the whole tree at the end, whatever the end was.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import thread_time

import trio

from knode.agents.limits import Limits
from knode.agents.sandbox import tree
from knode.agents.sandbox.folder import FolderUsage, make_removable, measure_folder
from knode.agents.sandbox.sandbox import Ended, OnProgress, Outcome
from knode.agents.sandbox.standard_error import Report, StandardError
from knode.errors import Code, KnodeError

MAX_STDERR_BYTES = 4 * 1024 * 1024
"""More than this on standard error is endless output."""
WATCH_SECONDS = 0.02
"""How often a tree is measured, at most."""
WATCH_SHARE = 0.05
"""The share of the node's time that measuring may take: many processes are measured less often."""
FOLDER_SECONDS = 0.1
START_SECONDS = 5.0
"""How long a sandbox may take to start, or to end itself, before it is killed as it stands."""
CHUNK_BYTES = 64 * 1024
_KILLED_FOR_CPU = 128 + signal.SIGXCPU


async def supervise(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    pass_fds: Sequence[int],
    stdin: bytes,
    folder: Path,
    limits: Limits,
    own_processes: int,
    on_progress: OnProgress,
    information: int | None = None,
) -> Outcome:
    """Run `argv` and everything below it until it exits or passes a limit.

    Args:
        environment: the whole environment of `argv`.
        pass_fds: descriptors for `argv`; closed here, as `information` is.
        own_processes: threads below `argv` that belong to the sandbox and count towards no limit.
        information: a descriptor on which `argv` tells, before it runs anything, the `child-pid` of the
            first process of a namespace that it makes; None when it makes none.

    Raises:
        KnodeError: NO_SANDBOX when `argv` cannot be started.

    When it returns, raises or is cancelled, no descendant of the process is alive.
    """
    try:
        before = measure_folder(folder)
        # Started by the thread that runs the loop, not by a helper thread: the sandboxes ask the
        # kernel to kill them with their parent, and for the kernel the parent is the thread.
        process = subprocess.Popen(  # noqa: ASYNC220
            argv,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    except OSError as error:
        if information is not None:
            os.close(information)
        raise KnodeError(
            Code.NO_SANDBOX, f"{argv[0]} cannot be started: {error.strerror}", "run 'knode status'"
        ) from error
    finally:
        for descriptor in pass_fds:
            os.close(descriptor)
    try:
        run = _Run(process, limits, own_processes, on_progress, information)
    except OSError as error:
        if information is not None:
            os.close(information)
        _end_unwatched(process)
        raise KnodeError(
            Code.NO_SANDBOX,
            f"{argv[0]} cannot be watched: {error.strerror}",
            "try again when the node is less busy",
        ) from error
    try:
        await run.to_the_end(stdin, folder, before)
    finally:
        with trio.CancelScope(shield=True):
            await run.kill()
            await trio.to_thread.run_sync(make_removable, folder)
    return run.outcome()


def _end_unwatched(process: subprocess.Popen[bytes]) -> None:
    """Kill `process` and what it has started by now; no descriptor is left to watch it by."""
    # Killed at once, it could leave a child that has not yet asked to die with it. Stopped, it starts
    # nothing more, and still leads to what it has started.
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    tree.kill_descendants(process.pid)
    process.kill()
    process.wait()


class _Run:
    def __init__(
        self,
        process: subprocess.Popen[bytes],
        limits: Limits,
        own_processes: int,
        on_progress: OnProgress,
        information: int | None,
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._limits = limits
        self._own_processes = own_processes
        self._on_progress = on_progress
        # The descriptors move to trio; Popen's file objects must not close them a second time.
        self._stdin, self._stdout, self._stderr = (
            trio.lowlevel.FdStream(os.dup(pipe.fileno()))
            for pipe in (process.stdin, process.stdout, process.stderr)
        )
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
        self._pidfd = os.pidfd_open(process.pid)
        self._information = None if information is None else trio.lowlevel.FdStream(information)
        self._namespace: int | None = None
        """The first process of the namespace, as a pidfd: its end is the end of all that are in it."""
        self._told = bytearray()
        self._output = bytearray()
        self._errors = StandardError()
        self._ended = Ended.EXITED
        self._report: Report | None = None

    async def to_the_end(self, stdin: bytes, folder: Path, before: FolderUsage) -> None:
        """Return once the process has exited or has passed a limit."""
        with trio.move_on_after(self._limits.wall_seconds) as wall:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._feed, stdin)
                nursery.start_soon(self._watch_processes, nursery.cancel_scope)
                nursery.start_soon(self._watch_folder, folder, before, nursery.cancel_scope)
                async with trio.open_nursery() as readers:
                    readers.start_soon(self._read_output, nursery.cancel_scope)
                    readers.start_soon(self._read_errors, nursery.cancel_scope)
                    await self._learn_namespace()
                    await trio.lowlevel.wait_readable(self._pidfd)
                    # A daemon that it left behind holds the pipes open: end it, then read to the end.
                    await self._kill_descendants()
                nursery.cancel_scope.cancel()
        if wall.cancelled_caught:
            self._ended = Ended.WALL

    async def kill(self) -> None:
        """Kill and reap the process and everything below it, and close what leads to them. Call it once."""
        with trio.move_on_after(START_SECONDS):
            # Killed before it has told, it could leave a process that nobody knows.
            await self._learn_namespace()
        await self._kill_descendants()
        self._process.terminate()
        with trio.move_on_after(START_SECONDS):
            await trio.lowlevel.wait_readable(self._pidfd)
        self._process.kill()
        await trio.lowlevel.wait_readable(self._pidfd)
        self._process.wait()  # it has exited, so this only reaps
        os.close(self._pidfd)
        if self._namespace is not None:
            os.close(self._namespace)
        for stream in (self._stdin, self._stdout, self._stderr):
            await stream.aclose()

    def outcome(self) -> Outcome:
        """Return how it ended, once it was killed."""
        self._pass_report_on()
        exit_code = self._process.returncode
        if self._ended is Ended.EXITED and exit_code == _KILLED_FOR_CPU:
            self._ended = Ended.CPU
        return Outcome(
            ended=self._ended,
            exit_code=exit_code if exit_code >= 0 else 128 - exit_code,
            stdout=bytes(self._output),
            stderr=self._errors.tail(),
        )

    async def _learn_namespace(self) -> None:
        if self._information is None:
            return
        while b"}" not in self._told:
            chunk = await self._information.receive_some(CHUNK_BYTES)
            if not chunk:
                break  # it ended before it made a namespace, and says why on standard error
            self._told += chunk
        await self._information.aclose()
        self._information = None
        if self._told:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and all in it
                self._namespace = os.pidfd_open(json.loads(self._told)["child-pid"])

    async def _kill_descendants(self) -> None:
        if self._namespace is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and somebody has reaped it
                signal.pidfd_send_signal(self._namespace, signal.SIGKILL)
            await trio.lowlevel.wait_readable(self._namespace)
        # There is no event for the end of a process that is not one's child, so this one asks again.
        while tree.kill_descendants(self._process.pid):  # noqa: ASYNC110
            await trio.sleep(0.001)

    def _stop(self, why: Ended, scope: trio.CancelScope) -> None:
        self._ended = why
        scope.cancel()

    async def _feed(self, data: bytes) -> None:
        try:
            await self._stdin.send_all(data)
        except trio.BrokenResourceError:
            pass  # the program does not read its input to the end, which is its right
        finally:
            await self._stdin.aclose()

    async def _read_output(self, scope: trio.CancelScope) -> None:
        while chunk := await self._stdout.receive_some(CHUNK_BYTES):
            room = self._limits.output_bytes - len(self._output)
            self._output += chunk[:room]
            if len(chunk) > room:
                self._stop(Ended.OUTPUT, scope)

    async def _read_errors(self, scope: trio.CancelScope) -> None:
        total = 0
        while chunk := await self._stderr.receive_some(CHUNK_BYTES):
            total += len(chunk)
            for report in self._errors.add(chunk):
                self._report = report
            if total > MAX_STDERR_BYTES:
                self._stop(Ended.OUTPUT, scope)

    async def _watch_processes(self, scope: trio.CancelScope) -> None:
        while True:
            begun = thread_time()
            self._pass_report_on()
            over = self._over_limit()
            if over is not None:
                self._stop(over, scope)
            await trio.sleep(max(WATCH_SECONDS, (thread_time() - begun) / WATCH_SHARE))

    def _pass_report_on(self) -> None:
        """Tell the latest progress, so that a program which reports without end is told of seldom."""
        if self._report is not None:
            self._on_progress(*self._report)
            self._report = None

    def _over_limit(self) -> Ended | None:
        processes = tree.descendants(self._process.pid)
        usage = tree.measure(processes)
        limits = self._limits
        if usage.threads - self._own_processes > limits.processes:
            return Ended.PROCESSES
        if usage.cpu_seconds > limits.cpu_seconds:
            return Ended.CPU
        if (
            usage.resident_bytes > limits.memory_bytes
            and tree.measure_proportional_bytes(processes) > limits.memory_bytes
        ):
            return Ended.MEMORY
        return None

    async def _watch_folder(self, folder: Path, before: FolderUsage, scope: trio.CancelScope) -> None:
        while True:
            begun = trio.current_time()
            now, unlinked_bytes = await trio.to_thread.run_sync(self._measure_files, folder)
            made_bytes = now.stored_bytes - before.stored_bytes + unlinked_bytes
            over_files = now.files - before.files > self._limits.files
            if over_files or made_bytes > self._limits.file_bytes or not now.is_countable:
                self._stop(Ended.FILES, scope)
            await trio.sleep(max(FOLDER_SECONDS, (trio.current_time() - begun) / WATCH_SHARE))

    def _measure_files(self, folder: Path) -> tuple[FolderUsage, int]:
        processes = tree.descendants(self._process.pid)
        return measure_folder(folder), tree.measure_unlinked_bytes(processes)
