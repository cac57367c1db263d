"""The checker is right about histories whose answer is known, and about small ones tried in every order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.simulation.linearizability import MOST_OPERATIONS, Operation, is_linearizable

Action = tuple[str, int]
Op = Operation[Action]


def register(state: int, action: Action) -> Iterable[int]:
    """A register that is written and read."""
    kind, value = action
    if kind == "write":
        return [value]
    return [state] if state == value else []


def write(value: int, called: float, returned: float | None) -> Op:
    return Operation(("write", value), called, returned)


def read(value: int, called: float, returned: float) -> Op:
    return Operation(("read", value), called, returned)


def is_right(history: Sequence[Op]) -> bool:
    return is_linearizable(history, 0, register)


def test_a_read_sees_the_last_write() -> None:
    assert is_right([write(1, 0, 1), read(1, 2, 3)])


def test_a_read_of_what_was_overwritten_before_it_began_is_stale() -> None:
    assert not is_right([write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)])


def test_a_read_during_a_write_may_see_either() -> None:
    assert is_right([write(1, 0, 9), read(0, 1, 2), read(1, 3, 4)])


def test_two_reads_during_a_write_never_go_back() -> None:
    assert not is_right([write(1, 0, 9), read(1, 1, 2), read(0, 3, 4)])


def test_a_write_without_answer_may_take_effect_late() -> None:
    assert is_right([write(1, 0, None), read(0, 1, 2), read(1, 3, 4)])


def test_a_write_without_answer_may_never_take_effect() -> None:
    assert is_right([write(1, 0, None), read(0, 50, 51)])


def test_a_write_takes_effect_once() -> None:
    history = [write(1, 0, None), read(1, 1, 2), write(2, 3, 4), read(1, 5, 6)]
    assert not is_right(history)


def test_a_value_that_nobody_wrote_is_impossible() -> None:
    assert not is_right([write(1, 0, 1), read(7, 2, 3)])


def test_operations_at_the_same_moment_overlap() -> None:
    assert is_right([write(1, 0, 5), read(0, 5, 5)])


def test_too_many_operations_on_one_object_are_refused() -> None:
    with pytest.raises(ValueError, match="too many"):
        is_right([read(0, 0, 1)] * (MOST_OPERATIONS + 1))


moments = st.integers(0, 8)


@st.composite
def operations(draw: st.DrawFn) -> Op:
    kind = draw(st.sampled_from(["write", "read"]))
    called = draw(moments)
    is_lost = kind == "write" and draw(st.booleans())
    returned = None if is_lost else called + draw(moments)
    return Operation((kind, draw(st.integers(0, 2))), called, returned)


def try_every_order(history: Sequence[Op]) -> bool:
    lost = [each for each in history if each.returned_at is None]
    answered = [each for each in history if each.returned_at is not None]
    subsets = [[each for i, each in enumerate(lost) if bits >> i & 1] for bits in range(1 << len(lost))]
    return any(explains(order) for some in subsets for order in permutations(answered + some))


def explains(order: Sequence[Op]) -> bool:
    state = 0
    for number, operation in enumerate(order):
        later = order[number + 1 :]
        if any(each.returned_at is not None and each.returned_at < operation.called_at for each in later):
            return False
        after = list(register(state, operation.action))
        if not after:
            return False
        state = after[0]
    return True


@given(st.lists(operations(), max_size=5))
def test_it_agrees_with_trying_every_order(history: list[Op]) -> None:
    assert is_right(history) == try_every_order(history)
