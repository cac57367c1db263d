from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.errors import Code, KnodeError
from knode.mesh.liveness import PeerState
from knode.mesh.statements import Role
from knode.tasks.commands import MAX_CANDIDATES
from knode.tasks.routing import (
    RUNNING_ROLES,
    Candidate,
    Work,
    choose,
    demand,
    demand_ever,
    obstacle,
    route,
    score,
    turn,
)

AGENT = "kExecutor:text"
OTHER = "kExecutor:other"
TASK = bytes(16)


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
            cpu_percent=draw(st.sampled_from([0, 1, 100])),
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
                choose(order, AGENT, TASK)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    else:
        assert choose(among, AGENT, TASK) == choose(shuffled, AGENT, TASK)


@given(candidates())
def test_the_one_chosen_has_no_obstacle_and_nobody_is_less_busy(among: list[Candidate]) -> None:
    able = [candidate for candidate in among if is_able(candidate)]
    assert able == [candidate for candidate in among if obstacle(candidate, AGENT) is None]
    if able:
        chosen = choose(among, AGENT, TASK)
        assert chosen in able

        def busy(candidate: Candidate) -> float:
            return (candidate.running + candidate.queued) / max(1, candidate.capacity)

        assert busy(chosen) == min(map(busy, able))
        ties = [candidate for candidate in able if busy(candidate) == busy(chosen)]
        assert (chosen.rtt_s, chosen.cpu_percent) == min((tie.rtt_s, tie.cpu_percent) for tie in ties)


def test_among_equally_busy_nodes_the_nearest_is_chosen_then_the_idlest() -> None:
    assert choose([make("a", rtt_s=0.2), make("b", rtt_s=0.1)], AGENT, TASK).node_id == "b"
    assert choose([make("a", rtt_s=0.2, running=1), make("b", rtt_s=0.9)], AGENT, TASK).node_id == "b"
    assert choose([make("a", cpu_percent=90), make("b", cpu_percent=9)], AGENT, TASK).node_id == "b"
    assert choose([make("a", rtt_s=0.1), make("b", cpu_percent=90)], AGENT, TASK).node_id == "b"


def test_tasks_spread_over_nodes_that_are_equal() -> None:
    among = [make(name) for name in "abcd"]
    chosen = Counter(choose(among, AGENT, bytes([n] * 16)).node_id for n in range(200))
    assert set(chosen) == set("abcd")
    assert max(chosen.values()) < 2 * min(chosen.values())


def test_nobody_can_run_it_says_why_for_each_and_for_eight_at_most() -> None:
    among = [
        make("a", role=Role.VOTER),
        make("b", state=PeerState.SUSPECT),
        make("c", agents=frozenset()),
        *(make(f"d{n}", agents=frozenset()) for n in range(20)),
    ]
    with pytest.raises(KnodeError) as caught:
        choose(among, AGENT, TASK)
    assert caught.value.code is Code.NO_ELIGIBLE_NODE
    assert "a: its role is voter, b: it is suspect, c: it has no such agent running" in str(caught.value)
    assert str(caught.value).count("it has no such agent running") == 6
    with pytest.raises(KnodeError, match="there is none"):
        choose([], AGENT, TASK)


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


# Durable tasks.


def member_of(name: str) -> bytes:
    return name.encode().ljust(32, b"-")


def cell_of(*candidates: Candidate) -> dict[bytes, Candidate]:
    return {member_of(candidate.node_id): candidate for candidate in candidates}


def chosen(among: dict[bytes, Candidate], attempts: dict[bytes, int] | None = None, **work: object) -> str:
    found = route(among, Work(TASK, AGENT, **work), attempts or {})  # type: ignore[arg-type]
    return "" if found.assignment is None else found.assignment.member.decode().rstrip("-")


def test_who_holds_the_files_comes_first_then_the_least_busy_by_the_ledger() -> None:
    among = cell_of(make("a", running=1), make("b"), make("c", cpu_percent=1))
    assert chosen(among, holders=(member_of("a"),)) == "a"
    assert chosen(among) == "b"
    assert chosen(among, {member_of("b"): 1}) == "c"
    assert chosen(among, {member_of("b"): 1, member_of("c"): 1}, holders=(member_of("b"),)) == "b"


