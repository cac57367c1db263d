"""The places of a node: how many attempts it runs at once, and how many more may wait for one."""

from __future__ import annotations

from collections.abc import Callable

import trio

from knode.agents.runtime import AgentResult, Attempt, Progress, Runner
from knode.errors import Code, KnodeError
from knode.klp.keepalive import Load
from knode.world import Turns

OnProgress = Callable[[Progress], None]


class Places:
    """`running` attempts at once and `queued` that wait, direct and durable ones together.

    Whoever wants to run one takes a place (`admit`), runs it (`run`) and gives the place back (`leave`).
    """

    def __init__(self, runner: Runner, *, running: int, queued: int) -> None:
        self._runner = runner
        self._capacity = running
        self._queue_limit = queued
        self._turns = Turns(running)
        self._taken = 0

    @property
    def load(self) -> Load:
        """How busy this node is."""
        running = min(self._taken, self._capacity)
        return Load(running, self._taken - running, self._capacity, 0)

    def admit(self) -> None:
        """Take a place, to run at once or to wait.

        Raises:
            KnodeError: RATE_LIMITED when too many wait.
        """
        if self._taken >= self._capacity + self._queue_limit:
            raise KnodeError(
                Code.RATE_LIMITED, "this node's queue is full", "try again later, or another node"
            )
        self._taken += 1

    def admit_again(self) -> None:
        """Take a place for what was accepted before this node's start, whether there is one or not."""
        self._taken += 1

    def leave(self) -> None:
        """Give a place back."""
        self._taken -= 1

    async def run(self, agent: str, attempt: Attempt, progress: OnProgress) -> AgentResult:
        """Run an attempt that has a place, when it is its turn; tell `progress` how far it is.

        Raises:
            KnodeError: EXPIRED when the deadline came first, or what the runner raises.
        """
        with trio.move_on_at(attempt.deadline):
            async with self._turns:
                try:
                    return await self._runner.run(agent, attempt, progress)
                except KnodeError as error:
                    if error.code is Code.TIMEOUT:
                        raise expired() from error
                    raise
        raise expired()


def expired() -> KnodeError:
    """Return the error of a task whose deadline came first."""
    return KnodeError(
        Code.EXPIRED,
        "the task's deadline came before it was done",
        "submit it again with a longer --deadline",
    )
