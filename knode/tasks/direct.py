"""Submitting direct tasks: choosing a node, sending files, asking once, keeping what came of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from knode.agents.registry import Registry
from knode.agents.registry import State as AgentState
from knode.agents.runtime import Runner
from knode.errors import Code, KnodeError
from knode.klp.codec import Decoder, encode
from knode.klp.messages import Context
from knode.mesh.liveness import PeerState
from knode.mesh.membership import Membership
from knode.mesh.peer import Peer
from knode.mesh.peers import Peers
from knode.mesh.roster import Member
from knode.tasks.messages import (
    MAX_FILES,
    MAX_INPUT_BYTES,
    NO_FRACTION,
    Offer,
    Ran,
    Report,
    Run,
    Stage,
)
from knode.tasks.routing import Candidate, choose, obstacle
from knode.tasks.task import Task
from knode.tasks.worker import Worker
from knode.world import Log, Monotonic, World

KEPT_TASKS = 1000
RUNNING_TASKS = 256
DEFAULT_DEADLINE_S = 60.0
LONGEST_DEADLINE_S = 300.0
ANSWER_GRACE_S = 2.0
"""How much longer than its deadline the answer of a task is waited for."""
READ_BYTES = 256 * 1024
OFFER_TOPIC = "agents.offer"

_ran: Decoder[Ran] = Decoder(Ran)
_report: Decoder[Report] = Decoder(Report)
_offer: Decoder[Offer] = Decoder(Offer)


@dataclass(frozen=True, slots=True)
class Submission:
    """What is asked for."""

    agent: str
    input: bytes = b""
    artifacts: tuple[Path, ...] = ()
    on: str | None = None
    """Name, id or start of an id of the node that must run it; None: whoever is best."""
    deadline_s: float = DEFAULT_DEADLINE_S


class DirectTasks:
    """The direct tasks that this node submitted: in memory, the last thousand."""

    def __init__(
        self,
        world: World,
        membership: Membership,
        peers: Peers,
        worker: Worker,
        runner: Runner,
        registry: Registry,
        log: Log,
    ) -> None:
        self._world = world
        self._membership = membership
        self._peers = peers
        self._worker = worker
        self._runner = runner
        self._registry = registry
        self._log = log
        self._tasks: OrderedDict[str, Task] = OrderedDict()
        self._scopes: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self._offers: dict[bytes, frozenset[str]] = {}
        peers.on_event(OFFER_TOPIC, lambda key, body: self._take_offer(key.raw, body))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks that were submitted, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                self.offer()
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def offer(self) -> None:
        """Tell every member which agents run here."""
        entries = [e for e in self._registry.list() if e.state is AgentState.RUNNING]
        agents = tuple(
            (e.manifest.id, e.manifest.version) for e in entries if self._runner.can_run(e.manifest.id)
        )
        self._peers.announce(OFFER_TOPIC, encode(Offer(agents)))

    def offers(self, member: Member) -> frozenset[str]:
        """Return the ids of the agents that a member has running, as far as is known here."""
        if member.key == self._membership.key.public:
            running = (e for e in self._registry.list() if e.state is AgentState.RUNNING)
            return frozenset(e.manifest.id for e in running if self._runner.can_run(e.manifest.id))
        return self._offers.get(member.key.raw, frozenset())

    async def submit(self, submission: Submission) -> Task:
        """Begin a task and return it at once; `Task.ended` waits for its end.

        Raises:
            KnodeError: TOO_LARGE, INVALID_ARGUMENT, NOT_FOUND (a file or node), NO_ELIGIBLE_NODE,
                NO_AGENT, UNAVAILABLE, RATE_LIMITED: then nothing was begun.
        """
        assert self._nursery is not None
        files = await self._check(submission)
        member = self._choose(submission)
        if len(self._scopes) >= RUNNING_TASKS:
            raise KnodeError(
                Code.RATE_LIMITED, f"{RUNNING_TASKS} direct tasks run already", "wait for some to end"
            )
        number = self._world.randomness.token(16)
        task = Task(number.hex(), submission.agent, member.node_id, member.name, self._world.clock.wall())
        self._tasks[task.id] = task
        while len(self._tasks) > KEPT_TASKS:
            oldest = next((t for t in self._tasks.values() if t.state.final), None)
            if oldest is None:
                break
            del self._tasks[oldest.id]
        self._scopes[task.id] = trio.CancelScope()
        self._nursery.start_soon(self._carry_out, task, number, member, submission, files)
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
            "'knode task list' shows the last thousand since its start",
        )

    async def cancel(self, task: Task) -> None:
        """Cancel a task and wait until that is settled.

        Raises:
            KnodeError: INVALID_ARGUMENT when it has ended already.
        """
        scope = self._scopes.get(task.id)
        if scope is None:
            raise KnodeError(Code.INVALID_ARGUMENT, f"the task has ended already: it is {task.state}")
        scope.cancel()
        await task.ended()

    # Choosing a node.

    def _choose(self, submission: Submission) -> Member:
        candidates = {m.node_id: self._candidate(m) for m in self._membership.roster.members.values()}
        if submission.on is None:
            return self._membership.roster.find(choose(candidates.values(), submission.agent).node_id)
        member = self._membership.roster.find(submission.on)
        why = obstacle(candidates[member.node_id], submission.agent)
        if why:
            here = candidates[member.node_id].state is PeerState.ALIVE
            raise KnodeError(
                Code.NO_AGENT if here else Code.UNAVAILABLE,
                f"{member.name} cannot run {submission.agent}: {why}",
                "'knode agent list' shows which agents run where; without --on the best node is chosen",
            )
        return member

    def _candidate(self, member: Member) -> Candidate:
        if member.key == self._membership.key.public:
            load, state, rtt_s = self._worker.load, PeerState.ALIVE, 0.0
        else:
            peer = self._peers.peer(member.key)
            state, rtt_s = peer.state, 1.0
            if peer.conversation is not None and peer.conversation.rtt_s is not None:
                rtt_s = peer.conversation.rtt_s
            found = peer.load
            if found is None:
                return Candidate(
                    member.node_id, member.name, member.role, state, self.offers(member), 0, 0, 1, rtt_s
                )
            load = found
        return Candidate(
            member.node_id,
            member.name,
            member.role,
            state,
            self.offers(member),
            load.running,
            load.queued,
            load.capacity,
            rtt_s,
        )

    def _take_offer(self, key: bytes, body: bytes) -> None:
        self._offers[key] = frozenset(agent for agent, _ in _offer.decode(body).agents)

    # Carrying a task out.

    async def _check(self, submission: Submission) -> dict[str, Path]:
        if len(submission.input) > MAX_INPUT_BYTES:
            raise KnodeError(
                Code.TOO_LARGE,
                f"the input has {len(submission.input)} bytes; at most {MAX_INPUT_BYTES} fit",
                "pass the data as a file: '--artifact PATH'",
            )
        if not 0 < submission.deadline_s <= LONGEST_DEADLINE_S:
            raise KnodeError(
                Code.INVALID_ARGUMENT,
                f"a direct task's deadline lies within {LONGEST_DEADLINE_S:g} seconds from now",
                "give seconds: '--deadline 60'",
            )
        if len(submission.artifacts) > MAX_FILES:
            raise KnodeError(Code.TOO_LARGE, f"a task takes at most {MAX_FILES} files")
        files: dict[str, Path] = {}
        for path in submission.artifacts:
            if path.name in files:
                raise KnodeError(Code.INVALID_ARGUMENT, f"two files are called {path.name!r}", "rename one")
            files[path.name] = path
            await self._world.blocking.run(partial(self._world.disk.read_at, path, 0, 1))
        return files

    async def _carry_out(
        self, task: Task, number: bytes, member: Member, submission: Submission, files: dict[str, Path]
    ) -> None:
        trace = self._world.randomness.token(24) + b"\x01"
        context = Context(correlation=number, causation=b"", trace=trace)
        log = {"task": task.id, "agent": task.agent, "node": member.name, "trace": trace[:16].hex()}
        self._log.info("task submitted", **log)
        scope = self._scopes[task.id]
        try:
            with scope:
                task.succeed(await self._attempt(task, number, member, submission, files, context))
            if scope.cancelled_caught:
                task.fail(KnodeError(Code.CANCELLED, "the task was cancelled"))
        except KnodeError as error:
            task.fail(error)
        finally:
            del self._scopes[task.id]
            if not task.state.final:
                task.fail(KnodeError(Code.UNKNOWN, "this node stopped while the task ran"))
        self._log.info("task ended", **log, state=task.state)

    async def _attempt(
        self,
        task: Task,
        number: bytes,
        member: Member,
        submission: Submission,
        files: dict[str, Path],
        context: Context,
    ) -> bytes:
        deadline = self._world.clock.monotonic() + submission.deadline_s
        here = member.key == self._membership.key.public
        peer = self._peers.peer(member.key)
        for index, (name, path) in enumerate(files.items()):
            task.report(None, f"sending {name} ({index + 1} of {len(files)})")
            async with aclosing(self._read(path)) as chunks:
                if here:
                    await self._worker.stage(number, name, chunks)
                else:
                    size = await self._world.blocking.run(partial(self._world.disk.size, path))
                    await self._send(peer, Stage(number, name, size), Monotonic(deadline), context, chunks)
        left_ms = round((deadline - self._world.clock.monotonic()) * 1000)
        if left_ms <= 0:
            raise KnodeError(
                Code.EXPIRED, "the deadline came while the files were sent", "give a longer --deadline"
            )
        run = Run(number, task.agent, submission.input, tuple(files), left_ms)
        if here:
            return await self._worker.attempt(run, lambda p: task.report(p.fraction, p.text))
        answer = await peer.request(
            "task.run",
            run,
            deadline=Monotonic(deadline + ANSWER_GRACE_S),
            context=context,
            on_progress=lambda body: _take_report(task, body),
        )
        return _ran.decode(answer).output

    async def _send(
        self, peer: Peer, stage: Stage, deadline: Monotonic, context: Context, chunks: AsyncIterator[bytes]
    ) -> None:
        try:
            await peer.request("task.stage", stage, deadline=deadline, context=context, chunks=chunks)
        except KnodeError as error:
            # The agent has not been asked yet, so nothing can have been done: no reason to say unknown.
            if error.code in (Code.UNKNOWN, Code.TIMEOUT):
                why = f"{stage.name} could not be sent: {error.message}"
                raise KnodeError(Code.UNAVAILABLE, why, "submit it again") from error
            raise

    async def _read(self, path: Path) -> AsyncGenerator[bytes, None]:
        offset = 0
        while True:
            chunk = await self._world.blocking.run(
                partial(self._world.disk.read_at, path, offset, READ_BYTES)
            )
            if not chunk:
                return
            offset += len(chunk)
            yield chunk


def _take_report(task: Task, body: bytes) -> None:
    report = _report.decode(body)
    task.report(None if report.permille == NO_FRACTION else report.permille / 1000, report.text)
