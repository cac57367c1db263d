"""Whole nodes of the mesh, without tasks: real databases, real handshakes, links of the test's choice."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio
from stranger import Stranger

from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.klp.keepalive import Load
from knode.mesh.contact import Contact, SignedContact, sign_contact
from knode.mesh.conversation import Conversation
from knode.mesh.gossip import Gossip
from knode.mesh.joining import Joining, Welcome
from knode.mesh.membership import MIGRATIONS, Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peer import Peer
from knode.mesh.peers import Peers
from knode.mesh.pinging import Pinging
from knode.mesh.roster import Member
from knode.mesh.statements import Role
from knode.mesh.ticket import Ticket
from knode.storage import Database
from knode.transport import Carrier
from knode.transport.address import is_host_and_port
from knode.transport.memory import MemoryNetwork
from knode.world import Blocking, Disk, Monotonic, WallTime, World
from knode.world.real import RealDisk

__all__ = ["Cell", "MeshNode", "RecordingLog", "Stranger", "refused", "until"]

T = TypeVar("T")

EPOCH_MS = 1_800_000_000_000
KEEPALIVE_S = 1.0
DEAD_AFTER_S = 3.0
RECOVERY = KeyPair(hashlib.sha256(b"recovery").digest())


def key_of(name: str) -> KeyPair:
    return KeyPair(hashlib.sha256(name.encode()).digest())


class SeededRandomness:
    """The simulator's kind of randomness."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def token(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)


@dataclass
class MovableClock:
    """trio's clock for durations, and a time of day that a test may move."""

    moved_ms: int = 0

    def monotonic(self) -> Monotonic:
        return Monotonic(trio.current_time())

    def wall(self) -> WallTime:
        return WallTime(EPOCH_MS + self.moved_ms + int(trio.current_time() * 1000))


