"""What a replica must remember beside its log: its starts, its fitness, and what others have shown."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from memory_cell import Inline, Seeded

from knode.consensus.standing import LATER_MIGRATIONS, MAX_REPLICAS_OF_A_MEMBER, MIGRATIONS, Standing
from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.mesh.incarnations import Incarnation
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedClock
from knode.storage import Database
from knode.world import World

PATH = Path("/state/node.db")
OWN, OTHER = bytes(31) + b"a", bytes(31) + b"b" + bytes(8)
FIRST = Incarnation(0, bytes(32))
KEY = KeyPair(bytes(32))
PROOF = bytes(64)
MARK = Path("/state/fit")


class Machine:
    """A disk, and the process that has the standing open."""

    def __init__(self, disk: SimulatedDisk | None = None) -> None:
        self.disk = disk or SimulatedDisk()
        self.disk.make_folder(PATH.parent)
        self.opened = 0

    async def open(self, *, founds: bool = False) -> Standing:
        self.opened += 1
        world = World(SimulatedClock(), Seeded(f"start {self.opened}"), self.disk, Inline())
        self.database = await Database.open(world, PATH, (*MIGRATIONS, *LATER_MIGRATIONS))
        self.boot = world.randomness.token(16)
        return await Standing.open(
            world,
            self.database,
            member=OWN,
            key=KEY,
            boot=self.boot,
            incarnation=FIRST,
            founds=founds,
            mark=MARK,
        )

    async def reopen(self) -> Standing:
        await self.database.aclose()
        return await self.open()

    async def cut_power(self) -> Standing:
        """Lose what was not synced, and start again."""
        await self.database.aclose()
        self.disk = self.disk.crash(random.Random(7))
        return await self.open()


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    made = Machine()
    yield made
    # Left to the garbage collector, the file might be closed only after the disk under it is gone.
    await made.database.aclose()


async def test_each_start_is_counted_and_the_replica_stays_who_it_is(machine: Machine) -> None:
    standing = await machine.open(founds=True)
    assert (standing.start, standing.replica_id[:32], len(standing.replica_id)) == (1, OWN, 40)
    again = await machine.cut_power()
    assert (again.start, again.replica_id, again.founds) == (2, standing.replica_id, True)


async def test_a_start_that_cannot_be_counted_is_none(machine: Machine) -> None:
    await machine.open()
    await machine.database.aclose()
    machine.disk.read_only = True
    with pytest.raises(KnodeError) as caught:
        await machine.open()
    assert caught.value.code is Code.DISK_READ_ONLY


async def test_what_another_shows_counts_only_once_it_is_durable(machine: Machine) -> None:
    standing = await machine.open()
    assert standing.admits(OTHER, 5, b"boot") is None
    assert await standing.note(OTHER, 5, b"boot", PROOF)
    assert standing.admits(OTHER, 5, b"boot") is True
    again = await machine.cut_power()
    assert again.admits(OTHER, 5, b"boot") is True


async def test_an_older_start_and_the_same_with_another_boot_are_refused(machine: Machine) -> None:
    standing = await machine.open()
    await standing.note(OTHER, 5, b"boot", PROOF)
    assert standing.admits(OTHER, 4, b"older") is False
    assert standing.admits(OTHER, 5, b"other") is False
    assert not await standing.note(OTHER, 5, b"other", PROOF)
    assert await standing.note(OTHER, 6, b"next", PROOF)
    assert standing.admits(OTHER, 5, b"boot") is False
    assert standing.shown(OTHER) == (6, b"next", PROOF)


async def test_what_the_disk_does_not_take_does_not_count(machine: Machine) -> None:
    standing = await machine.open()
    machine.disk.read_only = True
    with pytest.raises(KnodeError):
        await standing.note(OTHER, 5, b"boot", PROOF)
    assert standing.admits(OTHER, 5, b"boot") is None
    machine.disk.read_only = False
    assert await standing.note(OTHER, 5, b"boot", PROOF)


async def test_of_one_member_the_latest_replicas_are_remembered(machine: Machine) -> None:
    standing = await machine.open()
    replicas = [OTHER[:32] + bytes([n]) * 8 for n in range(MAX_REPLICAS_OF_A_MEMBER + 3)]
    for replica in replicas:
        assert await standing.note(replica, 1, b"boot", PROOF)
    again = await machine.reopen()
    assert [r for r in replicas if again.shown(r) is not None] == replicas[-MAX_REPLICAS_OF_A_MEMBER:]
    assert all(again.shown(r) == standing.shown(r) for r in replicas)


async def test_a_restored_home_learns_that_it_is_an_old_copy(machine: Machine) -> None:
    await machine.open()
    await machine.database.aclose()
    copy = machine.disk.snapshot()
    for _ in range(3):
        newest = await machine.open()
        await machine.database.aclose()
    shown = (newest.start, newest.boot)

    restored = Machine(SimulatedDisk.restored(copy))
    standing = await restored.open()
    assert standing.replica_id == newest.replica_id
    assert await standing.told(*shown)
    assert standing.unfit is not None
    assert "restored from an old copy" in standing.unfit
    assert (await restored.cut_power()).unfit == standing.unfit
    await restored.database.aclose()


async def test_the_same_start_with_another_boot_is_an_old_copy_too(machine: Machine) -> None:
    await machine.open()
    await machine.database.aclose()
    copy = machine.disk.snapshot()
    newest = await machine.open()
    restored = Machine(SimulatedDisk.restored(copy))
    restored.opened = 5  # another machine draws other random bytes
    standing = await restored.open()
    assert standing.start == newest.start
    assert await standing.told(newest.start, newest.boot)
    await restored.database.aclose()


async def test_a_refusal_of_an_earlier_start_means_nothing(machine: Machine) -> None:
    earlier = await machine.open()
    standing = await machine.reopen()
    assert not await standing.told(earlier.start, earlier.boot)
    assert not await standing.told(standing.start, standing.boot)
    assert standing.unfit is None


async def test_unfit_holds_at_once_and_for_ever_even_when_the_disk_takes_nothing(machine: Machine) -> None:
    standing = await machine.open()
    machine.disk.read_only = True
    with pytest.raises(KnodeError):
        await standing.mark_unfit("a sync failed")
    assert standing.unfit == "a sync failed"
    machine.disk.read_only = False
    await standing.mark_unfit("something else")
    assert (await machine.cut_power()).unfit == "something else"


async def test_unfit_is_remembered_though_the_disk_is_full(machine: Machine) -> None:
    standing = await machine.open()
    await standing.begin()
    old = standing.replica_id
    machine.disk.fill()
    await standing.mark_unfit("a sync failed")
    assert standing.unfit == "a sync failed"
    machine.disk.free()
    again = await machine.cut_power()
    assert again.unfit is not None
    assert "full disk" in again.unfit
    last = await machine.cut_power()
    assert last.unfit == again.unfit
    await last.replace(FIRST)
    await last.begin()
    fresh = await machine.cut_power()
    assert (fresh.unfit, fresh.begun, fresh.replica_id != old) == (None, True, True)


async def cut_power_while_replaced(at: int) -> tuple[Standing, Standing] | None:
    """The unfit standing, and what a power cut leaves of it at the disk's event number `at`, if it comes."""
    machine = Machine()
    standing = await machine.open()
    await standing.begin()
    machine.disk.fill()
    await standing.mark_unfit("a sync failed")
    machine.disk.free()
    old, images, seen = standing.replica_id, list[SimulatedDisk](), itertools.count()

    def before(_: object) -> None:
        if next(seen) == at:
            images.append(machine.disk.crash(random.Random(at)))

    machine.disk.watch(before)
    await standing.replace(FIRST)
    await standing.begin()
    await machine.database.aclose()
    if not images:
        return None
    machine.disk.close()
    machine.disk = images[0]
    found = await machine.open()
    await machine.database.aclose()
    machine.disk.close()
    assert found.replica_id != old or found.unfit is not None, at
    return standing, found


