"""The simulated disk against SQLite and against its own promises: power cuts, a full disk, old copies."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import apsw
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from knode.errors import Code, KnodeError
from knode.simulation.disk import SimulatedDisk
from knode.storage import Database
from knode.storage import database as database_module
from knode.storage.database import Synchronous
from knode.world import World
from knode.world.real import RealClock, RealRandomness

T = TypeVar("T")
FOLDER = Path("/home/state")
PATH = FOLDER / "node.db"
SCHEMA = ["CREATE TABLE entry (step INTEGER, part INTEGER, text TEXT) STRICT;"]
PARTS = 3


class Inline:
    async def run(self, work: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint()
        return work()


class Seeded:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def token(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


def world_on(disk: SimulatedDisk) -> World:
    return World(clock=RealClock(), randomness=RealRandomness(), disk=disk, blocking=Inline())


def new_disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_folder(FOLDER)
    return disk


def add_step(step: int) -> Callable[[apsw.Connection], None]:
    def work(connection: apsw.Connection) -> None:
        for part in range(PARTS):
            connection.execute("INSERT INTO entry VALUES (?, ?, ?)", (step, part, f"{step}" * 700))

    return work


def steps_of(connection: apsw.Connection) -> list[int]:
    """Return the steps that are there, having checked that each is whole."""
    rows = connection.execute("SELECT step, part, text FROM entry ORDER BY rowid").fetchall()
    assert connection.pragma("integrity_check") == "ok"
    steps = [step for step, part, _ in rows if part == 0]
    assert rows == [(step, part, f"{step}" * 700) for step in steps for part in range(PARTS)]
    return steps


async def steps_after(disk: SimulatedDisk) -> list[int]:
    database = await Database.open(world_on(disk), PATH, SCHEMA)
    try:
        return await database.read(steps_of)
    finally:
        await database.aclose()
        disk.close()


@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
async def test_a_power_cut_at_any_point_keeps_whole_transactions_and_all_acknowledged_ones(
    synchronous: Synchronous, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small, so that checkpoints come among the transactions.
    monkeypatch.setattr(database_module, "CHECKPOINT_PAGES", 8)
    disk = new_disk()
    acknowledged = 0
    cuts: list[tuple[int, SimulatedDisk]] = []

    def cut_here(event: str) -> None:
        cuts.extend((acknowledged, disk.crash(Seeded(len(cuts) + seed))) for seed in range(2))

    disk.watch(cut_here)
    database = await Database.open(world_on(disk), PATH, SCHEMA, synchronous=synchronous)
    for step in range(25):
        await database.write(add_step(step))
        acknowledged += 1
    await database.aclose()
    disk.close()
    assert len(cuts) > 300
    lost = 0
    for known, found in cuts:
        steps = await steps_after(found)
        assert steps == list(range(len(steps)))
        assert len(steps) <= known + 1
        lost += len(steps) < known
    assert lost == 0 if synchronous == "FULL" else lost > 0


async def test_what_was_synced_survives_every_power_cut_from_then_on() -> None:
    disk = new_disk()
    synced = 0
    cuts: list[tuple[int, SimulatedDisk]] = []
    disk.watch(lambda event: cuts.append((synced, disk.crash(Seeded(len(cuts))))))
    database = await Database.open(world_on(disk), PATH, SCHEMA, synchronous="NORMAL")
    for step in range(20):
        await database.write(add_step(step))
        if step % 5 == 4:
            await database.sync()
            synced = step + 1
    await database.sync()
    synced = 20
    cuts.append((synced, disk.crash(Seeded(len(cuts)))))
    await database.aclose()
    disk.close()
    for known, found in cuts:
        steps = await steps_after(found)
        assert steps == list(range(len(steps)))
        assert len(steps) >= known


async def test_a_database_that_lost_power_goes_on_and_loses_it_again() -> None:
    disk = new_disk()
    expected: list[int] = []
    for boot in range(20):
        database = await Database.open(world_on(disk), PATH, SCHEMA)
        assert await database.read(steps_of) == expected
        for step in range(boot * 10, boot * 10 + 3):
            await database.write(add_step(step))
            expected.append(step)
        following = disk.crash(Seeded(boot))
        # What the dying process still does reaches nothing.
        await database.write(add_step(99999))
        await database.aclose()
        disk.close()
        disk = following
    assert await steps_after(disk) == expected


def test_the_same_seed_finds_the_same_disk() -> None:
    disk = new_disk()
    with disk.create(FOLDER / "file") as file:
        for number in range(50):
            file.write(bytes([number]) * 10)
    found = [disk.crash(Seeded(seed)).snapshot() for seed in (1, 1, 2, 3)]
    assert found[0] == found[1]
    assert len({str(snapshot.files) for snapshot in found}) > 1


def test_a_file_keeps_what_was_synced_and_may_lose_or_tear_the_rest() -> None:
    disk = new_disk()
    path = FOLDER / "file"
    with disk.create(path) as file:
        file.write(b"synced ")
        file.sync()
        file.write(b"unsynced")
        outcomes = {disk.crash(Seeded(seed)).read(path, limit_bytes=100) for seed in range(200)}
    assert {b"synced ", b"synced unsynced"} < outcomes
    assert all(outcome.startswith(b"synced ") for outcome in outcomes)
    assert any(
        b"synced unsynced".startswith(outcome) for outcome in outcomes - {b"synced ", b"synced unsynced"}
    )


def test_a_new_file_without_a_sync_may_be_missing() -> None:
    disk = new_disk()
    disk.create(FOLDER / "file").close()
    assert {disk.crash(Seeded(seed)).exists(FOLDER / "file") for seed in range(20)} == {True, False}


def test_a_removed_file_may_be_back_until_its_folder_is_synced() -> None:
    disk = new_disk()
    disk.write(FOLDER / "file", b"")
    disk.remove(FOLDER / "file")
    assert {disk.crash(Seeded(seed)).exists(FOLDER / "file") for seed in range(20)} == {True, False}
    disk.sync_folder(FOLDER)
    assert {disk.crash(Seeded(seed)).exists(FOLDER / "file") for seed in range(20)} == {False}


def test_a_replaced_file_is_the_old_or_the_new_one() -> None:
    disk = new_disk()
    found: list[bytes] = []
    disk.write(FOLDER / "file", b"old")
    disk.watch(lambda event: found.append(disk.crash(Seeded(1)).read(FOLDER / "file", limit_bytes=10)))
    disk.write(FOLDER / "file", b"new")
    assert found == [b"old", b"new"]
    assert disk.crash(Seeded(1)).read(FOLDER / "file", limit_bytes=10) == b"new"


async def test_a_full_disk_refuses_by_name_and_loses_nothing() -> None:
    disk = new_disk()
    database = await Database.open(world_on(disk), PATH, SCHEMA)
    await database.write(add_step(0))
    disk.write(FOLDER / "small", b"old")
    disk.fill()
    with pytest.raises(KnodeError) as error:
        await database.write(add_step(1))
    assert error.value.code is Code.DISK_FULL
    with pytest.raises(KnodeError) as error:
        disk.write(FOLDER / "small", b"new")
    assert error.value.code is Code.DISK_FULL
    with pytest.raises(KnodeError) as error, disk.create(FOLDER / "large") as file:
        file.write(b"x")
    assert error.value.code is Code.DISK_FULL
    assert disk.read(FOLDER / "small", limit_bytes=10) == b"old"
    assert await database.read(steps_of) == [0]
    disk.free()
    await database.write(add_step(2))
    await database.aclose()
    assert await steps_after(disk) == [0, 2]


async def test_a_disk_that_fills_at_any_byte_never_breaks_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "CHECKPOINT_PAGES", 4)
    base = new_disk()
    database = await Database.open(world_on(base), PATH, SCHEMA)
    await database.write(add_step(0))
    await database.aclose()
    used = sum(len(data) for data in base.snapshot().files.values())
    base.close()
    refusals: list[Code] = []
    for extra in range(0, 60_000, 1500):
        disk = SimulatedDisk.restored(base.snapshot())
        disk.free(used + extra)
        acknowledged = [0]
        try:
            database = await Database.open(world_on(disk), PATH, SCHEMA)
        except KnodeError as error:
            refusals.append(error.code)
        else:
            try:
                for step in range(1, 6):
                    await database.write(add_step(step))
                    acknowledged.append(step)
            except KnodeError as error:
                refusals.append(error.code)
            await database.aclose()
        found = disk.crash(Seeded(extra))
        found.free()
        disk.close()
        assert await steps_after(found) == acknowledged
    assert set(refusals) == {Code.DISK_FULL}
    assert len(refusals) < 40


async def test_a_read_only_disk_refuses_by_name() -> None:
    disk = new_disk()
    database = await Database.open(world_on(disk), PATH, SCHEMA)
    await database.write(add_step(0))
    disk.read_only = True
    refusals: list[Callable[[], object]] = [
        lambda: disk.write(FOLDER / "file", b""),
        lambda: disk.create(FOLDER / "file"),
        lambda: disk.make_folder(FOLDER / "folder"),
        lambda: disk.remove(PATH),
    ]
    for refuse in refusals:
        with pytest.raises(KnodeError) as error:
            refuse()
        assert error.value.code is Code.DISK_READ_ONLY
    with pytest.raises(KnodeError) as error:
        await database.write(add_step(1))
    assert error.value.code is Code.DISK_READ_ONLY
    assert await database.read(steps_of) == [0]
    disk.read_only = False
    await database.aclose()
    disk.read_only = True
    with pytest.raises(KnodeError) as error:
        await Database.open(world_on(disk), PATH, SCHEMA)
    assert error.value.code is Code.DISK_READ_ONLY
    disk.read_only = False
    assert await steps_after(disk) == [0]


async def test_an_old_copy_is_restored_as_it_was() -> None:
    disk = new_disk()
    database = await Database.open(world_on(disk), PATH, SCHEMA)
    await database.write(add_step(0))
    copy = disk.snapshot()
    await database.write(add_step(1))
    await database.aclose()
    assert await steps_after(SimulatedDisk.restored(copy)) == [0]
    assert await steps_after(disk) == [0, 1]


async def test_a_second_connection_is_refused() -> None:
    disk = new_disk()
    database = await Database.open(world_on(disk), PATH, SCHEMA)
    with pytest.raises(KnodeError) as error:
        await Database.open(world_on(disk), PATH, SCHEMA)
    assert error.value.code is Code.LOCKED
    await database.aclose()


async def test_sql_cannot_ask_for_the_time() -> None:
    disk = new_disk()
    database = await Database.open(world_on(disk), PATH, SCHEMA)
    with pytest.raises(apsw.MisuseError, match="time of day"):
        await database.read(lambda connection: connection.execute("SELECT datetime('now')").fetchall())
    await database.aclose()


def test_a_closed_disk_leaves_no_vfs_behind() -> None:
    disk = new_disk()
    assert disk.sqlite_vfs in apsw.vfs_names()
    disk.close()
    assert disk.sqlite_vfs not in apsw.vfs_names()


KEYS = st.integers(0, 5)
STEPS = st.one_of(
    st.tuples(st.just("put"), KEYS, st.integers(0, 9)),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("clear")),
    st.tuples(st.just("fail"), KEYS),
    st.tuples(st.just("reopen")),
    st.tuples(st.just("crash"), st.integers(0, 1000)),
)
TABLE = ["CREATE TABLE pair (key INTEGER PRIMARY KEY, value BLOB) STRICT;"]


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=30))
async def test_a_database_that_is_killed_and_reopened_equals_a_dictionary(
    steps: list[tuple[object, ...]],
) -> None:
    disk = new_disk()
    model: dict[int, bytes] = {}
    database = await Database.open(world_on(disk), PATH, TABLE)

    def put_and_fail(connection: apsw.Connection, key: object) -> None:
        connection.execute("INSERT OR REPLACE INTO pair VALUES (?, x'00')", (key,))
        raise ZeroDivisionError

    for step in steps:
        match step:
            case ("put", int(key), int(size)):
                value = bytes([size]) * size * 1000
                await database.write(
                    lambda c, row=(key, value): c.execute("INSERT OR REPLACE INTO pair VALUES (?, ?)", row)
                )
                model[key] = value
            case ("delete", int(key)):
                await database.write(lambda c, key=key: c.execute("DELETE FROM pair WHERE key = ?", (key,)))
                model.pop(key, None)
            case ("clear",):
                await database.write(lambda c: c.execute("DELETE FROM pair"))
                model.clear()
            case ("fail", key):
                with pytest.raises(ZeroDivisionError):
                    await database.write(lambda c, key=key: put_and_fail(c, key))
            case ("reopen",):
                await database.aclose()
                database = await Database.open(world_on(disk), PATH, TABLE)
            case ("crash", int(seed)):
                following = disk.crash(Seeded(seed))
                await database.aclose()
                disk.close()
                disk = following
                database = await Database.open(world_on(disk), PATH, TABLE)
        assert dict(await database.read(lambda c: c.execute("SELECT * FROM pair").fetchall())) == model
    await database.aclose()
    disk.close()
