"""One simulated machine: its disk and clock, and the node's process on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import trio

from knode.home.configuration import load_configuration
from knode.home.folder import complete_home, open_home, prepare_home
from knode.home.layout import Home
from knode.identity import KeyPair, PublicKey
from knode.identity.keystore import create_key, load_key
from knode.mesh.membership import Membership
from knode.node import Machine, Node
from knode.node.database import open_database
from knode.simulation.disk import SimulatedDisk
from knode.simulation.sandbox import SimulatedSandbox
from knode.simulation.schedule import MACHINE, put_to_sleep, wake
from knode.simulation.trace import Trace, TracedLog
from knode.simulation.volume import Event, Snapshot
from knode.simulation.world import SimulatedBlocking, SimulatedClock, SimulatedRandomness
from knode.transport.memory import MemoryCarrier, MemoryNetwork
from knode.world import World

CORES = 2


class Host:
    """A machine. The node on it is the real one; only its world is not."""

    def __init__(
        self,
        name: str,
        seed: int,
        network: MemoryNetwork,
        trace: Trace,
        *,
        work_s: tuple[float, float],
        clock_skew_s: float,
        on_open: list[Callable[[Host, Node], None]],
    ) -> None:
        self.name = name
        self.is_asleep = False
        """Whether its node stands still, though it is up."""
        self.on_open = on_open
        """Called with each node that was opened, before it does anything."""
        self._node: Node | None = None
        self._running: Node | None = None
        """Of its present life, from the moment at which it is opened."""
        self.failures: list[str] = []
        """Errors that ended a life of the node, or that it could not start with."""
        self.clock = SimulatedClock(clock_skew_s)
        self._seed = seed
        self._network = network
        self._trace = trace
        self._log = TracedLog(trace, name)
        self._randomness = SimulatedRandomness(seed, name)
        self._fate = SimulatedRandomness(seed, f"{name}'s disk")
        self._usual_work_s = self._work_s = work_s
        self.home = Home(Path("/simulated") / name, runtime_folder=None)
        self.disk = SimulatedDisk()
        self.is_in_trouble = False
        """Whether a fault has taken it down; one at a time is enough."""
        self.is_restored = False
        """Whether an old copy was put in the place of its disk, so what only this node knew may be gone."""
        self.is_revoked = False
        """Whether its owner was told that it is revoked; news of that may still be on its way."""
        self._after_crash: SimulatedDisk | None = None
        self._carrier: MemoryCarrier | None = None
        """Of its present life."""
        self._life = trio.CancelScope()
        self._changed = trio.Event()
        self.is_living = False
        """Whether its process is there, up or not."""

    @property
    def node(self) -> Node | None:
        """The node, while it is up and awake."""
        return None if self.is_asleep else self._node

    def runs(self, node: Node) -> bool:
        """Tell whether this node's process is there, awake or not: what a dead one says reaches nobody."""
        return self._running is node

    @property
    def world(self) -> World:
        """What the node takes from outside."""
        blocking = SimulatedBlocking(self._randomness, lambda: self._work_s)
        return World(self.clock, self._randomness, self.disk, blocking)

    @property
    def public_key(self) -> PublicKey:
        """The node's key, up or not."""
        return load_key(self.world, self.home.node_key).public

    def make_home(self) -> KeyPair:
        """Make a home as `knode join` does; return the node's key. No certificate: no TLS is spoken here."""
        prepare_home(self.world, self.home)
        key = create_key(self.world, self.home.node_key)
        complete_home(self.world, self.home, name=self.name)
        return key

    async def found_cell(self) -> None:
        """Make a home and found a cell in it, as `knode init` does."""
        key = self.make_home()
        owner, recovery = create_key(self.world, self.home.owner_key), KeyPair(self._randomness.token(32))
        database = await open_database(self.world, self.home)
        try:
            membership = Membership(self.world, database, key, owner)
            await membership.load()
            await membership.found(recovery=recovery.public, name=self.name)
        finally:
            await database.aclose()

    def launch(self, nursery: trio.Nursery) -> None:
        """Start the node's process; `until_started` waits for the node."""
        assert not self.is_living
        self.is_living, self._life = True, trio.CancelScope()
        nursery.start_soon(self._live)

    async def _live(self) -> None:
        """Run one life of the process, until it is stopped or dies."""
        MACHINE.set(self.name)
        world = self.world
        try:
            with self._life:
                open_home(world, self.home)
                settings = load_configuration(world, self.home, {}, {}).values
                self._carrier = self._network.carrier(self.name)
                carriers = {"memory": self._carrier}
                machine = Machine(
                    cores=CORES,
                    busy_percent=lambda: 0,
                    sandbox=SimulatedSandbox(world),
                )
                node = await Node.open(world, self.home, settings, carriers, machine, self._log)
                self._running = node
                for tell in self.on_open:
                    tell(self, node)
                async with trio.open_nursery() as nursery:
                    await nursery.start(node.run)
                    self._node = node
                    self._tell()
                    await trio.sleep_forever()
        except Exception as error:
            self.failures.append(repr(error))
            self._trace.note(self.name, "the node failed", error=repr(error))
        finally:
            self._node, self._running, self.is_living = None, None, False
            if self._after_crash is not None:
                self.disk.close()
                self.disk, self._after_crash = self._after_crash, None
            self._tell()

    def stop(self) -> None:
        """Ask the node to end in order."""
        self._trace.note(self.name, "is stopped")
        self._life.cancel()

    def die(self, how: Literal["killed", "power cut"]) -> None:
        """End the node at this very moment: nothing that it still does reaches anybody or stays.

        Killed, it leaves what it wrote; in a power cut, what it had synced, and of the rest whatever
        chance left.
        """
        self._trace.note(self.name, "dies", how=how)
        self._end_with(self.disk.after_kill() if how == "killed" else self.disk.crash(self._fate))

    def restore(self, copy: Snapshot) -> None:
        """End the node at this very moment, and put an old copy of its whole disk in the place of it, as who
        restores a backup does that never was to be restored."""
        self._trace.note(self.name, "is restored from an old copy")
        self.is_restored = True
        self._end_with(SimulatedDisk.restored(copy))

    def _end_with(self, left: SimulatedDisk) -> None:
        if self._carrier is not None:
            self._carrier.end()
        self._network.break_links(self.name)
        self.disk.watch(lambda event: None)
        self._after_crash = left
        self._node = self._running = None
        self._life.cancel()
        self._tell()

    def sleep(self) -> None:
        """Let the node stand still at this very moment, as SIGSTOP does; what comes for it waits."""
        self._trace.note(self.name, "falls asleep")
        self.is_asleep = True
        put_to_sleep(self.name)

    def wake(self) -> None:
        """Let the node go on, as if no time had passed for it."""
        self._trace.note(self.name, "wakes")
        self.is_asleep = False
        wake(self.name)

    @property
    def is_slow(self) -> bool:
        """Whether its disk takes longer than usual."""
        return self._work_s != self._usual_work_s

    def slow_down(self, work_ms: tuple[float, float]) -> None:
        """Let disk writes and other blocking work take this long (from, to), until `speed_up`."""
        self._trace.note(self.name, "has a slow disk")
        low_ms, high_ms = work_ms
        self._work_s = low_ms / 1000, high_ms / 1000

    def speed_up(self) -> None:
        """Let them take what they usually do."""
        self._trace.note(self.name, "has its usual disk")
        self._work_s = self._usual_work_s

    def strike_at(self, disk_event: int, strike: Callable[[], None]) -> None:
        """Call `strike` in the midst of the disk's work: ahead of that write, sync or removal from now."""
        left = itertools.count(disk_event, -1)

        def count(event: Event) -> None:
            if next(left) == 0:
                strike()

        self.disk.watch(count)

    async def until_started(self) -> None:
        """Return once the node is up, or its process has ended without."""
        while self.is_living and self._node is None:
            await self._changed.wait()

    async def until_ended(self) -> None:
        """Return once the process is gone."""
        while self.is_living:
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
