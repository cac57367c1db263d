"""What the daemon's process takes of its machine. A few small reads, so it may be asked every second."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import trio

_SELF = Path("/proc/self")


def process_document() -> dict[str, int | None]:
    """Return memory, open descriptors, threads and trio tasks; null for what the system does not tell."""
    return {
        "resident_bytes": _told(_resident_bytes),
        "descriptors": _told(lambda: len(os.listdir(_SELF / "fd")) - 1),  # but for that of the listing
        "threads": _told(lambda: len(os.listdir(_SELF / "task"))),
        "tasks": trio.lowlevel.current_statistics().tasks_living,
    }


def _told(read: Callable[[], int]) -> int | None:
    try:
        return read()
    except OSError:  # no /proc here, or no descriptor left to read it with
        return None


def _resident_bytes() -> int:
    pages = int((_SELF / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
