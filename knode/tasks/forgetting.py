"""What the ledger forgets, and when: tasks that have ended, and the oldest operations. A part of its rules.

That a task takes effect once rests on the ledger's knowing it, as long as its submit may be repeated. A
repeat carries the `not_after` of the first, and is refused once the ledger's time is beyond. So a task whose
key is its own id, which nobody but its own outbox repeats, may be forgotten earlier: then the ledger keeps in
mind the greatest such `not_after` (`Totals.forgotten`), and refuses every unknown one up to it. A key that
was given stands for its task as long as was promised, since who repeats it dates it anew.

Oldest first, and so much at a time that what comes after it waits some tens of milliseconds at most.
"""

from __future__ import annotations

from knode.tasks.lifecycle import State
from knode.tasks.records import KEY_GRACE_MS, LedgerTask, Tables, Totals

KEPT_TASKS = 10_000
"""Tasks that are kept after their end, though their keys have expired."""
CROWDED_TASKS = 500_000
"""More, and tasks without a key of their own are forgotten before their `not_after`."""
REMEMBERED_MS = 15 * 60_000
"""How long even those are kept: from a day before their `not_after` on, when they were submitted."""
KEPT_OPERATION_BYTES = 512 * 1024 * 1024
"""Beyond it the oldest operations are dropped."""
KEPT_OPERATIONS_MS = 30 * 86_400_000
"""How long operations are kept at the most, once their task is forgotten."""
FORGOTTEN_AT_ONCE = 250
TRIMMED_AT_ONCE = 1_000
TRIMMED_BYTES_AT_ONCE = 4 * 1024 * 1024
LEVEL = 2
"""The feature level from which on more is forgotten than tasks whose keys have expired."""
_DAY_MS = 86_400_000


def forget(tables: Tables) -> int:
    """Forget what need not be kept any more; return how many tasks and operations, 0 when that is all."""
    totals = tables.totals
    most = min(FORGOTTEN_AT_ONCE, totals.kept - KEPT_TASKS)
    tasks = list(tables.with_old_keys(totals.now - KEY_GRACE_MS, most)) if most > 0 else []
    for task in tasks:
        drop(tables, task)
    if totals.level < LEVEL:
        return len(tasks)
    count = len(tasks)
    count += _forget_early(tables, FORGOTTEN_AT_ONCE - count)
    return count + _trim(tables, FORGOTTEN_AT_ONCE - count)


def is_crowded(totals: Totals) -> bool:
    """Tell whether forgetting is urgent."""
    return totals.kept > CROWDED_TASKS or totals.operation_bytes > KEPT_OPERATION_BYTES


def drop(tables: Tables, task: LedgerTask) -> None:
    """Drop a task that has ended, and its result."""
    totals = tables.totals
    totals.result_bytes -= tables.drop_result(task.ended)
    count_kept(totals, task.state, -1)
    tables.forget(task)


def count_kept(totals: Totals, state: State, by: int) -> None:
    """Count tasks that are kept after their end, in this state."""
    setattr(totals, state.value, getattr(totals, state.value) + by)


def _forget_early(tables: Tables, most: int) -> int:
    most = min(most, tables.totals.kept - CROWDED_TASKS)
    tasks = list(tables.without_keys(_early(tables.totals), most)) if most > 0 else []
    for task in tasks:
        _drop_early(tables, task)
    return len(tasks)


def _early(totals: Totals) -> int:
    """Return the least `not_after` that is too young to be forgotten early: a new task's is not beyond it."""
    return totals.now + _DAY_MS - REMEMBERED_MS


def _drop_early(tables: Tables, task: LedgerTask) -> None:
    tables.totals.forgotten = max(tables.totals.forgotten, task.not_after)
    drop(tables, task)


def _trim(tables: Tables, most_tasks: int) -> int:
    """Drop the oldest operations: too old, or too many bytes; never one whose task is kept.

    For want of space that task is forgotten first, if it may be.
    """
    totals = tables.totals
    dropped = dropped_bytes = last = 0
    for place, time, id, size in list(tables.oldest_operations(TRIMMED_AT_ONCE)):
        is_over = totals.operation_bytes > KEPT_OPERATION_BYTES
        is_old = time < totals.now - KEPT_OPERATIONS_MS
        if not (is_over or is_old) or dropped_bytes + size > TRIMMED_BYTES_AT_ONCE:
            break
        task = tables.task(id)
        if task is not None:
            most_tasks -= 1
            if not is_over or not task.state.final or most_tasks < 0:
                break
            if not task.holds_key(totals.now):
                drop(tables, task)
            elif task.key == task.id.hex() and task.not_after < _early(totals):
                _drop_early(tables, task)
            else:
                break
        totals.operation_bytes -= size
        dropped_bytes += size
        dropped, last = dropped + 1, place
    if dropped:
        tables.drop_operations(last)
    return dropped
