"""Whose vote should count: the rules one by one, and what holds of every step whatever happens."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knode.consensus.messages import Configuration, ReplicaId
from knode.consensus.voters import (
    MAX_VOTERS,
    Candidate,
    common_level,
    has_majority,
    keeps_quorum,
    living_replicas,
    member_of,
    next_configuration,
)

NAMES = "abcdefghij"


def member(name: str) -> bytes:
    return name.encode() + bytes(31)


def replica(name: str) -> ReplicaId:
    """`b` is the first replica of member b, `b2` its second."""
    return member(name[0]) + hashlib.sha256(name.encode()).digest()[:8]


def seen(name: str, *, alive: bool = True, fit: bool = True, level: int = 1) -> Candidate:
    return Candidate(member(name[0]), NAMES.index(name[0]), replica(name), fit, alive, level)


def configuration(voters: str, learners: str = "", outgoing: str = "") -> Configuration:
    def replicas(names: str) -> tuple[ReplicaId, ...]:
        return tuple(sorted(replica(name) for name in names.split()))

    return Configuration(replicas(voters), replicas(outgoing), replicas(learners))


def follows(
    present: Configuration, candidates: list[Candidate], *, leader: str = "a", behind: str = ""
) -> Configuration | None:
    """What should follow when every learner but those `behind` has caught up."""
    late = {replica(name) for name in behind.split()}
    caught_up = {learner for learner in present.learners if learner not in late}
    return next_configuration(present, replica(leader), candidates, caught_up)


def test_a_cell_of_one_votes_alone() -> None:
    assert follows(configuration("a"), [seen("a")]) is None


def test_a_second_member_learns_and_never_votes() -> None:
    assert follows(configuration("a"), [seen("a"), seen("b")]) == configuration("a", "b")
    assert follows(configuration("a", "b"), [seen("a"), seen("b")]) is None


def test_two_more_begin_to_vote_together_once_both_have_caught_up() -> None:
    three = [seen("a"), seen("b"), seen("c")]
    assert follows(configuration("a", "b"), three) == configuration("a", "b c")
    assert follows(configuration("a", "b c"), three, behind="c") is None
    assert follows(configuration("a", "b c"), three) == configuration("a b c")


def test_a_dead_third_member_gets_no_vote() -> None:
    assert follows(configuration("a", "b c"), [seen("a"), seen("b"), seen("c", alive=False)]) is None


def test_a_fourth_member_votes_as_soon_as_it_has_caught_up() -> None:
    four = [seen(name) for name in "abcd"]
    assert follows(configuration("a b c", "d"), four) == configuration("a b c d")


def test_of_eight_members_seven_have_a_replica() -> None:
    eight = [seen(name) for name in "abcdefgh"]
    assert follows(configuration("a"), eight) == configuration("a", "b c d e f g")
    assert follows(configuration("a b c d e f g"), eight) is None


def test_the_eighth_takes_the_place_of_a_learner_that_died_and_of_nobody_else() -> None:
    eight = [seen(name, alive=name != "g") for name in "abcdefgh"]
    assert follows(configuration("a b c d e f", "g"), eight) == configuration("a b c d e f", "h")
    assert follows(configuration("a b c d e f g"), eight) is None


def test_a_dead_voter_stays_until_it_is_revoked() -> None:
    dead = [seen("a"), seen("b"), seen("c", alive=False), seen("d")]
    assert follows(configuration("a b c d"), dead) is None
    assert follows(configuration("a b c d"), [seen("a"), seen("b"), seen("d")]) == configuration("a b d")


def test_of_three_voters_one_revoked_leaves_the_leader_alone_and_a_learner() -> None:
    assert follows(configuration("a b c"), [seen("b"), seen("c")], leader="b") == configuration("b", "c")


def test_an_observer_has_no_replica() -> None:
    assert follows(configuration("a b c d"), [seen(name) for name in "abc"]) == configuration("a b c")


def test_a_sole_voter_that_may_vote_no_longer_hands_over_to_a_learner_that_caught_up() -> None:
    assert follows(configuration("a", "b"), [seen("b")]) == configuration("b")
    assert follows(configuration("a", "b"), [seen("b")], behind="b") is None


def test_a_replaced_replica_keeps_its_place_until_its_successor_has_caught_up() -> None:
    replaced = [seen("a"), seen("b2"), seen("c")]
    assert follows(configuration("a b c"), replaced) == configuration("a b c", "b2")
    assert follows(configuration("a b c", "b2"), replaced, behind="b2") is None
    assert follows(configuration("a b c", "b2"), replaced) == configuration("a b2 c")


def test_a_successor_that_was_replaced_itself_is_forgotten() -> None:
    again = [seen("a"), seen("b3"), seen("c")]
    assert follows(configuration("a b c", "b2"), again) == configuration("a b c", "b3")


def test_an_unfit_learner_leaves_and_an_unfit_voter_waits_for_its_successor() -> None:
    unfit = [seen("a"), seen("b", fit=False), seen("c"), seen("d", fit=False)]
    assert follows(configuration("a b c", "d"), unfit) == configuration("a b c")


def test_a_learner_that_was_not_heard_yet_stays() -> None:
    silent = replace(seen("b", alive=False), replica=None)
    assert follows(configuration("a", "b"), [seen("a"), silent]) is None


def test_nothing_follows_while_the_living_cannot_decide_or_a_step_is_under_way() -> None:
    dead = [seen("a"), seen("b", alive=False), seen("c", alive=False), seen("d")]
    assert follows(configuration("a b c"), dead) is None
    assert follows(configuration("a b c", "d", outgoing="a"), [seen("a"), seen("b"), seen("d")]) is None


def test_no_step_is_taken_after_which_the_living_could_not_decide() -> None:
    # Of five, d and e are dead; without c the others would be two of four.
    members = [seen("a"), seen("b"), seen("d", alive=False), seen("e", alive=False)]
    assert follows(configuration("a b c d e"), members, leader="c") is None


@pytest.mark.parametrize(
    ("voters", "revoked", "living", "kept"),
    [
        ("a b c", "c", "a b c", True),
        ("a b c", "c", "a b", True),
        ("a b c", "b", "a b", False),
        ("a b c", "b", "a", True),  # it stands still already; c may come back
        ("a", "b", "b c", True),
        ("a", "a", "a b", False),
        ("a", "b", "a b", True),
        ("a b c d e", "c", "a b c", False),
        ("a b c d e", "e", "a b c", True),
    ],
)
def test_a_revocation_that_would_break_the_quorum_is_seen(
    voters: str, revoked: str, living: str, kept: bool
) -> None:
    alive = {replica(name) for name in living.split()}
    assert keeps_quorum(configuration(voters), member(revoked), alive) is kept


def test_during_a_step_a_revocation_must_leave_both_majorities() -> None:
    joint = configuration("a b c", outgoing="a")
    assert not keeps_quorum(joint, member("a"), {replica(name) for name in "abc"})


def test_the_common_level_is_the_lowest_of_all_replicas_and_unknown_when_one_is() -> None:
    members = [seen("a", level=3), seen("b", level=2), seen("c", level=1)]
    assert common_level(configuration("a b"), members) == 2
    assert common_level(configuration("a b", "c"), members) == 1
    assert common_level(configuration("a b d"), members) == 0


# Laws. A cell is driven by what may happen to its members; the leader takes every step that follows.


@st.composite
def happenings(draw: st.DrawFn) -> list[tuple[str, str]]:
    kinds = st.sampled_from(["join", "revoke", "die", "live", "replace", "unfit", "observe", "lead", "step"])
    return draw(st.lists(st.tuples(kinds, st.sampled_from(NAMES)), max_size=40))


class _Cell:
    def __init__(self) -> None:
        self.members = {"a": seen("a")}
        self.present = configuration("a")
        self.leader = replica("a")
        self.replaced = 0

    def happens(self, kind: str, name: str) -> None:
        there = self.members.get(name)
        if kind == "join" and there is None:
            self.replaced += 1
            self.members[name] = seen(f"{name}{self.replaced}")
        if kind == "step":
            self.step(caught_up=name < "f")
        if there is None or (there.replica == self.leader and kind in ("die", "replace", "unfit")):
            return  # it would lead no longer
        living = living_replicas(self.members.values()) | {self.leader}
        match kind:
            case "revoke" if there.replica != self.leader and keeps_quorum(
                self.present, there.member, living
            ):
                del self.members[name]
            case "observe":
                del self.members[name]
            case "die":
                self.members[name] = replace(there, alive=False)
            case "live":
                self.members[name] = replace(there, alive=True)
            case "unfit":
                self.members[name] = replace(there, fit=False)
            case "replace":
                self.replaced += 1
                self.members[name] = seen(f"{name}{self.replaced}")
            case "lead" if there.replica in self.present.voters and there.alive and there.fit:
                self.leader = there.replica

    def step(self, *, caught_up: bool) -> bool:
        """Let the leader take its next step; tell whether there was one, which keeps every law."""
        before, living = self.present, living_replicas(self.members.values()) | {self.leader}
        learners = before.learners if caught_up else before.learners[:1]
        after = next_configuration(before, self.leader, list(self.members.values()), learners)
        if after is None:
            return False
        assert after != before
        assert has_majority(before.voters, living)
        assert has_majority(after.voters, living)
        assert len(after.voters) != 2
        assert 1 <= len(after.voters) <= MAX_VOTERS
        assert len({member_of(voter) for voter in after.voters}) == len(after.voters)
        assert not set(after.voters) & set(after.learners)
        assert set(after.voters) <= {*before.voters, *learners}, "a vote without having learned"
        replicas = {member_of(r) for r in (*after.voters, *after.learners)}
        assert len(replicas) <= MAX_VOTERS
        for each in (after.voters, after.learners):
            assert list(each) == sorted(set(each))
        self.present = after
        if self.leader not in after.voters:
            self.leader = next(voter for voter in after.voters if voter in living)
        return True


@settings(deadline=None, max_examples=300)
@given(happenings())
def test_every_step_keeps_the_laws_and_the_steps_come_to_an_end(events: list[tuple[str, str]]) -> None:
    cell = _Cell()
    for kind, name in events:
        cell.happens(kind, name)
    for _ in range(12):
        if not cell.step(caught_up=True):
            break
    else:
        raise AssertionError("no end")
    members, present = cell.members.values(), cell.present
    if has_majority(present.voters, living_replicas(members)) and len(members) <= MAX_VOTERS:
        idle = [m for m in members if m.fit and m.alive and m.replica not in present.voters]
        assert not idle or (len(idle), len(present.voters)) == (1, 1), "somebody could vote and does not"
        assert {member_of(learner) for learner in present.learners} <= {m.member for m in members}


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 10))
def test_when_all_are_well_everybody_up_to_seven_votes(size: int) -> None:
    cell = _Cell()
    for name in NAMES[:size]:
        cell.happens("join", name)
    while cell.step(caught_up=True):
        pass
    assert len(cell.present.voters) == (1 if size < 3 else min(size, MAX_VOTERS))
