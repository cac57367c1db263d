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
    after: int | None = 0
    while after is not None:
        read = await node.ledger.operations(after, READ_AT_ONCE)
        operations += read.found
        after = read.next
    return LedgerImage(node.ledger.applied, tasks, tuple(operations))
