"""What must hold of the cell's log, its ledger and its durable tasks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from knode.consensus.electorate import Votes
from knode.consensus.voters import MAX_VOTERS, VOTING_ROLES
from knode.simulation.durable_clients import Asked, step
from knode.simulation.evidence import Evidence
from knode.simulation.image import LedgerImage
from knode.simulation.linearizability import MOST_OPERATIONS, is_linearizable
from knode.tasks.lifecycle import State


def anytime_replicas_agree(evidence: Evidence) -> Iterator[str]:
    """One leader a term and incarnation; who applies an index applies the same entry, to the same outcome."""
    for host, node in evidence.cell.nodes():
        evidence.observer.look(host.name, node)
    yield from evidence.observer.wrong


def anytime_no_stale_fence_is_accepted(evidence: Evidence) -> Iterator[str]:
    """Only the attempt that was assigned last ends a task."""
    yield from evidence.observer.stale


def anytime_a_key_is_one_task(evidence: Evidence) -> Iterator[str]:
    """The same key with the same input is the same task, and what was acknowledged is never refused later."""
    yield from evidence.book.wrong
    yield from evidence.book.faults


def eventually_one_leads(evidence: Evidence) -> Iterator[str]:
    """Every member that has a replica takes part and knows the same leader."""
    leaders = set()
    for host, node in evidence.cell.nodes():
        if evidence.cell.is_revoked(host):
            continue
        if node.replica.stopped is not None:
            yield f"{host.name} takes no part: {node.replica.stopped}"
        leader = node.replica.leader()
        if node.replica.is_named and leader is None:
            yield f"{host.name} knows no leader"
        if leader is not None:
            leaders.add(leader.name)
    if len(leaders) > 1:
        yield f"several are taken for the leader: {', '.join(sorted(leaders))}"


def eventually_the_unfit_are_replaced(evidence: Evidence) -> Iterator[str]:
    """No member has a replica that was damaged or restored: it has begun anew, and the others know it."""
    for host, node in evidence.cell.nodes():
        if evidence.cell.is_revoked(host) or not node.membership.in_cell:
            continue
        if node.replica.must_be_renewed:
            yield f"{host.name} has a replica that may not vote"
        own, members = node.membership.own, node.membership.roster.members
        may_vote = own.role in VOTING_ROLES and len(members) <= MAX_VOTERS
        if may_vote and node.electorate.votes(own) is Votes.NOT:
            yield f"{host.name} has no place among those who vote and learn"


def anytime_the_unfit_do_not_lead(evidence: Evidence) -> Iterator[str]:
    """A replica that is damaged or restored leads nobody."""
    for host, node in evidence.cell.nodes():
        standing = node.replica.standing
        if standing is not None and standing.unfit is not None and node.replica.is_leader:
            yield f"{host.name} leads, and is unfit: {standing.unfit}"


def finally_what_was_pending_is_found(evidence: Evidence) -> Iterator[str]:
    """Every id that was shown as pending leads to a task with its key, or to why there is none."""
    nodes = {host.name: (host, node) for host, node in evidence.cell.nodes()}
    for asked in evidence.book.asked:
        host, node = nodes.get(asked.host.name, (asked.host, None))
        image = evidence.ledgers.get(host.name)
        if node is None or image is None or host.is_restored:
            continue
        for id in asked.pending_ids:
            record = image.tasks.get(node.outbox.task_of(id))
            if record is None and node.outbox.get(id) is None:
                yield f"{asked.key!r} was pending under {id.hex()}, which nobody knows"
            elif record is not None and record.task.key != asked.key:
                yield f"{asked.key!r} was pending under {id.hex()}, which is {record.task.key!r}"


def eventually_all_tasks_end(evidence: Evidence) -> Iterator[str]:
    """Once all is healed, no task lives on, and nothing waits in an outbox."""
    for host, node in evidence.cell.nodes():
        if evidence.cell.is_revoked(host):
            continue
        if node.replica.is_named and node.ledger.live:
            yield f"{len(node.ledger.live)} tasks live on, as {host.name} has it"
        pending = [waiting for waiting in node.outbox.rows() if waiting.is_pending]
        if pending:
            yield f"{len(pending)} tasks wait in the outbox of {host.name}"


def finally_no_acknowledged_task_is_lost(evidence: Evidence) -> Iterator[str]:
    """Every task that somebody was told of is in every ledger, and has ended as it should."""
    for name, image in evidence.ledgers.items():
        for asked in evidence.book.asked:
            if asked.is_acknowledged and asked.id is not None:
                record = image.tasks.get(asked.id)
                if record is None:
                    yield f"{name} has lost {asked.key!r}, task {asked.id.hex()}"
                elif not record.task.state.final:
                    yield f"{asked.key!r} is still {record.task.state}, as {name} has it"
                elif not _ended_rightly(asked, record.task.state):
                    yield f"{asked.key!r} {record.task.state}: {record.task.code} {record.task.message}"


def finally_effects_are_there_once(evidence: Evidence) -> Iterator[str]:
    """What succeeded has left its one operation; nothing else has left any."""
    for name, image in evidence.ledgers.items():
        left = Counter(operation.task for operation in image.operations)
        for id, record in image.tasks.items():
            is_note = record.task.state is State.SUCCEEDED
            if left[id] != is_note:
                yield f"task {id.hex()}, which {record.task.state}, has {left[id]} operations at {name}"
        texts = {asked.id: asked.text for asked in evidence.book.asked}
        for operation in image.operations:
            said = json.loads(operation.data)
            if operation.task in texts and said["text"] != texts[operation.task]:
                yield f"task {operation.task.hex()} left another's operation at {name}"
        for stream in dict.fromkeys(operation.incarnation for operation in image.operations):
            numbers = [each.number for each in image.operations if each.incarnation == stream]
            if numbers != list(range(1, len(numbers) + 1)):
                yield f"the stream of {name} has gaps"


def finally_ledgers_are_equal(evidence: Evidence) -> Iterator[str]:
    """Every replica has come to the same ledger."""
    images = list(evidence.ledgers.items())
    if not images:
        yield "nobody has a ledger"
    for name, image in images[1:]:
        first, other = images[0]
        if _contents(image) != _contents(other):
            yield f"{first} and {name} have different ledgers"


def finally_histories_are_linearizable(evidence: Evidence) -> Iterator[str]:
    """What clients were told of each task was possible with one copy of it."""
    for asked in evidence.book.asked:
        operations = asked.operations[:MOST_OPERATIONS]
        if not is_linearizable(operations, None, step):
            told = [(o.action, o.called_at, o.returned_at) for o in operations]
            yield f"{asked.key!r}: no order explains {told}"


def finally_durable_tasks_were_done(evidence: Evidence) -> Iterator[str]:
    """A run in which nothing succeeded has shown nothing."""
    image = next(iter(evidence.ledgers.values()), None)
    if image is None or not any(r.task.state is State.SUCCEEDED for r in image.tasks.values()):
        yield "no durable task succeeded"


def _ended_rightly(asked: Asked, state: State) -> bool:
    """Tell whether a task may have ended so: faults delay it, they never make it fail."""
    match state:
        case State.SUCCEEDED:
            return not asked.is_failing
        case State.FAILED:
            return asked.is_failing
        case State.CANCELLED:
            return asked.is_cancelled
        case _:
            return state is State.EXPIRED


def _contents(image: LedgerImage) -> object:
    tasks = {id: (record.task, record.result) for id, record in image.tasks.items()}
    return tasks, image.operations


DURABLE_INVARIANTS = (
    anytime_replicas_agree,
    anytime_no_stale_fence_is_accepted,
    anytime_a_key_is_one_task,
    anytime_the_unfit_do_not_lead,
    eventually_one_leads,
    eventually_the_unfit_are_replaced,
    eventually_all_tasks_end,
    finally_no_acknowledged_task_is_lost,
    finally_what_was_pending_is_found,
    finally_effects_are_there_once,
    finally_ledgers_are_equal,
    finally_histories_are_linearizable,
    finally_durable_tasks_were_done,
)
