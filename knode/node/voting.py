"""What a node says of who votes in its cell, and of ledgers that were begun anew."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from knode.consensus.electorate import Votes
from knode.consensus.recovery import Survey
from knode.consensus.voters import member_of
from knode.mesh.incarnations import Incarnation
from knode.mesh.roster import Member
from knode.node.node import Node

FAILOVER_VOTERS = 3
PATIENCE_MS = 5_000
"""So long may an election take before somebody is told that nobody leads."""
LEDGER_CHARACTERS = 12

_VOTES = {Votes.NOT: None, Votes.LEARNER: "learner", Votes.VOTER: "voter"}


def iso(milliseconds: int) -> str:
    """Return a time of day as documents have it: UTC, to the second."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def votes_document(node: Node, member: Member) -> str | None:
    """Return `voter`, `learner`, or None for a member without a replica or of whom nothing is known."""
    return _VOTES[node.electorate.votes(member)]


def ledger_document(node: Node, incarnation: Incarnation) -> dict[str, Any]:
    """Return one ledger of the cell: where it began, and whether this node may say that it counts."""
    begun = node.membership.roster.incarnations.known[incarnation.hash]
    survivor = node.membership.roster.holders.get(member_of(begun.replica))
    return {
        "ledger": incarnation.hash.hex(),
        "number": incarnation.number,
        "begun_on": survivor.name if survivor is not None else None,
        "begun_at": iso(begun.issued),
        "index": begun.index,
        "owner": node.membership.owns_cell,
    }


def survey_document(node: Node, survey: Survey) -> dict[str, Any]:
    """Return what is known before the ledger begins anew on this node."""
    since = survey.leaderless_since
    return {
        "survivor": node.membership.own.name,
        "last_index": survey.end.index,
        "committed_index": survey.committed,
        "missing": list(survey.missing),
        "leaderless_since": None if since is None else iso(since),
        "founds": survey.founds,
        "more": [{"name": member.name, "last_index": end.index} for member, end in survey.more],
        "owner": node.membership.owns_cell,
    }


def voting_warnings(node: Node) -> list[str]:
    """Return what is wrong with the voters of this node's cell, each with the next step."""
    incarnations = node.membership.roster.incarnations
    if incarnations.rivals:
        ledgers = " and ".join(_ledger(node, rival) for rival in incarnations.rivals)
        return [
            f"two ledgers stand against each other ({ledgers}), so no task is done: name the one to keep on "
            "the owner's node: 'knode member recover --keep LEDGER'"
        ]
    warnings: list[str] = []
    if node.replica.trouble is not None:
        warnings.append(str(node.replica.trouble))
        standing = node.replica.standing
        if standing is not None and standing.incarnation.hash in incarnations.known:
            warnings.append(f"the ledger of this node is {_ledger(node, standing.incarnation)}")
    unfit = node.electorate.unfit()
    if unfit:
        names = ", ".join(member.name for member in unfit)
        warnings.append(
            f"being replaced, since its copy of the ledger cannot be trusted: {names}: wait until "
            "'knode member list' shows its vote again"
        )
    return [*warnings, *_leadership(node)]


def _leadership(node: Node) -> list[str]:
    electorate = node.electorate
    since = electorate.leaderless_since
    missing = electorate.missing()
    if missing is not None:
        when = "" if since is None else f" since {iso(since)}"
        return [
            f"most voters are away ({', '.join(missing)}){when}, so "
            "no task is done: start them again; if they never come back: 'knode member recover "
            "--lost-majority' on the member that has most of the ledger"
        ]
    if since is not None and node.world.clock.wall() - since > PATIENCE_MS:
        return [
            f"nobody leads the cell since {iso(since)}, though most voters are here: see 'knode logs tail'"
        ]
    unknown = electorate.voterless_since
    if unknown is not None and node.world.clock.wall() - unknown > PATIENCE_MS:
        return [
            f"no member that is here has the cell's ledger (since {iso(unknown)}), so no task is done: wait "
            "for the others; if it never began, since its founder had gone: "
            "'knode member recover --lost-majority'"
        ]
    configuration = electorate.configuration
    others = len(node.membership.roster.members) > 1
    if configuration is not None and others and len(configuration.voters) < FAILOVER_VOTERS:
        return [
            "no failover yet: the cell stops when its one voter does; it takes "
            f"{FAILOVER_VOTERS} members that vote: 'knode invite'"
        ]
    return []


def _ledger(node: Node, incarnation: Incarnation) -> str:
    document = ledger_document(node, incarnation)
    return (
        f"{document['ledger'][:LEDGER_CHARACTERS]}, begun on {document['begun_on']} at {document['begun_at']}"
    )
