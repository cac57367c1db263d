"""A tree of processes, seen from outside through /proc (Linux): who is in it, and what it uses."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
BLOCK_BYTES = 512
"""The unit of `st_blocks`, whatever the file system's own (stat(2))."""
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What the descendants of a process use at one moment."""

    threads: int = 0
    """Processes and threads."""
    resident_bytes: int = 0
    """Resident pages; a page that two processes share counts twice."""
    cpu_seconds: float = 0.0
    """Processor time, with that of the children which were waited for."""


@dataclass(frozen=True, slots=True)
class _Process:
    threads: int
    resident_bytes: int
    cpu_seconds: float


def descendants(root: int) -> list[int]:
    """Return the processes below `root`, parents first; `root` itself is not among them."""
    found: list[int] = []
    waiting = [root]
    while waiting:
        children = list(_children(waiting.pop()))
        found += children
        waiting += children
    return found


def measure(processes: list[int]) -> Usage:
    """Return what `processes` use together; one that has ended by now counts nothing."""
    threads, resident, cpu = 0, 0, 0.0
    for process in processes:
        state = _read_state(process)
        if state is not None:
            threads += state.threads
            resident += state.resident_bytes
            cpu += state.cpu_seconds
    return Usage(threads=threads, resident_bytes=resident, cpu_seconds=cpu)


def measure_proportional_bytes(processes: list[int]) -> int:
    """Return the memory of `processes`, each shared page counted once in all.

    Exact but slow (the kernel walks every page), so it is asked only when the cheap upper bound of
    `measure` is over the limit. A process that hides its pages counts with all its resident ones.
    """
    total = 0
    for process in processes:
        text = _read(f"/proc/{process}/smaps_rollup")
        proportional = [line for line in text.splitlines() if line.startswith(b"Pss:")]
        if proportional:
            total += int(proportional[0].split()[1]) * 1024
        else:
            state = _read_state(process)
            total += state.resident_bytes if state else 0
    return total


def measure_unlinked_bytes(processes: list[int]) -> int:
    """Return the bytes on the disk of files that `processes` hold open after removing them.

    No folder shows such files. Those of a process that hides its descriptors are not counted.
    """
    stored: dict[tuple[int, int], int] = {}
    for process in processes:
        try:
            descriptors = os.listdir(f"/proc/{process}/fd")
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                status = os.stat(f"/proc/{process}/fd/{descriptor}")
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                stored[status.st_dev, status.st_ino] = status.st_blocks * BLOCK_BYTES
    return sum(stored.values())


def kill_descendants(root: int) -> int:
    """Send SIGKILL to every process below `root` once; return how many were found."""
    processes = descendants(root)
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(processes)


def _children(process: int) -> Iterator[int]:
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except (FileNotFoundError, ProcessLookupError):
        return
    for thread in threads:
        yield from map(int, _read(f"/proc/{process}/task/{thread}/children").split())


def _read_state(process: int) -> _Process | None:
    # proc(5): the name in parentheses may hold anything, so the fields are counted after the last one.
    _, found, rest = _read(f"/proc/{process}/stat").rpartition(b")")
    if not found:
        return None
    fields = rest.split()
    return _Process(
        threads=int(fields[17]),
        resident_bytes=int(fields[21]) * PAGE_BYTES,
        cpu_seconds=sum(map(int, fields[11:15])) / TICKS_PER_SECOND,
    )


def _read(path: str) -> bytes:
    """Return a file of /proc; empty when its process has ended or hides it."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
