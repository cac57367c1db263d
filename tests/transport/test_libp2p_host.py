"""A node among libp2p's peers: what others may ask, and what strangers cannot do.

The faults of py-libp2p that the project's own host goes round are each a test here or in the link contract.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio
from libp2p.host.ping import PingService
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p_peers import LIMIT_SECONDS, Peer, echo, other_host, until
from multiaddr import Multiaddr
from trio.testing import MockClock

from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.transport import Link, libp2p_host
from knode.transport.libp2p_address import PeerAddress, direct_address
from knode.transport.libp2p_carrier import Libp2pCarrier, Libp2pSettings
from knode.transport.libp2p_connection import MuxedStream, StreamEnded
from knode.transport.libp2p_host import CONNECTIONS_AT_ONCE, OPENING_BYTES, Host, NotOpened
from knode.transport.libp2p_services import PING
from knode.transport.openings import OPENINGS_AT_ONCE
from knode.world import SilentLog
from knode.world.real import real_world

ECHO = "/test/echo"


@pytest.fixture
async def node(nursery: trio.Nursery) -> Peer:
    return await Peer("node").start(nursery)


@pytest.fixture
def stranger() -> Host:
    return Host(KeyPair(b"s" * 32), SilentLog())


async def echo_bytes(stream: MuxedStream) -> None:
    while True:  # ends by StreamEnded
        await stream.write(await stream.read(100_000))


async def works(node: Peer) -> None:
    """Somebody else opens a link to it, and is answered."""
    with trio.fail_after(LIMIT_SECONDS):
        link = await Peer("somebody else").carrier.dial(node.address)
        await link.send_frame(b"are you there?")
        assert await link.receive_frame() == b"are you there?"
        await link.aclose()


# what everybody may


async def test_another_libp2p_host_pings_and_identifies_a_node(node: Peer) -> None:
    async with other_host() as host:
        node_info = info_from_p2p_addr(Multiaddr(node.address))
        with trio.fail_after(LIMIT_SECONDS):
            await host.connect(node_info)
            assert len(await PingService(host).ping(node_info.peer_id, 3)) == 3
        store = host.get_peerstore()
        protocols = await until(lambda: store.get_protocols(node_info.peer_id))
        assert {"/ipfs/ping/1.0.0", "/ipfs/id/1.0.0", "/klp/1.0.0"} <= set(protocols)
        assert [str(each) for each in store.addrs(node_info.peer_id)] == [f"/ip4/127.0.0.1/tcp/{node.port}"]
        assert store.pubkey(node_info.peer_id).to_bytes() == node.key.public.raw


async def test_what_a_node_does_not_offer_is_refused_and_the_connection_stays(node: Peer) -> None:
    async with other_host() as host:
        node_info = info_from_p2p_addr(Multiaddr(node.address))
        with trio.fail_after(LIMIT_SECONDS):
            await host.connect(node_info)
            for protocol in ("/chat/1.0.0", "/libp2p/circuit/relay/0.2.0/hop", "/ipfs/kad/1.0.0"):
                with pytest.raises(Exception, match="failed to open a stream"):
                    await host.new_stream(node_info.peer_id, [protocol])
            await PingService(host).ping(node_info.peer_id)
        await until(lambda: node.host.counters["refused"] == 3)


async def test_nothing_but_noise_is_offered(node: Peer) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", node.port)

    async def say(text: str) -> None:
        line = text.encode() + b"\n"
        await stream.send_all(bytes([len(line)]) + line)

    async def hear() -> str:
        [size] = await stream.receive_some(1)
        line = b""
        while len(line) < size:
            line += await stream.receive_some(size - len(line))
        return line.decode().strip()

    with trio.fail_after(LIMIT_SECONDS):
        assert await hear() == "/multistream/1.0.0"
        await say("/multistream/1.0.0")
        for weaker in ("/plaintext/2.0.0", "/secio/1.0.0", "/tls/1.0.0"):
            await say(weaker)
            assert await hear() == "na"
        await say("/noise")
        assert await hear() == "/noise"
    await stream.aclose()


async def test_whoever_else_answers_at_an_address_gets_no_link(node: Peer) -> None:
    somebody = KeyPair(b"x" * 32).node_id
    with pytest.raises(KnodeError, match="no link to") as raised:
        await Peer("dialling").carrier.dial(direct_address("127.0.0.1", node.port, somebody))
    assert raised.value.code is Code.UNAVAILABLE


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
async def test_a_name_that_no_name_looks_like_gets_no_link(host: str) -> None:
    somebody = KeyPair(b"x" * 32).node_id
    with pytest.raises(KnodeError, match="no link to") as raised:
        await Peer("dialling").carrier.dial(f"/dns4/{host}/tcp/4748/p2p/{somebody}")
    assert raised.value.code is Code.UNAVAILABLE


async def test_a_peer_that_speaks_no_klp_gets_no_link() -> None:
    async with other_host() as host:
        with pytest.raises(KnodeError, match="does not speak"):
            await Peer("dialling").carrier.dial(str(host.get_addrs()[0]))


# cancelling, resets, readers that are away


async def test_cancelling_reads_and_writes_of_one_stream_leaves_the_others_of_its_connection(
    node: Peer, stranger: Host
) -> None:
    node.host.handlers[ECHO] = echo_bytes
    connection = await stranger.dial(node.way)
    staying = await stranger.open_stream(connection, ECHO)

    async def cancel_after(turns: int, scope: trio.CancelScope) -> None:
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    with trio.fail_after(LIMIT_SECONDS):
        for turns in range(24):
            other = await stranger.open_stream(connection, ECHO)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_after, turns, scope)
                    nursery.start_soon(other.write, bytes(1_000_000))
                    nursery.start_soon(other.read)
                    await trio.sleep_forever()
            other.abort()
            said = b"%d" % turns * 1000
            await staying.write(said)
            heard = b""
            while len(heard) < len(said):
                heard += await staying.read()
            assert heard == said
    connection.abort()


async def test_a_reset_ends_a_read_that_waits_and_is_no_orderly_end(node: Peer, stranger: Host) -> None:
    given: list[MuxedStream] = []

    async def keep(stream: MuxedStream) -> None:
        given.append(stream)

    node.host.handlers[ECHO] = keep
    connection = await stranger.dial(node.way)
    for near_resets in (True, False):
        near = await stranger.open_stream(connection, ECHO)
        await near.write(b"x")
        far = await until(lambda: given and given.pop())
        assert await far.read() == b"x"
        ends = []

        async def read(stream: MuxedStream, ends: list[bool] = ends) -> None:
            with pytest.raises(StreamEnded) as ended:
                await stream.read()
            ends.append(ended.value.in_order)

        with trio.fail_after(LIMIT_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, near)
                nursery.start_soon(read, far)
                await trio.testing.wait_all_tasks_blocked()
                (near if near_resets else far).abort()
        assert ends == [False, False]
    connection.abort()


async def test_a_link_survives_a_reader_that_is_away(tenfold_clock: MockClock, nursery: trio.Nursery) -> None:
    away = trio.Event()
    received: list[bytes] = []

    async def read_later(link: Link) -> None:
        await away.wait()
        while True:
            received.append(await link.receive_frame())

    node = await Peer("node").start(nursery, read_later)
    link = await Peer("dialling").carrier.dial(node.address)
    async with trio.open_nursery() as sending:

        @sending.start_soon
        async def send() -> None:
            for number in range(20):
                await link.send_frame(number.to_bytes() * 100_000)

        await trio.sleep(15)
        assert link.statistics.frames_sent < 20, "it waits"
        away.set()
    await link.aclose()
    assert received == [number.to_bytes() * 100_000 for number in range(20)]


# strangers


async def test_strangers_who_came_and_went_shut_nobody_out(node: Peer, stranger: Host) -> None:
    with trio.fail_after(LIMIT_SECONDS):
        for _ in range(CONNECTIONS_AT_ONCE + 20):
            connection = await stranger.dial(node.way)
            await connection.aclose()
        await works(node)
    await until(lambda: not node.host.connections)


async def test_strangers_who_stay_make_room_and_end_no_link(node: Peer, stranger: Host) -> None:
    link = await Peer("member").carrier.dial(node.address)
    for _ in range(CONNECTIONS_AT_ONCE + 5):
        await stranger.dial(node.way)
    await until(lambda: len(node.host.connections) <= CONNECTIONS_AT_ONCE)
    assert node.host.counters["made room"] >= 5
    await link.send_frame(b"still here")
    assert await link.receive_frame() == b"still here"
    await works(node)
    await link.aclose()


async def test_silent_connections_shut_nobody_out(node: Peer) -> None:
    silent = [await trio.open_tcp_stream("127.0.0.1", node.port) for _ in range(OPENINGS_AT_ONCE + 1)]
    await works(node)
    for stream in silent:
        await stream.aclose()


async def test_who_says_nothing_is_dropped(tenfold_clock: MockClock, nursery: trio.Nursery) -> None:
    node = await Peer("node").start(nursery)
    stream = await trio.open_tcp_stream("127.0.0.1", node.port)
    with trio.fail_after(LIMIT_SECONDS):
        while await stream.receive_some():
            pass
    assert node.listener.dropped == 1
    assert node.log.told[-1][0] == "libp2p connection dropped"


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 9 + b"\x01" + bytes(2 * OPENING_BYTES),
        b"\x13/multistream/1.0.0\n" + b"\x03na\n" * OPENING_BYTES,
        b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\xff\xff" + bytes(70_000),
        b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\x00\x20" + bytes(32),
    ],
    ids=["HTTP", "a long line", "endless proposals", "a long handshake", "a zero key"],
)
async def test_a_bad_opening_is_dropped_counted_and_told_once(node: Peer, said: bytes) -> None:
    with trio.fail_after(LIMIT_SECONDS):
        for _ in range(2):
            stream = await trio.open_tcp_stream("127.0.0.1", node.port)
            try:
                await stream.send_all(said)
                await stream.send_eof()
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
            await stream.aclose()
        await until(lambda: node.listener.dropped == 2)
        await works(node)
    assert [event for event, _ in node.log.told] == ["libp2p connection dropped"]


async def test_streams_that_nobody_reads_hold_a_window_each_and_no_more(node: Peer, stranger: Host) -> None:
    async def ignore(stream: MuxedStream) -> None:
        await trio.sleep_forever()

    node.host.handlers[ECHO] = ignore
    connection = await stranger.dial(node.way)
    stream = await stranger.open_stream(connection, ECHO)
    stream._stream.credit_bytes = 2**31  # it does not care
    with trio.fail_after(LIMIT_SECONDS), pytest.raises(StreamEnded):
        await stream.write(bytes(10_000_000))
    await until(lambda: not node.host.connections)
    await works(node)


async def test_a_handler_that_fails_ends_its_stream_alone(node: Peer, stranger: Host) -> None:
    async def fail(stream: MuxedStream) -> None:
        raise RuntimeError("unforeseen")

    node.host.handlers[ECHO] = fail
    connection = await stranger.dial(node.way)
    with trio.fail_after(LIMIT_SECONDS):
        stream = await stranger.open_stream(connection, ECHO)
        with pytest.raises(StreamEnded):
            await stream.read()
        ping = await stranger.open_stream(connection, PING)
        await ping.write(bytes(32))
        assert len(await ping.read()) == 32
    assert node.host.counters["failed"] == 1
    await connection.aclose()
    with pytest.raises(NotOpened):
        await stranger.open_stream(connection, PING)


async def test_a_connection_without_streams_is_closed(
    tenfold_clock: MockClock, monkeypatch: pytest.MonkeyPatch, node: Peer, stranger: Host
) -> None:
    monkeypatch.setattr(libp2p_host, "IDLE_SECONDS", 2)
    link = await Peer("member").carrier.dial(node.address)
    await stranger.dial(node.way)
    await until(lambda: len(node.host.connections) == 2)
    await until(lambda: len(node.host.connections) == 1)
    await trio.sleep(4)
    await link.send_frame(b"in use")
    assert await link.receive_frame() == b"in use"
    await link.aclose()


# dialling, listening, importing


async def test_a_dial_to_who_says_nothing_ends_in_time(tenfold_clock: MockClock, node: Peer) -> None:
    silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = silent[0].socket.getsockname()[1]
    started = trio.current_time()
    with pytest.raises(KnodeError, match="no answer within 10 seconds"):
        await node.carrier.dial(direct_address("127.0.0.1", port, node.id))
    assert 9.9 < trio.current_time() - started < 60
    await silent[0].aclose()


async def test_a_port_that_is_taken_is_no_reason_to_stay_down(node: Peer, nursery: trio.Nursery) -> None:
    other = await Peer("other", Libp2pSettings(port=node.port)).start(nursery)
    assert other.port != node.port
    assert other.log.told[0][0] == "libp2p listens on another port"
    await works(other)


async def test_a_connection_is_shared_where_any_will_do(node: Peer, stranger: Host) -> None:
    first = await stranger.reach(node.way)
    assert await stranger.reach(PeerAddress("192.0.2.1", 1, node.id)) is first
    await first.aclose()
    second = await stranger.reach(node.way)
    assert second is not first
    second.abort()


def test_nobody_imports_libp2p_who_does_not_use_it() -> None:
    asked = (
        "import sys, knode.control.daemon, knode.cli.main; print([m for m in sys.modules if 'libp2p' in m])"
    )
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert "knode.transport.libp2p_carrier" in told
    assert "'libp2p'" not in told


async def test_the_port_answers_before_libp2p_is_there(nursery: trio.Nursery) -> None:
    carrier = Libp2pCarrier(real_world(), KeyPair(b"n" * 32), SilentLog())
    listener = await carrier.listen("127.0.0.1", 0)
    [address] = listener.addresses
    assert address.endswith(carrier.node_id)
    stream = await trio.open_tcp_stream("127.0.0.1", int(address.split("/")[4]))
    nursery.start_soon(listener.serve, echo)
    with trio.fail_after(LIMIT_SECONDS):
        assert await stream.receive_some(1)
    await stream.aclose()
    await listener.aclose()


async def test_without_libp2p_a_node_has_its_other_links(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "knode.transport.libp2p_node", None)  # as if it were not installed
    peer = Peer("broken")
    listener = await peer.carrier.listen("127.0.0.1", 0)
    [address] = listener.addresses
    with trio.fail_after(LIMIT_SECONDS):
        await listener.serve(echo)
    assert listener.addresses == []
    assert peer.log.told[0][0] == "no libp2p"
    with pytest.raises(KnodeError, match="cannot be imported") as raised:
        await peer.carrier.dial(address)
    assert raised.value.code is Code.UNAVAILABLE
