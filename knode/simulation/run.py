"""One run of a scenario, from the founding of the cell to the last check."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import trio

from knode.errors import Code, KnodeError
from knode.simulation.cell import Cell
from knode.simulation.clients import History, lay_out_files, submit_for_ever
from knode.simulation.durable_clients import Book, DurableUsers
from knode.simulation.evidence import Evidence
from knode.simulation.faults import inflict
from knode.simulation.guard import guard
from knode.simulation.image import image_of
from knode.simulation.invariants import INVARIANTS, finally_nothing_of_attempts_is_left
from knode.simulation.observer import Observer
from knode.simulation.scenario import Scenario
from knode.simulation.schedule import run_repeatably
from knode.simulation.stranger import Stranger
from knode.simulation.trace import Trace
from knode.simulation.world import SimulatedRandomness
from knode.tasks.direct import ANSWER_GRACE_S
from knode.tasks.folders import WAIT_S
from knode.tasks.worker import SWEEP_S

LOOK_EVERY_S = 0.1
"""How often it is asked whether all is well again."""
HEALED_WITHIN_S = 30.0
FEWER_WITHIN_S = 10.0
"""While the tasks that live become fewer so often, healing may take longer."""
SWEPT_AFTER_S = WAIT_S + 2 * SWEEP_S
"""By then files that nobody came for are swept away."""
MAX_VIOLATIONS = 100


@dataclass(frozen=True, slots=True, order=True)
class Violation:
    """A promise that was broken."""

    at_s: float
    """Virtual time at which it was seen."""
    invariant: str
    what: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run. A function of scenario, seed and number of nodes."""

    virtual_s: float
    events: int
    trace_hash: str
    tasks: dict[str, int]
    violations: tuple[Violation, ...]


class Run:
    """A run under way.

    Args:
        scenario: what happens; INVALID_ARGUMENT when it names an invariant that there is not.
        seed: decides everything that the scenario leaves open.
        nodes: how many.
        show: called with each line of all nodes' logs.
        progress: called with a line for people now and then.
    """

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        nodes: int,
        *,
        show: Callable[[str], None] | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        unknown = [name for name in scenario.invariants if name not in INVARIANTS]
        if unknown:
            raise KnodeError(
                Code.INVALID_ARGUMENT,
                f"there is no invariant {unknown[0][:80]!r}",
                f"choose from {', '.join(INVARIANTS)}",
            )
        self._scenario = scenario
        self._seed = seed
        self._nodes = nodes
        self._progress = progress
        self._trace = Trace(show)
        self._violations: dict[tuple[str, str], Violation] = {}

    def run(self) -> Outcome:
        """Run it to its end."""
        return run_repeatably(self._main, self._seed)

    async def _main(self) -> Outcome:
        with guard():
            cell = Cell(self._scenario, self._seed, self._nodes, self._trace)
            history = History(cell)
            self._trace.readers.append(history.read)
            stranger = Stranger(cell, self._randomness("stranger"))
            observer = Observer()
            cell.on_open.append(observer.attach)
            evidence = Evidence(cell, history, Book(), observer, stranger)
            cell.on_recovered.append(evidence.let_go)
            async with trio.open_nursery() as nursery:
                await nursery.start(cell.run)
                self._progress(f"founding a cell of {self._nodes}")
                await cell.found()
                lay_out_files(cell.hosts)
                await self._settle(evidence)
                history.lost_links.clear()
                async with trio.open_nursery() as meanwhile:
                    meanwhile.start_soon(self._watch, evidence)
                    meanwhile.start_soon(stranger.run)
                    await self._storm(evidence)
                    self._progress("healed")
                    await self._settle(evidence)
                    await self._run_out(evidence)
                    meanwhile.cancel_scope.cancel()
                self._check(evidence, "anytime_")
                for host, node in cell.nodes():
                    if node.replica.is_named and not cell.is_revoked(host):
                        evidence.ledgers[host.name] = await image_of(node)
                self._check(evidence, "finally_")
                for host in cell.hosts:
                    await cell.stop(host)
                    host.disk.close()
                nursery.cancel_scope.cancel()
            return Outcome(
                virtual_s=round(trio.current_time(), 3),
                events=self._trace.events,
                trace_hash=self._trace.hash,
                tasks=history.states(),
                violations=tuple(sorted(self._violations.values())),
            )

    def _randomness(self, owner: str) -> SimulatedRandomness:
        return SimulatedRandomness(self._seed, owner)

    async def _storm(self, evidence: Evidence) -> None:
        """Let clients work and faults happen for as long as the scenario lasts."""
        cell, history = evidence.cell, evidence.history
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                submit_for_ever, cell, self._scenario.clients, history, self._randomness("clients")
            )
            if self._scenario.durable is not None:
                randomness = self._randomness("durable clients")
                users = DurableUsers(cell, self._scenario.durable, evidence.book, randomness)
                nursery.start_soon(users.run)
            for number, fault in enumerate(self._scenario.faults):
                nursery.start_soon(inflict, fault, cell, self._randomness(f"fault {number}"))
            tenth = self._scenario.lasts_s / 10
            for part in range(1, 11):
                await trio.sleep(tenth)
                self._progress(f"{part * tenth:.0f} s of {self._scenario.lasts_s:.0f}: {history.states()}")
            nursery.cancel_scope.cancel()

    async def _watch(self, evidence: Evidence) -> None:
        while True:
            await trio.sleep(self._scenario.check_every_s)
            self._check(evidence, "anytime_")

    async def _settle(self, evidence: Evidence) -> None:
        """Wait until what must become true is so; what is not in time is a violation. Tasks that have queued
        meanwhile take what they take, while they become fewer."""
        fewest, until = math.inf, trio.current_time() + HEALED_WITHIN_S
        while self._complaints(evidence, "eventually_"):
            now = trio.current_time()
            living = max((len(node.ledger.live) for _, node in evidence.cell.nodes()), default=0)
            if living < fewest:
                fewest, until = living, max(until, now + FEWER_WITHIN_S)
            if now >= until:
                self._check(evidence, "eventually_")
                return
            await trio.sleep(LOOK_EVERY_S)

    async def _run_out(self, evidence: Evidence) -> None:
        """Go on until the last deadline is over, and until files that nobody came for are swept away."""
        last_deadline_s = self._scenario.clients.deadline_s[1] + ANSWER_GRACE_S
        await trio.sleep(last_deadline_s + self._scenario.check_every_s)
        with trio.move_on_after(SWEPT_AFTER_S):
            while any(finally_nothing_of_attempts_is_left(evidence)):  # noqa: ASYNC110 - nobody tells
                await trio.sleep(LOOK_EVERY_S)

    def _complaints(self, evidence: Evidence, when: str) -> list[tuple[str, str]]:
        names = [name for name in self._scenario.invariants if name.startswith(when)]
        return [(name, what) for name in names for what in INVARIANTS[name](evidence)]

    def _check(self, evidence: Evidence, when: str) -> None:
        for name, what in self._complaints(evidence, when):
            if (name, what) not in self._violations and len(self._violations) < MAX_VIOLATIONS:
                violation = Violation(round(trio.current_time(), 3), name, what)
                self._violations[name, what] = violation
                self._trace.note("simulation", "violation", invariant=name, what=what)
