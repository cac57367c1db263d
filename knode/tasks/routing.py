"""Which node runs a task: a pure function of who is here, what they have and how busy they are.

First who can and may (here, the right role, the agent running there), then whoever is not suspect,
then the least busy, then the shortest round trip, then the smallest id, so that everyone who knows the
same decides the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from knode.errors import Code, KnodeError
from knode.mesh.liveness import PeerState
from knode.mesh.roster import Role

RUNNING_ROLES = frozenset({Role.ADMIN, Role.WORKER})


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


def obstacle(candidate: Candidate, agent: str) -> str:
    """Return why a node cannot run the agent now; empty when it can."""
    if candidate.role not in RUNNING_ROLES:
        return f"its role is {candidate.role}"
    if candidate.state in (PeerState.FAILED, PeerState.LEFT):
        return f"it has {candidate.state}"
    if agent not in candidate.agents:
        return "it does not have the agent"
    return ""


def choose(candidates: Iterable[Candidate], agent: str) -> Candidate:
    """Return the node that should run `agent`.

    Raises:
        KnodeError: NO_ELIGIBLE_NODE, saying for up to eight nodes why not.
    """
    everyone = sorted(candidates, key=lambda candidate: candidate.node_id)
    able = [candidate for candidate in everyone if not obstacle(candidate, agent)]
    if not able:
        reasons = ", ".join(f"{c.name}: {obstacle(c, agent)}" for c in everyone[:8])
        raise KnodeError(
            Code.NO_ELIGIBLE_NODE,
            f"no node can run {agent} now ({reasons or 'there is none'})",
            "'knode agent list' shows which agents run where",
        )
    return min(able, key=_score)


def _score(candidate: Candidate) -> tuple[bool, float, float, str]:
    busy = (candidate.running + candidate.queued) / max(1, candidate.capacity)
    return candidate.state is not PeerState.ALIVE, busy, candidate.rtt_s, candidate.node_id
