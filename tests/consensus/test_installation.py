"""A whole state taken over, when power or process end ahead of anything that the disk does."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from mesh_cell import InlineBlocking, MovableClock, SeededRandomness, refused
from replica_cell import ListMachine

from knode.consensus.installation import Installation, Received
from knode.consensus.journal import Journal
from knode.consensus.messages import Configuration, Entry, HardState, InstallSnapshot, Kind, Snapshot
from knode.consensus.ready import Recovered
from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.simulation.disk import SimulatedDisk
from knode.simulation.volume import Event
from knode.simulation.world import SimulatedRandomness
from knode.world import World

LOG, FILES, STATE = Path("/raft/log"), Path("/raft/snapshots"), Path("/list")
CONFIGURATION = Configuration((b"a", b"b"))
ENTRIES = tuple(Entry(1, index, Kind.COMMAND, b"old %d" % index) for index in range(1, 5))
NEW = Snapshot(10, 3, CONFIGURATION)
MESSAGE = InstallSnapshot(4, b"b", b"a", NEW)
HARD_STATE = HardState(4, b"", 10)
OLD_STATE, NEW_STATE = [b"old 1", b"old 2"], [b"new"]
DUMP = encode([10, NEW_STATE])


class Home:
    """What a replica finds on a disk."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self.disk = disk
        self.world = World(MovableClock(), SeededRandomness("home"), disk, InlineBlocking())

    async def open(self) -> Recovered:
        self.journal, recovered = Journal.open(self.disk, LOG)
        self.machine = ListMachine(self.world, STATE)
        self.installation = Installation(self.world, FILES, self.machine, self.journal)
        return await self.installation.settle(recovered)

    async def install(self) -> None:
        await self.installation.install(Received(MESSAGE, FILES / "in-0"), HARD_STATE)

    def receive(self, dump: bytes = DUMP) -> None:
        with self.disk.create(FILES / "in-0") as file:
            file.write(dump)
            file.sync()


async def home_with_an_old_state() -> Home:
    home = Home(SimulatedDisk())
    home.disk.make_folder(FILES)
    home.disk.make_folder(LOG)
    await home.open()
    home.journal.append(HardState(1, b"", 2), ENTRIES, sync=True)
    await home.machine.apply(ENTRIES[:2])
    await home.machine.sync()
    return home


async def left_behind(step: int, *, power_cut: bool) -> SimulatedDisk | None:
    """Return the disk of a node that ends ahead of this step of the installation; None when it has fewer."""
    home = await home_with_an_old_state()
    home.receive()
    left: list[SimulatedDisk] = []
    steps = itertools.count()

    def strike(event: Event) -> None:
        if next(steps) == step:
            fate = SimulatedRandomness(step, "fate")
            left.append(home.disk.crash(fate) if power_cut else home.disk.after_kill())

    home.disk.watch(strike)
    await home.install()
    home.journal.close()
    return left[0] if left else None


@pytest.mark.parametrize("power_cut", [False, True])
async def test_a_crash_at_any_point_leaves_the_old_state_or_the_new_one(power_cut: bool) -> None:
    found = set()
    for step in itertools.count():
        disk = await left_behind(step, power_cut=power_cut)
        if disk is None:
            assert step >= 8
            break
        home = Home(disk)
        recovered = await home.open()
        if recovered.snapshot == NEW:
            assert (home.machine.applied, home.machine.commands) == (10, NEW_STATE)
            assert recovered == Recovered(HARD_STATE, NEW)
        else:
            assert (home.machine.applied, home.machine.commands) == (2, OLD_STATE)
            assert recovered == Recovered(HardState(1, b"", 2), Snapshot(), ENTRIES)
        assert disk.list_folder(FILES) == []
        home.journal.close()
        again = Home(disk)
        assert await again.open() == recovered
        again.journal.close()
        found.add(recovered.snapshot.index)
    assert found == {0, 10}


@pytest.mark.parametrize("room_bytes", range(0, 400, 20))
async def test_on_a_full_disk_it_is_tried_again_until_there_is_room(room_bytes: int) -> None:
    home = await home_with_an_old_state()
    home.receive()
    home.disk.fill()
    used = sum(len(content) for content in home.disk.snapshot().files.values())
    home.disk.free(used + room_bytes)
    while True:
        try:
            await home.install()
            break
        except KnodeError as error:
            if error.code is not Code.DISK_FULL:
                raise
            home.disk.free()
    assert (home.machine.applied, home.machine.commands) == (10, NEW_STATE)
    home.journal.close()
    again = Home(home.disk)
    assert (await again.open()).snapshot == NEW
    again.journal.close()


@pytest.mark.parametrize("name", ["pending", "in-0"])
async def test_what_rots_while_it_is_installed_is_damage_and_not_the_nodes_end(name: str) -> None:
    for step in itertools.count():
        disk = await left_behind(step, power_cut=False)
        if disk is None:
            assert step >= 8
            break
        if name not in disk.list_folder(FILES):
            continue
        disk.write(FILES / name, b"\xc1")
        home = Home(disk)
        try:
            recovered = await home.open()
            # Nothing of it was needed any more, or yet.
            assert recovered.snapshot.index == home.machine.applied or recovered.entries == ENTRIES
        except KnodeError as error:
            if error.code is not Code.HOME_DAMAGED:
                raise
        home.journal.close()


async def test_what_is_no_state_changes_nothing_and_is_not_tried_at_the_next_start() -> None:
    home = await home_with_an_old_state()
    home.receive(b"no state")
    await refused(Code.BAD_FRAME, home.install)
    assert (home.machine.applied, home.machine.commands) == (2, OLD_STATE)
    home.journal.close()
    again = Home(home.disk)
    assert (await again.open()).entries == ENTRIES
    assert again.machine.commands == OLD_STATE
    again.journal.close()
