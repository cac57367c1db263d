"""What a node keeps for tasks of others: every name, size, order and fault that a peer could think of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from memory_cell import Inline, Seeded
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.home.logging import log_to
from knode.klp.codec import Decoder, encode
from knode.mesh import chunks
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedClock
from knode.tasks.arriving import OWNER_SHARE, TASKS_WORTH
from knode.tasks.folders import WAIT_S, WAITING_TASKS, Folders
from knode.tasks.messages import Run, Stage
from knode.tasks.values import MAX_FILES
from knode.world import World

ATTEMPTS = Path("/attempts")
OURS, THEIRS = b"o" * 32, b"t" * 32
LIMIT = 10_000
TASK = bytes(16)


def task(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Kept:
    """Folders on a disk of their own."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self.disk.make_folder(ATTEMPTS)
        self.lines: list[str] = []
        world = World(SimulatedClock(), Seeded("folders"), self.disk, Inline())
        self.folders = Folders(world, ATTEMPTS, log_to(world, self.lines.append).logger, task_bytes=LIMIT)

    async def keep(
        self, content: bytes = b"x", *, owner: bytes = OURS, of: bytes = TASK, name: str = "a", size: int = -1
    ) -> None:
        stage = Stage(of, name, len(content) if size < 0 else size)
        await self.folders.keep(owner, stage, chunks_of(content))

    @property
    def names(self) -> list[str]:
        return self.disk.list_folder(ATTEMPTS)

    async def refused(self, code: Code, *arguments: bytes, **rest: object) -> None:
        with pytest.raises(KnodeError) as caught:
            await self.keep(*arguments, **rest)  # type: ignore[arg-type]
        assert caught.value.code is code


async def chunks_of(content: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(content), 1000):
        yield content[begin : begin + 1000]


@pytest.fixture
def kept() -> Kept:
    return Kept()


