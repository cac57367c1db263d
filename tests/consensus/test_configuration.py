"""Configurations as values: what is one, and the steps from one to another."""

from __future__ import annotations

import pytest
from lone_core import A, B, C, D, voters

from knode.consensus import configuration as configurations
from knode.consensus.messages import Configuration


@pytest.mark.parametrize(
    "wrong",
    [
        Configuration(),
        Configuration((B, A)),
        Configuration((A, A)),
        Configuration((A,), (C, B)),
        Configuration((A, B), (), (B,)),
        Configuration((A,), (), (C, B)),
    ],
)
def test_what_is_no_configuration_is_refused(wrong: Configuration) -> None:
    with pytest.raises(ValueError, match=r"replicas must|needs a voter|voter and learner"):
        configurations.check(wrong)
    assert configurations.decoded(configurations.encoded(wrong)) is None


@pytest.mark.parametrize("data", [b"", b"\x93", b"\x93\x90\x90\x90\x00", b"\x92\x90\x90", bytes(300)])
def test_bytes_that_are_no_configuration_decode_to_none(data: bytes) -> None:
    assert configurations.decoded(data) is None


def test_votes_change_by_way_of_a_joint_configuration() -> None:
    joint = configurations.steps_toward(voters(A, B), voters(A, C, learners=[B]))
    assert joint == Configuration((A, C), (A, B), (B,))
    assert configurations.may_vote(joint, B)
    assert configurations.decoded(configurations.encoded(joint)) == joint
    assert configurations.left(joint) == voters(A, C, learners=[B])


def test_learners_change_in_one_step() -> None:
    target = voters(A, B, learners=[D])
    assert configurations.steps_toward(voters(A, B, learners=[C]), target) == target


def test_the_target_cannot_be_joint() -> None:
    with pytest.raises(ValueError, match="cannot be joint"):
        configurations.steps_toward(voters(A), Configuration((A,), (B,)))
