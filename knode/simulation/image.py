"""What a node's ledger holds at one moment."""

from __future__ import annotations

from dataclasses import dataclass

from knode.node import Node
from knode.tasks.records import Operation, TaskRecord

READ_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class LedgerImage:
    """A whole ledger at one moment."""

    applied: int
    tasks: dict[bytes, TaskRecord]
    operations: tuple[Operation, ...]


async def image_of(node: Node) -> LedgerImage:
    """Read a node's whole ledger."""
    tasks: dict[bytes, TaskRecord] = {}
    before: int | None = None
    while page := await node.ledger.list(READ_AT_ONCE, before=before):
        tasks |= {record.task.id: record for record in page}
        before = page[-1].task.number
    operations: list[Operation] = []
    begun = sorted(node.membership.roster.incarnations.known.values(), key=lambda each: each.number)
    for stream in dict.fromkeys([*(each.predecessor for each in begun), node.ledger.incarnation]):
        after = 0
        while more := await node.ledger.operations(after, READ_AT_ONCE, incarnation=stream):
            operations += more
            after = more[-1].number
    return LedgerImage(node.ledger.applied, tasks, tuple(operations))