def test_a_durable_task_waits_when_nobody_who_could_has_a_free_place() -> None:
    among = cell_of(make("a"), make("b", state=PeerState.SUSPECT), make("c", agents=frozenset()))
    found = route(among, Work(TASK, AGENT), {member_of("a"): 2})
    assert found.assignment is None
    assert [(entry.member, entry.score, entry.why) for entry in found.considered] == [
        (member_of("a"), None, "it has 2 attempts, and room for 2"),
        (member_of("b"), None, "it is suspect"),
        (member_of("c"), None, "it has no such agent running"),
    ]
    demand_ever(among, Work(TASK, AGENT))
    assert chosen(among, {member_of("a"): 1}) == "a"
    assert chosen(cell_of(make("a", queued=9)), {member_of("a"): 1}) == "a", "its own word may be old"


def test_a_task_for_one_node_goes_there_or_waits_for_it() -> None:
    among = cell_of(make("a"), make("b", running=1), make("c", state=PeerState.FAILED))
    assert chosen(among, on=member_of("b")) == "b"
    assert chosen(among, on=member_of("c")) == ""
    demand_ever(among, Work(TASK, AGENT, on=member_of("c")))


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (Work(TASK, "kExecutor:none"), Code.NO_ELIGIBLE_NODE),
        (Work(TASK, AGENT, on=member_of("b")), Code.NO_ELIGIBLE_NODE),
        (Work(TASK, AGENT, on=member_of("c")), Code.NO_ELIGIBLE_NODE),
        (Work(TASK, AGENT, on=member_of("z")), Code.NOT_FOUND),
    ],
)
def test_what_nobody_ever_could_run_is_refused(work: Work, code: Code) -> None:
    among = cell_of(make("a"), make("b", role=Role.VOTER), make("c", agents=frozenset()))
    with pytest.raises(KnodeError) as caught:
        demand_ever(among, work)
    assert caught.value.code is code


def test_in_a_large_cell_the_best_are_still_named() -> None:
    among = cell_of(*(make(f"n{n:02}", running=n % 3) for n in range(90)))
    found = route(among, Work(TASK, AGENT), {})
    assert len(found.considered) == MAX_CANDIDATES
    points = [entry.score for entry in found.considered]
    assert points == sorted(points, key=lambda value: value or 0)
    assert found.assignment is not None
    assert found.assignment.member == min(
        (member for member, candidate in among.items() if not candidate.running),
        key=lambda member: turn(TASK, member),
    )


@given(candidates(), st.lists(st.integers(0, 5), min_size=12, max_size=12), st.randoms())
def test_a_route_is_the_same_whatever_the_order_and_gives_each_candidate_a_score_or_a_reason(
    among: list[Candidate], held: list[int], chance: random.Random
) -> None:
    members = cell_of(*among)
    attempts = dict(zip(members, held, strict=False))
    work = Work(TASK, AGENT, holders=tuple(members)[:2])
    found = route(members, work, attempts)
    assert found == route(dict(chance.sample(list(members.items()), len(members))), work, attempts)
    assert {entry.member for entry in found.considered} == set(members)
    for entry in found.considered:
        assert (entry.score is None) == bool(entry.why)
        free = attempts[entry.member] < members[entry.member].capacity
        assert (entry.score is not None) == (is_able(members[entry.member]) and free)
    assert (found.assignment is not None) == any(entry.score is not None for entry in found.considered)


def test_scores_fit_their_field_and_each_thing_weighs_more_than_all_after_it() -> None:
    worst = make("a", running=10**6, rtt_s=1e6, cpu_percent=100)
    assert score(worst, 0, has_files=False) <= 2**31
    assert score(worst, 0) < score(make("a"), 0, has_files=False)
    assert score(make("a", rtt_s=1e6, cpu_percent=100), 0) < score(make("a", capacity=1000), 1)
    assert score(make("a", rtt_s=0.0, cpu_percent=100), 0) < score(make("a", rtt_s=0.001), 0)
