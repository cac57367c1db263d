"""The eras of a cell: the genesis is the first, and each RECOVER of the recovery key begins another.

Pure: no clock, no disk, no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from knode.mesh.statements import Genesis, Known, Recover, Statement


@dataclass(frozen=True, slots=True)
class Era:
    """What holds from a genesis or RECOVER on."""

    id: bytes
    """Of the statement that began it."""
    owner: bytes
    """Raw key that owns the cell in this era."""
    members: Mapping[bytes, Known]
    """With whom it began, by raw id."""
    revoked: frozenset[bytes]
    """Raw keys that were revoked before."""


def eras_of(cell_id: bytes, genesis: Genesis, bodies: Mapping[bytes, Statement]) -> list[Era]:
    """Return the eras in their order, of which the last is in force."""
    begun = [
        (b.issued, i, b)
        for i, b in bodies.items()
        if isinstance(b, Recover) and b.cell == cell_id and b.signer == genesis.recovery
    ]
    return [
        Era(cell_id, genesis.signer, {}, frozenset()),
        *(
            Era(i, b.owner, {known.member: known for known in b.members}, frozenset(b.revoked))
            for _, i, b in sorted(begun, key=lambda era: era[:2])
        ),
    ]
