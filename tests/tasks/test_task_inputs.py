"""The files of durable tasks between members: two copies before a submit, the right bytes to the worker."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
import trio
from mesh_cell import DEAD_AFTER_S, MeshNode, SeededRandomness
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.mesh.methods import Call
from knode.mesh.statements import Role
from knode.simulation.disk import SimulatedDisk
from knode.tasks import inputs as inputs_module
from knode.tasks.commands import Fence, File
from knode.tasks.holding import Holding
from knode.tasks.inputs import ASK_EVERY_S, Fate, Inputs
from knode.tasks.messages import AssignAttempt, HoldFile, SendFile
from knode.transport.memory import MemoryNetwork
from knode.world import Monotonic

INPUTS, FILES, ATTEMPT = Path("/home/inputs"), Path("/files"), Path("/home/attempt/input")
TASK = b"t" * 16
LIMIT = 100_000
UNKNOWN_S = 180.0


class FileNode(MeshNode):
    """A node with a disk of its own and the files of durable tasks, but without tasks."""

    fates: Mapping[bytes, Fate] | None = None
    """What the ledger says; None: nobody can be asked."""

    async def assemble(self) -> None:
        for folder in (INPUTS, FILES):
            self.disk.make_folder(folder)
        self.holding = Holding(self.world, INPUTS, self.log, task_bytes=LIMIT)
        self.inputs = Inputs(
            self.world,
            self.holding,
            self.membership,
            self.peers,
            self.methods,
            self.ask_fates,
            self.log,
        )

    async def work(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.inputs.run)

    async def ask_fates(self, tasks: Sequence[bytes]) -> Mapping[bytes, Fate]:
        if self.fates is None:
            raise KnodeError(Code.UNAVAILABLE, "no leader")
        return {task: self.fates.get(task, Fate.UNKNOWN) for task in tasks}

    def make_file(self, name: str, content: bytes) -> Path:
        self.disk.write(FILES / name, content)
        return FILES / name

    async def keep(self, *paths: Path, task: bytes = TASK) -> tuple[tuple[File, ...], tuple[bytes, ...]]:
        deadline = Monotonic(trio.current_time() + 200)
        kept = await self.inputs.keep(task, paths, deadline)
        return kept, await self.inputs.spread(task, kept, deadline) if kept else ()

    async def bring(self, files: Sequence[File], holders: Sequence[bytes], task: bytes = TASK) -> None:
        self.disk.remove(ATTEMPT.parent)
        fence = Fence(bytes(32), task, 1)
        request = AssignAttempt(fence, "kExecutor:text", b"", tuple(files), tuple(holders), 1000, "token")
        await self.inputs.bring(request, ATTEMPT)

    def brought(self, name: str) -> bytes:
        return self.disk.read(ATTEMPT / name, limit_bytes=2**20)

    def holds(self, *files: File, task: bytes = TASK) -> bool:
        return all(self.holding.has(task, file) for file in files)


class FileCell:
    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork(SeededRandomness("network"))
        self.nodes: list[FileNode] = []
        self._nursery = nursery

    async def add(self, name: str, role: Role = Role.WORKER) -> FileNode:
        disk = SimulatedDisk()
        disk.make_folder(Path("/home"))
        node = FileNode(name, Path("/home"), {"memory": self.network.carrier(name)}, disk=disk)
        if not self.nodes:
            await node.found()
        await node.start(self._nursery)
        if self.nodes:
            await node.join(await self.nodes[0].invite(role))
        self.nodes.append(node)
        for one in self.nodes:
            await one.connected(*(other for other in self.nodes if other is not one))
        return node

    async def lose(self, node: FileNode) -> None:
        """End a node as a power cut does, and wait until that is noticed."""
        self.network.break_links(node.name)
        await node.stop()
        await trio.sleep(DEAD_AFTER_S + 1)


@pytest.fixture
async def files(tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> FileCell:
    monkeypatch.setattr(inputs_module, "UNKNOWN_S", UNKNOWN_S)  # an hour, else: much to simulate
    return FileCell(tmp_path, nursery)


def file_of(content: bytes, name: str = "a") -> File:
    return File(name, len(content), hashlib.sha256(content).digest())


async def chunks_of(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def push(by: FileNode, to: FileNode, file: File, content: bytes | None, *, task: bytes = TASK) -> None:
    """Send `task.hold` as a peer does that keeps to no rule but the protocol's."""
    await by.peer(to).request(
        "task.hold",
        HoldFile(task, file),
        deadline=Monotonic(trio.current_time() + 100),
        chunks=None if content is None else chunks_of(content),
    )


