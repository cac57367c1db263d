"""Two nodes with a local network, an internet and a relay between them, each of which can fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
from mesh_cell import Cell, MeshNode, until

from knode.errors import Code
from knode.mesh.dialling import BETTER_FIRST_S, CLAIM_EVERY_S, CLAIMED_ADDRESSES
from knode.mesh.liveness import PeerState
from knode.mesh.ways import Scope, scope_of_link
from knode.transport import Link, Listener
from knode.transport.link import Accept
from knode.transport.memory import MemoryLink, MemoryNetwork

LAN, INTERNET, RELAY = "10.0.0.", "8.8.8.", "relayed-"
SWITCH_S = 5.0


class _Served:
    """A listener whose links bear the name of their kind."""

    def __init__(self, listener: Listener, mark: Callable[[MemoryLink], MemoryLink], prefix: str) -> None:
        self._listener = listener
        self._mark = mark
        self._prefix = prefix

    @property
    def addresses(self) -> list[str]:
        return [self._prefix + address for address in self._listener.addresses]

    async def serve(self, accept: Accept) -> None:
        async def marked(link: Link) -> None:
            assert isinstance(link, MemoryLink)
            await accept(self._mark(link))

        await self._listener.serve(marked)

    async def aclose(self) -> None:
        await self._listener.aclose()


class Interface:
    """What a node reaches one network with: a memory carrier under another kind's name."""

    def __init__(self, network: MemoryNetwork, host: str, kind: str) -> None:
        self._carrier = network.carrier(host)
        self._kind = kind
        self._is_relayed = host.startswith(RELAY)
        self._network_part = host.rstrip("0123456789")
        self._prefix = "/p2p-circuit/" if self._is_relayed else ""
        self.dialled: list[str] = []
        self.reaches_others = True

    def _mark(self, link: MemoryLink) -> MemoryLink:
        link.carrier = self._kind
        link.relayed = self._is_relayed
        return link

    async def listen(self, host: str, port: int) -> Listener:
        # each network has a port of its own: the node remembers only the first
        return _Served(await self._carrier.listen(host, 0), self._mark, self._prefix)

    def dials(self, address: str) -> bool:
        return self.reaches_others and address.startswith(self._prefix + self._network_part)

    async def dial(self, address: str) -> Link:
        self.dialled.append(address)
        return self._mark(await self._carrier.dial(address.removeprefix(self._prefix)))


class Homes:
    """Two members that are on one local network, on the internet and at a relay."""

    def __init__(self, cell: Cell, folder: Path) -> None:
        self.network = cell.network
        self._nursery = cell.nursery
        self._folder = folder
        self.interfaces: dict[str, dict[str, Interface]] = {}

    async def node(self, name: str, number: int, *, founder: bool = False) -> MeshNode:
        self.interfaces[name] = {
            "websocket": Interface(self.network, f"{LAN}{number}", "websocket"),
            "quic": Interface(self.network, f"{INTERNET}{number}", "quic"),
            "libp2p": Interface(self.network, f"{RELAY}{number}", "libp2p"),
        }
        node = MeshNode(name, self._folder, self.interfaces[name])
        if founder:
            await node.found()
        await node.start(self._nursery)
        return node

    def cut(self, network: str) -> None:
        self.network.cut(f"{network}1", f"{network}2")

    def heal(self, network: str) -> None:
        self.network.heal(f"{network}1", f"{network}2")


@pytest.fixture
def homes(cell: Cell, tmp_path: Path) -> Homes:
    return Homes(cell, tmp_path)


Two = tuple[MeshNode, MeshNode]


async def two(homes: Homes, *, told: bool = True) -> Two:
    """Start two members that know each other's addresses on every network."""
    a = await homes.node("a", 1, founder=True)
    b = await homes.node("b", 2)
    await b.join(await a.invite())
    for node in (a, b):
        if told:
            await node.tell_contact(*(x for listener in node.listeners for x in listener.addresses))
    await a.connected(b)
    await b.connected(a)
    await trio.sleep(1)  # until all know what was told
    return a, b


def scope(node: MeshNode, other: MeshNode) -> Scope | None:
    conversation = node.peer(other).conversation
    return scope_of_link(conversation.link) if conversation is not None else None


async def settled(a: MeshNode, b: MeshNode, wanted: Scope, *, within_s: float) -> None:
    """Wait until one link of this scope is left, the same at both ends."""

    def is_so() -> bool:
        return (
            scope(a, b) is scope(b, a) is wanted
            and len(a.peer(b).conversations) == len(b.peer(a).conversations) == 1
            and a.conversation(b).established.session_id == b.conversation(a).established.session_id
        )

    await until(is_so, within_s=within_s)


