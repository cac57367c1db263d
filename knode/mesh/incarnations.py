"""The incarnations of a cell: how often its ledger had to begin anew, and from where.

Pure: no clock, no disk, no network.
"""

from __future__ import annotations

from msgspec import Struct


class Incarnation(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which ledger of the cell: the first is (0, the cell's id), each later one has the hash of the
    statement that began it."""

    number: int
    hash: bytes
