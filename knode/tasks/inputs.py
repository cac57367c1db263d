"""The files of durable tasks: on two members before the task is submitted, on the worker before it runs.

A task's files are known by their hashes, which stand in the ledger; whoever holds them is a hint. Before a
submit is proposed they lie, whole and synced, on the node that submits and on one more member that runs
tasks. The node that is assigned an attempt asks the holders in turn for what it lacks. Each node lets go of
them once the task has ended, or when an hour long nobody knew the task.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from enum import Enum
from functools import partial
from pathlib import Path

import trio

from knode.errors import Code, KnodeError
from knode.mesh.chunks import read_chunks
from knode.mesh.liveness import PeerState
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peers import Peers
from knode.mesh.roster import Member
from knode.tasks.artifacts import Artifact, open_artifacts
from knode.tasks.commands import File
from knode.tasks.holding import Holding, write_checked
from knode.tasks.messages import AssignAttempt, HoldFile, SendFile
from knode.tasks.places import expired
from knode.tasks.routing import RUNNING_ROLES
from knode.world import Log, Monotonic, World

COPIES = 2
"""On how many members a file lies before its task is submitted, if so many run tasks."""
ASK_EVERY_S = 30.0
"""How often it is asked which tasks have ended."""
ASKED_AT_ONCE = 256
UNKNOWN_S = 3600.0
"""How long files are held for a task that the ledger does not know."""
SEND_S = 240.0
"""How long one holder may take to send one file."""
_FAR_S = 1.0


class Fate(Enum):
    """What the cell knows of a task."""

    UNKNOWN = "unknown"
    """It was never submitted, or not yet, or is forgotten."""
    LIVE = "live"
    """It waits to be submitted, or has not ended."""
    OVER = "over"


AskFates = Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, Fate]]]
"""Ask what became of tasks, at most ASKED_AT_ONCE; of those that are not in the answer, ask again later.