class InlineBlocking:
    """As the simulator's: a virtual clock would run on while a thread works."""

    async def run(self, work: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint()
        return work()


@dataclass
class RecordingLog:
    """Keeps what was logged."""

    lines: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def debug(self, event: str, **fields: Any) -> None:
        self.lines.append(("debug", event, fields))

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(("info", event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(("warning", event, fields))

    def error(self, event: str, **fields: Any) -> None:
        self.lines.append(("error", event, fields))

    def events(self, level: str) -> list[str]:
        return [event for found, event, _ in self.lines if found == level]


class Text(msgspec.Struct, frozen=True, array_like=True):
    """A body for the tests' own methods."""

    text: str = ""


class MeshNode:
    """One node: what survives it is its folder and its key."""

    def __init__(
        self,
        name: str,
        folder: Path,
        carriers: Mapping[str, Carrier],
        *,
        host: str = "",
        key: KeyPair | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.name = name
        self.disk = disk or RealDisk()
        self.blocking: Blocking = InlineBlocking()
        self.key = key or key_of(name)
        self.owner_key: KeyPair | None = None
        self.clock = MovableClock()
        self.world = World(self.clock, SeededRandomness(name), self.disk, self.blocking)
        self.log = RecordingLog()
        self.host = host
        self.file = folder / f"{name}.db"
        self.ran: list[str] = []
        """The bodies of the requests that the test's methods were given."""
        self.stopped: list[str] = []
        """Those that were cancelled."""
        self.release = trio.Event()
        """Lets the method `test.wait` answer."""
        self._carriers = carriers
        self._port = 0
        self._starts = 0
        self._scope = trio.CancelScope()
        self._down = trio.Event()

    migrations = MIGRATIONS

    async def assemble(self) -> None:
        """Make the rooms above the mesh, of which this node has none."""

    async def work(self, nursery: trio.Nursery) -> None:
        """Run them."""

    async def open(self) -> None:
        """Read the database; nothing is listened to yet."""
        self.database = await Database.open(self.world, self.file, self.migrations, synchronous="NORMAL")
        self.membership = Membership(self.world, self.database, self.key, self.owner_key)
        await self.membership.load()

    async def found(self) -> None:
        """Found a cell, with this node as its first member."""
        self.owner_key = key_of(f"owner of {self.name}")
        await self.open()
        await self.membership.found(recovery=RECOVERY.public, name=self.name)
        await self.database.aclose()

    async def start(self, nursery: trio.Nursery) -> None:
        """Run the node in `nursery`."""
        await nursery.start(self._run)

    async def _run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._starts += 1
        self._scope, self._down = trio.CancelScope(), trio.Event()
        self.world = World(
            self.clock, SeededRandomness(f"{self.name} {self._starts}"), self.disk, self.blocking
        )
        await self.open()
        self.methods = Methods()
        self.peers = Peers(
            self.world,
            self.key,
            self.membership,
            self.methods,
            self._carriers,
            self.log,
            keepalive_s=KEEPALIVE_S,
            dead_after_s=DEAD_AFTER_S,
            load=lambda: Load(len(self.ran), 0, 4, 0),
        )
        self.gossip = Gossip(self.world, self.membership, self.peers, self.methods, self.log)
        self.joining = Joining(self.world, self.membership, self.peers, self.gossip, self.methods)
        self.pinging = Pinging(self.world, self.methods)
        await self.assemble()
        self.methods.add("test.echo", Text, self._echo)
        self.methods.add("test.wait", Text, self._wait)
        self.methods.add("test.stream", Text, self._drain)
        self.methods.add("test.fault", Text, self._fault)
        self.methods.add("test.large", Text, self._large)
        self.methods.add("test.admin", Text, self._echo, roles=frozenset({Role.ADMIN}))
        listeners = self.listeners = await self.peers.listen(self.host, self._port)
        self.address = listeners[0].addresses[0]
        if is_host_and_port(self.address):
            self._port = int(self.address.rpartition(":")[2])
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.peers.run, listeners)
                    nursery.start_soon(self.gossip.run)
                    await self.work(nursery)
                    if self.membership.in_cell:
                        await self.tell_contact()
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()
                await self.database.aclose()
            self._down.set()

    async def stop(self) -> None:
        """Stop without a word."""
        self._scope.cancel()
        await self._down.wait()

    def contact(self, *addresses: str) -> SignedContact:
        body = Contact(self.key.public.raw, addresses or (self.address,), "0.1.0", self.clock.wall())
        return sign_contact(self.key, body)

    async def tell_contact(self, *addresses: str) -> None:
        self.gossip.push_contacts(await self.membership.add_contacts([self.contact(*addresses)]))

    async def invite(self, role: Role = Role.WORKER) -> Ticket:
        ticket, _ = await self.membership.issue_ticket(role, (self.address,))
        return ticket

    async def join(self, ticket: Ticket) -> Welcome:
        return await self.joining.join(ticket, self.name, self.contact())

    def peer(self, other: MeshNode) -> Peer:
        return self.peers.peer(other.key.public)

    def member(self, other: MeshNode) -> Member:
        return self.membership.roster.members[other.key.public.raw]

    async def ask(
        self, other: MeshNode, method: str, text: str = "", *, within_s: float = 30, **more: Any
    ) -> str:
        """Ask `other` and return the text that it answers."""
        deadline = Monotonic(trio.current_time() + within_s)
        answer = await self.peer(other).request(method, Text(text), deadline=deadline, **more)
        return msgspec.msgpack.decode(answer, type=Text).text

    async def ask_nothing(self, other: MeshNode, method: str) -> None:
        """Ask a method of `other` that answers nothing."""
        await self.peer(other).request(method, Text(), deadline=Monotonic(trio.current_time() + 30))

    async def connected(self, *others: MeshNode) -> None:
        """Wait until there is a link to each of `others`, and both rosters are the same."""
        for other in others:
            peer = self.peer(other)
            while peer.conversation is None:
                await peer.changed.wait()
            await peer.conversation.synchronised.wait()

    def conversation(self, other: MeshNode) -> Conversation:
        conversation = self.peer(other).conversation
        assert conversation is not None
        return conversation

    # The methods that the tests ask for.

    async def _echo(self, call: Call, body: Text) -> Text:
        self.ran.append(body.text)
        call.progress(body.text.encode())
        return body

    async def _wait(self, call: Call, body: Text) -> Text:
        self.ran.append(body.text)
        call.progress(b"begun")
        try:
            await self.release.wait()
        except trio.Cancelled:
            self.stopped.append(body.text)
            raise
        return body

    async def _drain(self, call: Call, body: Text) -> Text:
        assert call.stream is not None
        digest = hashlib.sha256()
        async for chunk in call.stream:
            digest.update(chunk)
        self.ran.append(digest.hexdigest())
        if body.text == "wait":
            await self.release.wait()
        return Text(digest.hexdigest())

    async def _fault(self, call: Call, body: Text) -> Text:
        raise ZeroDivisionError("a bug of a method")

    async def _large(self, call: Call, body: Text) -> Text:
        return Text("x" * int(body.text))


async def until(holds: Callable[[], bool], *, within_s: float = 60) -> float:
    """Wait until something holds; return how long it took. For a virtual clock."""
    begun = trio.current_time()
    with trio.fail_after(within_s):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.01)
    return trio.current_time() - begun


async def refused(code: Code, work: Callable[..., Any], *arguments: Any, **more: Any) -> KnodeError:
    """Await `work`, which must fail with `code`."""
    with pytest.raises(KnodeError) as caught:
        await work(*arguments, **more)
    assert caught.value.code is code, caught.value
    return caught.value


class Cell:
    """Nodes on one network, of which the first founded the cell."""

    def __init__(self, folder: Path, nursery: trio.Nursery, network: MemoryNetwork) -> None:
        self.network = network
        self.nursery = nursery
        self._folder = folder

    async def node(self, name: str, *, founder: bool = False, key: KeyPair | None = None) -> MeshNode:
        """Start a node that belongs to no cell, or founds one."""
        node = MeshNode(name, self._folder, {"memory": self.network.carrier(name)}, key=key)
        if founder:
            await node.found()
        await node.start(self.nursery)
        return node

    async def nodes(self, *names: str) -> list[MeshNode]:
        """Start nodes that all are members of one cell and have links to each other."""
        nodes = [await self.node(names[0], founder=True)]
        for name in names[1:]:
            node = await self.node(name)
            await node.join(await nodes[0].invite())
            nodes.append(node)
        for node in nodes:
            await node.connected(*(other for other in nodes if other is not node))
        return nodes

    def stranger(self, key: KeyPair, name: str = "stranger") -> Stranger:
        """A program at a host of its own that speaks the protocol by hand."""
        return Stranger(self.network.carrier(name), key)

    async def crash(self, node: MeshNode) -> None:
        """End a node as a power cut does."""
        self.network.break_links(node.name)
        await node.stop()