async def asking_all_along(a: MeshNode, b: MeshNode, work: Callable[[], Awaitable[None]]) -> None:
    """Ask both ways all along while `work` runs; every request is answered, and was run once."""
    asked: list[str] = []
    over = False

    async def ask(asker: MeshNode, answerer: MeshNode) -> None:
        number = 0
        while not over:
            number += 1
            text = f"{asker.name} {number}"
            asked.append(text)
            assert await asker.ask(answerer, "test.echo", text) == text
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(ask, a, b)
            nursery.start_soon(ask, b, a)
        await work()
        over = True
    assert sorted(a.ran + b.ran) == sorted(asked)
    assert len(asked) > 20


async def test_the_local_link_is_taken_though_others_are_there(homes: Homes) -> None:
    a, b = await two(homes)
    await settled(a, b, Scope.LOCAL, within_s=SWITCH_S)
    dialled = sum(len(i.dialled) for name in "ab" for i in homes.interfaces[name].values())
    await trio.sleep(3600)
    assert scope(a, b) is Scope.LOCAL
    # the best there is: nothing better is sought
    assert sum(len(i.dialled) for name in "ab" for i in homes.interfaces[name].values()) == dialled


async def test_a_wide_link_is_taken_when_the_local_one_dies_and_left_when_it_is_back(homes: Homes) -> None:
    a, b = await two(homes)

    async def dies_and_returns() -> None:
        homes.cut(LAN)
        await settled(a, b, Scope.WIDE, within_s=3 + SWITCH_S)
        homes.heal(LAN)
        await settled(a, b, Scope.LOCAL, within_s=BETTER_FIRST_S * 1.25 + SWITCH_S)

    await asking_all_along(a, b, dies_and_returns)


async def test_a_relay_serves_while_nothing_direct_does(homes: Homes) -> None:
    a, b = await two(homes)
    await a.ask(b, "test.echo", "before")

    async def only_the_relay_then_all() -> None:
        homes.cut(LAN)
        homes.cut(INTERNET)
        await settled(a, b, Scope.RELAYED, within_s=3 + SWITCH_S)
        assert a.conversation(b).link.relayed
        homes.heal(INTERNET)
        await settled(a, b, Scope.WIDE, within_s=BETTER_FIRST_S * 1.25 + SWITCH_S)

    before = len(b.ran)
    assert before == 1
    b.ran.clear()
    await asking_all_along(a, b, only_the_relay_then_all)


