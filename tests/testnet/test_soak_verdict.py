"""What the soak calls bad: growth that stays, answers that are lost, failures that no restart excuses."""

from __future__ import annotations

import pytest

from benchmarks.soak import BOUNDS, Answer, Disturbance, Record, Sample

WARM_UP_S = 600.0


def record(descriptors: list[int]) -> Record:
    """A node with a sample each minute."""
    values = [dict.fromkeys(BOUNDS, 0) | {"descriptors": count} for count in descriptors]
    samples = [Sample(60.0 * number, 1, each) for number, each in enumerate(values)]
    return Record({"node1": samples})


def test_growth_before_the_warm_up_and_peaks_after_it_are_no_leak() -> None:
    assert record([*range(10), *([20, 90] * 25)]).faults(WARM_UP_S) == []


def test_a_floor_that_rises_beyond_its_bound_is_a_leak() -> None:
    [fault] = record([20] * 10 + [20 + number // 4 for number in range(51)]).faults(WARM_UP_S)
    assert fault.startswith("node1: descriptors rose by ")


@pytest.mark.parametrize(
    ("outcome", "between", "is_good"),
    [
        ("succeeded", ("node2", "node3"), True),
        ("UNKNOWN", ("node2", "node4"), True),
        ("UNAVAILABLE", ("node4", "node2"), True),
        ("UNKNOWN", ("node2", "node3"), False),
        ("INTERNAL", ("node1", "node3"), False),
        ("lost", ("node2", "node4"), False),
        ("wrong", ("node2", "node4"), False),
    ],
)
def test_only_a_restart_of_one_of_the_two_excuses_and_never_a_lost_answer(
    outcome: str, between: tuple[str, str], is_good: bool
) -> None:
    seen = record([20] * 60)
    seen.disturbances.append(Disturbance("node4", 100.0, 105.0))
    seen.answers.append(Answer(*between, 99.5, 101.0, outcome))
    assert (seen.faults(WARM_UP_S) == []) is is_good


def test_a_restart_long_ago_excuses_nothing() -> None:
    seen = record([20] * 60)
    seen.disturbances.append(Disturbance("node4", 100.0, 105.0))
    seen.answers.append(Answer("node2", "node4", 140.0, 141.0, "UNKNOWN"))
    assert len(seen.faults(WARM_UP_S)) == 1
