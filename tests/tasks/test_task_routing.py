from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.errors import Code, KnodeError
from knode.mesh.liveness import PeerState
from knode.mesh.statements import Role
from knode.tasks.routing import RUNNING_ROLES, Candidate, choose, demand, obstacle

AGENT = "kExecutor:text"
OTHER = "kExecutor:other"


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    ids = draw(st.lists(st.text("abcdef", min_size=1, max_size=4), unique=True, max_size=12))
    return [
        Candidate(
            node_id=node_id,
            name=f"node-{node_id}",
            role=draw(st.sampled_from(Role)),
            state=draw(st.sampled_from(PeerState)),
            agents=draw(st.frozensets(st.sampled_from([AGENT, OTHER]))),
            running=draw(st.integers(0, 4)),
            queued=draw(st.integers(0, 4)),
            capacity=draw(st.integers(0, 4)),
            rtt_s=draw(st.sampled_from([0.0, 0.001, 0.1, 1.0])),
        )
        for node_id in ids
    ]


def make(node_id: str, **changes: object) -> Candidate:
    values: dict[str, object] = {
        "name": node_id,
        "role": Role.WORKER,
        "state": PeerState.ALIVE,
        "agents": frozenset({AGENT}),
        "running": 0,
        "queued": 0,
        "capacity": 2,
        "rtt_s": 0.01,
    }
    return Candidate(node_id=node_id, **{**values, **changes})  # type: ignore[arg-type]


def is_able(candidate: Candidate) -> bool:
    return (
        candidate.role in (Role.ADMIN, Role.WORKER)
        and candidate.state is PeerState.ALIVE
        and AGENT in candidate.agents
    )


@given(candidates(), st.randoms())
def test_the_choice_is_the_same_whatever_the_order(among: list[Candidate], chance: random.Random) -> None:
    shuffled = chance.sample(among, len(among))
    if not any(map(is_able, among)):
        errors = []
        for order in (among, shuffled):
            with pytest.raises(KnodeError) as caught:
                choose(order, AGENT)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    else:
        assert choose(among, AGENT) == choose(shuffled, AGENT)


@given(candidates())
def test_the_one_chosen_has_no_obstacle_and_nobody_is_less_busy(among: list[Candidate]) -> None:
    able = [candidate for candidate in among if is_able(candidate)]
    assert able == [candidate for candidate in among if obstacle(candidate, AGENT) is None]
    if able:
        chosen = choose(among, AGENT)
        assert chosen in able

        def busy(candidate: Candidate) -> float:
            return (candidate.running + candidate.queued) / max(1, candidate.capacity)

        assert busy(chosen) == min(map(busy, able))
        ties = [candidate for candidate in able if busy(candidate) == busy(chosen)]
        assert (chosen.rtt_s, chosen.node_id) == min((tie.rtt_s, tie.node_id) for tie in ties)


def test_among_equally_busy_nodes_the_nearest_is_chosen() -> None:
    assert choose([make("a", rtt_s=0.2), make("b", rtt_s=0.1)], AGENT).node_id == "b"
    assert choose([make("a", rtt_s=0.2, running=1), make("b", rtt_s=0.9)], AGENT).node_id == "b"


def test_nobody_can_run_it_says_why_for_each_and_for_eight_at_most() -> None:
    among = [
        make("a", role=Role.VOTER),
        make("b", state=PeerState.SUSPECT),
        make("c", agents=frozenset()),
        *(make(f"d{n}", agents=frozenset()) for n in range(20)),
    ]
    with pytest.raises(KnodeError) as caught:
        choose(among, AGENT)
    assert caught.value.code is Code.NO_ELIGIBLE_NODE
    assert "a: its role is voter, b: it is suspect, c: it has no such agent running" in str(caught.value)
    assert str(caught.value).count("it has no such agent running") == 6
    with pytest.raises(KnodeError, match="there is none"):
        choose([], AGENT)


@pytest.mark.parametrize(
    ("candidate", "code"),
    [
        (make("a", role=Role.OBSERVER), Code.NOT_ALLOWED),
        (make("a", state=PeerState.FAILED), Code.UNAVAILABLE),
        (make("a", agents=frozenset()), Code.NO_AGENT),
    ],
)
def test_a_node_that_was_asked_for_is_refused_with_its_own_reason(candidate: Candidate, code: Code) -> None:
    with pytest.raises(KnodeError) as caught:
        demand(candidate, AGENT)
    assert (caught.value.code, bool(caught.value.next_step)) == (code, True)


def test_voters_and_observers_run_nothing() -> None:
    assert {Role.ADMIN, Role.WORKER} == RUNNING_ROLES
