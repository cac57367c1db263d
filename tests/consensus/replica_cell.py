"""Nodes of the mesh with a replica each, in memory and in virtual time. Their state machine is a list."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from mesh_cell import MeshNode, SeededRandomness, until

from knode.consensus import backlog
from knode.consensus.driver import Driver
from knode.consensus.envelope import TOPIC, Envelope, Offer
from knode.consensus.messages import Configuration, Entry, Index, Kind, Message
from knode.consensus.replica import Replica
from knode.errors import KnodeError
from knode.klp.codec import Decoder, encode
from knode.klp.messages import Context
from knode.mesh.incarnations import Incarnation
from knode.mesh.statements import Role
from knode.node.database import MIGRATIONS
from knode.simulation.disk import SimulatedDisk
from knode.transport.memory import MemoryNetwork
from knode.world import Monotonic, World

FILES = Path("/state/raft/snapshots")
LOG = Path("/state/raft/log")
MAX_BYTES = 64 * 1024 * 1024


class _State(msgspec.Struct, array_like=True, frozen=True):
    applied: int
    commands: list[bytes]


_decoder: Decoder[_State] = Decoder(_State)


class ListMachine:
    """Remembers every command; what it applied since its last `sync` is lost with its process."""

    def __init__(self, world: World, path: Path) -> None:
        self._world = world
        self._path = path
        self._state = _State(0, [])
        self.batches: list[int] = []
        self.may_dump = trio.Event()
        """Replace it to let a dump last until it is set."""
        self.may_dump.set()
        self.is_dumping = False
        if world.disk.exists(path):
            self._state = _decoder.decode(world.disk.read(path, limit_bytes=MAX_BYTES))

    @property
    def applied(self) -> Index:
        return self._state.applied

    @property
    def commands(self) -> list[bytes]:
        return self._state.commands

    async def apply(self, entries: Sequence[Entry]) -> list[Any]:
        await trio.lowlevel.checkpoint()
        assert entries[0].index == self.applied + 1
        commands, outcomes = list(self.commands), list[Any]()
        for entry in entries:
            is_command = entry.kind is Kind.COMMAND and entry.data != b""
            if is_command:
                commands.append(entry.data)
            outcomes.append(len(commands) if is_command else None)
        self._state = _State(entries[-1].index, commands)
        self.batches.append(len(entries))
        return outcomes

    async def sync(self) -> Index:
        state = self._state
        await self._world.blocking.run(partial(self._world.disk.write, self._path, encode(state)))
        return state.applied

    async def dump(self, path: Path) -> Index:
        def write(state: _State) -> None:
            with self._world.disk.create(path) as file:
                file.write(encode(state))
                file.sync()

        state, self.is_dumping = self._state, True
        await self.may_dump.wait()
        await self._world.blocking.run(partial(write, state))
        return state.applied

    async def clear(self) -> None:
        self._state = _State(0, [])
        await self.sync()

    async def restore(self, path: Path) -> Index:
        read = partial(self._world.disk.read, path, limit_bytes=MAX_BYTES)
        self._state = _decoder.decode(await self._world.blocking.run(read))
        return await self.sync()


class ReplicaNode(MeshNode):
    """A node of the mesh with a replica on a simulated disk."""

    migrations = MIGRATIONS
    disk: SimulatedDisk

    async def assemble(self) -> None:
        self.machine = ListMachine(self.world, Path("/state/list"))
        self.replica = Replica(
            self.world,
            self.membership,
            self.peers,
            self.methods,
            self.database,
            self.machine,
            Path("/state/raft"),
            self.log,
            first_command=self.first_command,
        )
        try:
            await self.replica.open()
        except KnodeError:
            await self.database.aclose()
            raise

    def first_command(self, incarnation: Incarnation) -> bytes:
        return b""

    async def work(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.replica.run)

    @property
    def commands(self) -> list[str]:
        return [command.decode() for command in self.machine.commands]

    @property
    def replica_id(self) -> bytes:
        assert self.replica.standing is not None
        return self.replica.standing.replica_id

    @property
    def driver(self) -> Driver:
        life = self.replica._life
        assert life is not None
        return life.driver

    def envelope(self, message: Message, *, incarnation: bytes | None = None) -> Envelope:
        """Put a message of the test's making under this node's name."""
        standing = self.replica.standing
        assert standing is not None
        hash = incarnation or standing.incarnation.hash
        return Envelope(hash, standing.start, standing.boot, standing.proof, message)

    def speak(self, to: ReplicaNode, message: Message, *, incarnation: bytes | None = None) -> None:
        body = encode(self.envelope(message, incarnation=incarnation))
        self.peer(to).send_event(TOPIC, body, Context())

    async def offer(self, to: ReplicaNode, offer: Offer, data: bytes) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield data

        deadline = Monotonic(trio.current_time() + 30)
        await self.peer(to).request("consensus.snapshot", offer, deadline=deadline, chunks=chunks())

    async def propose(self, command: str, *, within_s: float = 5) -> Any:
        deadline = Monotonic(trio.current_time() + within_s)
        return await self.replica.propose(command.encode(), deadline=deadline)

    async def barrier(self, *, within_s: float = 5) -> None:
        await self.replica.barrier(deadline=Monotonic(trio.current_time() + within_s))


class ReplicaCell:
    """A cell whose first node founded it."""

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self.network = MemoryNetwork(SeededRandomness("network"))
        self.nodes: list[ReplicaNode] = []
        self._folder = folder
        self._nursery = nursery

    async def grow(self, count: int, *, voters: int | None = None) -> list[ReplicaNode]:
        """Start nodes and make them voters, the last ones learners when fewer `voters` are wanted."""
        for number in range(len(self.nodes), count):
            if number == 0:
                node = await self._make("node0")
                await node.found()
                await node.start(self._nursery)
                self.nodes.append(node)
            else:
                await self.join()
        ids = [node.replica_id for node in self.nodes]
        wanted = count if voters is None else voters
        leader = await self.leader()
        await self.configure(leader, Configuration((ids[0],), (), tuple(sorted(ids[1:]))))
        await self.configure(
            leader, Configuration(tuple(sorted(ids[:wanted])), (), tuple(sorted(ids[wanted:])))
        )
        return self.nodes

    async def configure(self, leader: ReplicaNode, target: Configuration) -> None:
        raft = leader.replica.raft
        assert raft is not None
        if raft.configuration != target:
            leader.replica.change(target)
        await until(lambda: raft.configuration == target and raft.applied == raft.last_index)
        await self.until_equal()

    async def join(self, name: str | None = None, *, role: Role = Role.WORKER) -> ReplicaNode:
        """Add a member that no configuration names."""
        node = await self._make(name or f"node{len(self.nodes)}")
        await node.start(self._nursery)
        await node.join(await self.nodes[0].invite(role))
        self.nodes.append(node)
        await self.connected()
        await until(lambda: node.replica.standing is not None)
        return node

    async def connected(self) -> None:
        for node in self.nodes:
            await node.connected(*(other for other in self.nodes if other is not node))

    def leads(self, node: ReplicaNode) -> bool:
        """Tell whether `node`, and nobody else, leads."""
        return [n for n in self.nodes if n.replica.is_leader] == [node]

    def cut(self, one: ReplicaNode, other: ReplicaNode) -> None:
        self.network.cut_way(one.name, other.name)
        self.network.cut_way(other.name, one.name)

    def heal(self, one: ReplicaNode, other: ReplicaNode) -> None:
        self.network.heal_way(one.name, other.name)
        self.network.heal_way(other.name, one.name)

    async def leader(self, *, but: ReplicaNode | None = None) -> ReplicaNode:
        """Wait until one that is not `but` leads; return it."""
        await until(lambda: any(n.replica.is_leader for n in self.nodes if n is not but))
        return next(n for n in self.nodes if n.replica.is_leader and n is not but)

    async def leader_and_follower(self) -> tuple[ReplicaNode, ReplicaNode]:
        """Grow to three; return who leads and one that follows."""
        nodes = await self.grow(3)
        leader = await self.leader()
        return leader, next(node for node in nodes if node is not leader)

    async def until_equal(self, *nodes: ReplicaNode) -> None:
        """Wait until all have applied what the leader has."""
        chosen = nodes or self.nodes
        await until(lambda: len({node.machine.applied for node in chosen}) == 1)
        assert len({tuple(node.commands) for node in chosen}) == 1

    async def kill(self, node: ReplicaNode) -> None:
        """End a node's process: what it wrote stays, what it still does reaches nobody."""
        disk = SimulatedDisk.restored(node.disk.snapshot())
        self.network.break_links(node.name)
        await node.stop()
        node.disk = disk

    async def restart(self, node: ReplicaNode) -> None:
        await node.start(self._nursery)

    async def _make(self, name: str) -> ReplicaNode:
        disk = SimulatedDisk()
        disk.make_folder(self._folder)
        return ReplicaNode(name, self._folder, {"memory": self.network.carrier(name)}, disk=disk)


@asynccontextmanager
async def open_replica_cell() -> AsyncIterator[ReplicaCell]:
    async with trio.open_nursery() as nursery:
        yield ReplicaCell(nursery, Path("/state"))
        nursery.cancel_scope.cancel()


@pytest.fixture
async def replicas() -> AsyncIterator[ReplicaCell]:
    """An empty cell, for a test that takes `autojump_clock` too."""
    async with open_replica_cell() as cell:
        yield cell


@pytest.fixture
def short_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let go of the log after twenty entries, but for the last ten."""
    monkeypatch.setattr(backlog, "LONG_ENTRIES", 20)
    monkeypatch.setattr(backlog, "KEPT_ENTRIES", 10)


__all__ = ["FILES", "LOG", "ListMachine", "ReplicaCell", "ReplicaNode", "replicas", "short_log", "until"]
