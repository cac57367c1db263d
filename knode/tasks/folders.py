"""The folders of attempts: what each task's files are kept in, from their arrival to the attempt's end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from knode.errors import Code, KnodeError
from knode.mesh.chunks import write_chunks
from knode.tasks.arriving import OWNER_SHARE, Share
from knode.tasks.messages import Stage
from knode.world import Log, World

WAIT_S = 60.0
"""How long files wait for their task."""
WAITING_TASKS = 64
"""Tasks whose files may wait at once."""


class Folders:
    """One folder for each task that has files here or runs here; nothing else lies beside them.

    A task belongs to the node that named it first: nobody else can add to it, run it or remove it.
    """

    def __init__(self, world: World, path: Path, log: Log, *, task_bytes: int) -> None:
        self._world = world
        self._path = path
        self._log = log
        self._task_bytes = task_bytes
        self._folders: dict[bytes, _Folder] = {}

    async def clean(self) -> None:
        """Remove what an earlier run of the node left."""
        try:
            await self._world.blocking.run(self._remove_all)
        except KnodeError as error:
            self._log.warning("old attempts cannot be removed", why=str(error))

    async def expire(self) -> None:
        """Forget files that nobody came for. Call it every few seconds."""
        now = self._world.clock.monotonic()
        for task, folder in list(self._folders.items()):
            if folder.is_waiting and not folder.writers and now - folder.touched_at > WAIT_S:
                await self._drop(task)

    async def keep(self, owner: bytes, stage: Stage, chunks: AsyncIterator[bytes]) -> None:
        """Keep a file for a task's attempt.

        Raises:
            KnodeError: TOO_LARGE over the limit for one task, RATE_LIMITED over that for all,
                INVALID_ARGUMENT when it is not what was announced, NOT_ALLOWED for another node's task,
                DISK_FULL, DISK_READ_ONLY.

        When it raises or is cancelled, nothing of the task's files is left.
        """
        folder = self._waiting_folder(owner, stage.task)
        folder.writers += 1
        try:
            folder.share.reserve(stage.name, stage.size, self._shares(), self._task_bytes)
            await self._write(folder, stage, chunks)
            folder.complete.add(stage.name)
        except BaseException:
            folder.is_broken = True
            raise
        finally:
            folder.writers -= 1
            folder.touched_at = self._world.clock.monotonic()
            if folder.is_broken and not folder.writers:
                await self._drop(stage.task)

    @asynccontextmanager
    async def claim(self, owner: bytes, task: bytes, files: Iterable[str]) -> AsyncGenerator[Path]:
        """Give an attempt its folder, with `files` in `input/`, and remove it in the end.

        Without files the folder is not made: see `make`.

        Raises:
            KnodeError: NOT_FOUND for a file that is not here, INVALID_ARGUMENT when the task runs or its
                files still arrive, NOT_ALLOWED for another node's task.
        """
        folder = self._folder(owner, task)
        if folder.writers or not folder.is_waiting:
            why = "its files still arrive" if folder.writers else "it was begun already"
            raise KnodeError(Code.INVALID_ARGUMENT, f"the task cannot be begun: {why}")
        folder.is_waiting = False
        try:
            if set(files) - folder.complete:
                raise KnodeError(Code.NOT_FOUND, "a file of the task is not here any more", "submit it again")
            yield self._path / task.hex()
        finally:
            await self._drop(task)

    async def make(self, task: bytes) -> None:
        """Make the folder of a claimed task on the disk; no error when it is there."""
        self._folders[task].is_made = True
        await self._world.blocking.run(partial(self._world.disk.make_folder, self._path / task.hex()))

    def _waiting_folder(self, owner: bytes, task: bytes) -> _Folder:
        if task not in self._folders:
            waiting = [f.share.owner for f in self._folders.values() if f.is_waiting]
            if len(waiting) >= WAITING_TASKS or waiting.count(owner) >= WAITING_TASKS // OWNER_SHARE:
                raise KnodeError(
                    Code.RATE_LIMITED, "files of too many tasks wait on this node", "try again later"
                )
        folder = self._folder(owner, task)
        if not folder.is_waiting:
            raise KnodeError(Code.INVALID_ARGUMENT, "the task was begun already: it takes no more files")
        return folder

    def _folder(self, owner: bytes, task: bytes) -> _Folder:
        folder = self._folders.get(task)
        if folder is None:
            folder = self._folders[task] = _Folder(owner, self._world.clock.monotonic())
        if folder.share.owner != owner:
            raise KnodeError(Code.NOT_ALLOWED, "this is another node's task")
        return folder

    def _shares(self) -> list[Share]:
        return [folder.share for folder in self._folders.values()]

    async def _write(self, folder: _Folder, stage: Stage, chunks: AsyncIterator[bytes]) -> None:
        run, disk = self._world.blocking.run, self._world.disk
        path = self._path / stage.task.hex() / "input"
        folder.is_made = True
        await run(partial(disk.make_folder, path))
        with await run(partial(disk.create, path / stage.name)) as file:
            await write_chunks(self._world, file, chunks, name=stage.name, size=stage.size)

    async def _drop(self, task: bytes) -> None:
        """Forget a task's folder and remove it; what cannot be removed now is at the node's next start."""
        folder = self._folders[task]
        folder.is_waiting = False
        with trio.CancelScope(shield=True):
            if folder.is_made:
                try:
                    path = self._path / task.hex()
                    await self._world.blocking.run(partial(self._world.disk.remove, path))
                except KnodeError as error:
                    self._log.warning("an attempt cannot be removed", task=task.hex(), why=str(error))
            del self._folders[task]

    def _remove_all(self) -> None:
        for name in self._world.disk.list_folder(self._path):
            self._world.disk.remove(self._path / name)


class _Folder:
    """One task's."""

    def __init__(self, owner: bytes, now: float) -> None:
        self.share = Share(owner)
        self.complete: set[str] = set()
        self.writers = 0
        self.touched_at = now
        self.is_waiting = True
        """Whether its attempt has not begun."""
        self.is_made = False
        """Whether it may be on the disk."""
        self.is_broken = False
        """Whether a file of it failed."""
