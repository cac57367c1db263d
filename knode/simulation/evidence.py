"""What invariants look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from knode.simulation.cell import Cell
from knode.simulation.clients import History
from knode.simulation.durable_clients import Book
from knode.simulation.observer import LedgerImage, Observer
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


Invariant = Callable[[Evidence], Iterator[str]]
"""Gives a sentence for everything that is wrong."""
