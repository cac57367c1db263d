"""A simulated cell: machines, the network between them, and what can be done to both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import permutations

import trio

from knode.errors import UNANSWERED, KnodeError
from knode.mesh.statements import Role
from knode.node import Node
from knode.simulation.host import Host
from knode.simulation.image import LedgerImage
from knode.simulation.scenario import Scenario
from knode.simulation.schedule import running_on
from knode.simulation.trace import Trace, TracedRandomness
from knode.simulation.volume import Snapshot
from knode.simulation.world import SimulatedRandomness
from knode.transport.memory import MemoryNetwork

JOIN_ATTEMPTS = 20
JOIN_AGAIN_S = 1.0

Pair = tuple[str, str]


class Cell:
    """The machines of one owner. Made by `found`, then only its nodes' processes come and go."""

    def __init__(self, scenario: Scenario, seed: int, nodes: int, trace: Trace) -> None:
        self.trace = trace
        self.network = MemoryNetwork(TracedRandomness(seed, "network", trace), scenario.network.settings())
        low, high = scenario.machines.work_ms
        drawn = SimulatedRandomness(seed, "clocks")
        wrong = scenario.machines.clock_skew_s
        self.on_open: list[Callable[[Host, Node], None]] = []
        """Called with each node that was opened, on whatever machine, before it does anything."""
        self.on_recovered: list[Callable[[LedgerImage], None]] = []
        """Called when a ledger was begun anew, with what had survived."""
        self.newcomers = 0
        """How many machines were added later."""

        def machine(number: int) -> Host:
            return Host(
                f"node{number}",
                seed,
                self.network,
                trace,
                work_s=(low / 1000, high / 1000),
                clock_skew_s=drawn.uniform(-wrong, wrong),
                on_open=self.on_open,
            )

        self._machine = machine
        self.hosts = [machine(number) for number in range(1, nodes + 1)]
        self.silent_since: dict[Pair, float] = {}
        """For (observer, observed): since when the observer can have heard nothing."""
        self._walls: Counter[Pair] = Counter()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the nodes' processes, until cancelled: which is no orderly end for them."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def found(self) -> None:
        """Make the homes, found the cell on the first and let the others join it, each with a ticket."""
        first, *others = self.hosts
        await first.found_cell()
        await self.start(first)
        for host in others:
            host.make_home()
            await self.start(host)
            await self._join(first, host)

    async def add_newcomer(self) -> None:
        """Let another machine join; it is taken away again when that fails."""
        self.newcomers += 1
        host = self._machine(len(self.hosts) + 1)
        self.hosts.append(host)
        host.is_in_trouble = True
        host.make_home()
        await self.start(host)
        await self._join(self.hosts[0], host)
        if host.node is None or not host.node.membership.in_cell:
            self.trace.note(host.name, "could not join, and is taken away")
            await self.stop(host)
            self.hosts.remove(host)
        host.is_in_trouble = False

    async def start(self, host: Host) -> None:
        """Start a node's process; returns when it is up or has failed."""
        assert self._nursery is not None
        await host.until_ended()
        host.launch(self._nursery)
        await host.until_started()
        self._note_silence(observer=host)

    async def stop(self, host: Host) -> None:
        """Stop a node in order."""
        host.stop()
        await host.until_ended()
        self._note_silence()

    def kill(self, host: Host) -> None:
        """Kill a node's process; its peers see their links end."""
        host.die("killed")
        self._note_silence()

    def restore(self, host: Host, copy: Snapshot) -> None:
        """Put an old copy in the place of a machine's disk; its node's process ends."""
        host.restore(copy)
        self._note_silence()

    def cut_power(self, host: Host) -> None:
        """Take a machine's power; its peers hear nothing at all, until `restore_power`."""
        for other in self._others(host):
            self._wall(host, other, +1)
            self._wall(other, host, +1)
        host.die("power cut")
        self._note_silence()

    def restore_power(self, host: Host) -> None:
        """Give a machine its power back. What was connected to it learns that it restarted."""
        for other in self._others(host):
            self._wall(host, other, -1)
            self._wall(other, host, -1)

    def put_to_sleep(self, host: Host) -> None:
        """Let a node stand still; its peers hear nothing, and their links to it stay."""
        host.sleep()
        self._note_silence()

    def wake(self, host: Host) -> None:
        """Let a node go on that was put to sleep."""
        host.wake()
        self._note_silence(observer=host)

    def cut(self, a: Host, b: Host) -> None:
        """Let nothing pass between two machines. Cuts add up."""
        self._wall(a, b, +1)
        self._wall(b, a, +1)
        self._note_silence()

    def heal(self, a: Host, b: Host) -> None:
        """Undo one cut."""
        self._wall(a, b, -1)
        self._wall(b, a, -1)
        self._note_silence()

    def cut_way(self, source: Host, destination: Host) -> None:
        """Let nothing pass from one machine to the other."""
        self._wall(source, destination, +1)
        self._note_silence()

    def heal_way(self, source: Host, destination: Host) -> None:
        """Undo one cut of one way."""
        self._wall(source, destination, -1)
        self._note_silence()

    def nodes(self) -> Iterator[tuple[Host, Node]]:
        """Give every machine whose node is up and awake."""
        return ((host, host.node) for host in self.hosts if host.node is not None)

    def is_revoked(self, host: Host) -> bool:
        """Tell whether a member was revoked: as was acknowledged, or as the owner's node has it."""
        owner = self.hosts[0].node
        known = owner is not None and host.public_key.raw in owner.membership.roster.revoked
        return host.is_revoked or known

    def _others(self, host: Host) -> list[Host]:
        return [other for other in self.hosts if other is not host]

    def _wall(self, source: Host, destination: Host, change: int) -> None:
        way = (source.name, destination.name)
        before = self._walls[way] > 0
        self._walls[way] += change
        assert self._walls[way] >= 0
        match before, self._walls[way] > 0:
            case False, True:
                self.network.cut_way(*way)
                self.trace.note("network", "cut", way=way)
            case True, False:
                self.network.heal_way(*way)
                self.trace.note("network", "healed", way=way)

    def _note_silence(self, observer: Host | None = None) -> None:
        """Note who cannot hear whom, since when; an observer that has just started, since then."""
        now = trio.current_time()
        for a, b in permutations(self.hosts, 2):
            if b.node is not None and not self.network.is_cut(b.name, a.name):
                self.silent_since.pop((a.name, b.name), None)
            elif a is observer:
                self.silent_since[a.name, b.name] = now
            else:
                self.silent_since.setdefault((a.name, b.name), now)

    async def _join(self, inviter: Host, host: Host) -> None:
        """Let a node join, again and again with one ticket, as a person does whose network is bad."""
        if inviter.node is None:
            return
        ticket, _ = await inviter.node.invite(Role.WORKER)
        for _ in range(JOIN_ATTEMPTS):
            if host.node is None:
                return  # the invariants name who has failed
            try:
                with running_on(host.name):
                    await host.node.join(ticket, host.name)
                return
            except KnodeError as error:
                if error.code not in UNANSWERED:
                    host.failures.append(f"could not join: {error!r}")
                    return
            await trio.sleep(JOIN_AGAIN_S)
