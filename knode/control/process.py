"""What the daemon's process takes of its machine. A few small reads, so it may be asked every second."""

from __future__ import annotations

import os
from pathlib import Path

import trio

_SELF = Path("/proc/self")


def process_document() -> dict[str, int | None]:
    """Return memory, open descriptors, threads and trio tasks; null for what the system does not tell."""
    linux = _SELF.is_dir()
    return {
        "resident_bytes": _resident_bytes() if linux else None,
        "descriptors": len(os.listdir(_SELF / "fd")) - 1 if linux else None,  # but for that of the listing
        "threads": len(os.listdir(_SELF / "task")) if linux else None,
        "tasks": trio.lowlevel.current_statistics().tasks_living,
    }


def _resident_bytes() -> int:
    pages = int((_SELF / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
