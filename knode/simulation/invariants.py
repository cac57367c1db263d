"""What must hold, by names that say when.

`anytime_…` is asked all the time, `eventually_…` once everything is healed and must become true within
30 seconds, `finally_…` when all is over. Each gives a sentence for everything that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import trio

from knode.errors import Code
from knode.mesh.liveness import PeerState
from knode.mesh.peer import Peer
from knode.mesh.peers import CONVERSATIONS_A_PEER
from knode.node import Node
from knode.simulation.clients import answer_of
from knode.simulation.durable_invariants import DURABLE_INVARIANTS
from knode.simulation.evidence import Evidence, Invariant
from knode.tasks.direct import KEPT_TASKS, RUNNING_TASKS
from knode.tasks.lifecycle import State

TASKS_A_HOST = 64
TASKS_A_PAIR = 64
"""trio tasks that a node may have alive, and as many again for each peer: far more would be a leak."""
LOAD_KNOWN_S = 5.0
ON_THEIR_WAY_S = 1.5
"""What was sent before a silence still arrives within this, however often it is lost."""


def anytime_no_node_fails(evidence: Evidence) -> Iterator[str]:
    """A node never ends by itself, never fails to start again, and logs no fault of its own."""
    for host in evidence.cell.hosts:
        yield from (f"{host.name} failed: {failure}" for failure in host.failures)
    yield from evidence.history.faults


def anytime_direct_task_runs_at_most_once(evidence: Evidence) -> Iterator[str]:
    """However often its request is asked again, an attempt begins once."""
    for task, count in evidence.history.begun.items():
        if count > 1:
            yield f"task {task} began {count} times"


def anytime_no_stranger_is_served(evidence: Evidence) -> Iterator[str]:
    """Who is no member gets a refusal, whatever it says."""
    yield from evidence.stranger.served


def anytime_the_revoked_are_not_served(evidence: Evidence) -> Iterator[str]:
    """Once a node knows that a member was revoked, it begins no attempt for it."""
    yield from evidence.history.served_revoked


def anytime_queues_are_bounded(evidence: Evidence) -> Iterator[str]:
    """Nothing grows beyond its limit, and no task is leaked."""
    for host, node in evidence.cell.nodes():
        load, tasks = node.places.load, node.tasks.list()
        if load.queued > node.settings.tasks.queued:
            yield f"{host.name} lets {load.queued} attempts wait"
        if len(tasks) > KEPT_TASKS + RUNNING_TASKS:
            yield f"{host.name} keeps {len(tasks)} tasks"
        for peer in node.peers.members():
            # One more while the surplus one is closing.
            if len(peer.conversations) > CONVERSATIONS_A_PEER + 1:
                yield f"{host.name} has {len(peer.conversations)} conversations with one peer"
    hosts = len(evidence.cell.hosts)
    living = trio.lowlevel.current_statistics().tasks_living
    if living > TASKS_A_HOST * hosts + TASKS_A_PAIR * hosts * hosts:
        yield "there are far more trio tasks than nodes need"


def anytime_the_silent_are_found_dead(evidence: Evidence) -> Iterator[str]:
    """Who could not be heard for `mesh.dead_after_s` is alive to nobody."""
    now = trio.current_time()
    names = {host.name: host for host in evidence.cell.hosts}
    for (observer, observed), since in evidence.cell.silent_since.items():
        node = names[observer].node
        if node is None or not node.membership.in_cell:
            continue
        mesh = node.settings.mesh
        if now - since <= mesh.dead_after_s + ON_THEIR_WAY_S:
            continue
        for member in node.membership.roster.members.values():
            if member.name == observed:
                state = node.peers.peer(member.key).state
                if state not in (PeerState.FAILED, PeerState.LEFT):
                    yield f"{observer} takes {observed} for {state} after too long a silence"


def anytime_all_links_are_up(evidence: Evidence) -> Iterator[str]:
    """Every node has a link to every other member."""
    for host, node in evidence.cell.nodes():
        for peer in node.peers.members():
            if peer.conversation is None:
                yield f"{host.name} has no link to {_name_of(peer, node)}"


def anytime_no_link_is_lost(evidence: Evidence) -> Iterator[str]:
    """No link ends."""
    yield from evidence.history.lost_links


def anytime_loads_are_known(evidence: Evidence) -> Iterator[str]:
    """Every node heard within 5 seconds how busy each other member is."""
    now = trio.current_time()
    for host, node in evidence.cell.nodes():
        for peer in node.peers.members():
            conversation = peer.conversation
            if conversation is None or peer.load is None or now - conversation.peer_load_at > LOAD_KNOWN_S:
                yield f"{host.name} does not know how busy {_name_of(peer, node)} is"


def eventually_all_see_all(evidence: Evidence) -> Iterator[str]:
    """Every member is up, has the same roster, and sees every other one alive."""
    members = [host for host in evidence.cell.hosts if not evidence.cell.is_revoked(host)]
    up = {host.name: host.node for host in members if host.node is not None}
    for host in members:
        if host.name not in up:
            yield f"{host.name} is not up"
    if len({node.membership.roster.digest for node in up.values()}) > 1:
        yield "the rosters differ"
    for name, node in up.items():
        for member in node.membership.roster.members.values():
            if member.key != node.key.public and node.peers.peer(member.key).state is not PeerState.ALIVE:
                yield f"{name} does not see {member.name}"


def eventually_the_revoked_are_out(evidence: Evidence) -> Iterator[str]:
    """Every member knows who was revoked, and talks to none of them."""
    revoked = [host for host in evidence.cell.hosts if evidence.cell.is_revoked(host)]
    for member, node in evidence.cell.nodes():
        if member in revoked:
            continue
        for host in revoked:
            key = host.public_key
            if key.raw not in node.membership.roster.revoked:
                yield f"{member.name} has not heard that {host.name} was revoked"
            if node.peers.peer(key).conversation is not None:
                yield f"{member.name} still talks to {host.name}, which was revoked"


def finally_every_task_has_ended(evidence: Evidence) -> Iterator[str]:
    """No task is left without an end."""
    for each in evidence.history.submitted:
        if not each.task.state.final:
            yield f"task {each.task.id} of {each.origin} is still {each.task.state}"


def finally_answers_are_right(evidence: Evidence) -> Iterator[str]:
    """What succeeded has the right result."""
    for each in evidence.history.submitted:
        if each.task.state is State.SUCCEEDED and answer_of(each.task) != each.right:
            yield f"task {each.task.id} counted {answer_of(each.task)}, which is {each.right}"


def finally_nothing_of_attempts_is_left(evidence: Evidence) -> Iterator[str]:
    """No file that came with a task stays on a disk, whatever became of the task."""
    for host in evidence.cell.hosts:
        for name in host.disk.list_folder(host.home.attempts):
            yield f"{host.name} still has a folder of task {name}"


def finally_what_was_not_sent_never_began(evidence: Evidence) -> Iterator[str]:
    """A task that ended UNAVAILABLE says that nothing was sent, so it began nowhere."""
    for each in evidence.history.submitted:
        error, begun = each.task.error, evidence.history.begun[each.task.id]
        if error is not None and error.code is Code.UNAVAILABLE and begun:
            yield f"task {each.task.id} is UNAVAILABLE and began {begun} times"


def finally_loads_are_right(evidence: Evidence) -> Iterator[str]:
    """What each node knows of how busy the others are is what they are."""
    loads = {node.key.public: node.places.load for _, node in evidence.cell.nodes()}
    for host, node in evidence.cell.nodes():
        for peer in node.peers.members():
            if peer.load != loads.get(peer.key):
                yield f"{host.name} takes {_name_of(peer, node)} to be {peer.load}"


def finally_the_cell_has_worked(evidence: Evidence) -> Iterator[str]:
    """Some tasks succeeded on other nodes: a cell that does nothing keeps every other promise."""
    succeeded = [each for each in evidence.history.submitted if each.task.state is State.SUCCEEDED]
    if not any(each.task.node != each.origin for each in succeeded) and len(evidence.cell.hosts) > 1:
        yield "no task succeeded on another node"


def _name_of(peer: Peer, node: Node) -> str:
    return node.membership.roster.members[peer.key.raw].name


INVARIANTS: Mapping[str, Invariant] = {
    invariant.__name__: invariant
    for invariant in (
        anytime_no_node_fails,
        anytime_direct_task_runs_at_most_once,
        anytime_no_stranger_is_served,
        anytime_the_revoked_are_not_served,
        anytime_queues_are_bounded,
        anytime_the_silent_are_found_dead,
        anytime_all_links_are_up,
        anytime_no_link_is_lost,
        anytime_loads_are_known,
        eventually_all_see_all,
        eventually_the_revoked_are_out,
        finally_every_task_has_ended,
        finally_answers_are_right,
        finally_nothing_of_attempts_is_left,
        finally_what_was_not_sent_never_began,
        finally_loads_are_right,
        finally_the_cell_has_worked,
        *DURABLE_INVARIANTS,
    )
}
