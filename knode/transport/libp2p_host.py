"""A libp2p host that is a node's: TCP, Noise and Yamux alone, and its key is the node's key.

Noise, the negotiation of protocols, keys and messages are py-libp2p's. Its own host and swarm are not used
(docs/adr/0013): they shut a node out for good once a number of strangers have called, keep what every
stranger tells, and end as a whole by one stranger's stream.

Whoever connects may ping and identify; what else a protocol grants is its own matter.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable

import trio
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair as Libp2pKeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.custom_types import TProtocol
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.security.security_multistream import SecurityMultistream

from knode.identity import KeyPair
from knode.transport.address import join_address
from knode.transport.libp2p_address import PeerAddress
from knode.transport.libp2p_connection import Connection, MuxedStream, StreamEnded
from knode.transport.libp2p_raw import RawBytes
from knode.transport.libp2p_yamux import PROTOCOL as YAMUX
from knode.transport.openings import Openings
from knode.transport.strangers import StrangerLines
from knode.transport.tcp import prepare_tcp
from knode.world import Log

OPENING_SECONDS = 10
OPENING_BYTES = 16 * 1024
"""How much a connection may carry until Noise and Yamux are agreed."""
CONNECTIONS_AT_ONCE = 128
"""Of those that others opened. The oldest that nobody here uses makes room."""
IDLE_SECONDS = 60
"""How long a connection that others opened stays without a stream."""
HANDLED_SECONDS = 10
"""How long the handling of streams outlasts their connection."""
NEGOTIATED_BYTES = 1024
"""What is read at once while a stream's protocol is agreed."""

# its modules warn on stderr about what strangers send, where nobody has asked for it
logging.getLogger("libp2p").addHandler(logging.NullHandler())
logging.getLogger("libp2p").setLevel(logging.CRITICAL)

Handler = Callable[[MuxedStream], Awaitable[None]]
"""What a protocol does with a stream that the other side opened: it finishes it, or an error resets it."""


class NotOpened(Exception):
    """A connection or a stream did not come about."""


