"""Majorities and joint majorities, as laws."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st

from knode.consensus import configuration as configurations
from knode.consensus.messages import Configuration, ReplicaId
from knode.consensus.quorum import agreed, is_quorum, majority

IDS = [bytes([number]) for number in range(9)]
some_voters = st.sets(st.sampled_from(IDS), min_size=1).map(lambda ids: tuple(sorted(ids)))
some_replicas = st.sets(st.sampled_from(IDS))


@st.composite
def some_configurations(draw: st.DrawFn) -> Configuration:
    voters = draw(some_voters)
    learners = draw(some_replicas) - set(voters)
    return Configuration(voters, draw(st.just(()) | some_voters), tuple(sorted(learners)))


@given(some_voters, some_replicas, some_replicas)
def test_two_majorities_have_a_voter_in_common(
    voters: tuple[ReplicaId, ...], some: set[ReplicaId], others: set[ReplicaId]
) -> None:
    configuration = Configuration(voters)
    if is_quorum(configuration, some) and is_quorum(configuration, others):
        assert some & others & set(voters)


@given(some_voters, some_voters, some_replicas, some_replicas)
def test_a_joint_quorum_meets_every_quorum_of_either_half(
    old: tuple[ReplicaId, ...], new: tuple[ReplicaId, ...], some: set[ReplicaId], others: set[ReplicaId]
) -> None:
    if is_quorum(Configuration(new, old), some):
        for half in (old, new):
            if is_quorum(Configuration(half), others):
                assert some & others & set(half)


@given(some_configurations(), some_replicas, some_replicas)
def test_more_replicas_are_no_worse(
    configuration: Configuration, some: set[ReplicaId], more: set[ReplicaId]
) -> None:
    if is_quorum(configuration, some):
        assert is_quorum(configuration, some | more)


@given(some_configurations(), some_replicas)
def test_who_has_no_vote_does_not_count(configuration: Configuration, some: set[ReplicaId]) -> None:
    voting = {replica for replica in some if configurations.may_vote(configuration, replica)}
    assert is_quorum(configuration, some) == is_quorum(configuration, voting)
    assert not is_quorum(configuration, set(configuration.learners) - set(configuration.outgoing))


@given(some_configurations(), st.dictionaries(st.sampled_from(IDS), st.integers(0, 20)))
def test_what_is_agreed_is_the_highest_that_a_quorum_has_reached(
    configuration: Configuration, reached: dict[ReplicaId, int]
) -> None:
    def at_least(number: int) -> Collection[ReplicaId]:
        return {replica for replica in IDS if reached.get(replica, 0) >= number}

    number = agreed(configuration, lambda replica: reached.get(replica, 0))
    assert is_quorum(configuration, at_least(number))
    assert not is_quorum(configuration, at_least(number + 1))


def test_no_voters_decide_nothing() -> None:
    assert not is_quorum(Configuration(), set(IDS))
    assert agreed(Configuration(), lambda replica: 5) == 0


def test_sizes_of_majorities() -> None:
    assert [majority(IDS[:count]) for count in range(1, 8)] == [1, 2, 2, 3, 3, 4, 4]
