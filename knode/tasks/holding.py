"""Files of durable tasks on a node's disk: each by its hash, whole and durable, until its task has ended.

`<task>/<hash>` holds the content, `<task>/<hash>.whole` says whose it is and that all of it is durable.
What has no such mark is removed at the next start.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import trio

from knode.errors import Code, KnodeError
from knode.klp.codec import Decoder, encode
from knode.mesh.chunks import read_chunks, write_chunks
from knode.tasks.arriving import OWNER_SHARE, Share
from knode.tasks.commands import File, MemberId
from knode.tasks.values import Size
from knode.world import Log, World, WritableFile

HELD_TASKS = 1024
"""Tasks whose files are held at once; one member's are half of them at most."""
MARK = ".whole"
_MARK_BYTES = 256
_TASK = re.compile(r"[0-9a-f]{32}")
_HASH = re.compile(r"[0-9a-f]{64}")


class Mark(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A file that is whole."""

    format: Annotated[int, msgspec.Meta(ge=1, le=1)]
    owner: MemberId
    size: Size


_mark: Decoder[Mark] = Decoder(Mark)


@dataclass(eq=False)
class _Task:
    """What is held of one task."""

    share: Share
    touched_at: float
    whole: dict[bytes, int] = field(default_factory=dict)
    """Hash and size of each file that is here."""
    users: int = 0
    """Who writes or reads here now: it is not removed meanwhile."""


class Holding:
    """The files that this node holds, for tasks of its own and of others."""

    def __init__(self, world: World, path: Path, log: Log, *, task_bytes: int) -> None:
        self._world = world
        self._path = path
        self._log = log
        self._task_bytes = task_bytes
        self._tasks: dict[bytes, _Task] = {}

    async def load(self) -> None:
        """Find what the last start left; what is not whole is removed.

        Raises:
            KnodeError: DISK_READ_ONLY, UNAVAILABLE: the disk cannot be read.
        """
        found = await self._world.blocking.run(self._find)
        now = self._world.clock.monotonic()
        for task, marks in found.items():
            share = Share(next(iter(marks.values())).owner)
            for name, mark in marks.items():
                share.names.add(name)
                share.reserved_bytes += mark.size
            whole = {bytes.fromhex(name): mark.size for name, mark in marks.items()}
            self._tasks[task] = _Task(share, now, whole)

    @property
    def tasks(self) -> tuple[bytes, ...]:
        """The tasks of which something is held."""
        return tuple(self._tasks)

    @property
    def files(self) -> tuple[int, int]:
        """How many files are held, and their bytes."""
        sizes = [size for held in self._tasks.values() for size in held.whole.values()]
        return len(sizes), sum(sizes)

    def owner(self, task: bytes) -> bytes | None:
        """Return whose a task is; None when nothing of it is held."""
        held = self._tasks.get(task)
        return None if held is None else held.share.owner

    def has(self, task: bytes, file: File) -> bool:
        """Tell whether a file is held."""
        held = self._tasks.get(task)
        return held is not None and held.whole.get(file.hash) == file.size

    def touch(self, task: bytes) -> None:
        """Note that somebody still wants what is held of a task."""
        if task in self._tasks:
            self._tasks[task].touched_at = self._world.clock.monotonic()

    def is_idle(self, task: bytes, seconds: float) -> bool:
        """Tell whether nobody has wanted anything of a task for so long."""
        held = self._tasks.get(task)
        return held is not None and self._world.clock.monotonic() - held.touched_at >= seconds

    async def keep(self, owner: bytes, task: bytes, file: File, chunks: AsyncIterator[bytes]) -> None:
        """Hold a file. Once this returns it is whole and durable; one that is held already is not read again.

        Args:
            owner: the member whose room it takes.
            task: its task. It belongs to the member that named it here first.
            file: what was announced.
            chunks: its content.

        Raises:
            KnodeError: NOT_ALLOWED for another member's task, TOO_LARGE over the limit for one task,
                RATE_LIMITED over that for all or while the same file arrives already, INVALID_ARGUMENT when
                it is not what was announced, DISK_FULL, DISK_READ_ONLY.

        When it raises or is cancelled, nothing of the file is left.
        """
        held = self._open(owner, task)
        held.touched_at = self._world.clock.monotonic()
        if self.has(task, file):
            return
        name = file.hash.hex()
        if name in held.share.names:
            raise KnodeError(Code.RATE_LIMITED, f"{file.name} arrives already", "try again later")
        try:
            shares = [each.share for each in self._tasks.values()]
            held.share.reserve(name, file.size, shares, self._task_bytes)
            held.users += 1
            try:
                await self._write(task, file, chunks, Mark(1, held.share.owner, file.size))
                held.whole[file.hash] = file.size
            except BaseException:
                held.share.give_back(name, file.size)
                await self._remove(self._path / task.hex() / name)
                raise
            finally:
                held.users -= 1
        finally:
            if not held.share.names and self._tasks.get(task) is held:
                await self.drop(task)

    async def read(self, task: bytes, file: File) -> AsyncGenerator[bytes, None]:
        """Give the content of a file that is held; NOT_FOUND when it is not.

        Whoever takes it checks its hash: the disk may have changed it.
        """
        if not self.has(task, file):
            raise KnodeError(Code.NOT_FOUND, f"{file.name} is not held here")
        held = self._tasks[task]
        held.users += 1
        try:
            path = self._path / task.hex() / file.hash.hex()
            async with aclosing(read_chunks(self._world, path, file.size)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            held.users -= 1

    async def discard(self, task: bytes, file: File) -> None:
        """Let go of a file that turned out to be damaged."""
        held = self._tasks.get(task)
        if held is not None and held.whole.pop(file.hash, None) is not None:
            self._log.error("a held file is damaged", task=task.hex(), file=file.name)
            path = self._path / task.hex() / file.hash.hex()
            await self._remove(path.with_name(path.name + MARK))
            await self._remove(path)
            held.share.give_back(file.hash.hex(), file.size)

    async def drop(self, task: bytes) -> bool:
        """Let go of all files of a task, unless one is being written or read; tell whether none is left."""
        held = self._tasks.get(task)
        if held is None:
            return True
        if held.users:
            return False
        del self._tasks[task]
        await self._remove(self._path / task.hex())
        return True

    def _open(self, owner: bytes, task: bytes) -> _Task:
        held = self._tasks.get(task)
        if held is None:
            owners = [each.share.owner for each in self._tasks.values()]
            if len(owners) >= HELD_TASKS or owners.count(owner) >= HELD_TASKS // OWNER_SHARE:
                raise KnodeError(
                    Code.RATE_LIMITED, "files of too many tasks are on this node", "try again later"
                )
            held = self._tasks[task] = _Task(Share(owner), self._world.clock.monotonic())
        if held.share.owner != owner:
            raise KnodeError(Code.NOT_ALLOWED, "this is another member's task")
        return held

    async def _write(self, task: bytes, file: File, chunks: AsyncIterator[bytes], mark: Mark) -> None:
        run, disk = self._world.blocking.run, self._world.disk
        folder = self._path / task.hex()
        path = folder / file.hash.hex()

        def make() -> None:
            disk.make_folder(folder)
            disk.sync_folder(self._path)

        await run(make)
        with await run(partial(disk.create, path)) as written:
            await write_checked(self._world, written, file, chunks)
            await run(written.sync)
        # Makes the names in the folder durable, too.
        await run(partial(disk.write, path.with_name(path.name + MARK), encode(mark)))

    async def _remove(self, path: Path) -> None:
        with trio.CancelScope(shield=True):
            try:
                await self._world.blocking.run(partial(self._world.disk.remove, path))
            except KnodeError as error:
                self._log.warning("a task's files cannot be removed", path=str(path), why=str(error))

    def _find(self) -> dict[bytes, dict[str, Mark]]:
        """Return by task what is whole, by hash in hexadecimal; remove the rest."""
        disk, found = self._world.disk, dict[bytes, dict[str, Mark]]()
        for task in disk.list_folder(self._path):
            folder, marks = self._path / task, dict[str, Mark]()
            names = disk.list_folder(folder)
            for name in names:
                is_mark = name.endswith(MARK) and _TASK.fullmatch(task) is not None
                mark = self._read_mark(folder / name) if is_mark else None
                if mark is not None:
                    marks[name.removesuffix(MARK)] = mark
            try:
                for name in names:
                    if name.removesuffix(MARK) not in marks:
                        disk.remove(folder / name)
                if not marks:
                    disk.remove(folder)
            except KnodeError as error:
                self._log.warning("a task's files cannot be removed", path=str(folder), why=str(error))
            if marks:
                found[bytes.fromhex(task)] = marks
        return found

    def _read_mark(self, path: Path) -> Mark | None:
        disk = self._world.disk
        try:
            mark = _mark.decode(disk.read(path, limit_bytes=_MARK_BYTES))
            whole = path.with_name(path.name.removesuffix(MARK))
            if _HASH.fullmatch(whole.name) is not None and disk.size(whole) == mark.size:
                return mark
            why = "its name or its size is not what it was"
        except KnodeError as error:
            why = str(error)
        self._log.warning("a held file is lost", path=str(path), why=why)
        return None


async def write_checked(
    world: World, written: WritableFile, file: File, chunks: AsyncIterator[bytes]
) -> None:
    """Write what arrives into a new file.

    Raises:
        KnodeError: INVALID_ARGUMENT when it is not `file`; DISK_FULL, DISK_READ_ONLY. Then what was written
            is to be removed.
    """
    digest = hashlib.sha256()
    await write_chunks(world, written, chunks, name=file.name, size=file.size, update=digest.update)
    if digest.digest() != file.hash:
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            f"{file.name} is not what was announced: its hash differs",
            "see that nothing changes it, then send it again",
        )
