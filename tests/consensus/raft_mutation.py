"""Is every rule of Raft tested? Each is switched off in turn, and a script or a seed must fail.

`python tests/consensus/raft_mutation.py` tries them all, each with every script and up to `SEEDS` seeds, and
writes the table into docs/reliability.md; a rule whose loss nothing notices ends it with exit code 1. It
takes some minutes.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raft_fuzz import run
from raft_invariants import Violation
from raft_mutants import MUTANTS, Mutant
from raft_script import SCRIPTS, ScriptError, play

SEEDS = 100
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- mutants: begin -->\n", "<!-- mutants: end -->"


@contextmanager
def switched_off(mutant: Mutant) -> Iterator[None]:
    """Do without a rule for a while."""
    original = inspect.getattr_static(mutant.owner, mutant.name)
    setattr(mutant.owner, mutant.name, mutant.change(original))
    try:
        yield
    finally:
        setattr(mutant.owner, mutant.name, original)


def fails(path: Path) -> bool:
    """Whether a script notices."""
    try:
        play(path)
    except ScriptError:
        return True
    return False


def seed_fails(seed: int) -> bool:
    """Whether a seed notices."""
    try:
        run(seed)
    except Violation:
        return True
    return False


@dataclass(frozen=True)
class Killers:
    """What notices that a rule is off: scripts, and the first seed."""

    scripts: tuple[str, ...]
    seed: int | None


def killers(mutant: Mutant) -> Killers:
    """Try a mutant with every script, and with seeds until one fails."""
    with switched_off(mutant):
        scripts = tuple(path.stem for path in SCRIPTS if fails(path))
        seed = next((seed for seed in range(SEEDS) if seed_fails(seed)), None)
    return Killers(scripts, seed)


def write(found: Sequence[Killers]) -> None:
    """Write the table into the page. Of the scripts it names those that say most about the rule: they fail
    for the fewest others."""
    often = Counter(name for one in found for name in one.scripts)
    lines = [
        "| rule that is switched off | section | where | scripts that fail | seed |",
        "|---|---|---|---|---|",
    ]
    for mutant, one in zip(MUTANTS, found, strict=True):
        scripts = sorted(one.scripts, key=lambda name: (often[name], name))
        named = ", ".join(f"`{name}`" for name in scripts[:2]) or "–"
        more = f" and {len(scripts) - 2} more" if len(scripts) > 2 else ""
        seed = "–" if one.seed is None else str(one.seed)
        lines.append(f"| {mutant.rule} | {mutant.section} | `{mutant.where}` | {named}{more} | {seed} |")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1])


def table() -> list[tuple[str, ...]]:
    """The table in the page, as cells."""
    lines = PAGE.read_text().split(BEGIN)[1].split(END)[0].splitlines()[2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def main() -> int:
    found = []
    for mutant in MUTANTS:
        found.append(killers(mutant))
        print(f"{mutant.rule}: {len(found[-1].scripts)} scripts, seed {found[-1].seed}", flush=True)
    write(found)
    alive = [mutant.rule for mutant, one in zip(MUTANTS, found, strict=True) if one == Killers((), None)]
    print(f"{len(MUTANTS)} rules switched off, of which nothing notices {len(alive)}: {alive}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
