"""Finding where a node is by asking others, and answering who asks."""

from __future__ import annotations

import pytest
import trio
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.tools.anyio_service import background_trio_service
from libp2p_peers import LIMIT_SECONDS, NO_MESSAGES, Peer, other_host, until
from multiaddr import Multiaddr

from knode.transport.libp2p_address import parse_peer_address
from knode.transport.libp2p_carrier import Libp2pSettings
from knode.transport.libp2p_connection import MuxedStream
from knode.transport.libp2p_lookup import KAD
from knode.transport.libp2p_messages import read_message, write_message


async def knowing(nursery: trio.Nursery) -> Peer:
    return await Peer("knowing", Libp2pSettings(offers_relay=True)).start(nursery)


async def test_a_node_is_found_where_it_says_and_through_the_relay_that_knows_it(
    nursery: trio.Nursery,
) -> None:
    relay = await knowing(nursery)
    known = await Peer("known", Libp2pSettings(bootstrap=[relay.way])).start(nursery)
    hidden = await Peer("hidden", Libp2pSettings(relays=[relay.way])).start(nursery)
    await until(lambda: hidden.carrier.relayed_addresses)
    await until(lambda: len(relay.carrier._node.lookup._known) == 2)  # type: ignore[union-attr]
    asking = Peer("asking", Libp2pSettings(bootstrap=[relay.way])).carrier
    with trio.fail_after(LIMIT_SECONDS):
        assert await asking.find(known.id) == [known.address]
        assert set(await asking.find(hidden.id)) == {hidden.address, *hidden.carrier.relayed_addresses}
        assert await asking.find(Peer("nobody").id) == []
        assert all(asking.dials(address) for address in await asking.find(hidden.id))


async def test_nobody_is_asked_who_was_not_named(nursery: trio.Nursery) -> None:
    relay = await knowing(nursery)
    assert await Peer("asking").carrier.find(relay.id) == []
    assert not relay.host.connections


async def test_who_does_not_relay_answers_no_such_questions(nursery: trio.Nursery) -> None:
    plain = await Peer("plain").start(nursery)
    asking = Peer("asking", Libp2pSettings(bootstrap=[plain.way])).carrier
    assert await asking.find(Peer("anybody").id) == []


async def test_a_node_that_leaves_is_not_named_any_more(nursery: trio.Nursery) -> None:
    relay = await knowing(nursery)
    async with trio.open_nursery() as short:
        known = await Peer("known", Libp2pSettings(bootstrap=[relay.way])).start(short)
        lookup = relay.carrier._node.lookup  # type: ignore[union-attr]
        await until(lambda: lookup._known)
        [connection] = known.host.connections
        short.cancel_scope.cancel()
    connection.abort()
    await until(lambda: not lookup._known)
    asking = Peer("asking", Libp2pSettings(bootstrap=[relay.way])).carrier
    assert await asking.find(known.id) == []


async def ask(peer: Peer, *questions: Message) -> tuple[list[Message], MuxedStream]:
    node = await Peer("asking").carrier.start()
    connection = await node.host.dial(peer.way)
    stream = await node.host.open_stream(connection, KAD)
    answers = []
    for question in questions:
        await write_message(stream, question)
        answers.append(await read_message(stream, Message, 100_000))
    return answers, stream


@pytest.mark.parametrize("answer", NO_MESSAGES)
async def test_who_answers_nonsense_knows_nobody(nursery: trio.Nursery, answer: bytes) -> None:
    async def nonsense(stream: MuxedStream) -> None:
        await stream.write(answer)
        await stream.discard()

    knows = await knowing(nursery)
    knows.host.handlers[KAD] = nonsense
    asking = Peer("asking", Libp2pSettings(bootstrap=[knows.way])).carrier
    with trio.fail_after(LIMIT_SECONDS):
        assert await asking.find(Peer("anybody").id) == []


@pytest.mark.parametrize("kind", [Message.PUT_VALUE, Message.GET_VALUE, Message.ADD_PROVIDER])
async def test_nothing_is_stored_for_anybody(
    nursery: trio.Nursery, kind: Message.MessageType.ValueType
) -> None:
    relay = await knowing(nursery)
    with trio.fail_after(LIMIT_SECONDS):
        [answer], stream = await ask(relay, Message(type=Message.FIND_NODE, key=b"x" * 38))
        assert not answer.closerPeers
        await write_message(stream, Message(type=kind, key=b"/pk/x", record={"key": b"/pk/x", "value": b"v"}))
        await stream.discard()
    assert relay.host.counters["failed"] == 1


async def test_peers_of_another_implementation_are_asked(nursery: trio.Nursery) -> None:
    async with other_host() as host:
        dht = KadDHT(host, DHTMode.SERVER)
        async with background_trio_service(dht):
            way = parse_peer_address(str(host.get_addrs()[0]))
            known = await Peer("known", Libp2pSettings(bootstrap=[way])).start(nursery)
            store = host.get_peerstore()
            peer_id = ID.from_string(known.id)
            await until(lambda: peer_id in store.peer_ids() and store.addrs(peer_id))
            asking = Peer("asking", Libp2pSettings(bootstrap=[way])).carrier
            with trio.fail_after(LIMIT_SECONDS):
                assert await asking.find(known.id) == [known.address]


async def test_peers_of_another_implementation_are_answered(nursery: trio.Nursery) -> None:
    relay = await knowing(nursery)
    known = await Peer("known", Libp2pSettings(bootstrap=[relay.way])).start(nursery)
    await until(lambda: relay.carrier._node.lookup._known)  # type: ignore[union-attr]
    async with other_host() as host:
        dht = KadDHT(host, DHTMode.CLIENT)
        async with background_trio_service(dht):
            with trio.fail_after(LIMIT_SECONDS):
                await host.connect(info_from_p2p_addr(Multiaddr(relay.address)))
                found = await dht.find_peer(ID.from_string(known.id))
            assert [str(each) for each in found.addrs] == [f"/ip4/127.0.0.1/tcp/{known.port}"]