Raises a KnodeError when nobody can say now."""


class Inputs:
    """The files of durable tasks, as this node submits, holds, gives and uses them."""

    def __init__(
        self,
        world: World,
        holding: Holding,
        membership: Membership,
        peers: Peers,
        methods: Methods,
        ask_fates: AskFates,
        log: Log,
    ) -> None:
        self._world = world
        self._holding = holding
        self._membership = membership
        self._peers = peers
        self._ask_fates = ask_fates
        self._log = log
        self._awaited: Counter[tuple[bytes, bytes]] = Counter()
        """Task and hash of the files that this node has asked holders for."""
        methods.add("task.hold", HoldFile, self._answer_hold)
        methods.add("task.send", SendFile, self._answer_send, roles=RUNNING_ROLES)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Find what the last start left; then, until cancelled, let go of what nobody needs any more."""
        await self._holding.load()
        task_status.started()
        while True:
            await trio.sleep(ASK_EVERY_S)
            await self._let_go()

    @property
    def held(self) -> tuple[int, int]:
        """How many files are held here, and their bytes."""
        return self._holding.files

    async def keep(self, task: bytes, paths: Sequence[Path], deadline: Monotonic) -> tuple[File, ...]:
        """Hold the files of a task here, durably; `spread` them before it is submitted.

        Args:
            task: its id, new.
            paths: absolute, on this machine.
            deadline: monotonic; until when all of it must be done.

        Raises:
            KnodeError: NOT_FOUND, INVALID_ARGUMENT, TOO_LARGE, DISK_FULL for a file; RATE_LIMITED over this
                node's room; EXPIRED. Then this node holds nothing of it.
        """
        artifacts = await open_artifacts(self._world, paths)
        try:
            with trio.move_on_at(deadline):
                return tuple([await self._keep_here(task, artifact) for artifact in artifacts])
            raise expired()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._holding.drop(task)
            raise

    async def spread(self, task: bytes, files: Sequence[File], deadline: Monotonic) -> tuple[bytes, ...]:
        """Have one more member hold files that are held here, durably.

        Returns:
            The ids of the members that hold all of them: of this one alone where no other runs tasks.

        Raises:
            KnodeError: UNAVAILABLE when no other member takes them in time, though one runs tasks.
        """
        with trio.move_on_at(deadline):
            return (self._membership.own.id.raw, *await self._spread(task, files))
        raise KnodeError(
            Code.UNAVAILABLE, "no other member took all files in time", "'knode peer list' shows who is here"
        )

    async def refresh(self, task: bytes, files: Sequence[File], holders: Sequence[bytes]) -> None:
        """Tell the other holders that a task still waits to be submitted; they get what they lost.

        Call it every quarter of an hour or so while a submit is pending; whoever cannot be reached is
        passed over.
        """
        self._holding.touch(task)
        for member in self._members(holders):
            try:
                await self._give_all(task, files, member)
            except KnodeError as error:
                self._log.info("files not held anew", task=task.hex(), node=member.name, why=error.message)

    async def forget(self, task: bytes) -> None:
        """Let go of a task's files here: it has ended, or is not submitted after all."""
        await self._holding.drop(task)

    async def bring(self, request: AssignAttempt, folder: Path) -> None:
        """Put the files of an attempt into `folder`, from here or from a holder, each checked by its hash.

        Raises:
            KnodeError: UNAVAILABLE when no holder gives one of them; DISK_FULL, RATE_LIMITED, TOO_LARGE.
        """
        await self._world.blocking.run(partial(self._world.disk.make_folder, folder))
        for file in request.files:
            task = request.fence.task
            if self._holding.has(task, file) and await self._copy(task, file, folder):
                continue
            await self._fetch(task, file, request.holders)
            if not await self._copy(task, file, folder):
                raise KnodeError(Code.UNAVAILABLE, f"{file.name} is damaged on this node's disk")

    # Holding, as the node that submits.

    async def _keep_here(self, task: bytes, artifact: Artifact) -> File:
        digest = hashlib.sha256()
        async with aclosing(read_chunks(self._world, artifact.path, artifact.size)) as chunks:
            async for chunk in chunks:
                digest.update(chunk)
        file = File(artifact.name, artifact.size, digest.digest())
        async with aclosing(read_chunks(self._world, artifact.path, artifact.size)) as chunks:
            await self._holding.keep(self._membership.own.id.raw, task, file, chunks)
        return file

    async def _spread(self, task: bytes, files: Sequence[File]) -> tuple[bytes, ...]:
        """Have one more member hold the files, the nearest that takes them; return its id."""
        others = [member for member in self._other_members() if member.role in RUNNING_ROLES]
        refusals: list[str] = []
        for member in sorted(others, key=self._distance):
            if self._peers.peer(member.key).state is not PeerState.ALIVE:
                refusals.append(f"{member.name}: it is {self._peers.peer(member.key).state}")
                continue
            try:
                await self._give_all(task, files, member)
                return (member.id.raw,)
            except KnodeError as error:
                refusals.append(f"{member.name}: {error.message}")
        if not others:
            return ()
        raise KnodeError(
            Code.UNAVAILABLE,
            f"no other member takes the files, and {COPIES} must hold them ({', '.join(refusals[:8])})",
            "'knode peer list' shows who is here",
        )

    async def _give_all(self, task: bytes, files: Sequence[File], member: Member) -> None:
        for file in files:
            await self._give(task, file, member)

    async def _give(self, task: bytes, file: File, member: Member) -> None:
        deadline = Monotonic(self._world.clock.monotonic() + SEND_S)
        async with aclosing(self._holding.read(task, file)) as chunks:
            await self._peers.peer(member.key).request(
                "task.hold", HoldFile(task, file), deadline=deadline, chunks=chunks
            )

    # Fetching, as the node that runs.

    async def _fetch(self, task: bytes, file: File, holders: Sequence[bytes]) -> None:
        refusals: list[str] = []
        self._awaited[task, file.hash] += 1
        try:
            for member in self._members(holders):
                deadline = Monotonic(self._world.clock.monotonic() + SEND_S)
                try:
                    peer = self._peers.peer(member.key)
                    await peer.request("task.send", SendFile(task, file), deadline=deadline)
                except KnodeError as error:
                    refusals.append(f"{member.name}: {error.message}")
                if self._holding.has(task, file):
                    return
        finally:
            self._awaited -= Counter([(task, file.hash)])
        raise KnodeError(
            Code.UNAVAILABLE,
            f"no member gives {file.name} ({', '.join(refusals[:8]) or 'none that is left holds it'})",
        )

    async def _copy(self, task: bytes, file: File, folder: Path) -> bool:
        """Copy a held file into a folder; False when what is held is damaged, and then it is let go of."""
        try:
            with await self._world.blocking.run(partial(self._world.disk.create, folder / file.name)) as to:
                async with aclosing(self._holding.read(task, file)) as chunks:
                    await write_checked(self._world, to, file, chunks)
        except KnodeError as error:
            if error.code is not Code.INVALID_ARGUMENT:
                raise
            await self._holding.discard(task, file)
            return False
        return True

    # What peers ask.

    async def _answer_hold(self, call: Call, body: HoldFile) -> None:
        if call.stream is None:
            raise KnodeError(Code.INVALID_ARGUMENT, "a file comes on a stream")
        task, file = body.task, body.file
        own = self._membership.own
        if own.role not in RUNNING_ROLES:
            raise KnodeError(Code.NOT_ALLOWED, f"this node holds no files: its role is {own.role}")
        if self._awaited[task, file.hash]:
            # Whoever brings what was asked for: the hash says that it is right.
            owner = self._holding.owner(task) or own.id.raw
        else:
            owner = self._membership.roster.admit(call.caller.raw).id.raw
        await self._holding.keep(owner, task, file, aiter(call.stream))

    async def _answer_send(self, call: Call, body: SendFile) -> None:
        """Give a file to who asks for it. Whoever knows its hash had it from the ledger, or has the file."""
        if not self._holding.has(body.task, body.file):
            raise KnodeError(Code.NOT_FOUND, f"{body.file.name} is not held here")
        await self._give(body.task, body.file, self._membership.roster.admit(call.caller.raw))

    # Letting go.

    async def _let_go(self) -> None:
        tasks = self._holding.tasks
        for begin in range(0, len(tasks), ASKED_AT_ONCE):
            asked = tasks[begin : begin + ASKED_AT_ONCE]
            try:
                fates = await self._ask_fates(asked)
            except KnodeError as error:
                self._log.debug("nobody says which tasks have ended", why=error.message)
                return
            for task in asked:
                match fates.get(task):
                    case Fate.OVER:
                        await self._holding.drop(task)
                    case Fate.UNKNOWN if self._holding.is_idle(task, UNKNOWN_S):
                        self._log.info("files of a task that nobody knows are removed", task=task.hex())
                        await self._holding.drop(task)
                    case Fate.LIVE:
                        self._holding.touch(task)

    # Members.

    def _other_members(self) -> list[Member]:
        members = self._membership.roster.members.values()
        return [member for member in members if member.key != self._membership.key.public]

    def _members(self, ids: Sequence[bytes]) -> list[Member]:
        """Return the other members among these, the nearest first."""
        return sorted((m for m in self._other_members() if m.id.raw in ids), key=self._distance)

    def _distance(self, member: Member) -> tuple[bool, float, str]:
        peer = self._peers.peer(member.key)
        measured = None if peer.conversation is None else peer.conversation.rtt_s
        return peer.state is not PeerState.ALIVE, _FAR_S if measured is None else measured, member.node_id
