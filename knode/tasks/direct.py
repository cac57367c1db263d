"""Submitting direct tasks: choosing a node, sending files, asking once, keeping what came of it."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from knode.errors import Code, KnodeError
from knode.klp.codec import Decoder
from knode.klp.messages import Context
from knode.mesh.chunks import read_chunks
from knode.mesh.member_log import MemberLog
from knode.mesh.membership import Membership
from knode.mesh.peers import Peers
from knode.mesh.roster import Member
from knode.tasks.artifacts import Artifact, open_artifacts
from knode.tasks.candidates import Candidates
from knode.tasks.messages import NO_FRACTION, Ran, Report, Run, Stage
from knode.tasks.places import expired
from knode.tasks.routing import choose, demand
from knode.tasks.task import Task
from knode.tasks.values import MAX_INPUT_BYTES
from knode.tasks.worker import Worker
from knode.world import Log, Monotonic, World

KEPT_TASKS = 1000
KEPT_OUTPUT_BYTES = 16 * 1024 * 1024
RUNNING_TASKS = 256
DEFAULT_DEADLINE_S = 60.0
LONGEST_DEADLINE_S = 300.0
ANSWER_GRACE_S = 2.0
"""How much longer than its deadline the answer of a task is waited for."""

_ran: Decoder[Ran] = Decoder(Ran)
_report: Decoder[Report] = Decoder(Report)


@dataclass(frozen=True, slots=True)
class Submission:
    """What is asked for."""

    agent: str
    input: bytes = b""
    artifacts: tuple[Path, ...] = ()
    """Absolute paths on this machine."""
    on: str | None = None
    """Name, id or start of an id of the node that must run it; None: whoever is best."""
    deadline_s: float = DEFAULT_DEADLINE_S


@dataclass(frozen=True, slots=True)
class _Assignment:
    """A task on its way: who runs it, and what it takes with it."""

    task: Task
    number: bytes
    """The task's id."""
    member: Member
    input: bytes
    artifacts: tuple[Artifact, ...]
    deadline: float
    context: Context


