"""What more than one room's tests use."""

from __future__ import annotations

import signal

from memory_cell import cell

__all__ = ["cell"]


def pytest_configure() -> None:
    """End at SIGTERM as at Ctrl-C: fixtures then stop the processes and unmount the disks that they made."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
