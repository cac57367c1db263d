"""Which node runs a task: a pure function of who is here, what they have and how busy they are.

First who can and may (here and not suspect, the right role, the agent running there), then the least
busy, then the shortest round trip, then the smallest id, so that everyone who knows the same decides the
same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from knode.errors import Code, KnodeError
from knode.mesh.liveness import PeerState
from knode.mesh.statements import Role

RUNNING_ROLES = frozenset({Role.ADMIN, Role.WORKER})
NAMED_AT_MOST = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A member, as the routing node sees it."""

    node_id: str
    name: str
    role: Role
    state: PeerState
    agents: frozenset[str]
    """Ids of the agents that it has running."""
    running: int
    queued: int
    capacity: int
    """Attempts that it runs at once."""
    rtt_s: float
    """0 for the routing node itself."""


def obstacle(candidate: Candidate, agent: str) -> tuple[Code, str] | None:
    """Return why a node cannot run the agent now, with its code; None when it can."""
    if candidate.role not in RUNNING_ROLES:
        return Code.NOT_ALLOWED, f"its role is {candidate.role}"
    if candidate.state is not PeerState.ALIVE:
        return Code.UNAVAILABLE, f"it is {candidate.state}"
    if agent not in candidate.agents:
        return Code.NO_AGENT, "it has no such agent running"
    return None


def demand(candidate: Candidate, agent: str) -> None:
    """Check that this very node can run the agent.

    Raises:
        KnodeError: NOT_ALLOWED by its role, UNAVAILABLE when it is not here, NO_AGENT.
    """
    found = obstacle(candidate, agent)
    if found is not None:
        code, why = found
        raise KnodeError(
            code,
            f"{candidate.name} cannot run {agent}: {why}",
            "'knode agent list' shows which agents run where; without --on the best node is chosen",
        )


def choose(candidates: Iterable[Candidate], agent: str) -> Candidate:
    """Return the node that should run `agent`.

    Raises:
        KnodeError: NO_ELIGIBLE_NODE, saying for up to eight nodes why not.
    """
    everyone = sorted(candidates, key=lambda candidate: candidate.node_id)
    obstacles = [obstacle(candidate, agent) for candidate in everyone]
    able = [candidate for candidate, found in zip(everyone, obstacles, strict=True) if found is None]
    if able:
        return min(able, key=_score)
    reasons = [f"{c.name}: {found[1]}" for c, found in zip(everyone, obstacles, strict=True) if found]
    raise KnodeError(
        Code.NO_ELIGIBLE_NODE,
        f"no node can run {agent} now ({', '.join(reasons[:NAMED_AT_MOST]) or 'there is none'})",
        "'knode agent list' shows which agents run where",
    )


def _score(candidate: Candidate) -> tuple[float, float, str]:
    busy = (candidate.running + candidate.queued) / max(1, candidate.capacity)
    return busy, candidate.rtt_s, candidate.node_id
