"""Each rule of Raft that is switched off is noticed, and docs/reliability.md says by what."""

from __future__ import annotations

import re

import pytest
from raft_mutants import MUTANTS, Mutant
from raft_mutation import PAGE, fails, seed_fails, switched_off, table
from raft_script import SCRIPTS

from knode.consensus import raft

SCRIPT = {path.stem: path for path in SCRIPTS}
FAST = 40
"""Seeds up to this one are tried here; the command tries all."""


def test_the_table_has_every_mutant() -> None:
    told = [(rule, section, where.strip("`")) for rule, section, where, _, _ in table()]
    assert told == [(mutant.rule, mutant.section, mutant.where) for mutant in MUTANTS]
    assert len({mutant.rule for mutant in MUTANTS}) == len(MUTANTS)


def test_every_rule_that_the_core_names_is_switched_off_once() -> None:
    named = re.findall(r"^\| .+ \| `([\w.]+)`", raft.__doc__ or "", re.MULTILINE)
    assert len(named) > 20
    switched = {mutant.where for mutant in MUTANTS}
    assert set(named) <= switched, set(named) - switched


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule.replace(" ", "_"))
def test_without_the_rule_the_script_that_the_table_names_fails(mutant: Mutant) -> None:
    (scripts, seed) = next(cells[3:] for cells in table() if cells[0] == mutant.rule)
    named = re.findall(r"`(\w+)`", scripts)
    assert named or seed.isdigit(), "nothing notices"
    with switched_off(mutant):
        for name in named:
            assert fails(SCRIPT[name]), name
        if not named:
            assert seed_fails(int(seed))


def test_without_a_rule_the_seed_that_the_table_names_fails() -> None:
    tried = 0
    for mutant, cells in zip(MUTANTS, table(), strict=True):
        if cells[4].isdigit() and int(cells[4]) < FAST and tried < 12:
            tried += 1
            with switched_off(mutant):
                assert seed_fails(int(cells[4])), mutant.rule
    assert tried == 12


def test_with_every_rule_in_force_nothing_fails() -> None:
    assert not any(fails(path) for path in SCRIPTS)
    assert f"{len(MUTANTS)} rules" in PAGE.read_text()
