"""A cell of real nodes in memory and in virtual time: simulated disks, the memory link, no threads.

Its sandbox runs a language of a few words, so that a test says how long an attempt takes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from knode.agents.limits import Limits
from knode.agents.sandbox import Command, Ended, Outcome
from knode.agents.sandbox.sandbox import OnProgress
from knode.home.configuration import load_configuration
from knode.home.folder import complete_home, open_home, prepare_home
from knode.home.layout import Home
from knode.home.logging import OpenLog, log_to
from knode.identity import KeyPair
from knode.identity.keystore import create_key, load_key
from knode.mesh.membership import Membership
from knode.mesh.statements import Role
from knode.node import Machine, Node
from knode.node.database import open_database
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedClock
from knode.tasks.direct import Submission
from knode.tasks.messages import TaskView
from knode.tasks.outbox import Waiting
from knode.tasks.task import Task
from knode.transport.memory import MemoryNetwork
from knode.world import World

T = TypeVar("T")
COMMAND = "kExecutor:command"
TEXT = "kExecutor:text"


class Inline:
    async def run(self, work: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint()
        return work()


class Seeded:
    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def token(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


class Scripted:
    """A sandbox for lines of `sleep N`, `say X`, `list`, `report F TEXT`, `leave JSON`, `die N`, `break`."""

    name = "scripted"

    def __init__(self, disk: SimulatedDisk) -> None:
        self._disk = disk
        self.running: list[str] = []
        """Task ids of the attempts that run."""
        self.most_at_once = 0
        self.cancelled: list[str] = []

    async def run(self, command: Command, limits: Limits, on_progress: OnProgress) -> Outcome:
        task = command.folder.name
        self.running.append(task)
        self.most_at_once = max(self.most_at_once, len(self.running))
        try:
            with trio.move_on_after(limits.wall_seconds):
                return await self._interpret(command, on_progress)
            return Outcome(Ended.WALL, 0, b"", b"")
        except trio.Cancelled:
            self.cancelled.append(task)
            raise
        finally:
            self.running.remove(task)

    async def _interpret(self, command: Command, on_progress: OnProgress) -> Outcome:
        output, effects = b"", b""
        for line in command.argv[-1].splitlines():
            word, _, rest = line.partition(" ")
            match word:
                case "sleep":
                    await trio.sleep(float(rest))
                case "say":
                    output += rest.encode()
                case "list":
                    output += ",".join(self._disk.list_folder(command.folder / "input")).encode()
                case "report":
                    fraction, _, text = rest.partition(" ")
                    on_progress(float(fraction), text)
                case "leave":
                    effects += rest.encode() + b"\n"
                    self._disk.write(command.folder / "effects.jsonl", effects)
                case "die":
                    return Outcome(Ended.EXITED, int(rest), output, b"its last words")
                case "break":
                    raise RuntimeError("a fault in the sandbox")
        return Outcome(Ended.EXITED, 0, output, b"")


@dataclass
class Host:
    """A machine, whose node may be up or not."""

    name: str
    clock: SimulatedClock
    world: World
    home: Home
    log: OpenLog
    disk: SimulatedDisk
    sandbox: Scripted
    settings: dict[str, str]
    lines: list[str]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    error: BaseException | None = None
    running: Node | None = None
    recovery: KeyPair | None = None
    """Of the cell, where it was founded."""

    @property
    def node(self) -> Node:
        assert self.running is not None, self.error
        return self.running

    @property
    def attempts(self) -> list[str]:
        """What lies in the folder of the attempts."""
        return self.disk.list_folder(self.home.attempts)

    def file(self, name: str, content: bytes) -> Path:
        """Make a file on its disk, outside its home."""
        self.disk.make_folder(Path("/files"))
        self.disk.write(Path("/files") / name, content)
        return Path("/files") / name

    async def submit(self, line: str = "", agent: str = COMMAND, **rest: Any) -> Task:
        return await self.node.tasks.submit(Submission(agent, line.encode(), **rest))

    async def settle(self, line: str = "", agent: str = COMMAND, **rest: Any) -> Task:
        task = await self.submit(line, agent, **rest)
        await task.ended()
        return task


async def settled(host: Host, task: bytes, *, within_s: float = 600) -> TaskView:
    """Follow a durable task to its end, in virtual time."""
    last: TaskView | Waiting | None = None
    with trio.fail_after(within_s):
        async for view in host.node.following.follow(task):
            last = view
    assert isinstance(last, TaskView)
    return last


class Cell:
    """The hosts, their network, and what happens to them."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork(Seeded("network"))
        self.hosts: dict[str, Host] = {}
        self._nursery = nursery

    async def add(self, name: str, role: Role = Role.WORKER, **settings: str) -> Host:
        """Add a host whose node is up, joined by a ticket of the first one, seen and offered by all."""
        host = self._make(name, settings)
        first = next(iter(self.hosts.values()), None)
        if first is None:
            await _found(host)
        self.hosts[name] = host
        await self.start(host)
        if first is not None:
            ticket, _ = await first.node.invite(role)
            await host.node.join(ticket, name)
            await self.until_whole()
        return host

    async def start(self, host: Host) -> None:
        host.scope, host.ended, host.error = trio.CancelScope(), trio.Event(), None
        await self._nursery.start(self._live, host)

    async def stop(self, host: Host) -> None:
        host.scope.cancel()
        await host.ended.wait()

    async def crash(self, host: Host) -> None:
        """Take a host away at once: nothing that its node still does reaches anybody."""
        self.network.break_links(host.name)
        await self.stop(host)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait in virtual time."""
        with trio.fail_after(120):
            while not condition():  # noqa: ASYNC110
                await trio.sleep(0.01)

    async def until_whole(self) -> None:
        """Wait until everybody knows everybody's agents and load."""

        def whole() -> bool:
            nodes = [host.running for host in self.hosts.values() if host.running is not None]
            return all(
                one.peers.peer(other.key.public).load is not None and one.offers.of(other.key.public)
                for one, other in itertools.permutations(nodes, 2)
            )

        await self.until(whole)

    async def _live(self, host: Host, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            with host.scope:
                open_home(host.world, host.home)
                settings = load_configuration(host.world, host.home, {}, host.settings).values
                machine = Machine(2, lambda: 0, host.sandbox)
                carriers = {"memory": self.network.carrier(host.name)}
                node = await Node.open(host.world, host.home, settings, carriers, machine, host.log.logger)
                async with trio.open_nursery() as nursery:
                    await nursery.start(node.run)
                    host.running = node
                    task_status.started()
                    await trio.sleep_forever()
        except Exception as error:
            host.error = error
            if host.running is None:
                raise
        finally:
            host.running = None
            host.ended.set()

    def _make(self, name: str, settings: dict[str, str]) -> Host:
        disk = SimulatedDisk()
        clock, lines = SimulatedClock(), list[str]()
        world = World(clock, Seeded(name), disk, Inline())
        home = Home(Path("/homes") / name, None)
        prepare_home(world, home)
        create_key(world, home.node_key)
        complete_home(world, home, name=name)
        flags = {key.replace("_", ".", 1): value for key, value in settings.items()}
        log = log_to(world, lines.append)
        return Host(name, clock, world, home, log, disk, Scripted(disk), flags, lines)


async def _found(host: Host) -> None:
    owner, recovery = create_key(host.world, host.home.owner_key), KeyPair(host.world.randomness.token(32))
    database = await open_database(host.world, host.home)
    try:
        membership = Membership(host.world, database, load_key(host.world, host.home.node_key), owner)
        await membership.load()
        await membership.found(recovery=recovery.public, name=host.name)
        host.recovery = recovery
    finally:
        await database.aclose()


@asynccontextmanager
async def open_cell() -> AsyncIterator[Cell]:
    async with trio.open_nursery() as nursery:
        cell = Cell(nursery)
        yield cell
        for host in cell.hosts.values():
            assert host.error is None, host.error
        nursery.cancel_scope.cancel()


@pytest.fixture
async def cell() -> AsyncIterator[Cell]:
    """An empty cell, for a test that takes `autojump_clock` too. Its nodes live until the test stops them."""
    async with open_cell() as made:
        yield made
