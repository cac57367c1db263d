"""The node that runs an attempt: staging its files, waiting for a free place, running, answering."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import trio

from knode.agents.runtime import Attempt, Progress, Runner
from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.klp.messages import Load
from knode.mesh.methods import Call, Methods
from knode.mesh.roster import Role
from knode.tasks.messages import NO_FRACTION, Ran, Report, Run, Stage
from knode.world import Log, World

STAGED_FOR_S = 60.0
"""How long staged files wait for their task."""
STAGED_TASKS = 64
WRITE_BYTES = 1024 * 1024
"""How much is gathered before it goes to the disk."""

MAY_SUBMIT = frozenset({Role.ADMIN, Role.WORKER, Role.VOTER, Role.OBSERVER})


class Worker:
    """Runs attempts: at most `running` at once, at most `queued` waiting, the rest is refused."""

    def __init__(
        self,
        world: World,
        runner: Runner,
        attempts: Path,
        methods: Methods,
        log: Log,
        *,
        running: int,
        queued: int,
        artifact_bytes: int,
    ) -> None:
        self._world = world
        self._runner = runner
        self._attempts = attempts
        self._log = log
        self._capacity = running
        self._queue_limit = queued
        self._artifact_bytes = artifact_bytes
        self._places = trio.Semaphore(running)
        self._admitted = 0
        self._staged: dict[bytes, _Staging] = {}
        methods.add("task.stage", Stage, self._answer_stage, roles=MAY_SUBMIT)
        methods.add("task.run", Run, self._answer_run, roles=MAY_SUBMIT)

    @property
    def load(self) -> Load:
        """How busy this node is."""
        running = min(self._admitted, self._capacity)
        return Load(running, self._admitted - running, self._capacity, 0)

    async def run(self) -> None:
        """Remove what earlier runs left, then forget staged files that nobody came for, until cancelled."""
        await self._world.blocking.run(self._clean)
        while True:
            await trio.sleep(STAGED_FOR_S / 4)
            now = self._world.clock.monotonic()
            for task, staging in list(self._staged.items()):
                if not staging.busy and now - staging.touched_at > STAGED_FOR_S:
                    del self._staged[task]
                    await self._remove(task)

    async def stage(self, task: bytes, name: str, chunks: AsyncIterator[bytes]) -> None:
        """Keep a file for a task's attempt.

        Raises:
            KnodeError: TOO_LARGE over the limit for one task, RATE_LIMITED, DISK_FULL, INVALID_ARGUMENT.

        When it raises or is cancelled, nothing of the task's files is left.
        """
        staging = self._staging(task)
        folder = self._attempts / task.hex() / "input"
        if name in staging.names:
            raise KnodeError(
                Code.INVALID_ARGUMENT, f"two files of one task are called {name!r}", "rename one"
            )
        staging.names.add(name)
        staging.busy += 1
        try:
            await self._world.blocking.run(lambda: self._world.disk.make_folder(folder))
            with await self._world.blocking.run(lambda: self._world.disk.create(folder / name)) as file:
                waiting = bytearray()
                async for chunk in chunks:
                    staging.size += len(chunk)
                    if staging.size > self._artifact_bytes:
                        raise KnodeError(
                            Code.TOO_LARGE,
                            f"this node takes {self._artifact_bytes // 2**20} MiB of files with a task",
                            "send less, or raise tasks.artifact_bytes there",
                        )
                    waiting += chunk
                    if len(waiting) >= WRITE_BYTES:
                        written = bytes(waiting)
                        await self._world.blocking.run(partial(file.write, written))
                        waiting.clear()
                await self._world.blocking.run(partial(file.write, bytes(waiting)))
            staging.complete.add(name)
        except BaseException:
            self._staged.pop(task, None)
            with trio.CancelScope(shield=True):
                await self._remove(task)
            raise
        finally:
            staging.busy -= 1
            staging.touched_at = self._world.clock.monotonic()

    async def attempt(self, request: Run, progress: Callable[[Progress], None]) -> bytes:
        """Run one attempt to its end and return the agent's output.

        Raises:
            KnodeError: RATE_LIMITED when too many wait, NOT_FOUND for a file that was not staged,
                EXPIRED when the deadline came first, or what the runner raises.

        When it returns, raises or is cancelled, nothing of the attempt runs or lies on the disk any more.
        """
        if self._admitted >= self._capacity + self._queue_limit:
            raise KnodeError(
                Code.RATE_LIMITED, "this node's queue is full", "try again later, or another node"
            )
        staging = self._staged.pop(request.task, None)
        self._admitted += 1
        try:
            if set(request.files) - (staging.complete if staging is not None else set()):
                raise KnodeError(
                    Code.NOT_FOUND, "a file of the task is not here (any more)", "submit it again"
                )
            deadline = self._world.clock.monotonic() + request.deadline_ms / 1000
            with trio.move_on_at(deadline):
                async with self._places:
                    return await self._run(request, deadline, progress)
            raise _expired()
        finally:
            self._admitted -= 1
            with trio.CancelScope(shield=True):
                await self._remove(request.task)

    async def _run(self, request: Run, deadline: float, progress: Callable[[Progress], None]) -> bytes:
        folder = self._attempts / request.task.hex()
        if request.files or not self._runner.is_builtin(request.agent):
            await self._world.blocking.run(lambda: self._world.disk.make_folder(folder))
        attempt = Attempt(
            task_id=request.task.hex(),
            input=request.input,
            token=request.task.hex(),
            remaining_seconds=deadline - self._world.clock.monotonic(),
            files=tuple(folder / "input" / name for name in request.files),
        )
        try:
            return (await self._runner.run(request.agent, attempt, progress)).output
        except KnodeError as error:
            if error.code is Code.TIMEOUT:
                raise _expired() from error
            raise

    async def _answer_stage(self, call: Call, stage: Stage) -> None:
        if call.stream is None:
            raise KnodeError(Code.INVALID_ARGUMENT, "a file comes on a stream")
        await self.stage(stage.task, stage.name, aiter(call.stream))

    async def _answer_run(self, call: Call, run: Run) -> Ran:
        log = {"task": run.task.hex(), "agent": run.agent, "trace": call.context.trace[:16].hex()}
        started = self._world.clock.monotonic()
        self._log.info("attempt begins", **log, peer=call.caller.node_id)
        try:
            output = await self.attempt(run, lambda report: call.progress(encode(_report(report))))
        except KnodeError as error:
            self._log.info("attempt failed", **log, code=error.code, why=error.message)
            raise
        seconds = round(self._world.clock.monotonic() - started, 4)
        self._log.info("attempt succeeded", **log, seconds=seconds, output_bytes=len(output))
        return Ran(output)

    def _staging(self, task: bytes) -> _Staging:
        staging = self._staged.get(task)
        if staging is None:
            if len(self._staged) >= STAGED_TASKS:
                raise KnodeError(
                    Code.RATE_LIMITED, "files of too many tasks wait on this node", "try again later"
                )
            staging = self._staged[task] = _Staging(self._world.clock.monotonic())
        return staging

    async def _remove(self, task: bytes) -> None:
        folder = self._attempts / task.hex()
        if self._world.disk.exists(folder):
            await self._world.blocking.run(lambda: self._world.disk.remove(folder))

    def _clean(self) -> None:
        for name in self._world.disk.list_folder(self._attempts):
            self._world.disk.remove(self._attempts / name)


class _Staging:
    """The files of one task that wait for it."""

    def __init__(self, now: float) -> None:
        self.names: set[str] = set()
        self.complete: set[str] = set()
        self.size = 0
        self.busy = 0
        self.touched_at = now


def _report(progress: Progress) -> Report:
    fraction = progress.fraction
    permille = NO_FRACTION if fraction is None else round(1000 * min(1.0, max(0.0, fraction)))
    return Report(permille, progress.text[:200])


def _expired() -> KnodeError:
    return KnodeError(
        Code.EXPIRED,
        "the task's deadline came before it was done",
        "submit it again with a longer --deadline",
    )
