"""What every libp2p peer may ask a node: who it is (identify) and whether it is there (ping).

Specifications: libp2p `identify` and `ping`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio
from libp2p.identity.identify.pb.identify_pb2 import Identify
from multiaddr import Multiaddr

from knode import __version__
from knode.transport.address import split_address
from knode.transport.libp2p_address import direct_address, without_peer_id
from knode.transport.libp2p_connection import Connection, MuxedStream, StreamEnded
from knode.transport.libp2p_host import Host
from knode.transport.libp2p_messages import read_message, write_message

IDENTIFY = "/ipfs/id/1.0.0"
PING = "/ipfs/ping/1.0.0"
PING_BYTES = 32
PING_SECONDS = 60
"""How long a peer may wait with its next ping."""
MESSAGE_BYTES = 16 * 1024
IDENTIFY_SECONDS = 10
ADDRESSES = 16
"""How many addresses of a peer are taken."""


class Identity:
    """Answers who this node is, and asks others.

    Args:
        host: of whom it answers.
        addresses: the multiaddrs that others can dial now.
    """

    def __init__(self, host: Host, addresses: Callable[[], Sequence[str]]) -> None:
        self._host = host
        self._addresses = addresses
        host.handlers[IDENTIFY] = self._tell

    async def _tell(self, stream: MuxedStream) -> None:
        key = self._host.private_key.get_public_key()
        message = Identify(
            protocol_version="ipfs/0.1.0",
            agent_version=f"knode/{__version__}",
            public_key=key.serialize(),
            listen_addrs=[Multiaddr(without_peer_id(address)).to_bytes() for address in self._addresses()],
            observed_addr=_observed(stream.connection),
            protocols=list(self._host.handlers),
        )
        with trio.fail_after(IDENTIFY_SECONDS):
            await write_message(stream, message)
        stream.finish()

    async def ask(self, connection: Connection) -> tuple[str, ...]:
        """Return the multiaddrs that the peer at the other end says it has; nobody has proven them.

        Raises:
            NotOpened, StreamEnded, TooSlowError, ValueError: it does not say.
        """
        with trio.fail_after(IDENTIFY_SECONDS):
            stream = await self._host.open_stream(connection, IDENTIFY)
            try:
                message = await read_message(stream, Identify, MESSAGE_BYTES)
            finally:
                stream.abort()
        return tuple(multiaddr_texts(message.listen_addrs, connection.peer_id))


async def answer_pings(stream: MuxedStream) -> None:
    """Send back what comes, 32 bytes at a time, until the peer finishes."""
    try:
        while True:
            with trio.fail_after(PING_SECONDS):
                data = b""
                while len(data) < PING_BYTES:
                    data += await stream.read(PING_BYTES - len(data))
                await stream.write(data)
    except (StreamEnded, trio.TooSlowError):
        stream.finish()
        stream.abort()


def multiaddr_texts(raw: Sequence[bytes], peer_id: str) -> list[str]:
    """Return multiaddrs as text, each ending in `/p2p/PEERID`; what is none, or another's, is left out.

    Raises:
        ValueError: there are too many.
    """
    if len(raw) > 4 * ADDRESSES:
        raise ValueError(f"a peer with {len(raw)} addresses")
    texts = []
    for each in raw:
        try:
            text = without_peer_id(str(Multiaddr(each)))
        except Exception:  # the library has many ways to refuse a stranger's bytes
            continue
        texts.append(f"{text}/p2p/{peer_id}")
    return texts[:ADDRESSES]


def _observed(connection: Connection) -> bytes:
    if connection.relayed:
        return b""
    host, port = split_address(connection.remote_address)
    return bytes(Multiaddr(without_peer_id(direct_address(host, port, connection.peer_id))).to_bytes())
