"""A node's attempts on a simulated disk, in virtual time, and the leader that they are told to.

The agents are real, the sandbox is the scripted one of `memory_cell`; the leader is the other side: it says
what a ledger would, or is away.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
from memory_cell import COMMAND, Inline, Scripted, Seeded

from knode.agents.registry import Registry
from knode.agents.runtime import Runner
from knode.errors import Code, KnodeError
from knode.home.logging import log_to
from knode.identity import KeyPair, PublicKey
from knode.mesh.membership import MIGRATIONS, Membership
from knode.mesh.methods import Methods
from knode.mesh.statements import Revoke, sign_statement
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedClock
from knode.storage import Database
from knode.tasks.attempts import Attempts
from knode.tasks.commands import Fence
from knode.tasks.folders import Folders
from knode.tasks.messages import AssignAttempt, AttemptReport, CompleteAttempt, FailAttempt, Settled
from knode.tasks.places import Places
from knode.tasks.work import Work
from knode.world import Monotonic, World

STATE = Path("/home/state")
INCARNATION = bytes(range(32))
OWNER, NODE, RECOVERY = KeyPair(b"o" * 32), KeyPair(b"n" * 32), KeyPair(b"r" * 32)


def fence(task: int = 1, attempt: int = 1, incarnation: bytes = INCARNATION) -> Fence:
    return Fence(incarnation, task.to_bytes(16, "big"), attempt)


def assign(
    line: str = "say x", of: Fence | None = None, *, agent: str = COMMAND, seconds: float = 600
) -> AssignAttempt:
    of = of or fence()
    return AssignAttempt(of, agent, line.encode(), (), (), round(seconds * 1000), of.task.hex())


@dataclass
class Ledger:
    """The leader: knows which fences are current, and takes each end once."""

    is_here: bool = True
    current: set[Fence] = field(default_factory=set)
    """Those that are waited for; whatever is assigned through `Station.assign` is put here."""
    ended: list[CompleteAttempt | FailAttempt] = field(default_factory=list)
    told: int = 0
    """How often it was told an end, whatever it answered."""
    answers_get_lost: int = 0
    """How many ends it still takes without its answer arriving."""
    refusal: Code | None = None
    """What it answers completions with."""
    reports: list[AttemptReport] = field(default_factory=list)
    asked: list[Fence] = field(default_factory=list)

    def may_lead(self, key: PublicKey) -> bool:
        return True

    async def complete(self, request: CompleteAttempt, *, deadline: Monotonic) -> Settled:
        if self.is_here and self.refusal is not None:
            raise KnodeError(self.refusal, "refused")
        return await self._take(request)

    async def fail(self, request: FailAttempt, *, deadline: Monotonic) -> Settled:
        return await self._take(request)

    async def is_current(self, fence: Fence, *, deadline: Monotonic) -> bool:
        self._must_be_here()
        self.asked.append(fence)
        return fence in self.current

    def report(self, report: AttemptReport) -> None:
        if self.is_here:
            self.reports.append(report)

    async def _take(self, request: CompleteAttempt | FailAttempt) -> Settled:
        self._must_be_here()
        await trio.sleep(0.01)
        self.told += 1
        is_current = request.fence in self.current
        if is_current:
            self.current.remove(request.fence)
            self.ended.append(request)
        if self.answers_get_lost:
            self.answers_get_lost -= 1
            raise KnodeError(Code.UNKNOWN, "the link was lost")
        return Settled(is_current)

    def _must_be_here(self) -> None:
        if not self.is_here:
            raise KnodeError(Code.UNAVAILABLE, "no leader can be reached")


class Station:
    """One start of the node."""

    def __init__(self, disk: SimulatedDisk, world: World, ledger: Ledger, membership: Membership) -> None:
        self.disk = disk
        self.world = world
        self.ledger = ledger
        self.membership = membership
        self.sandbox = Scripted(disk)
        self.lines: list[str] = []
        self.work: Work
        self.attempts: Attempts
        self.places: Places

    async def open(self, running: int, queued: int) -> None:
        log = log_to(self.world, self.lines.append).logger
        registry = Registry(self.world, STATE / "agents", NODE, lambda key: False)
        registry.load()
        runner = Runner(self.world, registry, self.sandbox, STATE / "attempts")
        self.places = Places(runner, running=running, queued=queued)
        folders = Folders(self.world, STATE / "attempts", log, task_bytes=2**20)
        await folders.clean()
        self.work = await Work.open(self.world, STATE / "work.db", log)
        self.attempts = Attempts(
            self.world,
            self.work,
            runner,
            self.places,
            folders,
            _no_files,
            self.membership,
            self.ledger,
            Methods(),
            log,
        )

    async def assign(self, line: str = "say x", of: Fence | None = None, **rest: object) -> Fence:
        request = assign(line, of, **rest)  # type: ignore[arg-type]
        self.ledger.current.add(request.fence)
        await self.attempts.assign(request)
        return request.fence

    async def revoke(self) -> None:
        """Let the cell's owner revoke this node."""
        roster, own = self.membership.roster, self.membership.own
        issued = roster.next_issue_time(own.id.raw, self.world.clock.wall())
        body = Revoke(OWNER.public.raw, roster.era, own.id.raw, (), issued)
        await self.membership.add([sign_statement(OWNER, body)])

    async def until_idle(self) -> None:
        """Wait, in virtual time, until nothing is kept any more; and until the disk knows it."""
        with trio.fail_after(3600):
            while len(self.attempts):  # noqa: ASYNC110
                await trio.sleep(0.05)
        await trio.sleep(1)

    async def kept(self) -> list[Fence]:
        """Return what the disk holds."""
        return [request.fence for request, _ in await self.work.load()]

    @property
    def results(self) -> list[bytes]:
        """What the ledger took, in its order."""
        return [end.bundle.result for end in self.ledger.ended if isinstance(end, CompleteAttempt)]

    @property
    def failures(self) -> list[tuple[str, bool]]:
        return [(end.code, end.retryable) for end in self.ledger.ended if isinstance(end, FailAttempt)]


def new_disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    for folder in (STATE, STATE / "agents", STATE / "attempts", Path("/cell")):
        disk.make_folder(folder)
    return disk


@asynccontextmanager
async def station(
    disk: SimulatedDisk, ledger: Ledger, *, running: int = 2, queued: int = 64, seed: str = "station"
) -> AsyncIterator[Station]:
    """Start the node on a disk; leaving stops it as SIGTERM does, or as SIGKILL when the disk is not read
    again."""
    world = World(SimulatedClock(), Seeded(seed), disk, Inline())
    async with _membership(world) as membership:
        made = Station(disk, world, ledger, membership)
        await made.open(running, queued)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(made.attempts.run)
                yield made
                nursery.cancel_scope.cancel()
        finally:
            await made.work.aclose()


@asynccontextmanager
async def _membership(world: World) -> AsyncIterator[Membership]:
    """Found a cell whose only member this node is; it is kept elsewhere than what the tests let fail."""
    disk = SimulatedDisk()
    disk.make_folder(Path("/cell"))
    elsewhere = World(world.clock, world.randomness, disk, world.blocking)
    database = await Database.open(elsewhere, Path("/cell/node.db"), MIGRATIONS)
    try:
        membership = Membership(elsewhere, database, NODE, OWNER)
        await membership.load()
        await membership.found(recovery=RECOVERY.public, name="desk")
        yield membership
    finally:
        await database.aclose()
        disk.close()


async def _no_files(request: AssignAttempt, folder: Path) -> None:
    raise AssertionError("no attempt here has files")
