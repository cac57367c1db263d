"""A fault of the ledger's own rules: one command ends as INTERNAL, everywhere alike; the ledger goes on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import apsw
import pytest
from ledger_commands import BEN, FIRST, PATH, Cell, InPlace, cell, id_of, new_task

from knode.consensus.messages import Entry, Kind
from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.simulation.disk import SimulatedDisk
from knode.tasks import ledger
from knode.tasks.commands import Command
from knode.tasks.lifecycle import State
from knode.tasks.records import Outcome
from knode.tasks.store import LedgerStore
from knode.world import World
from knode.world.real import real_world

DUMP = Path("/state/dump")
POISON = b"poison"


class Said:
    """A log that remembers its errors."""

    def __init__(self) -> None:
        self.errors: list[dict[str, Any]] = []

    def error(self, event: str, **fields: Any) -> None:
        self.errors.append({"event": event, **fields})

    def debug(self, event: str, **fields: Any) -> None:
        """Forget it."""

    info = warning = debug


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Exception]], None]:
    """Make a submit of POISON, and any cancel, raise after all that it does was done."""
    rules = {name: getattr(ledger, name) for name in ("_submit", "_cancel")}

    def install(error: Callable[[], Exception]) -> None:
        def submit(tables: Any, command: Any) -> Outcome:
            outcome: Outcome = rules["_submit"](tables, command)
            if command.task.input == POISON:
                raise error()
            return outcome

        def cancel(tables: Any, command: Any) -> Outcome:
            rules["_cancel"](tables, command)
            raise error()

        monkeypatch.setattr(ledger, "_submit", submit)
        monkeypatch.setattr(ledger, "_cancel", cancel)

    return install


def history(c: Cell) -> list[Command]:
    """Commands with faults at the beginning, in the middle and at the end, and two of one kind."""
    commands: list[Command] = [
        c.submit(0, new_task(POISON)),
        c.begin(0, FIRST),
        c.submit(1, to=BEN),
        c.submit(2, new_task(POISON), to=BEN),
        c.submit(3),
        c.cancel(1),
        c.complete(1, operations=(b"a",), incarnation=FIRST),
    ]
    c.now += 1000
    return [*commands, c.cancel(3), c.submit(2, new_task(b"good")), c.cancel(2)]


SOUND = (1, 2, 4, 6, 8)
"""Places of those without a fault."""


async def tell(store: LedgerStore, commands: list[Command], *, most: int) -> list[Outcome | None]:
    outcomes: list[Outcome | None] = []
    for start in range(0, len(commands), most):
        entries = [
            Entry(1, store.applied + 1 + place, Kind.COMMAND, encode(command))
            for place, command in enumerate(commands[start : start + most])
        ]
        outcomes += await store.apply(entries)
    return outcomes


async def test_a_fault_is_an_outcome_and_keeps_nothing(
    poison: Callable[[Callable[[], Exception]], None],
) -> None:
    """Whatever the batches are, and whatever the exception says, all replicas hold the same."""
    told = iter(range(1000))
    poison(lambda: ZeroDivisionError(f"at {next(told)}"))
    found = list[tuple[bytes, list[Outcome | None], dict[bytes, Any], Any]]()
    for most in (1, 2, 3, 10):
        async with cell() as c:
            commands = history(c)
            outcomes = await tell(c.store, commands, most=most)
            await c.store.dump(DUMP)
            assert c.store.applied == len(commands)
            assert c.store.faults == len(commands) - len(SOUND)
            held = c.store._held
            found.append(
                (c.world.disk.read(DUMP, limit_bytes=2**24), outcomes, dict(held.live), dict(held.usage))
            )
    assert all(one == other for one, other in pairwise(found))
    outcomes = found[0][1]
    faults = {outcome for place, outcome in enumerate(outcomes) if place not in SOUND}
    assert len(faults) == 1
    fault = faults.pop()
    assert fault is not None
    assert fault.code is Code.INTERNAL
    assert fault.task == b""
    assert fault.state is None
    # As if the faulty ones had never been said.
    async with cell() as c:
        commands = history(c)
        sound = await tell(c.store, [commands[place] for place in SOUND], most=1)
        assert sound == [outcomes[place] for place in SOUND]
        assert dict(c.store.live) == found[0][2]
        assert dict(c.store._held.usage) == found[0][3]


async def test_who_listens_hears_of_what_was_kept_alone(
    poison: Callable[[Callable[[], Exception]], None],
) -> None:
    poison(lambda: KeyError("b"))
    async with cell() as c:
        changes = list[tuple[bytes, State | None]]()
        c.store.on_change.append(
            lambda all: changes.extend((one.id, one.after.state if one.after else None) for one in all)
        )
        await tell(c.store, history(c), most=10)
    assert changes == [
        (id_of(1), State.ASSIGNED),
        (id_of(3), State.QUEUED),
        (id_of(1), State.SUCCEEDED),
        (id_of(2), State.QUEUED),
    ]


async def test_it_is_the_same_after_a_restart(
    tmp_path: Path, poison: Callable[[Callable[[], Exception]], None]
) -> None:
    poison(lambda: AssertionError("never"))
    world = real_world()
    store = await LedgerStore.open(world, tmp_path / "ledger.db")
    await tell(store, history(Cell(store, world)), most=4)
    held = store._held
    await store.aclose()
    again = await LedgerStore.open(world, tmp_path / "ledger.db")
    assert (again._held.totals, again._held.live) == (held.totals, held.live)
    await again.aclose()


async def test_the_first_of_each_kind_of_command_is_logged_with_its_cause(
    poison: Callable[[Callable[[], Exception]], None],
) -> None:
    cause = ZeroDivisionError("a secret of this machine")
    poison(lambda: cause)
    said = Said()
    disk = SimulatedDisk()
    disk.make_folder(PATH.parent)
    real = real_world()
    world = World(real.clock, real.randomness, disk, InPlace())
    store = await LedgerStore.open(world, PATH, log=said)
    await tell(store, history(Cell(store, world)), most=3)
    assert [(one["command"], one["index"], one["exc_info"]) for one in said.errors] == [
        ("Submit", 1, cause),
        ("Cancel", 6, cause),
    ]
    assert store.faults == 5
    await store.aclose()
    disk.close()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RecursionError(),
        OSError(5, "the disk"),
        RuntimeError("who knows"),
        apsw.IOError("the disk"),
        apsw.SQLError("no such table"),
        KnodeError(Code.HOME_TOO_NEW, "a newer one"),
        KnodeError(Code.DISK_FULL, "full"),
    ],
)
async def test_what_may_differ_between_replicas_is_no_outcome(
    error: Exception, poison: Callable[[Callable[[], Exception]], None]
) -> None:
    async with cell() as c:
        await c.one(c.submit(1))
        poison(lambda: error)
        with pytest.raises((type(error), KnodeError)):
            await c.do(c.submit(2), c.cancel(1))
        assert c.store.applied == 1
        assert c.store.faults == 0
        assert await c.store.task(id_of(2)) is None


async def test_a_full_disk_stops_a_batch_with_a_fault_whole(
    poison: Callable[[Callable[[], Exception]], None],
) -> None:
    poison(lambda: TypeError("a"))
    disk = SimulatedDisk()
    async with cell(disk) as c:
        await c.one(c.begin(0, FIRST))
        disk.fill()
        with pytest.raises(KnodeError) as caught:
            await c.do(c.submit(1), c.submit(2, new_task(POISON)))
        assert caught.value.code is Code.DISK_FULL
        assert (c.store.applied, c.store.faults, dict(c.store.live)) == (1, 0, {})
        disk.free()
        outcomes = await c.do(c.submit(1), c.submit(2, new_task(POISON)))
        assert [outcome.code for outcome in outcomes] == [None, Code.INTERNAL]
        assert (c.store.applied, c.store.faults, list(c.store.live)) == (3, 1, [id_of(1)])
    disk.close()


async def test_what_a_table_refuses_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """As once: a follow-up whose key was taken."""
    monkeypatch.setattr(ledger, "_is_taken", lambda *_: False)
    async with cell() as c:
        await c.do(c.begin(0, FIRST), c.submit(1, to=BEN))
        child = ledger.follow_up_id(id_of(1), 0)
        await c.one(c.submit(2, key=child.hex()))
        outcome = await c.one(c.complete(1, follow_ups=(new_task(),)))
        assert outcome.code is Code.INTERNAL
        assert c.store.live[id_of(1)].state is State.ASSIGNED
        assert (await c.one(c.complete(1))).code is None


async def test_a_fault_that_damage_may_have_caused_stops_the_replica(
    tmp_path: Path, poison: Callable[[Callable[[], Exception]], None]
) -> None:
    world = real_world()
    path = tmp_path / "ledger.db"
    store = await LedgerStore.open(world, path)
    c = Cell(store, world)
    await c.do(c.begin(0, FIRST), c.submit(1), c.submit(2))
    await store.aclose()
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("DELETE FROM sqlite_schema WHERE name = 'task_by_not_after'")
    connection.close()
    store = await LedgerStore.open(world, path)
    c = Cell(store, world)
    applied = store.applied
    poison(lambda: TypeError("a"))
    with pytest.raises(KnodeError) as caught:
        await c.one(c.submit(3, new_task(POISON)))
    assert caught.value.code is Code.HOME_DAMAGED
    assert (store.applied, store.faults) == (applied, 0)
    await store.aclose()


async def test_a_row_that_makes_no_sense_is_damage(tmp_path: Path) -> None:
    world = real_world()
    path = tmp_path / "ledger.db"
    store = await LedgerStore.open(world, path)
    c = Cell(store, world)
    await c.do(c.begin(0, FIRST), c.submit(1, to=BEN), c.complete(1, incarnation=FIRST))
    await store.aclose()
    connection = apsw.Connection(str(path))
    connection.execute("UPDATE task SET state = 'sucCeeded'")
    connection.close()
    store = await LedgerStore.open(world, path)
    with pytest.raises(KnodeError) as caught:
        await Cell(store, world).one(c.submit(1))
    assert caught.value.code is Code.HOME_DAMAGED
    await store.aclose()