async def test_a_request_that_waits_when_the_best_link_dies_is_answered_once(homes: Homes) -> None:
    a, b = await two(homes)
    answers: list[str] = []

    async def ask() -> None:
        answers.append(await a.ask(b, "test.wait", "slow"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await until(lambda: b.ran == ["slow"])
        homes.cut(LAN)
        await settled(a, b, Scope.WIDE, within_s=3 + SWITCH_S)
        b.release.set()
    assert answers == ["slow"]
    assert b.ran == ["slow"]


async def test_data_under_way_are_not_cut_off_when_a_better_link_comes(homes: Homes) -> None:
    a, b = await two(homes)
    homes.cut(LAN)
    await settled(a, b, Scope.WIDE, within_s=3 + SWITCH_S)
    switched = trio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        await switched.wait()
        yield b"y" * 1000

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: a.ask(b, "test.stream", chunks=chunks(), within_s=240))
        homes.heal(LAN)
        await until(lambda: scope(a, b) is scope(b, a) is Scope.LOCAL)
        assert len(a.peer(b).conversations) == 2  # the former one still carries the data
        switched.set()
    assert len(b.ran) == 1
    await settled(a, b, Scope.LOCAL, within_s=SWITCH_S)


async def test_the_end_that_alone_can_dial_finds_the_better_link(homes: Homes) -> None:
    a, b = await two(homes)
    for asker, answerer in ((a, b), (b, a)):
        # only `asker` knows where the other is on the local network
        lan, wide = ([listener.addresses[0] for listener in answerer.listeners])[:2]
        for node in (a, b):
            node.clock.moved_ms += 1000
        await answerer.tell_contact(lan, wide)
        await asker.tell_contact(asker.listeners[1].addresses[0])
        await trio.sleep(1)
        homes.cut(LAN)
        await settled(a, b, Scope.WIDE, within_s=3 + SWITCH_S)
        homes.heal(LAN)
        await settled(a, b, Scope.LOCAL, within_s=BETTER_FIRST_S * 1.25 + SWITCH_S)


async def test_a_link_that_was_retired_serves_again_when_the_better_one_was_dead_already(
    homes: Homes,
) -> None:
    a, b = await two(homes)
    await settled(a, b, Scope.LOCAL, within_s=SWITCH_S)
    chooses, moves = sorted((a, b), key=lambda node: node.key.public.raw)
    for interface in homes.interfaces[chooses.name].values():
        interface.reaches_others = False  # as when the other is behind a NAT
    homes.cut(LAN)
    lost = moves.conversation(chooses).link
    assert isinstance(lost, MemoryLink)
    lost.vanish("its interface is gone")  # it notices at once, and the other end much later
    await until(lambda: scope(moves, chooses) is Scope.WIDE)
    assert scope(chooses, moves) is Scope.LOCAL
    await settled(a, b, Scope.WIDE, within_s=3 + SWITCH_S)
    assert await chooses.ask(moves, "test.echo", "there") == "there"
    homes.heal(LAN)
    await settled(a, b, Scope.LOCAL, within_s=BETTER_FIRST_S * 1.25 + SWITCH_S)


async def test_a_claimed_address_is_dialled_at_once_and_grants_nothing(homes: Homes) -> None:
    a, b = await two(homes)
    at = b.listeners[0].addresses[0]
    b.clock.moved_ms += 1000
    await b.tell_contact(f"{LAN}77:1")  # where it is not any more
    homes.network.break_links(f"{LAN}1")
    homes.network.break_links(f"{INTERNET}1")
    await until(lambda: a.peer(b).conversation is None)
    stranger = await homes.node("stranger", 3, founder=True)
    a.peers.discovered(stranger.key.public.node_id, [stranger.listeners[0].addresses[0]])
    a.peers.discovered(b.key.public.node_id, [stranger.listeners[0].addresses[0], at])
    assert await until(lambda: a.peer(b).state is PeerState.ALIVE) < 1
    assert await a.ask(b, "test.echo", "found") == "found"
    assert stranger.key.public.raw not in {peer.key.raw for peer in a.peers.members()}
    assert not stranger.peers.members()


async def test_an_address_that_is_learned_between_two_dials_is_dialled_at_once(homes: Homes) -> None:
    a, b = await two(homes)
    for interface in homes.interfaces["a"].values():
        interface.reaches_others = False
    for _ in range(10):  # until b waits long between its dials
        await until(lambda: b.peer(a).conversation, within_s=60)
        for conversation in b.peer(a).conversations:
            conversation.close("it does not last")
        await until(lambda: b.peer(a).conversation is None)
    b.peers.discovered(a.key.node_id, [f"{LAN}9:4747"])
    await until(lambda: b.peer(a).conversation, within_s=1)


async def test_a_hundred_false_claims_cost_a_few_dials_and_change_nothing(homes: Homes) -> None:
    a, b = await two(homes)
    await settled(a, b, Scope.LOCAL, within_s=SWITCH_S)
    used = a.conversation(b)
    lan = homes.interfaces["a"]["websocket"]
    before = len(lan.dialled)
    for number in range(100):
        a.peers.discovered(b.key.public.node_id, [f"{LAN}{number + 50}:{port}" for port in range(1, 9)])
        await trio.sleep(0.1)
    assert a.conversation(b) is used
    assert len(lan.dialled) == before  # none could be better than the link in use
    homes.cut(LAN)
    await settled(a, b, Scope.WIDE, within_s=3 + SWITCH_S)
    begun = trio.current_time()
    before = len(lan.dialled)
    for number in range(100):
        a.peers.discovered(b.key.public.node_id, [f"{LAN}{number + 50}:{port}" for port in range(9, 17)])
        await trio.sleep(0.1)
    allowed = (CLAIMED_ADDRESSES + 1) * ((trio.current_time() - begun) / CLAIM_EVERY_S + 2)
    assert len(lan.dialled) - before <= allowed
    assert scope(a, b) is Scope.WIDE
    homes.heal(LAN)
    await settled(a, b, Scope.LOCAL, within_s=BETTER_FIRST_S * 4 * 1.25 + SWITCH_S + 20)


async def test_what_each_way_came_to_is_known(homes: Homes) -> None:
    a, b = await two(homes)
    homes.cut(LAN)
    await settled(a, b, Scope.WIDE, within_s=3 + SWITCH_S)
    await trio.sleep(BETTER_FIRST_S * 1.25 + 12)
    local, wide, _ = a.peers.dialling.ways(a.peer(b))
    assert "answer" in (a.peers.dialling.failure(a.peer(b), local) or "")
    assert a.peers.dialling.failure(a.peer(b), wide) is None
    assert a.peer(b).refusal is None


async def test_joining_takes_the_first_way_that_answers(homes: Homes) -> None:
    a = await homes.node("a", 1, founder=True)
    b = await homes.node("b", 2)
    homes.cut(LAN)
    ticket, _ = await a.membership.issue_ticket(
        next(iter(a.membership.roster.members.values())).role,
        (f"{LAN}1:9", *(address for listener in a.listeners for address in listener.addresses)),
    )
    begun = trio.current_time()
    await b.join(ticket)
    assert trio.current_time() - begun < 2  # the black hole held nothing up
    assert Code.UNAVAILABLE not in b.peers.handshakes.refusals