async def test_a_power_cut_while_a_replica_is_replaced_makes_no_unfit_one_fit() -> None:
    found = [pair for at in range(50) if (pair := await cut_power_while_replaced(at)) is not None]
    assert 5 < len(found) < 50
    assert {after.unfit is None for _, after in found} == {True, False}


async def test_a_disk_that_removes_no_file_is_asked_again(machine: Machine) -> None:
    standing = await machine.open()
    await standing.begin()
    machine.disk.read_only = True
    for _ in range(2):
        with pytest.raises(KnodeError) as caught:
            await standing.mark_unfit("a sync failed")
        assert caught.value.code is Code.DISK_READ_ONLY
    machine.disk.read_only = False
    machine.disk.fill()
    await standing.mark_unfit("a sync failed")
    machine.disk.free()
    assert (await machine.cut_power()).unfit is not None


async def test_a_home_of_before_the_mark_is_fit_and_gets_one(machine: Machine) -> None:
    standing = await machine.open()
    await standing.begin()
    await machine.database.write(lambda c: c.execute("UPDATE standing SET marked = 0").fetchall())
    machine.disk.remove(MARK)
    again = await machine.cut_power()
    assert again.unfit is None
    await again.begin()
    assert machine.disk.exists(MARK)
    machine.disk.remove(MARK)
    machine.disk.sync_folder(MARK.parent)
    assert (await machine.cut_power()).unfit is not None


async def test_a_replaced_replica_has_another_id_and_nothing_of_the_old(machine: Machine) -> None:
    standing = await machine.open(founds=True)
    await standing.begin()
    await standing.mark_unfit("damage")
    old, start = standing.replica_id, standing.start
    later = Incarnation(1, b"x" * 32)
    await standing.replace(later)
    for found in (standing, await machine.cut_power()):
        assert found.replica_id != old
        assert found.replica_id[:32] == OWN
        assert (found.unfit, found.begun, found.founds, found.incarnation) == (None, False, False, later)
    assert standing.start == start


async def test_that_a_log_was_begun_is_remembered(machine: Machine) -> None:
    standing = await machine.open()
    assert not standing.begun
    await standing.begin()
    assert (await machine.cut_power()).begun


async def test_a_survivor_is_the_same_replica_in_another_incarnation(machine: Machine) -> None:
    standing = await machine.open()
    await standing.begin()
    later = Incarnation(1, b"x" * 32)
    await standing.survive(later)
    again = await machine.cut_power()
    assert (again.replica_id, again.incarnation, again.begun) == (standing.replica_id, later, True)
