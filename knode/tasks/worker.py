"""The node that runs an attempt: taking its files, waiting for a free place, running, answering."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio

from knode.agents.runtime import Attempt, Progress, Runner
from knode.errors import Code, KnodeError
from knode.identity import PublicKey
from knode.klp.codec import encode
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peers import Peers
from knode.tasks.folders import Folders
from knode.tasks.messages import NO_FRACTION, Ran, Report, Run, Stage
from knode.tasks.places import OnProgress, Places
from knode.tasks.routing import RUNNING_ROLES
from knode.world import Log, Monotonic, World

SWEEP_S = 5.0
"""How often it looks for files that nobody came for and attempts that nobody waits for."""
ABANDONED_AFTER_S = 10.0
"""How long an attempt goes on while its submitter is away. The submitter gives up as soon."""


class Worker:
    """Runs the attempts of direct tasks, as far as there are places; the rest is refused.

    An attempt ends when its agent does, at its deadline, when its submitter cancels it, and some 15
    seconds after its submitter was lost or has restarted: nobody could be told its result.
    """

    def __init__(
        self,
        world: World,
        runner: Runner,
        places: Places,
        folders: Folders,
        membership: Membership,
        peers: Peers,
        methods: Methods,
        log: Log,
    ) -> None:
        self._world = world
        self._runner = runner
        self._places = places
        self._folders = folders
        self._membership = membership
        self._peers = peers
        self._log = log
        # A dictionary for its order: what is stopped first must not depend on addresses in memory.
        self._watched: dict[_Watched, None] = {}
        methods.add("task.stage", Stage, self._answer_stage)
        methods.add("task.run", Run, self._answer_run)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Remove what earlier runs left; then, until cancelled, what nobody waits for any more."""
        await self._folders.clean()
        task_status.started()
        while True:
            await trio.sleep(SWEEP_S)
            await self._folders.expire()
            now = self._world.clock.monotonic()
            for watched in self._watched:
                watched.stop_if_abandoned(self._boot_of(watched.submitter), now)

    async def stage(self, owner: PublicKey, stage: Stage, chunks: AsyncIterator[bytes]) -> None:
        """Keep a file for a task's attempt; see `Folders.keep`."""
        await self._folders.keep(owner.raw, stage, chunks)

    async def attempt(self, owner: PublicKey, request: Run, trace: bytes, progress: OnProgress) -> bytes:
        """Run one attempt to its end and return the agent's output.

        Args:
            owner: the node that submitted the task, and sent its files.
            request: what to run.
            trace: of the submitter's log, for this node's.
            progress: told how far the agent is.

        Raises:
            KnodeError: RATE_LIMITED when too many wait, NOT_FOUND for a file that was not staged,
                EXPIRED when the deadline came first, or what the runner raises.

        When it returns, raises or is cancelled, nothing of the attempt runs or lies on the disk any more,
        but for what the disk itself refuses to remove.
        """
        log = {"task": request.task.hex(), "agent": request.agent, "trace": trace[:16].hex()}
        self._log.info("attempt begins", **log, submitter=owner.node_id)
        started = self._world.clock.monotonic()
        outcome: dict[str, object] = {"outcome": "stopped"}
        try:
            output = await self._attempt(owner, request, progress)
            outcome = {"outcome": "succeeded", "output_bytes": len(output)}
        except KnodeError as error:
            outcome = {"outcome": error.code, "why": error.message}
            raise
        finally:
            seconds = round(self._world.clock.monotonic() - started, 4)
            self._log.info("attempt ended", **log, **outcome, seconds=seconds)
        return output

    async def _attempt(self, owner: PublicKey, request: Run, progress: OnProgress) -> bytes:
        async with self._folders.claim(owner.raw, request.task, request.files) as folder:
            self._places.admit()
            try:
                if not self._runner.is_builtin(request.agent):
                    await self._folders.make(request.task)
                task = request.task.hex()
                attempt = Attempt(
                    folder=task,
                    input=request.input,
                    token=task,
                    number=1,
                    deadline=Monotonic(self._world.clock.monotonic() + request.deadline_ms / 1000),
                    files=tuple(folder / "input" / name for name in request.files),
                )
                result = await self._places.run(request.agent, attempt, progress)
                if result.effects:
                    raise KnodeError(
                        Code.INVALID_ARGUMENT,
                        f"{request.agent} left effects, and a direct task has none but its result",
                        "submit it without --direct",
                    )
                return result.output
            finally:
                self._places.leave()

    # What peers ask.

    async def _answer_stage(self, call: Call, stage: Stage) -> None:
        self._check_role()
        if call.stream is None:
            raise KnodeError(Code.INVALID_ARGUMENT, "a file comes on a stream")
        await self.stage(call.caller, stage, aiter(call.stream))

    async def _answer_run(self, call: Call, run: Run) -> Ran:
        self._check_role()
        now = self._world.clock.monotonic()
        watched = _Watched(call.caller, self._boot_of(call.caller), trio.CancelScope(), now)
        self._watched[watched] = None
        try:
            with watched.scope:
                return Ran(
                    await self.attempt(
                        call.caller,
                        run,
                        call.context.trace,
                        lambda progress: call.progress(encode(report_of(progress))),
                    )
                )
        finally:
            del self._watched[watched]
        raise KnodeError(Code.CANCELLED, "the node that submitted the task is gone")

    def _check_role(self) -> None:
        role = self._membership.own.role
        if role not in RUNNING_ROLES:
            raise KnodeError(Code.NOT_ALLOWED, f"this node runs no tasks: its role is {role}")

    def _boot_of(self, key: PublicKey) -> bytes:
        """Return which boot of a node is here; empty when none is."""
        conversation = self._peers.peer(key).conversation
        return b"" if conversation is None else conversation.established.peer_boot


@dataclass(eq=False, slots=True)
class _Watched:
    """An attempt for another node."""

    submitter: PublicKey
    boot: bytes
    """The one that asked."""
    scope: trio.CancelScope
    here_at: float
    """When the submitter was last seen here."""

    def stop_if_abandoned(self, boot: bytes, now: float) -> None:
        """Stop it when the boot that asked for it has not been here for too long."""
        if boot and boot == self.boot:
            self.here_at = now
        elif now - self.here_at > ABANDONED_AFTER_S:
            self.scope.cancel()


def report_of(progress: Progress) -> Report:
    """Return how far an attempt is, as it travels."""
    fraction = progress.fraction
    permille = NO_FRACTION if fraction is None else round(1000 * min(1.0, max(0.0, fraction)))
    return Report(permille, progress.text[:200])
