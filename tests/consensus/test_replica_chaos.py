"""Replicas while nodes are killed, lose power, are cut off and stopped and their disks fill up, all at once.

What was acknowledged stands in the end where its answer said; a barrier shows all that was acknowledged
before it was called; and everybody has the same. A failing seed fails again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

import pytest
import trio
from replica_cell import ReplicaCell, ReplicaNode, replicas, short_log
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.mesh.membership import Membership
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedRandomness
from knode.storage import Database

__all__ = ["replicas", "short_log"]

T = TypeVar("T")
LASTS_S = 10.0
CLIENTS = 4
KEPT_GOING = (Code.UNAVAILABLE, Code.UNKNOWN, Code.TIMEOUT, Code.RATE_LIMITED)


class SlowDisk:
    """Blocking work that takes half a millisecond to ten."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    async def run(self, work: Callable[[], T]) -> T:
        with trio.CancelScope(shield=True):
            await trio.sleep(self._dice.choice((0.0005, 0.002, 0.01)))
        return work()


class Chaos:
    """Clients, faults, and what was promised to the clients."""

    def __init__(self, cell: ReplicaCell, seed: int) -> None:
        self.cell = cell
        self.dice = random.Random(seed)
        self.fate = SimulatedRandomness(seed, "fate")
        self.up = list(cell.nodes)
        self.acknowledged: dict[str, int] = {}
        """Each command, with the place in the list that its answer named."""
        self.is_over = False
        self.barriers = 0

    async def run(self) -> None:
        async with trio.open_nursery() as clients:
            for client in range(CLIENTS):
                clients.start_soon(self.propose, client)
            clients.start_soon(self.read)
            async with trio.open_nursery() as faults:
                with trio.move_on_after(LASTS_S):
                    while True:
                        await trio.sleep(self.dice.uniform(0.1, 1))
                        node = self.dice.choice(self.cell.nodes)
                        fault = self.dice.choice((self.take_down, self.cut_off, self.fill, self.transfer))
                        faults.start_soon(fault, node)
            self.is_over = True

    async def propose(self, client: int) -> None:
        number = 0
        while not self.is_over:
            leaders = [node for node in self.up if node.replica.is_leader]
            if leaders:
                number += 1
                command = f"{client} {number}"
                try:
                    self.acknowledged[command] = await leaders[-1].propose(command, within_s=3)
                except KnodeError as error:
                    assert error.code in KEPT_GOING, repr(error)  # noqa: PT017
            await trio.sleep(self.dice.uniform(0, 0.1))

    async def read(self) -> None:
        while not self.is_over:
            await trio.sleep(0.2)
            if self.up:
                node, before = self.dice.choice(self.up), set(self.acknowledged)
                try:
                    await node.barrier(within_s=3)
                except KnodeError:
                    continue
                self.barriers += 1
                assert before <= set(node.commands) or node not in self.up

    async def take_down(self, node: ReplicaNode) -> None:
        if node not in self.up:
            return
        self.up.remove(node)
        match self.dice.choice(("killed", "power cut", "stopped")):
            case "killed":
                await self.cell.kill(node)
            case "power cut":
                found = node.disk.crash(self.fate)
                await self.cell.kill(node)
                node.disk = found
            case _:
                await node.replica.hand_over()
                await node.stop()
        await trio.sleep(self.dice.uniform(0, 3))
        await self.cell.restart(node)
        self.up.append(node)

    async def cut_off(self, node: ReplicaNode) -> None:
        other = self.dice.choice([n for n in self.cell.nodes if n is not node])
        self.cell.cut(node, other)
        await trio.sleep(self.dice.uniform(0.2, 4))
        self.cell.heal(node, other)

    async def fill(self, node: ReplicaNode) -> None:
        disk: SimulatedDisk = node.disk
        disk.fill()
        await trio.sleep(self.dice.uniform(0.2, 3))
        disk.free()
        node.disk.free()  # which may be what a power cut left of it

    async def transfer(self, node: ReplicaNode) -> None:
        to = self.dice.choice(self.cell.nodes)
        if node in self.up and node.replica.is_leader and to.replica.standing is not None:
            try:
                node.replica.transfer(to.replica_id)
            except KnodeError as error:
                assert error.code in (Code.UNAVAILABLE, Code.INVALID_ARGUMENT)  # noqa: PT017


@pytest.fixture
def durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a node notes survive a power cut, and a full disk keep no node from starting."""

    async def open_durably(node: ReplicaNode) -> None:
        node.database = await Database.open(node.world, node.file, node.migrations)
        node.membership = Membership(node.world, node.database, node.key, node.owner_key)
        await node.membership.load()

    async def tell_nobody(node: ReplicaNode) -> None:
        """Say no address: it is known already."""

    monkeypatch.setattr(ReplicaNode, "open", open_durably)
    monkeypatch.setattr(ReplicaNode, "tell_contact", tell_nobody)


@pytest.mark.parametrize("seed", [1, 2])
async def test_nothing_that_was_acknowledged_is_lost_whatever_happens(
    autojump_clock: MockClock, replicas: ReplicaCell, short_log: None, durable: None, seed: int
) -> None:
    nodes = await replicas.grow(3)
    chaos = Chaos(replicas, seed)
    for node in nodes:
        node.blocking = SlowDisk(chaos.dice)
    await chaos.run()
    with trio.fail_after(60):
        while "the end" not in nodes[0].commands:
            try:
                await (await replicas.leader()).propose("the end")
            except KnodeError:
                await trio.sleep(0.1)
    await replicas.until_equal()
    commands = nodes[0].commands
    assert commands[-1] == "the end"
    proposed = [command for command in commands if command != "the end"]
    assert len(proposed) == len(set(proposed))
    for command, place in chaos.acknowledged.items():
        assert commands[place - 1] == command
    assert len(chaos.acknowledged) > 100
    assert chaos.barriers > 5
    assert not any(node.replica.standing and node.replica.standing.unfit for node in nodes)