async def test_an_attempt_finds_its_files_and_leaves_nothing(kept: Kept) -> None:
    await kept.keep(b"one", name="a")
    await kept.keep(b"two", name="b")
    async with kept.folders.claim(OURS, TASK, ("a", "b")) as folder:
        assert kept.disk.read(folder / "input" / "b", limit_bytes=10) == b"two"
    assert kept.names == []
    async with kept.folders.claim(OURS, TASK, ()):
        assert kept.names == []
        await kept.folders.make(TASK)
        assert kept.names == [TASK.hex()]
    assert kept.names == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\nb", "a\0", "\x1b[31m", "x" * 201, "../a"])
def test_a_name_that_is_no_plain_name_does_not_decode(name: str) -> None:
    for kind, body in ((Stage, Stage(TASK, name, 1)), (Run, Run(TASK, "kExecutor:text", b"", (name,), 1000))):
        with pytest.raises(KnodeError) as caught:
            Decoder[Stage | Run](kind).decode(encode(body))
        assert caught.value.code is Code.BAD_FRAME


@given(st.text(max_size=210))
def test_a_name_that_decodes_stays_in_its_folder(name: str) -> None:
    try:
        encoded = encode(Stage(TASK, name, 1))
        decoded = Decoder[Stage](Stage).decode(encoded)
    except (KnodeError, UnicodeEncodeError):
        return
    assert decoded.name == name
    path = ATTEMPTS / "input" / name
    assert (path.parent, path.name) == (ATTEMPTS / "input", name)
    assert name not in ("", ".", "..")


@given(st.integers(min_value=-(2**63), max_value=2**64 - 1))
def test_sizes_and_deadlines_out_of_bounds_do_not_decode(number: int) -> None:
    for kind, body, fits in (
        (Stage, Stage(TASK, "a", number), 0 <= number < 2**40),
        (Run, Run(TASK, "kExecutor:text", b"", (), number), 1 <= number <= 300_000),
    ):
        try:
            msgspec.msgpack.Decoder(kind).decode(encode(body))
            assert fits
        except msgspec.ValidationError:
            assert not fits


async def test_a_task_may_have_exactly_its_bytes_and_its_files(kept: Kept) -> None:
    await kept.keep(bytes(LIMIT - 1), name="a")
    await kept.keep(b"x", name="b")
    await kept.refused(Code.TOO_LARGE, b"x", name="c")
    assert kept.names == []
    await kept.refused(Code.TOO_LARGE, bytes(LIMIT + 1))
    for number in range(MAX_FILES):
        await kept.keep(b"", name=str(number))
    await kept.refused(Code.TOO_LARGE, b"", name="one more")
    assert kept.names == []


@pytest.mark.parametrize("announced", [0, 99, 101, LIMIT])
async def test_a_file_that_is_not_as_long_as_announced_is_refused(kept: Kept, announced: int) -> None:
    await kept.refused(Code.INVALID_ARGUMENT, bytes(100), size=announced)
    assert kept.names == []


async def test_endless_data_is_cut_at_what_was_announced(kept: Kept) -> None:
    given_out = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given_out
        while True:
            given_out += 1000
            yield bytes(1000)

    with pytest.raises(KnodeError) as caught:
        await kept.folders.keep(OURS, Stage(TASK, "a", 5000), endless())
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert given_out == 6000
    assert kept.names == []


async def test_two_files_of_one_name_end_the_task_s_files(kept: Kept) -> None:
    await kept.keep(name="a")
    await kept.refused(Code.INVALID_ARGUMENT, name="a")
    assert kept.names == []


async def test_nobody_touches_another_node_s_task(kept: Kept) -> None:
    await kept.keep(name="a")
    await kept.refused(Code.NOT_ALLOWED, owner=THEIRS, name="b")
    with pytest.raises(KnodeError) as caught:
        async with kept.folders.claim(THEIRS, TASK, ("a",)):
            pytest.fail("another node's files were given")
    assert caught.value.code is Code.NOT_ALLOWED
    async with kept.folders.claim(OURS, TASK, ("a",)):
        with pytest.raises(KnodeError):
            async with kept.folders.claim(THEIRS, TASK, ()):
                pytest.fail("another node's attempt was joined")
        assert kept.names == [TASK.hex()]


async def test_a_task_is_begun_once_and_takes_no_files_then(kept: Kept) -> None:
    await kept.keep(name="a")
    async with kept.folders.claim(OURS, TASK, ("a",)):
        with pytest.raises(KnodeError) as caught:
            async with kept.folders.claim(OURS, TASK, ("a",)):
                pytest.fail("it was begun twice")
        assert caught.value.code is Code.INVALID_ARGUMENT
        await kept.refused(Code.INVALID_ARGUMENT, name="b")
        assert kept.names == [TASK.hex()]
    assert kept.names == []


async def test_a_task_is_not_begun_while_its_files_arrive_nor_without_them(kept: Kept) -> None:
    gate, waiting = trio.Event(), trio.Event()

    async def slow() -> AsyncIterator[bytes]:
        waiting.set()
        await gate.wait()
        yield b"x"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.folders.keep, OURS, Stage(TASK, "a", 1), slow())
        await waiting.wait()
        with pytest.raises(KnodeError) as caught:
            async with kept.folders.claim(OURS, TASK, ()):
                pytest.fail("it was begun")
        assert caught.value.code is Code.INVALID_ARGUMENT
        gate.set()
    with pytest.raises(KnodeError) as caught:
        async with kept.folders.claim(OURS, TASK, ("a", "missing")):
            pytest.fail("it was begun")
    assert caught.value.code is Code.NOT_FOUND
    assert kept.names == []


async def test_a_file_that_fails_takes_those_that_still_arrive_along(kept: Kept) -> None:
    gate, waiting = trio.Event(), trio.Event()

    async def slow() -> AsyncIterator[bytes]:
        waiting.set()
        await gate.wait()
        yield b"x"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.folders.keep, OURS, Stage(TASK, "slow", 1), slow())
        await waiting.wait()
        await kept.refused(Code.INVALID_ARGUMENT, b"short", name="bad", size=9)
        gate.set()
    assert kept.names == []
    await kept.keep(name="slow")
    assert kept.names == [TASK.hex()]


