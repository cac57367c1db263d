"""How a core is set: times in ticks, sizes in bytes."""

from __future__ import annotations

from msgspec import Struct


class Settings(Struct, frozen=True):
    """The defaults suit a tick of 100 ms."""

    election_ticks: int = 10
    """Who hears no leader for this long, and up to as much again at random, stands for election; a leader
    that hears no majority for this long steps down."""
    heartbeat_ticks: int = 2
    """Must be well below `election_ticks`."""
    max_append_bytes: int = 192 * 1024
    """Of the entries in one `Append`; a single larger entry goes alone."""
    max_in_flight: int = 256
    """Appends with entries sent to one follower and not yet answered."""
    max_in_flight_bytes: int = 4 * 1024 * 1024
    """The entries of these. One `Append` more may go over it."""
    max_uncommitted_bytes: int = 16 * 1024 * 1024
    """What a leader takes before a quorum has it; beyond: `QueueFull`. A single larger entry is taken."""
    max_reads: int = 1024
    """Reads that wait for a quorum; beyond: `QueueFull`."""
