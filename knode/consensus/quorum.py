"""When enough voters agree: majorities, and joint ones (dissertation, sections 3.1 and 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from knode.consensus.messages import Configuration, ReplicaId


def majority(voters: Sequence[ReplicaId]) -> int:
    """Return how many of the voters decide: any two majorities have a voter in common."""
    return len(voters) // 2 + 1


def is_quorum(configuration: Configuration, replicas: Collection[ReplicaId]) -> bool:
    """Whether these replicas can decide: a majority of the voters, during a joint configuration of
    both its halves. Who has no vote does not count."""
    return all(
        sum(voter in replicas for voter in voters) >= majority(voters) for voters in halves(configuration)
    )


def agreed(configuration: Configuration, value_of: Callable[[ReplicaId], int]) -> int:
    """Return the highest number that a quorum has reached: a log index, a read, a tick.

    Args:
        value_of: what a voter has reached; numbers only grow and are at least 0.
    """
    return min(_reached(voters, value_of) for voters in halves(configuration))


def _reached(voters: Sequence[ReplicaId], value_of: Callable[[ReplicaId], int]) -> int:
    if not voters:
        return 0
    reached = sorted(map(value_of, voters))
    return reached[-majority(voters)]


def halves(configuration: Configuration) -> tuple[Sequence[ReplicaId], ...]:
    """Return the groups of voters of which each must decide."""
    if configuration.outgoing:
        return configuration.voters, configuration.outgoing
    return (configuration.voters,)