async def test_a_cancelled_transfer_leaves_nothing(autojump_clock: MockClock, kept: Kept) -> None:
    async def slow() -> AsyncIterator[bytes]:
        for _ in range(10):
            await trio.sleep(1)
            yield bytes(100)

    for after_s in (0, 0.5, 3.5, 9.5):
        with trio.move_on_after(after_s) as scope:
            await kept.folders.keep(OURS, Stage(TASK, "a", 1000), slow())
        assert scope.cancelled_caught
        assert kept.names == []
    await kept.folders.keep(OURS, Stage(TASK, "a", 1000), slow())


async def test_files_that_nobody_comes_for_are_forgotten_after_a_minute(
    autojump_clock: MockClock, kept: Kept
) -> None:
    await kept.keep(of=task(1))
    await trio.sleep(WAIT_S - 1)
    await kept.keep(of=task(2))
    await kept.keep(of=task(1), name="b")
    await trio.sleep(WAIT_S - 1)
    await kept.folders.expire()
    assert kept.names == [task(1).hex(), task(2).hex()]
    await trio.sleep(2)
    async with kept.folders.claim(OURS, task(2), ("a",)):
        await kept.folders.expire()
        assert kept.names == [task(2).hex()]
    assert kept.names == []


async def test_tasks_that_wait_are_bounded(kept: Kept) -> None:
    for number in range(WAITING_TASKS):
        await kept.keep(b"", owner=OURS if number % 2 == 0 else THEIRS, of=task(number))
    await kept.refused(Code.RATE_LIMITED, b"", owner=b"third", of=task(WAITING_TASKS))
    async with kept.folders.claim(OURS, task(0), ()):
        await kept.keep(b"", of=task(WAITING_TASKS))


async def test_the_bytes_of_all_tasks_are_bounded_and_come_back(kept: Kept) -> None:
    for number in range(TASKS_WORTH):
        await kept.keep(bytes(LIMIT), owner=OURS if number % 2 == 0 else THEIRS, of=task(number))
    await kept.refused(Code.RATE_LIMITED, b"x", owner=b"third", of=task(99))
    async with kept.folders.claim(OURS, task(0), ("a",)):
        await kept.refused(Code.RATE_LIMITED, b"x", of=task(99))
    await kept.keep(b"x", of=task(99))


async def test_one_node_s_tasks_take_a_half_and_leave_the_other(kept: Kept) -> None:
    for number in range(WAITING_TASKS // OWNER_SHARE):
        await kept.keep(b"", of=task(number))
    await kept.refused(Code.RATE_LIMITED, b"", of=task(99))
    await kept.keep(b"", owner=THEIRS, of=task(99))


async def test_one_node_s_bytes_take_a_half_and_leave_the_other(kept: Kept) -> None:
    for number in range(TASKS_WORTH // OWNER_SHARE):
        await kept.keep(bytes(LIMIT), of=task(number))
    await kept.refused(Code.RATE_LIMITED, b"x", of=task(98))
    await kept.keep(b"x", owner=THEIRS, of=task(99))


async def test_what_is_announced_counts_before_it_arrives(kept: Kept) -> None:
    waiting = trio.Event()

    async def never() -> AsyncIterator[bytes]:
        waiting.set()
        await trio.sleep_forever()
        yield b""

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.folders.keep, OURS, Stage(TASK, "a", LIMIT), never())
        await waiting.wait()
        with pytest.raises(KnodeError) as caught:
            await kept.keep(b"x", name="b")
        assert caught.value.code is Code.TOO_LARGE
        nursery.cancel_scope.cancel()
    assert kept.names == []


async def test_a_full_disk_is_named_and_nothing_stays(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "WRITE_BYTES", 2000)
    for room in (0, 1500, 6000):
        kept.disk.free(room)
        await kept.refused(Code.DISK_FULL, bytes(9000))
        assert kept.names == []
    kept.disk.free()
    await kept.keep(bytes(9000))


async def test_what_a_read_only_disk_keeps_is_logged_and_removed_at_the_next_start(kept: Kept) -> None:
    await kept.keep()
    async with kept.folders.claim(OURS, TASK, ("a",)):
        kept.disk.read_only = True
    assert "an attempt cannot be removed" in kept.lines[-1]
    await kept.folders.clean()
    assert "old attempts cannot be removed" in kept.lines[-1]
    kept.disk.read_only = False
    await kept.folders.clean()
    assert kept.names == []
