"""Which node runs a task: a pure function of who is here, what they have and how busy they are.

First who can and may (here and not suspect, the right role, the agent running there); then who holds the
task's files, is the least busy, is the nearest, has the idlest processors. Who is equal in all that is told
apart by the task's id, so that many tasks spread; and everyone who knows the same decides the same.

A direct task goes to the best of those, which lets it wait. A durable one is only given to who has a free
place: else it stays queued in the ledger, or is refused when nobody ever could run it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import log2

from knode.errors import Code, KnodeError
from knode.mesh.liveness import PeerState
from knode.mesh.statements import Role
from knode.tasks.commands import MAX_CANDIDATES, Assignment, Considered

RUNNING_ROLES = frozenset({Role.ADMIN, Role.WORKER})
NAMED_AT_MOST = 8

# A score's decimal digits, from the left: 1 when the files are elsewhere; how busy, in thousandths of the
# capacity; how far, in 99 steps that double tenfold; how busy the processors are, in percent.
_ELSEWHERE = 1_000_000_000
_BUSY = 100_000
_MOST_BUSY = 9_999
_FAR = 1_000
_FARTHEST = 99


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
    cpu_percent: int = 0
    """Of all its cores together."""


@dataclass(frozen=True, slots=True)
class Work:
    """A durable task, as far as it matters who runs it."""

    task: bytes
    agent: str
    on: bytes = b""
    """Raw id of the member that must run it; empty: any."""
    holders: tuple[bytes, ...] = ()
    """Members that hold its files; empty: it has none."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a durable task goes."""

    assignment: Assignment | None
    """None: nobody has a free place now, so it waits."""
    considered: tuple[Considered, ...]
    """Every candidate, the best first; then those that cannot run it now, in the order of their names."""


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


def choose(candidates: Iterable[Candidate], agent: str, task: bytes) -> Candidate:
    """Return the node that should run a direct task for `agent`.

    Raises:
        KnodeError: NO_ELIGIBLE_NODE, saying for up to eight nodes why not.
    """
    everyone = sorted(candidates, key=lambda candidate: candidate.node_id)
    obstacles = [obstacle(candidate, agent) for candidate in everyone]
    able = [candidate for candidate, found in zip(everyone, obstacles, strict=True) if found is None]
    if able:
        return min(able, key=lambda candidate: (score(candidate, 0), turn(task, candidate.node_id.encode())))
    reasons = [f"{c.name}: {found[1]}" for c, found in zip(everyone, obstacles, strict=True) if found]
    raise _nobody(agent, "now", reasons)


def route(candidates: Mapping[bytes, Candidate], work: Work, attempts: Mapping[bytes, int]) -> Route:
    """Return who should run a durable task now, or that it waits.

    Args:
        candidates: the members by their raw ids.
        work: the task.
        attempts: how many attempts each member has, by the ledger and by what is proposed to it; those
            whom it does not name have none.
    """
    able: list[tuple[int, bytes, Considered]] = []
    unable: list[tuple[str, Considered]] = []
    for member, candidate in candidates.items():
        held = attempts.get(member, 0)
        why = _why_not_now(member, candidate, work, held)
        if why is not None:
            unable.append((candidate.name, Considered(member, None, why)))
            continue
        points = score(candidate, held, has_files=not work.holders or member in work.holders)
        able.append((points, turn(work.task, member), Considered(member, points, "")))
    able.sort(key=lambda entry: entry[:2])
    unable.sort(key=lambda entry: (entry[0], entry[1].member))
    considered = (*(entry[2] for entry in able), *(entry[1] for entry in unable))[:MAX_CANDIDATES]
    return Route(Assignment(considered[0].member, considered) if able else None, considered)


def demand_ever(candidates: Mapping[bytes, Candidate], work: Work) -> None:
    """Check that somebody could run a durable task, now or when it is back and has a free place.

    Raises:
        KnodeError: NO_ELIGIBLE_NODE, saying for up to eight nodes why not; NOT_FOUND when the node that must
            run it is no member.
    """
    if work.on and work.on not in candidates:
        raise KnodeError(Code.NOT_FOUND, "the node that must run it is no member", "'knode member list'")
    asked = [candidates[work.on]] if work.on else list(candidates.values())
    reasons = {candidate.name: _why_never(candidate, work.agent) for candidate in asked}
    if all(reasons.values()):
        raise _nobody(work.agent, "ever", [f"{name}: {why}" for name, why in sorted(reasons.items())])


def score(candidate: Candidate, attempts: int, *, has_files: bool = True) -> int:
    """Return how good a node is that can run something, lower is better: at most 2,000,000,000.

    Args:
        candidate: the node; what it says of its load may be a second old.
        attempts: how many it has by the ledger.
        has_files: whether nothing must be sent to it first.
    """
    used = max(attempts, candidate.running + candidate.queued)
    busy = min(used * 1000 // max(1, candidate.capacity), _MOST_BUSY)
    far = min(round(10 * log2(1 + candidate.rtt_s * 1000)), _FARTHEST)
    return (0 if has_files else _ELSEWHERE) + busy * _BUSY + far * _FAR + candidate.cpu_percent


def turn(task: bytes, member: bytes) -> bytes:
    """Return where a member stands in the order of those that are equally good for a task."""
    return sha256(task + member).digest()


def _why_not_now(member: bytes, candidate: Candidate, work: Work, attempts: int) -> str | None:
    if work.on and work.on != member:
        return "another node was asked for"
    found = obstacle(candidate, work.agent)
    if found is not None:
        return found[1]
    if attempts >= candidate.capacity:
        return f"it has {attempts} attempts, and room for {candidate.capacity}"
    return None


def _why_never(candidate: Candidate, agent: str) -> str | None:
    """Return why a node cannot run the agent even when it is back; an absent one has what it had."""
    if candidate.role not in RUNNING_ROLES:
        return f"its role is {candidate.role}"
    if agent not in candidate.agents:
        return "it has no such agent running"
    return None


def _nobody(agent: str, when: str, reasons: list[str]) -> KnodeError:
    return KnodeError(
        Code.NO_ELIGIBLE_NODE,
        f"no node can {when} run {agent} ({', '.join(reasons[:NAMED_AT_MOST]) or 'there is none'})",
        "'knode agent list' shows which agents run where",
    )
