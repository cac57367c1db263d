"""What a node says of itself and of its cell: the documents that people and programs read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from knode import __version__
from knode.agents.registry import State as AgentState
from knode.errors import KnodeError
from knode.mesh.liveness import PeerState
from knode.mesh.peer import Peer
from knode.mesh.roster import Member
from knode.node.node import Node
from knode.node.voting import iso, voting_warnings


def status(node: Node) -> dict[str, Any]:
    """Return the whole picture, with what needs care and the next step for it."""
    membership = node.membership
    in_cell = membership.in_cell
    leader = node.replica.leader() if in_cell else None
    own = membership.roster.members.get(node.key.public.raw) if in_cell else None
    return {
        "node_id": own.node_id if own else node.key.node_id,
        "did": own.id.did if own else node.key.public.did,
        "name": own.name if own else node.settings.node.name,
        "cell_id": membership.roster.cell_id.hex() if in_cell else None,
        "role": own.role if own else None,
        "leader": leader.node_id if leader else None,
        "members": [member_document(node, m) for m in membership.roster.members.values()] if in_cell else [],
        "agents": [e.manifest.id for e in node.registry.list() if e.state is AgentState.RUNNING],
        "tasks": _tasks(node),
        "durable": _durable(node),
        "warnings": _warnings(node),
        "version": __version__,
        "uptime_s": round(node.world.clock.monotonic() - node.started_at, 3),
        "addresses": list(node.addresses),
        "home": str(node.home.path),
        "sandbox": node.machine.sandbox.name if node.machine.sandbox else None,
        "refusals": dict(node.peers.refusals),
        "failures": dict(node.peers.failures),
        "dropped": node.dropped,
    }


def member_document(node: Node, member: Member) -> dict[str, Any]:
    """Return one member, as this node sees it."""
    own = member.key == node.key.public
    peer = None if own else node.peers.peer(member.key)
    document = {
        "node_id": member.node_id,
        "name": member.name,
        "role": member.role,
        "state": PeerState.ALIVE if peer is None else peer.state,
        "link": None,
        "relayed": None,
        "rtt_ms": None,
    }
    return document | (_link(peer) if peer is not None else {})


def peer_document(node: Node, member: Member) -> dict[str, Any]:
    """Return one peer with how it is reached."""
    document = member_document(node, member)
    document["id"] = document.pop("node_id")
    peer = node.peers.peer(member.key)
    contact = node.membership.contacts.get(member.key.raw)
    conversation = peer.conversation
    load = peer.load
    return document | {
        "address": conversation.link.remote_address if conversation else None,
        "addresses": list(contact.body.addresses) if contact else [],
        "why": node.peers.dialling.explain(peer),
        "version": contact.body.version if contact else None,
        "agents": sorted(node.offers.of(member.key)),
        "load": None
        if load is None
        else {
            "running": load.running,
            "queued": load.queued,
            "capacity": load.capacity,
            "cpu": load.cpu_percent,
        },
    }


def peer_details(node: Node, member: Member) -> dict[str, Any]:
    """Return everything that is known of one peer."""
    document = peer_document(node, member)
    peer = node.peers.peer(member.key)
    dialling = node.peers.dialling
    contact = node.membership.contacts.get(member.key.raw)
    told = contact.body.addresses if contact is not None else ()
    conversation = peer.conversation
    now = node.world.clock.monotonic()
    return document | {
        "did": member.key.did,
        "joined_at": iso(member.joined),
        "told_at": iso(contact.body.issued) if contact is not None else None,
        "connected_s": None if conversation is None else round(now - conversation.opened_at, 3),
        "silent_s": None if math.isinf(peer.heard_at) else round(now - peer.heard_at, 3),
        "dialled_here": None if conversation is None else conversation.established.initiator,
        "links": len(peer.conversations),
        "traffic": None if conversation is None else asdict(conversation.link.statistics),
        "ways": [
            {
                "link": way.carrier,
                "address": way.address,
                "scope": way.scope.name.lower(),
                "source": "told" if way.address in told else "heard",
                "problem": dialling.failure(peer, way),
            }
            for way in dialling.ways(peer)
        ],
        "refusal": None
        if peer.refusal is None
        else {
            "code": peer.refusal.code,
            "message": peer.refusal.message,
            "next": peer.refusal.next_step,
        },
    }


def _tasks(node: Node) -> dict[str, int]:
    """Count the tasks that this node knows by state: the cell's, its own direct ones, and what is pending."""
    counts = Counter(str(task.state) for task in node.tasks.list())
    counts.update({str(state): count for state, count in node.ledger.counts.items()})
    counts["pending"] = sum(row.is_pending for row in node.outbox.rows())
    return {state: count for state, count in sorted(counts.items()) if count}


def _durable(node: Node) -> dict[str, Any]:
    """Return what durable tasks take here, and what went wrong with them since the start."""
    files, file_bytes = node.inputs.held
    return {
        "kept_attempts": len(node.attempts),
        "kept_attempt_bytes": node.attempts.kept_bytes,
        "held_files": files,
        "held_file_bytes": file_bytes,
        "refused_ends": dict(node.reception.refused),
        "dropped_messages": dict(node.replica.dropped_messages),
        "faults": node.ledger.faults,
    }


def _link(peer: Peer) -> dict[str, Any]:
    conversation = peer.conversation
    if conversation is None:
        return {}
    rtt_s = conversation.rtt_s
    return {
        "link": conversation.link.carrier,
        "relayed": conversation.link.relayed,
        "rtt_ms": None if rtt_s is None else round(rtt_s * 1000, 3),
    }


def _warnings(node: Node) -> list[str]:
    warnings: list[str] = []
    membership = node.membership
    if not membership.in_cell:
        warnings.append("this node belongs to no cell yet: 'knode join TICKET'")
    else:
        try:
            _ = membership.own
        except KnodeError as error:
            warnings.append(str(error))
        for peer in node.peers.members():
            if peer.refusal is not None:
                name = membership.roster.members[peer.key.raw].name
                warnings.append(
                    f"{name} refuses this node ({peer.refusal.message}): {peer.refusal.next_step}"
                )
        for member in membership.roster.contested.values():
            warnings.append(
                f"{member.name} is out: two keys claim to be its next one, so someone else has its key: "
                f"'knode member revoke {member.name}', then invite it again"
            )
        warnings += voting_warnings(node)
        if node.ledger.faults:
            warnings.append(
                "commands of the ledger met a fault of knode itself, and did nothing "
                f"({node.ledger.faults}): see 'knode logs tail', and report it"
            )
        lost = [p for p in node.peers.members() if p.state is PeerState.FAILED]
        if lost:
            names = ", ".join(membership.roster.members[p.key.raw].name for p in lost)
            warnings.append(f"not reachable: {names}: see 'knode peer list'")
    if node.machine.sandbox is None:
        why = "; ".join(node.machine.sandbox_problems)
        warnings.append(
            f"no sandbox holds here, so sandboxed agents are refused ({why}): "
            "mend that or install bubblewrap, then start the node anew"
        )
    for entry in node.registry.list():
        if entry.state is AgentState.REFUSED:
            warnings.append(f"agent {entry.manifest.id} is refused ({entry.problem}): install it again")
    return warnings
