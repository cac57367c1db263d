"""The effect bundle: all that an agent left, or a named error and nothing."""

from __future__ import annotations

import pytest

from knode.agents.effects import Effects, FollowUp
from knode.agents.runtime import AgentResult
from knode.errors import Code, KnodeError
from knode.klp.codec import Decoder, encode
from knode.tasks.bundle import bundle_of
from knode.tasks.commands import (
    MAX_BUNDLE_BYTES,
    MAX_FOLLOW_UPS,
    MAX_OPERATION_BYTES,
    MAX_OPERATIONS,
    Bundle,
)
from knode.tasks.values import MAX_INPUT_BYTES

TEXT = "kExecutor:text"


def left(*operations: bytes, follow_ups: tuple[FollowUp, ...] = (), output: bytes = b"x") -> AgentResult:
    return AgentResult(output, Effects(operations, follow_ups))


def tasks(*sizes: int) -> tuple[FollowUp, ...]:
    return tuple(FollowUp(TEXT, bytes(size)) for size in sizes)


@pytest.mark.parametrize(
    ("most", "more"),
    [
        (left(*[b"1"] * MAX_OPERATIONS), left(*[b"1"] * (MAX_OPERATIONS + 1))),
        (left(bytes(MAX_OPERATION_BYTES)), left(bytes(MAX_OPERATION_BYTES + 1))),
        (left(follow_ups=tasks(*[1] * MAX_FOLLOW_UPS)), left(follow_ups=tasks(*[1] * (MAX_FOLLOW_UPS + 1)))),
        (left(follow_ups=tasks(MAX_INPUT_BYTES)), left(follow_ups=tasks(MAX_INPUT_BYTES + 1))),
        (left(output=bytes(MAX_BUNDLE_BYTES - 8)), left(output=bytes(MAX_BUNDLE_BYTES - 7))),
        (left(*[bytes(16_000)] * 15), left(*[bytes(16_000)] * 15, output=bytes(6_000))),
    ],
    ids=["operations", "operation", "tasks", "input", "result", "together"],
)
def test_the_most_of_each_fits_and_decodes_and_more_is_too_large(
    most: AgentResult, more: AgentResult
) -> None:
    bundle = bundle_of(most)
    assert Decoder[Bundle](Bundle).decode(encode(bundle)) == bundle
    with pytest.raises(KnodeError) as caught:
        bundle_of(more)
    assert caught.value.code is Code.TOO_LARGE


@pytest.mark.parametrize("agent", ["", "text", "kExecutor:", "kExecutor:" + "x" * 90])
def test_a_task_for_what_is_no_agents_name_is_the_agents_failure(agent: str) -> None:
    with pytest.raises(KnodeError) as caught:
        bundle_of(left(follow_ups=(FollowUp(agent, b""),)))
    assert caught.value.code is Code.AGENT_FAILED