async def refused(code: Code, work: object, *arguments: object, **rest: object) -> KnodeError:
    with pytest.raises(KnodeError) as caught:
        await work(*arguments, **rest)  # type: ignore[operator]
    assert caught.value.code is code, caught.value
    return caught.value


def ids(*nodes: FileNode) -> tuple[bytes, ...]:
    return tuple(node.key.public.raw for node in nodes)


async def test_files_lie_on_the_submitter_and_one_more_and_any_worker_gets_them(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, attic, cellar = [await files.add(name) for name in ("desk", "attic", "cellar")]
    kept, holders = await desk.keep(desk.make_file("a", b"one" * 9000), desk.make_file("b", b""))
    assert kept == (file_of(b"one" * 9000, "a"), file_of(b"", "b"))
    assert len(holders) == 2
    assert holders[0] == desk.key.public.raw
    assert desk.holds(*kept)
    assert [node.holds(*kept) for node in (attic, cellar)].count(True) == 1
    for node in (desk, attic, cellar):
        await node.bring(kept, holders)
        assert (node.brought("a"), node.brought("b")) == (b"one" * 9000, b"")
    assert cellar.holds(*kept)


async def test_a_task_without_files_needs_nobody(autojump_clock: MockClock, files: FileCell) -> None:
    desk, attic = await files.add("desk"), await files.add("attic")
    await files.lose(attic)
    assert await desk.keep() == ((), ())


async def test_the_only_member_that_runs_tasks_holds_them_alone(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, watcher = await files.add("desk"), await files.add("watcher", Role.OBSERVER)
    kept, holders = await desk.keep(desk.make_file("a", b"x"))
    assert holders == ids(desk)
    assert not watcher.holds(*kept)


async def test_a_member_that_runs_nothing_submits_with_a_copy_on_one_that_does(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, watcher = await files.add("desk"), await files.add("watcher", Role.OBSERVER)
    kept, holders = await watcher.keep(watcher.make_file("a", b"x"))
    assert holders == ids(watcher, desk)
    await refused(Code.NOT_ALLOWED, push, desk, watcher, file_of(b"y"), b"y")
    await files.lose(watcher)
    await desk.bring(kept, holders)


async def test_without_a_second_member_that_takes_them_they_are_held_here_alone(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, attic = await files.add("desk"), await files.add("attic")
    await files.lose(attic)
    error = await refused(Code.UNAVAILABLE, desk.keep, desk.make_file("a", b"x"))
    assert "attic: it is failed" in error.message
    assert desk.holding.tasks == (TASK,)
    await attic.start(files._nursery)
    await desk.connected(attic)
    attic.disk.fill()  # type: ignore[attr-defined]
    deadline = Monotonic(trio.current_time() + 200)
    await refused(Code.UNAVAILABLE, desk.inputs.spread, TASK, [file_of(b"x")], deadline)
    assert (desk.holding.tasks, attic.holding.tasks) == ((TASK,), ())
    attic.disk.free()  # type: ignore[attr-defined]
    assert await desk.inputs.spread(TASK, [file_of(b"x")], deadline) == ids(desk, attic)
    assert attic.holds(file_of(b"x"))


async def test_when_one_member_does_not_take_them_the_next_does(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, attic, cellar = [await files.add(name) for name in ("desk", "attic", "cellar")]
    for full, other in ((attic, cellar), (cellar, attic)):
        full.disk.fill()  # type: ignore[attr-defined]
        _, holders = await desk.keep(desk.make_file("a", b"x"), task=full.name.ljust(16).encode())
        assert holders == ids(desk, other)
        full.disk.free()  # type: ignore[attr-defined]


async def test_bad_files_are_named_before_anything_is_sent(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, attic = await files.add("desk"), await files.add("attic")
    await refused(Code.NOT_FOUND, desk.keep, FILES / "none")
    await refused(Code.TOO_LARGE, desk.keep, desk.make_file("a", bytes(LIMIT + 1)))
    await refused(Code.TOO_LARGE, desk.keep, desk.make_file("a", bytes(LIMIT)), desk.make_file("b", b"x"))
    assert (desk.holding.tasks, attic.holding.tasks) == ((), ())


async def test_the_deadline_of_a_submit_holds_for_its_files(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, attic = await files.add("desk"), await files.add("attic")

    async def never(call: Call, body: HoldFile) -> None:
        await trio.sleep_forever()

    attic.inputs._answer_hold = never  # type: ignore[method-assign]
    attic.methods._by_name.pop("task.hold")
    attic.methods.add("task.hold", HoldFile, never)
    begun = trio.current_time()
    deadline = Monotonic(begun + 7)
    kept = await desk.inputs.keep(TASK, [desk.make_file("a", b"x")], deadline)
    await refused(Code.UNAVAILABLE, desk.inputs.spread, TASK, kept, deadline)
    assert trio.current_time() - begun < 8
    await refused(Code.EXPIRED, desk.inputs.keep, bytes(16), [desk.make_file("b", b"x")], deadline)
    assert desk.holding.tasks == (TASK,)


async def test_a_worker_tries_the_holders_in_turn_and_says_when_there_is_none(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, attic, cellar = [await files.add(name) for name in ("desk", "attic", "cellar")]
    kept, holders = await desk.keep(desk.make_file("a", b"x"))
    worker = cellar if attic.holds(*kept) else attic
    other = attic if worker is cellar else cellar
    await files.lose(desk)
    await worker.bring(kept, holders)
    assert worker.brought("a") == b"x"
    await worker.inputs.forget(TASK)
    await files.lose(other)
    error = await refused(Code.UNAVAILABLE, worker.bring, kept, holders)
    assert "a" in error.message
    assert worker.holding.tasks == ()


async def test_a_holder_that_lies_is_passed_over(autojump_clock: MockClock, files: FileCell) -> None:
    desk, liar, worker = [await files.add(name) for name in ("desk", "liar", "worker")]
    right = file_of(b"right")
    await desk.holding.keep(desk.key.public.raw, TASK, right, chunks_of(b"right"))
    lies: list[tuple[File, bytes | None]] = [
        (right, b"wrong"),
        (right, b"right and more"),
        (right, b"ri"),
        (msgspec.structs.replace(right, size=3), b"rig"),
        (msgspec.structs.replace(right, size=2**39), b"right"),
        (right, None),
        (file_of(b"something else"), b"something else"),
    ]
    refusals: list[Code | None] = []

    async def send(call: Call, body: SendFile) -> None:
        for file, content in lies:
            try:
                await push(liar, worker, file, content)
                refusals.append(None)
            except KnodeError as error:
                refusals.append(error.code)

    liar.methods._by_name.pop("task.send")
    liar.methods.add("task.send", SendFile, send)
    worker.inputs._members = lambda ids: [  # type: ignore[method-assign]
        worker.member(liar),
        worker.member(desk),
    ]
    await worker.bring([right], ids(liar, desk))
    assert worker.brought("a") == b"right"
    assert refusals == [
        Code.INVALID_ARGUMENT,
        Code.INVALID_ARGUMENT,
        Code.INVALID_ARGUMENT,
        Code.INVALID_ARGUMENT,
        Code.TOO_LARGE,
        Code.INVALID_ARGUMENT,
        None,  # a file of the liar's own, in its own share
    ]
    assert not worker.inputs._awaited


async def test_another_members_task_takes_no_file_of_mine(autojump_clock: MockClock, files: FileCell) -> None:
    desk, attic, rogue = [await files.add(name) for name in ("desk", "attic", "rogue")]
    await push(desk, attic, file_of(b"x"), b"x")
    for content in (b"x", b"y"):
        await refused(Code.NOT_ALLOWED, push, rogue, attic, file_of(content), content)
    await push(desk, attic, file_of(b"y"), b"y")
    assert attic.holds(file_of(b"x"), file_of(b"y"))


async def test_who_does_not_know_a_files_hash_or_runs_nothing_is_given_nothing(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, attic = await files.add("desk"), await files.add("attic")
    watcher = await files.add("watcher", Role.OBSERVER)
    kept, _ = await desk.keep(desk.make_file("a", b"x"))
    deadline = Monotonic(trio.current_time() + 100)
    for asker, file, code in (
        (attic, file_of(b"guessed"), Code.NOT_FOUND),
        (attic, msgspec.structs.replace(kept[0], size=2), Code.NOT_FOUND),
        (watcher, kept[0], Code.NOT_ALLOWED),
    ):
        body = SendFile(TASK, file)
        await refused(code, asker.peer(desk).request, "task.send", body, deadline=deadline)


async def test_a_copy_that_the_disk_has_damaged_is_fetched_again(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, attic = await files.add("desk"), await files.add("attic")
    kept, holders = await desk.keep(desk.make_file("a", b"right"))
    attic.disk.write(INPUTS / TASK.hex() / kept[0].hash.hex(), b"wrong")
    await attic.bring(kept, holders)
    assert attic.brought("a") == b"right"
    await files.lose(desk)
    attic.disk.write(INPUTS / TASK.hex() / kept[0].hash.hex(), b"wrong")
    await refused(Code.UNAVAILABLE, attic.bring, kept, holders)
    assert not attic.holds(*kept)


async def test_files_go_when_their_task_is_over_and_stay_while_nobody_can_say(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, attic = await files.add("desk"), await files.add("attic")
    kept, _ = await desk.keep(desk.make_file("a", b"x"))
    await trio.sleep(2 * UNKNOWN_S)
    assert desk.holds(*kept)
    assert attic.holds(*kept)
    desk.fates = attic.fates = {TASK: Fate.LIVE}
    await trio.sleep(2 * UNKNOWN_S)
    assert desk.holds(*kept)
    assert attic.holds(*kept)
    desk.fates = attic.fates = {TASK: Fate.OVER}
    await trio.sleep(ASK_EVERY_S + 1)
    assert (desk.holding.tasks, attic.holding.tasks) == ((), ())


async def test_files_whose_submit_never_came_go_in_time_and_a_pending_one_is_refreshed(
    autojump_clock: MockClock, files: FileCell
) -> None:
    desk, attic = await files.add("desk"), await files.add("attic")
    orphans, _ = await desk.keep(desk.make_file("a", b"x"))
    pending = b"p" * 16
    waiting, holders = await desk.keep(desk.make_file("b", b"y"), task=pending)
    desk.fates, attic.fates = {pending: Fate.LIVE}, {}
    for _ in range(8):
        await trio.sleep(UNKNOWN_S / 4)
        await desk.inputs.refresh(pending, waiting, holders)
    assert not desk.holds(*orphans)
    assert not attic.holds(*orphans)
    assert attic.holds(*waiting, task=pending)
    await attic.inputs.forget(pending)  # lost there
    await desk.inputs.refresh(pending, waiting, holders)
    assert attic.holds(*waiting, task=pending)
    await files.lose(attic)
    await desk.inputs.refresh(pending, waiting, holders)  # whoever is away is passed over
