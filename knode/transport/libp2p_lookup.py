"""Finding a peer's addresses by its PeerId: libp2p specification `kad-dht`, FIND_NODE.

A node asks the peers that it was told to ask (`discovery.bootstrap`), and those that they name, ever nearer
to the PeerId it looks for. What it hears are claims: whoever answers at an address must prove the key. A node
that relays for others answers such questions, too, from the addresses that its connected peers have told it;
nothing is stored for anybody, so py-libp2p's DHT, which also keeps values and providers, is not used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress

import base58
import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from multiaddr import Multiaddr

from knode.transport.libp2p_address import PeerAddress, parse_peer_address, without_peer_id
from knode.transport.libp2p_connection import Connection, MuxedStream, StreamEnded
from knode.transport.libp2p_host import Host, NotOpened
from knode.transport.libp2p_messages import read_message, write_message
from knode.transport.libp2p_relay import RelayServer
from knode.transport.libp2p_services import ADDRESSES, Identity, multiaddr_texts

KAD = "/ipfs/kad/1.0.0"
ASK_SECONDS = 5
LOOK_UP_SECONDS = 20
ASKED_AT_MOST = 12
"""How many peers are asked in one look-up."""
CLOSER_PEERS = 20
MESSAGE_BYTES = 128 * 1024
REDIAL_S = 60.0


class Lookup:
    """This node's questions, and its answers.

    Args:
        host: this node among libp2p's peers.
        identity: learns the addresses of connected peers.
        bootstrap: whom it asks first.
        relay: the relay that this node is, which then answers others, too; None: it only asks.
    """

    def __init__(
        self, host: Host, identity: Identity, bootstrap: Sequence[PeerAddress], relay: RelayServer | None
    ) -> None:
        self._host = host
        self._identity = identity
        self._bootstrap = bootstrap
        self._known: dict[Connection, tuple[str, ...]] = {}
        """What connected peers say of themselves, where others may ask for it."""
        self._relay = relay
        if relay is not None:
            host.handlers[KAD] = self._answer
            host.on_connection.append(self._learn)

    async def run(self, stay_with: Sequence[PeerAddress]) -> None:
        """Stay connected to peers, so that they can name this node to others, until cancelled."""
        async with trio.open_nursery() as nursery:
            for address in stay_with:
                nursery.start_soon(self._stay_connected, address)

    async def find(self, peer_id: str) -> list[str]:
        """Return multiaddrs that somebody claims for a peer; empty when nobody does.

        Asks at most 12 peers, for at most 20 seconds.
        """
        near: dict[str, tuple[PeerAddress, ...]] = {
            address.peer_id: (address,) for address in self._bootstrap
        }
        asked: set[str] = {self._host.node_id}
        with trio.move_on_after(LOOK_UP_SECONDS):
            while len(asked) <= ASKED_AT_MOST:
                open_questions = near.keys() - asked
                if not open_questions:
                    break
                nearest = min(open_questions, key=lambda each: _distance(each, peer_id))
                asked.add(nearest)
                answer = await self._ask(near[nearest], peer_id)
                if answer.get(peer_id):
                    return answer[peer_id]
                for name, texts in answer.items():
                    ways = _direct(texts)
                    if ways and name not in near:
                        near[name] = ways
        return []

    async def _ask(self, ways: Sequence[PeerAddress], peer_id: str) -> dict[str, list[str]]:
        """Return the addresses of the peers that one peer names."""
        for way in ways:
            with suppress(NotOpened, StreamEnded, ValueError), trio.move_on_after(ASK_SECONDS):
                connection = await self._host.reach(way)
                stream = await self._host.open_stream(connection, KAD)
                try:
                    question = Message(type=Message.FIND_NODE, key=base58.b58decode(peer_id))
                    await write_message(stream, question)
                    answer = await read_message(stream, Message, MESSAGE_BYTES)
                finally:
                    stream.abort()
                return {
                    (name := base58.b58encode(peer.id).decode()): multiaddr_texts(peer.addrs, name)
                    for peer in answer.closerPeers[:CLOSER_PEERS]
                }
        return {}

    async def _answer(self, stream: MuxedStream) -> None:
        """Answer the questions on a stream that somebody opened."""
        while True:
            with trio.fail_after(ASK_SECONDS):
                try:
                    question = await read_message(stream, Message, MESSAGE_BYTES)
                except StreamEnded:
                    stream.finish()
                    return
                if question.type not in (Message.FIND_NODE, Message.PING):
                    raise ValueError(
                        "a question that is not answered here"
                    )  # it keeps neither values nor providers
                answer = Message(type=question.type, key=question.key)
                if question.type == Message.FIND_NODE:
                    answer.closerPeers.extend(self._closest(base58.b58encode(question.key).decode()))
                await write_message(stream, answer)

    def _closest(self, peer_id: str) -> list[Message.Peer]:
        known = {each.peer_id: texts for each in self._known if (texts := self._addresses_of(each))}
        nearest = sorted(known, key=lambda each: _distance(each, peer_id))[:CLOSER_PEERS]
        return [
            Message.Peer(
                id=base58.b58decode(name),
                addrs=[Multiaddr(without_peer_id(text)).to_bytes() for text in known[name]],
                connection=Message.CONNECTED,
            )
            for name in nearest
        ]

    def _addresses_of(self, connection: Connection) -> list[str]:
        """Return where a connected peer is: through this relay for sure, and where it says."""
        assert self._relay is not None
        return [*self._relay.addresses_of(connection.peer_id), *self._known[connection]][:ADDRESSES]

    async def _learn(self, connection: Connection) -> None:
        """Ask a new peer for its addresses, and keep them as long as it stays."""
        with suppress(NotOpened, StreamEnded, trio.TooSlowError, ValueError):
            self._known[connection] = (await self._identity.ask(connection))[:ADDRESSES]
            try:
                while connection.ended_why is None:
                    await connection.changed.wait()
            finally:
                del self._known[connection]

    async def _stay_connected(self, address: PeerAddress) -> None:
        while True:
            with suppress(NotOpened), trio.move_on_after(ASK_SECONDS) as scope:
                connection = await self._host.reach(address)
                scope.deadline = float("inf")
                self._host.use(connection)
                try:
                    while connection.ended_why is None:
                        await connection.changed.wait()
                finally:
                    self._host.release(connection)
            await trio.sleep(REDIAL_S)


def _direct(texts: Sequence[str]) -> tuple[PeerAddress, ...]:
    ways = []
    for text in texts:
        with suppress(ValueError):
            ways.append(parse_peer_address(text))
    return tuple(way for way in ways if way.behind is None)[:2]


def _distance(one: str, other: str) -> int:
    """How far apart two PeerIds are: XOR of their SHA-256 (the specification)."""
    return _place(one) ^ _place(other)


def _place(peer_id: str) -> int:
    return int.from_bytes(hashlib.sha256(base58.b58decode(peer_id)).digest())
