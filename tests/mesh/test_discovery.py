"""Members find each other by what is announced, and nothing that anybody announces does more than that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio
from mesh_cell import Cell, MeshNode, SeededRandomness, key_of, until

from knode.errors import Code, KnodeError
from knode.mesh.announcement import MAX_ADDRESSES, write_announcement
from knode.mesh.discovery import CLAIMS_A_WINDOW, ECHO_S, NODES_REMEMBERED, TRY_AGAIN_S, WINDOW_S, Discovery
from knode.mesh.joining import Joining
from knode.transport.memory import MemoryNetwork

Heard = Callable[[bytes], None]


class Lan:
    """Passes each text on to everybody, also to whom it came from, as multicast does."""

    def __init__(self) -> None:
        self.listening: list[tuple[bytes, Heard]] = []
        self.problem: KnodeError | None = None
        self.swallows = False
        self.runs = 0

    async def run(self, text: bytes, hosts: Sequence[str], port: int, heard: Heard) -> None:
        assert hosts
        assert port
        self.runs += 1
        if self.problem is not None:
            raise self.problem
        own = (text, heard)
        self.listening.append(own)
        try:
            if not self.swallows:
                for told, hear in self.listening:
                    hear(text)
                    heard(told)
            await trio.sleep_forever()
        finally:
            self.listening.remove(own)


class Place:
    """The machines of a network where every node has an IP address."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork(SeededRandomness("network"))
        self.lan = Lan()
        self.nursery = nursery
        self._folder = folder
        self._scopes: dict[str, trio.CancelScope] = {}

    async def node(self, name: str, host: str, *, founder: bool = False) -> MeshNode:
        node = MeshNode(name, self._folder, {"memory": self.network.carrier(host)})
        if founder:
            await node.found()
        await node.start(self.nursery)
        return node

    async def move(self, node: MeshNode, host: str) -> MeshNode:
        """Start a node that was stopped again, at another address."""
        moved = MeshNode(node.name, self._folder, {"memory": self.network.carrier(host)})
        await moved.start(self.nursery)
        return moved

    def discovery(self, node: MeshNode) -> Discovery:
        return Discovery(node.world, node.membership, node.peers, self.lan, lambda: (node.address,), node.log)

    def discover(self, *nodes: MeshNode) -> list[Discovery]:
        made = [self.discovery(node) for node in nodes]
        for discovery in made:
            self.nursery.start_soon(discovery.run)
        return made


@pytest.fixture
async def place(tmp_path: Path, nursery: trio.Nursery, autojump_clock: object) -> Place:
    return Place(tmp_path, nursery)


async def two(place: Place) -> tuple[MeshNode, MeshNode]:
    a = await place.node("a", "10.0.0.1", founder=True)
    b = await place.node("b", "10.0.0.2")
    await b.join(await a.invite())
    await a.connected(b)
    await b.connected(a)
    return a, b


async def test_members_that_have_all_moved_find_each_other_again(place: Place) -> None:
    nodes = await two(place)
    for node in nodes:
        await node.stop()
    a, b = [await place.move(node, f"10.0.7.{n}") for n, node in enumerate(nodes, start=1)]
    await trio.sleep(120)
    assert a.peer(b).conversation is None  # what they know of each other is stale
    place.discover(a, b)
    with trio.fail_after(2):
        await a.connected(b)
    assert await a.ask(b, "test.echo", "here") == "here"
    assert a.conversation(b).link.remote_address.startswith("10.0.7.")


async def test_a_node_whose_address_changes_tells_the_new_one(place: Place) -> None:
    a, b = await two(place)
    place.discover(a, b)
    await trio.sleep(1)
    runs = place.lan.runs
    a.address = "10.0.0.99:4747"
    await until(lambda: place.lan.runs > runs)
    await until(lambda: any(b"10.0.0.99:4747" in text for text, _ in place.lan.listening))
    assert len(place.lan.listening) == 2


async def test_addresses_that_are_not_announced_may_come_and_go(place: Place) -> None:
    a, _ = await two(place)
    relayed: list[str] = []
    own = a.key.public.node_id
    discovery = Discovery(a.world, a.membership, a.peers, place.lan, lambda: (a.address, *relayed), a.log)
    place.nursery.start_soon(discovery.run)
    await trio.sleep(1)
    relayed.append(f"/ip4/10.9.9.9/tcp/4001/p2p/{own}/p2p-circuit/p2p/{own}")
    await trio.sleep(60)
    assert place.lan.runs == 1


async def test_an_inviter_that_has_moved_since_it_invited_is_found(place: Place) -> None:
    a = await place.node("a", "10.0.0.1", founder=True)
    ticket = await a.invite()
    await a.stop()
    a = await place.move(a, "10.0.7.1")
    b = await place.node("b", "10.0.0.2")
    [found, _] = place.discover(b, a)
    joining = Joining(b.world, b.membership, b.peers, b.gossip, type(b.methods)(), found)
    welcome = await joining.join(ticket, "b", b.contact())
    assert welcome.member.name == "b"


async def test_a_false_inviter_does_not_keep_the_true_one_from_being_found(place: Place) -> None:
    a = await place.node("a", "10.0.0.1", founder=True)
    ticket = await a.invite()
    await a.stop()
    a = await place.move(a, "10.0.7.1")
    b = await place.node("b", "10.0.0.2")
    mallory = await place.node("mallory", "10.0.0.66", founder=True)
    found = place.discovery(b)
    found.hear(write_announcement(a.key.public.node_id, (mallory.address, a.address)))
    joining = Joining(b.world, b.membership, b.peers, b.gossip, type(b.methods)(), found)
    assert (await joining.join(ticket, "b", b.contact())).member.name == "b"
    assert mallory.membership.roster.members.keys() == {mallory.key.public.raw}


