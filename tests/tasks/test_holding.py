"""The files that a node holds for tasks: whole and right or not at all, whatever comes, whenever it stops."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from memory_cell import Inline, Seeded
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.home.logging import log_to
from knode.mesh import chunks
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedClock
from knode.tasks import holding
from knode.tasks.arriving import OWNER_SHARE, TASKS_WORTH
from knode.tasks.commands import File
from knode.tasks.holding import Holding
from knode.world import World

INPUTS = Path("/state/inputs")
OURS, THEIRS = b"o" * 32, b"t" * 32
TASK = bytes(16)
LIMIT = 10_000


def task(number: int) -> bytes:
    return number.to_bytes(16, "big")


def file_of(content: bytes, name: str = "a") -> File:
    return File(name, len(content), hashlib.sha256(content).digest())


async def chunks_of(content: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for begin in range(0, len(content), size):
        yield content[begin : begin + size]


def new_disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_folder(INPUTS)
    return disk


async def holding_on(disk: SimulatedDisk) -> Holding:
    world = World(SimulatedClock(), Seeded("holding"), disk, Inline())
    made = Holding(world, INPUTS, log_to(world, [].append).logger, task_bytes=LIMIT)
    await made.load()
    return made


async def content_of(held: Holding, of: bytes, file: File) -> bytes:
    return b"".join([chunk async for chunk in held.read(of, file)])


async def refused(code: Code, held: Holding, content: bytes, **rest: object) -> None:
    arguments = {"owner": OURS, "task": TASK, "file": file_of(content), "chunks": chunks_of(content), **rest}
    with pytest.raises(KnodeError) as caught:
        await held.keep(**arguments)  # type: ignore[arg-type]
    assert caught.value.code is code


async def test_a_file_is_held_over_a_restart_until_it_is_dropped() -> None:
    disk, content = new_disk(), b"x" * 3500
    held = await holding_on(disk)
    await held.keep(OURS, TASK, file_of(content), chunks_of(content))
    for _ in range(2):
        assert held.tasks == (TASK,)
        assert held.owner(TASK) == OURS
        assert await content_of(held, TASK, file_of(content)) == content
        held = await holding_on(disk)
    assert await held.drop(TASK)
    assert disk.list_folder(INPUTS) == []
    assert (await holding_on(disk)).tasks == ()


async def test_what_is_held_already_is_not_read_again() -> None:
    held = await holding_on(new_disk())
    await held.keep(OURS, TASK, file_of(b"x"), chunks_of(b"x"))

    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("read again")
        yield b""

    await held.keep(OURS, TASK, file_of(b"x", "another name"), unread())


async def test_an_empty_file_is_a_file() -> None:
    disk = new_disk()
    held = await holding_on(disk)
    await held.keep(OURS, TASK, file_of(b""), chunks_of(b""))
    assert await content_of(await holding_on(disk), TASK, file_of(b"")) == b""


@pytest.mark.parametrize("lie", [b"other", b"longer than it", b"xx", b""])
async def test_content_that_is_not_what_was_announced_leaves_nothing(lie: bytes) -> None:
    disk = new_disk()
    held = await holding_on(disk)
    await refused(Code.INVALID_ARGUMENT, held, b"right", chunks=chunks_of(lie))
    assert held.tasks == ()
    assert disk.list_folder(INPUTS) == []
    await held.keep(OURS, TASK, file_of(b"right"), chunks_of(b"right"))


async def test_a_task_belongs_to_who_named_it_first() -> None:
    held = await holding_on(new_disk())
    await held.keep(OURS, TASK, file_of(b"x"), chunks_of(b"x"))
    await refused(Code.NOT_ALLOWED, held, b"y", owner=THEIRS)
    await refused(Code.NOT_ALLOWED, held, b"x", owner=THEIRS)
    assert await content_of(held, TASK, file_of(b"x")) == b"x"


async def test_a_tasks_bytes_all_tasks_bytes_and_a_members_part_of_them_are_limits() -> None:
    disk = new_disk()
    held = await holding_on(disk)
    whole = bytes(LIMIT)
    await refused(Code.TOO_LARGE, held, bytes(LIMIT + 1))
    for number in range(TASKS_WORTH // OWNER_SHARE):
        await held.keep(OURS, task(number), file_of(whole), chunks_of(whole))
    await refused(Code.TOO_LARGE, held, b"x", task=task(0))
    await refused(Code.RATE_LIMITED, held, b"x", task=task(99))
    held = await holding_on(disk)  # what was there before counts
    await refused(Code.RATE_LIMITED, held, b"x", task=task(99))
    await held.keep(THEIRS, task(100), file_of(whole), chunks_of(whole))
    await held.drop(task(0))
    await held.keep(OURS, task(99), file_of(b"x"), chunks_of(b"x"))


async def test_one_member_has_half_of_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "HELD_TASKS", 4)
    held = await holding_on(new_disk())
    for number in range(2):
        await held.keep(OURS, task(number), file_of(b"x"), chunks_of(b"x"))
    await refused(Code.RATE_LIMITED, held, b"x", task=task(2))
    for number in (3, 4):
        await held.keep(THEIRS, task(number), file_of(b"x"), chunks_of(b"x"))
    await refused(Code.RATE_LIMITED, held, b"x", task=task(5), owner=b"3" * 32)


async def test_a_cancelled_arrival_leaves_nothing_and_can_be_repeated(autojump_clock: MockClock) -> None:
    disk = new_disk()
    held = await holding_on(disk)

    async def slow() -> AsyncIterator[bytes]:
        yield b"ri"
        await trio.sleep(100)
        yield b"ght"

    with trio.move_on_after(5):
        await held.keep(OURS, TASK, file_of(b"right"), slow())
    assert disk.list_folder(INPUTS) == []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(held.keep, OURS, TASK, file_of(b"right"), slow())
        await trio.sleep(5)
        await refused(Code.RATE_LIMITED, held, b"right")
        assert not await held.drop(TASK)  # not while it is written
    assert await content_of(held, TASK, file_of(b"right")) == b"right"


async def test_a_full_disk_is_named_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "WRITE_BYTES", 1000)
    disk = new_disk()
    held = await holding_on(disk)
    disk.free(2500)
    await refused(Code.DISK_FULL, held, bytes(5000))
    assert (held.tasks, disk.list_folder(INPUTS)) == ((), [])
    disk.free()
    await held.keep(OURS, TASK, file_of(bytes(5000)), chunks_of(bytes(5000)))


async def test_a_file_whose_size_changed_on_the_disk_and_strange_names_are_removed_at_the_start() -> None:
    disk = new_disk()
    held = await holding_on(disk)
    for content in (b"one", b"two"):
        await held.keep(OURS, TASK, file_of(content), chunks_of(content))
    disk.write(INPUTS / TASK.hex() / file_of(b"one").hash.hex(), b"short, or long")
    disk.make_folder(INPUTS / "strange")
    disk.write(INPUTS / "strange" / f"{'0' * 64}.whole", b"\xc1")
    held = await holding_on(disk)
    assert not held.has(TASK, file_of(b"one"))
    assert held.has(TASK, file_of(b"two"))
    assert disk.list_folder(INPUTS) == [TASK.hex()]
    assert len(disk.list_folder(INPUTS / TASK.hex())) == 2


async def test_a_power_cut_at_any_point_leaves_files_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "WRITE_BYTES", 1000)
    disk = new_disk()
    contents = [bytes([number]) * 2500 for number in range(4)]
    acknowledged = 0
    cuts: list[tuple[int, SimulatedDisk]] = []
    disk.watch(
        lambda event: cuts.extend(
            (acknowledged, disk.crash(Seeded(f"{len(cuts)} {each}"))) for each in range(3)
        )
    )
    held = await holding_on(disk)
    for number, content in enumerate(contents):
        await held.keep(OURS, task(number // 2), file_of(content), chunks_of(content))
        acknowledged += 1
    assert len(cuts) > 60
    for known, left in cuts:
        found = await holding_on(left)
        for number, content in enumerate(contents):
            if found.has(task(number // 2), file_of(content)):
                assert await content_of(found, task(number // 2), file_of(content)) == content
            else:
                assert number >= known
                assert file_of(content).hash.hex() not in left.list_folder(INPUTS / task(number // 2).hex())
        left.close()