class DirectTasks:
    """The direct tasks that this node submitted: in memory, the last thousand."""

    def __init__(
        self,
        world: World,
        membership: Membership,
        peers: Peers,
        candidates: Candidates,
        worker: Worker,
        log: Log,
    ) -> None:
        self._world = world
        self._membership = membership
        self._peers = peers
        self._candidates = candidates
        self._worker = worker
        self._log = log
        self._member_log = MemberLog(world.clock, log)
        self._tasks: OrderedDict[str, Task] = OrderedDict()
        self._scopes: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks that were submitted, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def submit(self, submission: Submission) -> Task:
        """Begin a task and return it at once; `Task.ended` waits for its end.

        Raises:
            KnodeError: TOO_LARGE, INVALID_ARGUMENT, NOT_FOUND (a file or node), NO_ELIGIBLE_NODE,
                NO_AGENT, NOT_ALLOWED, UNAVAILABLE, RATE_LIMITED: then nothing was begun.
        """
        _check(submission)
        artifacts = await open_artifacts(self._world, submission.artifacts)
        number = self._world.randomness.token(16)
        member = self._choose(submission, number)
        if len(self._scopes) >= RUNNING_TASKS:
            raise KnodeError(
                Code.RATE_LIMITED, f"{RUNNING_TASKS} direct tasks run already", "wait for some to end"
            )
        task = Task(number.hex(), submission.agent, member.node_id, member.name, self._world.clock.wall())
        trace = self._world.randomness.token(24) + b"\x01"
        assignment = _Assignment(
            task,
            number,
            member,
            submission.input,
            artifacts,
            self._world.clock.monotonic() + submission.deadline_s,
            Context(correlation=number, causation=b"", trace=trace),
        )
        if self._nursery is None:
            raise KnodeError(Code.UNAVAILABLE, "this node goes down", "submit it on another node")
        self._forget_old()
        self._tasks[task.id] = task
        self._scopes[task.id] = trio.CancelScope()
        self._nursery.start_soon(self._carry_out, assignment)
        return task

    def list(self) -> list[Task]:
        """Return the tasks, newest first."""
        return list(reversed(self._tasks.values()))

    def find(self, selector: str) -> Task:
        """Return the task with this id or unique start of an id; NOT_FOUND, INVALID_ARGUMENT."""
        fitting = [t for t in self._tasks.values() if selector and t.id.startswith(selector)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise KnodeError(
                Code.INVALID_ARGUMENT, f"{selector!r} fits {len(fitting)} tasks", "give more of the id"
            )
        raise KnodeError(
            Code.NOT_FOUND,
            f"this node has submitted no task {selector[:64]!r}",
            "'knode task list' shows the last ones since its start",
        )

    async def cancel(self, task: Task) -> None:
        """Cancel a task and wait until that is settled.

        Raises:
            KnodeError: INVALID_ARGUMENT when it has ended already.
        """
        scope = self._scopes.get(task.id)
        if scope is None:
            raise KnodeError(
                Code.INVALID_ARGUMENT,
                f"the task has ended already: it is {task.state}",
                f"'knode task show {task.id[:8]}'",
            )
        scope.cancel()
        await task.ended()

    # Choosing a node.

    def _choose(self, submission: Submission, number: bytes) -> Member:
        roster = self._membership.roster
        if submission.on is not None:
            member = roster.find(submission.on)
            demand(self._candidates.of(member), submission.agent)
            return member
        candidates = self._candidates.everyone().values()
        return roster.find(choose(candidates, submission.agent, number).node_id)

    # Carrying a task out.

    async def _carry_out(self, assignment: _Assignment) -> None:
        """See a task to its end. Whatever happens, it ends, and nothing but a cancellation is raised."""
        task, context = assignment.task, assignment.context
        log = {"task": task.id, "agent": task.agent, "node": task.node, "trace": context.trace[:16].hex()}
        self._log.info("task submitted", **log)
        try:
            with self._scopes[task.id] as scope:
                await self._send_files(assignment)
                task.succeed(await self._ask(assignment))
            if scope.cancelled_caught:
                task.fail(KnodeError(Code.CANCELLED, "the task was cancelled"))
        except KnodeError as error:
            task.fail(error)
        except Exception:
            self._log.error("a task failed", **log, exc_info=True)
            task.fail(KnodeError(Code.INTERNAL, "a fault of knode itself", "'knode logs tail'"))
        finally:
            del self._scopes[task.id]
            if not task.state.final:
                task.fail(KnodeError(Code.UNKNOWN, "this node stopped while the task ran"))
            self._log.info("task ended", **log, state=task.state)

    async def _send_files(self, assignment: _Assignment) -> None:
        total = len(assignment.artifacts)
        with trio.move_on_at(assignment.deadline) as sending:
            for index, artifact in enumerate(assignment.artifacts):
                assignment.task.report(None, f"sending {artifact.name} ({index + 1} of {total})")
                try:
                    await self._send_file(assignment, artifact)
                except KnodeError as error:
                    # The agent was not asked yet, so nothing can have been done: no reason to say unknown.
                    if error.code not in (Code.UNKNOWN, Code.TIMEOUT):
                        raise
                    why = f"{artifact.name} could not be sent: {error.message}"
                    raise KnodeError(Code.UNAVAILABLE, why, "submit it again") from error
        if sending.cancelled_caught:
            raise expired()

    async def _send_file(self, assignment: _Assignment, artifact: Artifact) -> None:
        stage = Stage(assignment.number, artifact.name, artifact.size)
        member = assignment.member
        async with aclosing(read_chunks(self._world, artifact.path, artifact.size)) as chunks:
            if member.key == self._membership.key.public:
                await self._worker.stage(member.key, stage, chunks)
            else:
                await self._peers.peer(member.key).request(
                    "task.stage",
                    stage,
                    deadline=Monotonic(assignment.deadline + ANSWER_GRACE_S),
                    context=assignment.context,
                    chunks=chunks,
                )

    async def _ask(self, assignment: _Assignment) -> bytes:
        task, member, context = assignment.task, assignment.member, assignment.context
        left_ms = round((assignment.deadline - self._world.clock.monotonic()) * 1000)
        if left_ms <= 0:
            raise expired()
        names = tuple(artifact.name for artifact in assignment.artifacts)
        run = Run(assignment.number, task.agent, assignment.input, names, left_ms)
        if member.key == self._membership.key.public:
            return await self._worker.attempt(
                member.key, run, context.trace, lambda progress: task.report(progress.fraction, progress.text)
            )
        answer = await self._peers.peer(member.key).request(
            "task.run",
            run,
            deadline=Monotonic(assignment.deadline + ANSWER_GRACE_S),
            context=context,
            on_progress=partial(self._take_report, task),
        )
        return _ran.decode(answer).output

    def _take_report(self, task: Task, body: bytes) -> None:
        try:
            report = _report.decode(body)
        except KnodeError as error:
            self._member_log.warning(
                "a report that cannot be read", peer=task.node_id, task=task.id, why=error.message
            )
            return
        task.report(None if report.permille == NO_FRACTION else report.permille / 1000, report.text)

    def _forget_old(self) -> None:
        """Make room for one more: forget the oldest that have ended."""
        kept_bytes = sum(len(task.output or b"") for task in self._tasks.values())
        for task in list(self._tasks.values()):
            if len(self._tasks) < KEPT_TASKS and kept_bytes <= KEPT_OUTPUT_BYTES:
                return
            if task.state.final:
                kept_bytes -= len(task.output or b"")
                del self._tasks[task.id]


def _check(submission: Submission) -> None:
    if len(submission.input) > MAX_INPUT_BYTES:
        raise KnodeError(
            Code.TOO_LARGE,
            f"the input has {len(submission.input)} bytes; at most {MAX_INPUT_BYTES} fit",
            "pass the data as a file: '--artifact PATH'",
        )
    if not 0.001 <= submission.deadline_s <= LONGEST_DEADLINE_S:
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            f"a direct task's deadline lies at most {LONGEST_DEADLINE_S:g} seconds ahead",
            "give seconds: '--deadline 60'",
        )
