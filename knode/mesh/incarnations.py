"""The incarnations of a cell: where its ledger had to begin anew, and which of them is in force.

A cell that lost the majority of its voters for good goes on from what one of them has. Whoever owns the cell
says so by INCARNATION; what others had beyond that is void from then on. It may be said of two survivors, by
people who do not know of each other: then nobody can tell which ledger counts, and the cell stands still
until KEEP names one. Nothing that the two could write differently (a time, an order) decides it.

Pure: no clock, no disk, no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from msgspec import Struct

from knode.errors import Code, KnodeError
from knode.mesh.eras import Era
from knode.mesh.statements import BeginIncarnation, KeepIncarnation, Statement

MAX_OF_AN_EARLIER_OWNER = 16


class Incarnation(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which ledger of the cell: the first is (0, the cell's id), each later one has the id of the statement
    that began it."""

    number: int
    hash: bytes


class Verdict(StrEnum):
    """What becomes of a replica, by the incarnation of its log."""

    IN_FORCE = "in force"
    """It takes part."""
    SURVIVES = "survives"
    """The incarnation in force was begun with what it has: it goes on as its only voter."""
    OVER = "over"
    """The ledger went on without it: what it has is void."""
    NOT_ACKNOWLEDGED = "not acknowledged"
    """Its incarnation was begun on the one in force, by a key that does not count (any more). What it has
    may be all that there is, so it stands still until the owner keeps its incarnation or begins another."""
    CONTESTED = "contested"
    """There are rivals: it stands still until the owner keeps one."""


@dataclass(frozen=True, slots=True)
class Incarnations:
    """What a roster's statements say of the cell's ledger."""

    present: Incarnation
    """In force; of rivals, the one on which all of them were begun."""
    begun: BeginIncarnation | None
    """The statement that began it; None for the first."""
    rivals: tuple[Incarnation, ...]
    """Those that were begun on the present one; two or more, and none is in force: the cell stands still."""
    known: Mapping[bytes, BeginIncarnation]
    """Every statement that is kept, by its id, whether it counts or not."""
    kept: frozenset[bytes]
    """Ids of the statements that may ever count."""

    def judge(self, incarnation: Incarnation, replica: bytes) -> Verdict:
        """Say what becomes of this replica, whose log is of `incarnation`."""
        if self.rivals:
            return Verdict.CONTESTED
        if incarnation == self.present:
            return Verdict.IN_FORCE
        if self.begun is not None and (self.begun.replica, self.begun.predecessor) == (
            replica,
            incarnation.hash,
        ):
            return Verdict.SURVIVES
        return Verdict.NOT_ACKNOWLEDGED if self._was_begun_on_present(incarnation) else Verdict.OVER

    def find(self, beginning: str) -> Incarnation:
        """Return the incarnation whose hash, in hexadecimal, begins so; not the first, which nobody began.

        Raises:
            KnodeError: NOT_FOUND, or INVALID_ARGUMENT when several do.
        """
        found = [
            Incarnation(b.number, i) for i, b in self.known.items() if i.hex().startswith(beginning.lower())
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise KnodeError(Code.INVALID_ARGUMENT, f"{beginning!r} fits several ledgers", "give more of it")
        raise KnodeError(
            Code.NOT_FOUND,
            f"the cell has no ledger {beginning[:64]!r}",
            "'knode status' shows those in doubt",
        )

    def _was_begun_on_present(self, incarnation: Incarnation) -> bool:
        """Tell whether it descends from the one in force; one that nobody knows of any more may."""
        at = incarnation
        while at.number > self.present.number:
            begun = self.known.get(at.hash)
            if begun is None:
                return True
            at = Incarnation(begun.number - 1, begun.predecessor)
        return at == self.present


def incarnations_of(
    cell_id: bytes, bodies: Mapping[bytes, Statement], eras: list[Era], recovery: bytes
) -> Incarnations:
    """Say which incarnation is in force, from the statements of all eras, of which the last is in force."""
    era, owners = eras[-1], {each.id: each.owner for each in eras}
    begun = {
        i: b
        for i, b in bodies.items()
        if isinstance(b, BeginIncarnation) and b.era in owners and b.signer in (owners[b.era], recovery)
    }
    keeps = {
        i: b
        for i, b in bodies.items()
        if isinstance(b, KeepIncarnation)
        and ((b.signer == recovery and b.era in owners) or (b.signer, b.era) == (era.owner, era.id))
    }
    named = {b.incarnation for b in keeps.values()}
    counting = {
        i
        for i, b in begun.items()
        if i in named or b.signer == recovery or (b.signer, b.era) == (era.owner, era.id)
    }
    decided = [b.incarnation for _, b in sorted(keeps.items(), key=_turn) if b.incarnation in begun]
    present, at = Incarnation(0, cell_id), None
    if decided:
        at = begun[decided[-1]]
        present = Incarnation(at.number, decided[-1])
    while len(next_ones := _begun_on(present, begun, counting)) == 1:
        present = next_ones[0]
        at = begun[present.hash]
    forgotten = _surplus({i: b for i, b in begun.items() if i not in counting})
    return Incarnations(
        present,
        at,
        tuple(next_ones),
        {i: b for i, b in sorted(begun.items()) if i not in forgotten},
        frozenset({*begun, *keeps} - forgotten),
    )


def _begun_on(
    present: Incarnation, begun: Mapping[bytes, BeginIncarnation], counting: set[bytes]
) -> list[Incarnation]:
    return [
        Incarnation(b.number, i)
        for i, b in sorted(begun.items())
        if i in counting and (b.predecessor, b.number) == (present.hash, present.number + 1)
    ]


def _surplus(earlier: Mapping[bytes, BeginIncarnation]) -> set[bytes]:
    """Return which of the statements of earlier owners are too many: all but the first of each."""
    of_signer: dict[bytes, list[bytes]] = {}
    for i, body in sorted(earlier.items(), key=_turn):
        of_signer.setdefault(body.signer, []).append(i)
    return {i for ids in of_signer.values() for i in ids[MAX_OF_AN_EARLIER_OWNER:]}


def _turn(item: tuple[bytes, BeginIncarnation | KeepIncarnation]) -> tuple[int, bytes]:
    return item[1].issued, item[0]
