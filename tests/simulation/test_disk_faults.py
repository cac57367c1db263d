"""What disks do to nodes besides losing power: flipped bits, failed syncs, slowness, old copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from knode.errors import Code, KnodeError
from knode.simulation.command import simulate
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedRandomness
from knode.storage import Database
from knode.world import World
from knode.world.real import RealBlocking, RealClock, RealRandomness

FOLDER = Path("/home/state")
PATH = FOLDER / "file"
ANY = "*"


def new_disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_folder(FOLDER)
    return disk


def dice(seed: int) -> SimulatedRandomness:
    return SimulatedRandomness(seed, "dice")


def bits_apart(one: bytes, other: bytes) -> list[int]:
    assert len(one) == len(other)
    return [
        index * 8 + bit
        for index in range(len(one))
        for bit in range(8)
        if (one[index] ^ other[index]) >> bit & 1
    ]


def test_a_flip_turns_one_bit_for_ever_and_spares_what_was_synced_last() -> None:
    hit = set()
    for seed in range(100):
        disk = new_disk()
        with disk.create(PATH) as file:
            file.write(b"old")
            file.sync()
            file.sync()
            assert disk.flip(dice(seed), ANY) is None
            file.write(b"new")
            file.sync()
            file.write(b"unsynced")
        assert disk.flip(dice(seed), "*/raft/*") is None
        assert disk.flip(dice(seed), "*/fil?") == str(PATH)
        (bit,) = bits_apart(disk.read(PATH, limit_bytes=100), b"oldnewunsynced")
        hit.add(bit)
        after = disk.after_kill().crash(dice(seed)).read(PATH, limit_bytes=100)
        assert bits_apart(after[:6], b"oldnew") == [bit]
    assert hit <= set(range(24))
    assert len(hit) > 15


def test_a_failed_sync_loses_what_was_unsynced_though_it_can_be_read_and_later_syncs_succeed() -> None:
    disk = new_disk()
    with disk.create(PATH) as file, disk.create(FOLDER / "other") as other:
        file.write(b"first ")
        file.sync()
        disk.fail_sync("*/file")
        other.sync()
        file.write(b"second ")
        with pytest.raises(KnodeError) as error:
            file.sync()
        assert error.value.code is Code.UNAVAILABLE
        file.sync()
        assert disk.read(PATH, limit_bytes=100) == b"first second "
        file.write(b"third")
        file.sync()
        assert disk.after_kill().read(PATH, limit_bytes=100) == b"first second third"
    assert disk.crash(dice(1)).read(PATH, limit_bytes=100) == b"first " + bytes(7) + b"third"


def test_a_file_whose_replacement_cannot_be_synced_stays_as_it_was() -> None:
    disk = new_disk()
    disk.write(PATH, b"old")
    disk.fail_sync(ANY)
    with pytest.raises(KnodeError):
        disk.write(PATH, b"new")
    assert disk.read(PATH, limit_bytes=100) == b"old"
    disk.write(PATH, b"new")
    disk.fail_sync(ANY)
    disk.mend_sync()
    disk.write(PATH, b"newer")


async def test_a_database_whose_sync_fails_says_so_and_keeps_what_it_acknowledged() -> None:
    disk = new_disk()
    world = World(RealClock(), RealRandomness(), disk, RealBlocking())
    database = await Database.open(world, FOLDER / "node.db", ["CREATE TABLE entry (step INTEGER) STRICT;"])
    await database.write(lambda c: c.execute("INSERT INTO entry VALUES (1)"))
    disk.fail_sync("*/node.db-wal")
    with pytest.raises(KnodeError) as error:
        await database.write(lambda c: c.execute("INSERT INTO entry VALUES (2)"))
    assert error.value.code is Code.HOME_DAMAGED
    await database.write(lambda c: c.execute("INSERT INTO entry VALUES (3)"))
    found = disk.crash(dice(1))
    await database.aclose()
    world = World(RealClock(), RealRandomness(), found, RealBlocking())
    database = await Database.open(world, FOLDER / "node.db", ["CREATE TABLE entry (step INTEGER) STRICT;"])
    steps = await database.read(lambda c: [row[0] for row in c.execute("SELECT step FROM entry")])
    assert steps == [1, 3]
    await database.aclose()


def test_what_a_killed_process_had_not_synced_is_still_lost_when_the_power_goes() -> None:
    disk = new_disk()
    disk.write(PATH, b"")
    with disk.append(PATH, 0) as file:
        file.write(b"x" * 100)
    left = disk.after_kill()
    assert left.read(PATH, limit_bytes=100) == b"x" * 100
    assert len({left.crash(dice(seed)).size(PATH) for seed in range(20)}) > 1
    with left.append(PATH, 100) as file:
        file.sync()
    assert {left.crash(dice(seed)).size(PATH) for seed in range(20)} == {100}
    assert len({disk.crash(dice(seed)).size(PATH) for seed in range(20)}) > 1


SCENARIO = """
what = "Disks are slow, flip bits, fail to sync, and old copies come back."
lasts_s = 40
invariants = ["anytime_no_node_fails", "anytime_direct_task_runs_at_most_once", "eventually_all_see_all"]

[[faults]]
kind = "slow-disk"
every_s = [1, 5]
lasts_s = [1, 5]
work_ms = [100, 500]

[[faults]]
kind = "old-copy"
every_s = [1, 5]
age_s = [0, 5]
lasts_s = [0.1, 2]

[[faults]]
kind = "failed-sync"
every_s = [1, 5]
lasts_s = [1, 5]

[[faults]]
kind = "bit-flip"
every_s = [1, 5]
"""


def test_scenarios_have_these_faults_and_nodes_outlive_them(tmp_path: Path) -> None:
    path = tmp_path / "disks.toml"
    path.write_text(SCENARIO)
    lines: list[dict[str, Any]] = []
    outcome = simulate(seed=1, nodes=3, scenario=str(path), show=lambda line: lines.append(json.loads(line)))
    assert outcome["violations"] == []
    happened = {line["event"] for line in lines}
    assert {
        "has a slow disk",
        "has its usual disk",
        "is restored from an old copy",
        "a bit flips",
    } <= happened