async def test_a_node_that_was_heard_before_it_became_a_member_is_tried_then(place: Place) -> None:
    a, b = await two(place)
    tried: list[tuple[str, Sequence[str]]] = []
    b.peers.discovered = lambda node_id, addresses: tried.append((node_id, addresses))  # type: ignore[method-assign]
    discovery = place.discovery(b)
    c = await place.node("c", "10.0.0.3")
    discovery.hear(write_announcement(c.key.public.node_id, (c.address,)))
    tried.clear()
    await c.join(await a.invite())
    await until(lambda: tried == [(c.key.public.node_id, (c.address,))])


async def test_a_hundred_false_announcements_change_nothing_but_a_log_line(place: Place) -> None:
    a, b = await two(place)
    mallory = await place.node("mallory", "10.0.0.66", founder=True)
    discovery = place.discovery(a)
    before = (a.membership.roster.digest, dict(a.membership.contacts), a.conversation(b).established)
    lines = len(a.log.lines)
    many = [f"10.{m}.3.{n}:1" for m in range(20) for n in range(1, 200)]
    thousands = b"".join(
        bytes([len(s)]) + s for s in (b"klp=" + f"{b.key.public.node_id}@{at}".encode() for at in many)
    )
    said_of_b = write_announcement(b.key.public.node_id, many)
    for number in range(100):
        for text in (
            bytes([255]) * number,
            b"\xff" * 60_000,
            b"\x0cklp=nonsense" * 30,
            write_announcement(key_of(f"nobody {number}").public.node_id, (f"10.1.0.{number + 1}:4747",)),
            write_announcement(b.key.public.node_id, (mallory.address, f"10.2.0.{number + 1}:4747")),
            thousands,
            thousands[: 100 * (5 + len(b.key.public.node_id) + 9)],
            said_of_b,
        ):
            discovery.hear(text)
        await trio.sleep(0.1)
    await trio.sleep(30)
    assert (a.membership.roster.digest, dict(a.membership.contacts), a.conversation(b).established) == before
    assert await a.ask(b, "test.echo", "still") == "still"
    said = [line for line in a.log.lines[lines:] if line[1] == "announcements ignored"]
    assert 1 <= len(said) <= 2
    assert discovery.ignored["malformed"] >= 200
    assert len(mallory.log.lines) < 30
    assert mallory.peers._peers == {}


async def test_a_false_address_of_a_member_is_tried_and_gives_nobody_its_place(place: Place) -> None:
    nodes = await two(place)
    for node in nodes:
        await node.stop()
    a, b = [await place.move(node, f"10.0.7.{n}") for n, node in enumerate(nodes, start=1)]
    mallory = await place.node("mallory", "10.0.0.66", founder=True)
    discovery = place.discovery(a)
    for _ in range(100):
        discovery.hear(write_announcement(b.key.public.node_id, (mallory.address,)))
        await trio.sleep(1)
    assert a.peer(b).conversation is None
    discovery.hear(write_announcement(b.key.public.node_id, (mallory.address, b.address)))
    with trio.fail_after(60):
        await a.connected(b)


async def test_a_flood_is_taken_in_small_sips_and_kept_in_little_memory(place: Place) -> None:
    a, _ = await two(place)
    discovery = place.discovery(a)
    taken: list[str] = []
    a.peers.discovered = lambda node_id, addresses: taken.append(node_id)  # type: ignore[method-assign]
    for number in range(1000):
        discovery.hear(write_announcement(key_of(f"{number}").public.node_id, ("10.9.9.9:1",)))
    assert len(taken) == CLAIMS_A_WINDOW
    assert discovery.ignored["too many"] == 1000 - CLAIMS_A_WINDOW
    for number in range(1000):
        discovery.hear(write_announcement(key_of(f"{number}").public.node_id, ("10.9.9.9:1",)))
        await trio.sleep(WINDOW_S / CLAIMS_A_WINDOW)
    assert len(discovery._nodes) == NODES_REMEMBERED
    assert all(len(addresses) <= MAX_ADDRESSES for addresses in discovery._nodes.values())


async def test_a_network_without_multicast_is_warned_of_once_and_tried_again(place: Place) -> None:
    a = await place.node("a", "10.0.0.1", founder=True)
    place.lan.problem = KnodeError(Code.UNAVAILABLE, "this machine cannot multicast", "look at it")
    [discovery] = place.discover(a)
    await trio.sleep(10 * TRY_AGAIN_S)
    assert place.lan.runs >= 9
    assert a.log.events("warning") == ["no discovery on the local network"]
    assert discovery.problem == str(place.lan.problem)
    place.lan.problem = None
    await until(lambda: discovery.problem is None, within_s=2 * TRY_AGAIN_S)


async def test_a_firewall_that_swallows_multicast_is_noticed(place: Place) -> None:
    a = await place.node("a", "10.0.0.1", founder=True)
    place.lan.swallows = True
    [discovery] = place.discover(a)
    await trio.sleep(ECHO_S + 1)
    assert discovery.problem is not None
    assert "firewall" in discovery.problem
    assert a.log.events("warning") == ["no discovery on the local network"]
    [(text, hear)] = place.lan.listening
    hear(text)
    await until(lambda: discovery.problem is None)


async def test_a_node_that_listens_on_loopback_alone_says_nothing_to_the_network(cell: Cell) -> None:
    lan = Lan()
    a = await cell.node("a", founder=True)
    discovery = Discovery(a.world, a.membership, a.peers, lan, lambda: ("127.0.0.1:4747",), a.log)
    cell.nursery.start_soon(discovery.run)
    await trio.sleep(60)
    assert lan.runs == 0
    assert discovery.problem is not None
    assert a.log.events("warning") == []
