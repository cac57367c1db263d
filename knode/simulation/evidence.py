"""What invariants look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from knode.simulation.cell import Cell
from knode.simulation.clients import History
from knode.simulation.durable_clients import Book
from knode.simulation.image import LedgerImage
from knode.simulation.observer import Observer
from knode.simulation.stranger import Stranger


@dataclass(frozen=True, slots=True)
class Evidence:
    """The cell, and what everybody saw of it."""

    cell: Cell
    history: History
    """Of direct tasks."""
    book: Book
    """Of durable tasks."""
    observer: Observer
    stranger: Stranger
    ledgers: dict[str, LedgerImage] = field(default_factory=dict)
    """By the name of the machine; filled when all is over."""

    def let_go(self, survived: LedgerImage) -> None:
        """A ledger began anew: what is not in what survived may be lost, though it was acknowledged."""
        for asked in self.book.asked:
            if asked.id is not None and asked.id not in survived.tasks:
                asked.id, asked.is_acknowledged = None, False


Invariant = Callable[[Evidence], Iterator[str]]
"""Gives a sentence for everything that is wrong."""
