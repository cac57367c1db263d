"""One measured line, and the table of all of them, in plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROUNDS = 10
"""How often each figure and its floor are measured, in turn; the median counts."""

_HEADINGS = ("benchmark", "figure", "floor", "ratio", "target", "met")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Args:
        name: what was measured, a short phrase.
        figure: what knode reached, with its unit: `412 MB/s`.
        floor: what the bare thing reached in the same run, with its unit; empty when there is none.
        ratio: figure to floor, or to the target when there is no floor.
        target: what the ratio or the figure must be, in words: `at least 0.6`.
        met: whether it is.
    """

    name: str
    figure: str
    floor: str
    ratio: float
    target: str
    met: bool


def table(rows: Sequence[Row]) -> str:
    """Return the rows as an aligned table with headings."""
    cells = [
        (
            row.name,
            row.figure,
            row.floor or "-",
            f"{row.ratio:.2f}",
            row.target,
            "yes" if row.met else "MISSED",
        )
        for row in rows
    ]
    return aligned([_HEADINGS, *cells])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as columns; the first line are the headings."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    headings, *rest = lines
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [headings, ["-" * width for width in widths], *rest]
    )
