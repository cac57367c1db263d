"""What more than one room's tests use."""

from __future__ import annotations

import os
import signal

from memory_cell import cell

__all__ = ["cell"]


def pytest_configure() -> None:
    """End at SIGTERM as at Ctrl-C: fixtures then stop the processes and unmount the disks that they made.

    No daemon of a test speaks to the machine's own network, or imports libp2p, which takes a second each.
    """
    os.environ["KNODE_DISCOVERY_LIBP2P"] = "false"
    os.environ["KNODE_DISCOVERY_MDNS"] = "false"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
