"""Random faults, with every rule checked at every step."""

from __future__ import annotations

from collections import Counter

import pytest
from raft_fuzz import run

SEEDS = 200
BATCH = 20


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_no_seed_breaks_a_rule(first: int) -> None:
    total: Counter[str] = Counter()
    for seed in range(first, first + BATCH):
        total += run(seed)
    # A fuzz in which nothing happens finds nothing.
    for happened in ("committed", "reads", "terms", "crashes", "changes", "transfers", "compactions"):
        assert total[happened] >= BATCH / 2, happened


def test_a_seed_is_the_same_every_time() -> None:
    assert run(7) == run(7)
