"""Cells of nodes whose voters follow from the roster by themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from mesh_cell import until
from replica_cell import ReplicaCell, ReplicaNode

from knode.consensus.electorate import Electorate, Votes
from knode.consensus.recovery import Recovery
from knode.consensus.standing import Standing
from knode.errors import KnodeError
from knode.simulation.disk import SimulatedDisk


class VotingNode(ReplicaNode):
    """A node of the mesh that announces its replica and, when it leads, says who votes."""

    async def assemble(self) -> None:
        await super().assemble()
        self.levels: list[int] = []
        self.electorate = Electorate(
            self.world,
            self.membership,
            self.peers,
            self.replica,
            self.log,
            level=1,
            on_level=self._take_level,
        )
        self.recovery = Recovery(
            self.world, self.membership, self.peers, self.methods, self.replica, self.electorate, self.log
        )

    async def work(self, nursery: trio.Nursery) -> None:
        await super().work(nursery)
        nursery.start_soon(self.electorate.run)

    async def _take_level(self, level: int) -> None:
        self.levels.append(level)

    @property
    def standing(self) -> Standing:
        assert self.replica.standing is not None
        return self.replica.standing

    def votes(self) -> dict[str, Votes]:
        """What part each member has, as this node sees it."""
        return {m.name: self.electorate.votes(m) for m in self.membership.roster.members.values()}

    def has_vote(self) -> bool:
        """Whether the vote of the replica that this node has now counts."""
        configuration = self.electorate.configuration
        return configuration is not None and self.replica_id in configuration.voters

    def part(self) -> Votes:
        """What part this node has, as it sees itself."""
        return self.electorate.votes(self.membership.own)


class VotingCell(ReplicaCell):
    nodes: list[VotingNode]  # type: ignore[assignment]

    async def of(self, count: int) -> list[VotingNode]:
        """Let nodes join, and wait until all vote that should, up to seven."""
        for number in range(count):
            if number == 0:
                node = await self._make("node0")
                await node.found()
                await node.start(self._nursery)
                self.nodes.append(node)
            else:
                await self.join()
        await self.until_voting(1 if count < 3 else min(count, 7))
        await until(lambda: [n.part() for n in self.nodes].count(Votes.NOT) == max(0, count - 7))
        await self.until_led()
        return self.nodes

    async def until_voting(self, voters: int, *, but: VotingNode | None = None, within_s: float = 60) -> None:
        """Wait until so many vote, and everybody who is up, `but` one, knows the same."""

        def settled() -> bool:
            found = {
                tuple(n.votes().items())
                for n in self.nodes
                if n is not but and n.replica.standing is not None and self.is_up(n)
            }
            return len(found) == 1 and [p for _, p in next(iter(found))].count(Votes.VOTER) == voters

        await until(settled, within_s=within_s)

    def is_up(self, node: VotingNode) -> bool:
        return not node._down.is_set()

    def leading(self) -> VotingNode:
        [found] = [n for n in self.nodes if self.is_up(n) and n.replica.is_leader]
        return found

    async def until_led(self, *, but: VotingNode | None = None) -> VotingNode:
        """Wait until one that is up leads."""
        await until(lambda: any(n.replica.is_leader for n in self.nodes if self.is_up(n) and n is not but))
        return next(n for n in self.nodes if self.is_up(n) and n.replica.is_leader and n is not but)

    async def let_lead(self, node: VotingNode) -> None:
        """Hand over to this one; asked again, since a transfer may be given up."""
        with trio.fail_after(60):
            while (leader := await self.until_led()) is not node:
                with suppress(KnodeError):
                    leader.replica.transfer(node.replica_id)
                await trio.sleep(0.5)

    async def change_disk(self, node: VotingNode, change: Callable[[SimulatedDisk], None]) -> None:
        """End a node's process, change what is on its disk, and start it again."""
        await self.kill(node)
        change(node.disk)
        await self.restart(node)

    async def _make(self, name: str) -> VotingNode:
        disk = SimulatedDisk()
        disk.make_folder(self._folder)
        return VotingNode(name, self._folder, {"memory": self.network.carrier(name)}, disk=disk)


@asynccontextmanager
async def open_voting_cell() -> AsyncIterator[VotingCell]:
    async with trio.open_nursery() as nursery:
        yield VotingCell(nursery, Path("/state"))
        nursery.cancel_scope.cancel()


@pytest.fixture
async def voting() -> AsyncIterator[VotingCell]:
    """An empty cell, for a test that takes `autojump_clock` too."""
    async with open_voting_cell() as cell:
        yield cell
