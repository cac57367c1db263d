"""What an attempt's error means for its task: whether another attempt may do better.

The agent's own failure is final: it would most likely fail again, and whoever wrote it can say otherwise by
the exit code 75. The node's trouble is not: it says nothing about the task.
"""

from __future__ import annotations

from knode.agents.runtime import TryAgain
from knode.errors import Code, KnodeError
from knode.klp.messages import error_fields
from knode.tasks.commands import Fence
from knode.tasks.messages import FailAttempt

RETRYABLE = frozenset(
    {
        Code.DISK_FULL,
        Code.DISK_READ_ONLY,
        # The node's own clock said so; whether the task's time is over, the ledger decides.
        Code.EXPIRED,
        Code.HOME_DAMAGED,
        Code.INTERNAL,
        Code.LOCKED,
        # This node's copy of the agent was changed; another's may be whole.
        Code.MANIFEST_INVALID,
        # A file of the task that no holder has now.
        Code.NOT_FOUND,
        Code.NO_AGENT,
        Code.NO_SANDBOX,
        Code.RATE_LIMITED,
        Code.UNAVAILABLE,
    }
)
"""Codes of the node's own trouble. Every other one that an attempt can end with is the agent's failure
(AGENT_FAILED), or the same everywhere (TOO_LARGE)."""


def failure_of(fence: Fence, error: KnodeError) -> FailAttempt:
    """Return what the leader is told of an attempt that ended with `error`.

    Of an error whose words are for this machine alone it is told what the table says.
    """
    code, message, _ = error_fields(error)
    retryable = isinstance(error, TryAgain) or error.code in RETRYABLE
    return FailAttempt(fence, code, message, retryable)
