"""How many attempts a member is given ahead: some when it is quick, none as soon as one takes long."""

from __future__ import annotations

from knode.tasks.pace import AHEAD, ENOUGH, LONG_S, MOST_AHEAD, SHORT_S, Pace


def after(count: int, seconds: float, pace: Pace | None = None) -> Pace:
    """A member that has done so many attempts, each in so many seconds."""
    pace = pace or Pace()
    for number in range(count):
        pace.begin(bytes([number]), 0.0)
        pace.end(bytes([number]), seconds, is_done=True)
    return pace


def test_a_quick_member_is_given_some_ahead_once_it_has_shown_it() -> None:
    assert after(ENOUGH - 1, 0.01).room(2, 0.0) == 2
    assert after(ENOUGH, 0.01).room(2, 0.0) == 2 * AHEAD
    assert after(ENOUGH, 2 * SHORT_S).room(2, 0.0) == 2


def test_what_is_given_ahead_is_bounded_and_never_less_than_the_capacity() -> None:
    pace = after(ENOUGH, 0.01)
    assert pace.room(30, 0.0) == MOST_AHEAD
    assert pace.room(200, 0.0) == 200


def test_one_long_attempt_ends_it_while_it_runs_and_several_for_longer() -> None:
    pace = after(ENOUGH, 0.01)
    pace.begin(b"long", 10.0)
    pace.begin(b"short", 10.5)
    assert pace.room(2, 10 + LONG_S) == 2 * AHEAD
    assert pace.room(2, 10.1 + LONG_S) == 2
    pace.end(b"long", 20.0, is_done=True)
    assert after(50, 0.01, pace).room(2, 20.0) == 2, "the other is older by now"
    pace.end(b"short", 20.0, is_done=False)
    assert pace.room(2, 20.0) == 2 * AHEAD
    assert after(5, 2.0, pace).room(2, 20.0) == 2


def test_an_attempt_that_was_taken_away_says_nothing_of_its_length() -> None:
    pace = after(ENOUGH, 0.01)
    pace.begin(b"lost", 0.0)
    pace.end(b"lost", 500.0, is_done=False)
    pace.end(b"never begun", 500.0, is_done=True)
    assert pace.room(2, 500.0) == 2 * AHEAD
