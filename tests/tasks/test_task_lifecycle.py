from __future__ import annotations

import itertools

import pytest

from knode.errors import Code, KnodeError
from knode.tasks.lifecycle import TRANSITIONS, Outcome, State, outcome_of
from knode.tasks.task import Task

FINAL = [state for state in State if state is not State.ASSIGNED]


def make_task(state: State = State.ASSIGNED) -> Task:
    return Task("00" * 16, "kExecutor:text", "12D3Koo", "desk", 0, state)


def test_only_an_assigned_task_moves_and_every_outcome_ends_it() -> None:
    expected = {
        Outcome.COMPLETED: State.SUCCEEDED,
        Outcome.AGENT_OR_MESH_FAILED: State.FAILED,
        Outcome.CANCELLED: State.CANCELLED,
        Outcome.DEADLINE: State.EXPIRED,
        Outcome.LOST: State.UNKNOWN,
    }
    for state, outcome in itertools.product(State, Outcome):
        if state is State.ASSIGNED:
            assert TRANSITIONS[state, outcome] is expected[outcome]
        else:
            assert (state, outcome) not in TRANSITIONS
    assert {state for state in State if state.final} == set(FINAL)


@pytest.mark.parametrize("state", FINAL)
def test_a_task_that_has_ended_never_ends_again(state: State) -> None:
    with pytest.raises(KeyError):
        make_task(state).succeed(b"late")
    with pytest.raises(KeyError):
        make_task(state).fail(KnodeError(Code.CANCELLED, "late"))


@pytest.mark.parametrize("code", list(Code))
def test_every_error_code_ends_a_task_in_one_state(code: Code) -> None:
    task = make_task()
    task.fail(KnodeError(code, "why"))
    expected = {
        Code.CANCELLED: State.CANCELLED,
        Code.EXPIRED: State.EXPIRED,
        Code.TIMEOUT: State.UNKNOWN,
        Code.UNKNOWN: State.UNKNOWN,
    }
    assert task.state is expected.get(code, State.FAILED)
    assert task.state is TRANSITIONS[State.ASSIGNED, outcome_of(code)]
    assert task.document()["error"] == {"code": code, "message": "why", "next": ""}