class Host:
    """One node among libp2p's peers.

    Args:
        key: the node's.
        log: told of connections that come to nothing.
    """

    def __init__(self, key: KeyPair, log: Log) -> None:
        self.node_id = str(key.node_id)
        self.private_key = Ed25519PrivateKey.from_bytes(key.seed)
        self.handlers: dict[str, Handler] = {}
        """What is offered to everybody who connects, by protocol."""
        self.on_connection: list[Callable[[Connection], Awaitable[None]]] = []
        """Run for each connection that others open, for as long as it lasts at most."""
        self.connections: list[Connection] = []
        """All that are open, the oldest first."""
        self.counters: Counter[str] = Counter()
        """What became of strangers: connections `dropped` before they were open, or that `made room` for
        others; streams `refused`, which want what is not offered, or `failed`. `faults` are our own."""
        self._log = log
        self._lines = StrangerLines()
        self._openings = Openings()
        self._in_use: Counter[Connection] = Counter()
        pair = Libp2pKeyPair(self.private_key, self.private_key.get_public_key())
        noise = Noise(pair, noise_privkey=create_noise_key().private_key)
        self._security = SecurityMultistream({NOISE: noise})
        self._muxers = Multiselect({TProtocol(YAMUX): None})

    async def accept(self, connected: trio.socket.SocketType) -> None:
        """Take a TCP connection that somebody opened, and keep it until it ends or idles."""
        try:
            prepare_tcp(connected)
            remote = join_address(*connected.getpeername()[:2])
        except OSError:  # it came and went
            connected.close()
            self.counters["dropped"] += 1
            return
        connection = await self._open_as_listener(_raw_of(connected), remote, relayed=False)
        if connection is not None:
            self.connections.append(connection)
            await self._keep(connection)

    async def accept_circuit(self, raw: RawBytes, relay: str) -> None:
        """Take a connection that somebody opened through a relay, until it ends or idles."""
        connection = await self._open_as_listener(raw, f"{relay} (relay)", relayed=True)
        if connection is not None:
            self._keep_in_background(connection)

    async def dial(self, address: PeerAddress) -> Connection:
        """Open a new connection straight to a peer.

        Raises:
            NotOpened: with why. The caller sets the deadline.
        """
        assert address.behind is None
        try:
            connected = (await trio.open_tcp_stream(address.host, address.port)).socket
            prepare_tcp(connected)
        except (OSError, ValueError) as error:  # ValueError: what a name in DNS cannot look like
            raise NotOpened(str(error.__cause__ or error)) from error
        raw = _raw_of(connected)
        remote = join_address(address.host, address.port)
        return await self.dial_over(raw, address.peer_id, remote, relayed=False)

    async def reach(self, address: PeerAddress) -> Connection:
        """Return a connection straight to who answers at an address: one that is open, or a new one.

        Raises:
            NotOpened: with why. The caller sets the deadline.
        """
        for connection in self.connections:
            if connection.peer_id == address.peer_id and connection.is_open and not connection.relayed:
                return connection
        return await self.dial(PeerAddress(address.host, address.port, address.peer_id))

    async def dial_over(
        self, raw: RawBytes, peer_id: str, remote_address: str, *, relayed: bool
    ) -> Connection:
        """Make a connection of bytes that go to a peer, and keep it until it ends or idles.

        Args:
            raw: closed when this fails.
            peer_id: who must be there.
            remote_address: where that is, for people.
            relayed: whether the bytes run through a third node.

        Raises:
            NotOpened: with why.
        """
        try:
            connection = await self._upgrade(raw, peer_id, remote_address, relayed=relayed)
        except BaseException:
            raw.close_now()
            raise
        self._keep_in_background(connection)
        return connection

    async def open_stream(self, connection: Connection, protocol: str) -> MuxedStream:
        """Open a stream of `protocol`.

        Raises:
            NotOpened: the peer does not speak it, or the connection broke.
        """
        try:
            stream = connection.open_stream()
        except StreamEnded as error:
            raise NotOpened(error.reason) from error
        try:
            await MultiselectClient().select_one_of(
                [TProtocol(protocol)], MultiselectCommunicator(_Negotiated(stream)), OPENING_SECONDS
            )
        except Exception as error:  # whatever the library finds wrong with the answer
            stream.abort()
            raise NotOpened(f"it does not speak {protocol} ({error})") from error
        except BaseException:
            stream.abort()
            raise
        return stream

    def use(self, connection: Connection) -> None:
        """Keep `connection` even when others want its place; `release` it as often."""
        self._in_use[connection] += 1

    def release(self, connection: Connection) -> None:
        """Take back one `use`."""
        self._in_use[connection] -= 1
        if not self._in_use[connection]:
            del self._in_use[connection]

    async def _open_as_listener(
        self, raw: RawBytes, remote_address: str, *, relayed: bool
    ) -> Connection | None:
        """Return what a connection of somebody else becomes, or None when it is dropped."""
        why = f"not open after {OPENING_SECONDS} seconds, or the oldest when others came"
        connection = None
        try:
            with self._openings.take(OPENING_SECONDS):
                upgraded = await self._upgrade(raw, None, remote_address, relayed=relayed)
                if not self._make_room():
                    raise NotOpened(f"{CONNECTIONS_AT_ONCE} others are in use")
                connection = upgraded
        except NotOpened as error:
            why = str(error)
        finally:
            if connection is None:
                raw.close_now()
        if connection is None:
            self.counters["dropped"] += 1
            self._tell("libp2p connection dropped", remote_address, why)
        return connection

    async def _upgrade(
        self, raw: RawBytes, peer_id: str | None, remote_address: str, *, relayed: bool
    ) -> Connection:
        """Agree on Noise, prove keys, agree on Yamux. `peer_id` is None for the end that was dialled."""
        initiator = peer_id is not None
        connection = RawConnection(raw, initiator)
        raw.limit_bytes = OPENING_BYTES
        try:
            if peer_id is not None:
                secured = await self._security.secure_outbound(connection, ID.from_string(peer_id))
                await MultiselectClient().select_one_of(
                    [TProtocol(YAMUX)], MultiselectCommunicator(secured), OPENING_SECONDS
                )
            else:
                secured = await self._security.secure_inbound(connection)
                await self._muxers.negotiate(MultiselectCommunicator(secured), OPENING_SECONDS)
        except Exception as error:  # whatever the library finds wrong with a stranger's bytes
            raise NotOpened(str(error) or type(error).__name__) from error
        raw.limit_bytes = None
        return Connection(
            secured,
            secured.get_remote_peer().to_base58(),
            initiator=initiator,
            remote_address=remote_address,
            relayed=relayed,
        )

    def _keep_in_background(self, connection: Connection) -> None:
        self.connections.append(connection)
        # belongs to the run, as the kernel's own work for a TCP connection does: see `_keep`
        trio.lowlevel.spawn_system_task(self._keep, connection, name=f"libp2p with {connection.peer_id}")

    async def _keep(self, connection: Connection) -> None:
        """Run one of `connections`, and what others ask over it. Nothing comes out but a cancellation."""
        try:
            async with trio.open_nursery() as nursery, trio.open_nursery() as companions:
                companions.start_soon(self._close_when_idle, connection)
                if not connection.initiator:
                    for run in self.on_connection:
                        companions.start_soon(run, connection)
                try:
                    await connection.run(lambda stream: nursery.start_soon(self._handle, stream))
                finally:
                    self.connections.remove(connection)
                companions.cancel_scope.cancel()
                # what came over it before the end may still be handled
                nursery.cancel_scope.deadline = trio.current_time() + HANDLED_SECONDS
        except Exception:
            self.counters["faults"] += 1
            self._log.error("a libp2p connection failed", remote=connection.remote_address, exc_info=True)
        finally:
            connection.abort()

    async def _handle(self, stream: MuxedStream) -> None:
        offered = Multiselect({TProtocol(name): None for name in self.handlers})
        negotiated = MultiselectCommunicator(_Negotiated(stream))
        try:
            protocol, _ = await offered.negotiate(negotiated, OPENING_SECONDS)
            await self.handlers[str(protocol)](stream)
        except StreamEnded:
            stream.abort()
        except MultiselectError:  # it wants what is not here, or says nothing
            self.counters["refused"] += 1
            stream.abort()
        except Exception as error:  # a stranger's stream ends alone, whatever came over it
            stream.abort()
            self.counters["failed"] += 1
            self._tell("libp2p stream failed", stream.connection.remote_address, repr(error))
        except BaseException:
            stream.abort()
            raise

    def _make_room(self) -> bool:
        """Close the oldest connection that others opened and nobody uses; tell whether there is a place."""
        theirs = [each for each in self.connections if each.is_open and not each.initiator]
        if len(theirs) < CONNECTIONS_AT_ONCE:
            return True
        unused = next((each for each in theirs if each not in self._in_use), None)
        if unused is None:
            return False
        self.counters["made room"] += 1
        unused.abort()
        return True

    async def _close_when_idle(self, connection: Connection) -> None:
        while True:
            with trio.move_on_after(IDLE_SECONDS) as idle:
                while not connection.core.streams:
                    await connection.changed.wait()
            if idle.cancelled_caught and connection not in self._in_use:
                await connection.aclose()
            while connection.core.streams:
                await connection.changed.wait()

    def _tell(self, event: str, remote: str, why: str) -> None:
        left_out = self._lines.admit(remote, trio.current_time())
        if left_out is not None:
            self._log.info(event, remote=remote, reason=why, left_out=left_out)


class _Negotiated(ReadWriteCloser):
    """A stream while its protocol is agreed: the library would read a message of any length."""

    def __init__(self, stream: MuxedStream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        return await self._stream.read(min(n or NEGOTIATED_BYTES, NEGOTIATED_BYTES))

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close(self) -> None:
        self._stream.finish()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


def _raw_of(connected: trio.socket.SocketType) -> RawBytes:
    stream = trio.SocketStream(connected)
    return RawBytes(stream.receive_some, stream.send_all, connected.close)
