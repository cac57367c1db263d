"""From what an agent left to the effect bundle that the ledger takes."""

from __future__ import annotations

import msgspec

from knode.agents.runtime import AgentResult
from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.tasks.commands import (
    ATTEMPTS,
    MAX_BUNDLE_BYTES,
    MAX_FOLLOW_UPS,
    MAX_OPERATION_BYTES,
    MAX_OPERATIONS,
    Bundle,
    FollowUp,
    NewTask,
)
from knode.tasks.values import MAX_INPUT_BYTES, AgentId


def bundle_of(result: AgentResult) -> Bundle:
    """Return the bundle of an attempt.

    Raises:
        KnodeError: TOO_LARGE over a limit, AGENT_FAILED for a follow-up whose agent's name is none.
    """
    effects = result.effects
    for what, found, most in (
        ("operations", len(effects.operations), MAX_OPERATIONS),
        ("bytes of an operation", max(map(len, effects.operations), default=0), MAX_OPERATION_BYTES),
        ("tasks that follow", len(effects.follow_ups), MAX_FOLLOW_UPS),
        (
            "bytes of a following task's input",
            max((len(each.input) for each in effects.follow_ups), default=0),
            MAX_INPUT_BYTES,
        ),
    ):
        if found > most:
            raise _too_large(f"{found} {what}, and at most {most} fit")
    try:
        follow_ups = tuple(
            FollowUp(NewTask(msgspec.convert(each.agent, AgentId), each.input, (), b"", 0, ATTEMPTS))
            for each in effects.follow_ups
        )
    except msgspec.ValidationError as error:
        raise KnodeError(Code.AGENT_FAILED, f"a task that the agent asked for is none: {error}") from error
    bundle = Bundle(result.output, effects.operations, follow_ups)
    if (found := len(encode(bundle))) > MAX_BUNDLE_BYTES:
        raise _too_large(f"{found} bytes together, and at most {MAX_BUNDLE_BYTES} fit")
    return bundle


def _too_large(what: str) -> KnodeError:
    return KnodeError(Code.TOO_LARGE, f"the agent left {what}: nothing of it took effect")
