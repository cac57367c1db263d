from __future__ import annotations

import itertools

import pytest

from knode.errors import Code, KnodeError
from knode.tasks.lifecycle import TRANSITIONS, Event, State, event_of
from knode.tasks.task import Task

FINAL = [State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED, State.UNKNOWN]

# The design's table once more, from the other side: for each state, what may happen in it.
EXPECTED: dict[State | None, dict[Event, State]] = {
    None: {Event.SUBMITTED: State.QUEUED, Event.SENT: State.ASSIGNED},
    State.QUEUED: {
        Event.ASSIGNED: State.ASSIGNED,
        Event.CANCELLED: State.CANCELLED,
        Event.DEADLINE: State.EXPIRED,
    },
    State.ASSIGNED: {
        Event.RELEASED: State.QUEUED,
        Event.RETRIED: State.QUEUED,
        Event.COMPLETED: State.SUCCEEDED,
        Event.FAILED: State.FAILED,
        Event.CANCELLED: State.CANCELLED,
        Event.DEADLINE: State.EXPIRED,
        Event.LOST: State.UNKNOWN,
    },
}


def make_task(state: State = State.ASSIGNED) -> Task:
    return Task("00" * 16, "kExecutor:text", "12D3Koo", "desk", 0, state)


def test_every_pair_of_state_and_event_leads_where_it_should_or_nowhere() -> None:
    for state, event in itertools.product([None, *State], Event):
        assert TRANSITIONS.get((state, event)) is EXPECTED.get(state, {}).get(event), (state, event)


def test_final_states_are_those_that_nothing_leaves() -> None:
    assert [state for state in State if state.final] == FINAL
    assert {state for state, _ in TRANSITIONS} == {None, *State} - set(FINAL)
    assert set(TRANSITIONS.values()) == set(State)


@pytest.mark.parametrize("state", FINAL)
def test_a_task_that_has_ended_never_ends_again(state: State) -> None:
    with pytest.raises(KeyError):
        make_task(state).succeed(b"late")
    with pytest.raises(KeyError):
        make_task(state).fail(KnodeError(Code.CANCELLED, "late"))


@pytest.mark.parametrize("code", list(Code))
def test_every_error_code_ends_a_direct_task_in_one_state(code: Code) -> None:
    task = make_task()
    task.fail(KnodeError(code, "why"))
    expected = {
        Code.CANCELLED: State.CANCELLED,
        Code.EXPIRED: State.EXPIRED,
        Code.TIMEOUT: State.UNKNOWN,
        Code.UNKNOWN: State.UNKNOWN,
    }
    assert task.state is expected.get(code, State.FAILED)
    assert task.state is TRANSITIONS[State.ASSIGNED, event_of(code)]
    assert task.document()["error"] == {"code": code, "message": "why", "next": ""}
