"""One QUIC connection (RFC 9000, 9001) by `aioquic`, as KLP's links use it: one bidirectional stream.

Everything that reaches behind aioquic's public face stands here, for the version that is locked. What that
face lacks: credit by what was taken instead of by what came, a limit of one stream, how much waits to be
sent, the other end's certificate, and word of an end before all of its packets may have been lost.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    MAX_STREAM_DATA_FRAME_CAPACITY,
    TRANSPORT_CLOSE_FRAME_CAPACITY,
    Limit,
    NetworkAddress,
    QuicConnection,
)
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicHeader, QuicPacketType, QuicProtocolVersion
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream
from cryptography.hazmat.primitives.serialization import Encoding

ALPN = "klp.1"
VERSION = QuicProtocolVersion.VERSION_1
STREAM = 0
"""The one stream: the first bidirectional one of the end that dialled (RFC 9000, 2.1)."""
CONNECTION_ID_BYTES = 8
DATAGRAM_BYTES = 1232
"""Of what is sent, without IP and UDP: with them it is 1280, which every IPv6 path carries (RFC 8200, 5)."""
WINDOW_BYTES = 2 * 1024 * 1024
"""How much may have come that nobody took yet: a whole frame, and about another one under way."""
IDLE_SECONDS = 15.0
"""A connection over which nothing comes for so long is over."""
KEEPALIVE_SECONDS = 5.0
"""After so much silence of the other end it is asked for a sign of life: keeps a NAT's mapping, too."""
KEY_UPDATE_PACKETS = 2**22
"""After so many packets the keys change; AES-GCM bears 2^23 (RFC 9001, 6.6)."""

_NO_LIMIT = 2**62 - 1

# the core describes each packet to a logger that listens at info level
logging.getLogger("quic").setLevel(logging.CRITICAL)


def server_configuration(certificate_path: Path) -> QuicConfiguration:
    """Return the settings of the end that is dialled.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no key and certificate.
    """
    configuration = _configuration(is_client=False)
    try:
        configuration.load_cert_chain(certificate_path, keyfile=certificate_path)
    except IndexError as error:
        raise ValueError("no certificate in it") from error
    return configuration


def client_configuration() -> QuicConfiguration:
    """Return the settings of the end that dials: KLP's handshake checks the peer."""
    return _configuration(is_client=True)


def _configuration(*, is_client: bool) -> QuicConfiguration:
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=[ALPN],
        supported_versions=[VERSION],
        connection_id_length=CONNECTION_ID_BYTES,
        idle_timeout=IDLE_SECONDS,
        max_datagram_size=DATAGRAM_BYTES,
        max_stream_data=WINDOW_BYTES,
        # there is one stream, and its own limit is the one that counts
        max_data=_NO_LIMIT,
        verify_mode=ssl.CERT_NONE,
    )


class Connection(QuicConnection):
    """A connection whose stream gets credit for what was taken from it. Pure: time and bytes in and out."""

    def __init__(self, configuration: QuicConfiguration, **address_validation: Any) -> None:
        super().__init__(configuration=configuration, **address_validation)
        dialled = configuration.is_client
        self._local_max_streams_bidi = Limit(
            QuicFrameType.MAX_STREAMS_BIDI, "max_streams_bidi", 0 if dialled else 1
        )
        self._local_max_streams_uni = Limit(QuicFrameType.MAX_STREAMS_UNI, "max_streams_uni", 0)
        self._taken_bytes = 0
        self._packets = 0

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        """Return what is to be sent now, and where to; in good time with new keys."""
        datagrams: list[tuple[bytes, NetworkAddress]] = super().datagrams_to_send(now)
        self._packets += len(datagrams)
        if self._packets >= KEY_UPDATE_PACKETS:
            self._packets = 0
            self.request_key_update()
        return datagrams

    def _connect(self, now: float) -> None:
        """Begin, or begin again after a Retry: aioquic goes on to count what was sent before as in flight."""
        self._loss._cc.bytes_in_flight = 0
        super()._connect(now)

    @property
    def ending(self) -> ConnectionTerminated | None:
        """Why it ends, as soon as that is known; the event of that name comes when all is over."""
        event: ConnectionTerminated | None = self._close_event
        return event

    @property
    def unsent_bytes(self) -> int:
        """What was written to the stream and never sent."""
        sender = self._streams[STREAM].sender
        unsent: int = sender._buffer_stop - sender.highest_offset
        return unsent

    @property
    def undelivered_bytes(self) -> int:
        """What was written to the stream and is not acknowledged."""
        sender = self._streams[STREAM].sender
        undelivered: int = sender._buffer_stop - sender._buffer_start
        return undelivered

    @property
    def delivered(self) -> bool:
        """Whether the other end has all of the stream, and its end."""
        stream = self._streams.get(STREAM)
        return stream is None or bool(stream.sender.is_finished)

    @property
    def furthest_bytes(self) -> int:
        """How far the other end has come with the stream, counting what came out of order."""
        stream = self._streams.get(STREAM)
        return 0 if stream is None else int(stream.receiver.highest_offset)

    def peer_certificate(self) -> bytes:
        """Return the certificate (DER) that the other end showed, and proved to own, in the handshake."""
        certificate = self.tls._peer_certificate
        assert certificate is not None, "a server shows one"
        return certificate.public_bytes(Encoding.DER)

    def remote(self) -> tuple[Any, ...]:
        """Return the socket address where the other end is now."""
        path = self.get_peer_address()
        assert path is not None, "it began with a datagram"
        remote: tuple[Any, ...] = path.remote
        return remote

    def take(self, count: int) -> bool:
        """Note that `count` bytes of the stream were taken; tell whether it is time to say so."""
        self._taken_bytes += count
        stream = self._streams.get(STREAM)
        return stream is not None and self._credit_is_due(stream)

    def _credit_is_due(self, stream: QuicStream) -> bool:
        return bool(self._taken_bytes + WINDOW_BYTES - stream.max_stream_data_local >= WINDOW_BYTES // 4)

    def _write_stream_limits(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream
    ) -> None:
        """Raise MAX_STREAM_DATA. aioquic's own doubles it when half of it came, taken or not."""
        if self._credit_is_due(stream):
            stream.max_stream_data_local = self._taken_bytes + WINDOW_BYTES
        if stream.max_stream_data_local_sent == stream.max_stream_data_local:
            return
        buffer = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        buffer.push_uint_var(STREAM)
        buffer.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local


def refusal(header: QuicHeader, code: QuicErrorCode) -> bytes:
    """Return the answer to a first datagram that begins no connection (RFC 9000, 5.2.2 and 8.1.3)."""
    crypto = CryptoPair()
    crypto.setup_initial(cid=header.destination_cid, is_client=False, version=VERSION)
    builder = QuicPacketBuilder(
        host_cid=header.destination_cid,
        peer_cid=header.source_cid,
        version=VERSION,
        is_client=False,
        max_datagram_size=DATAGRAM_BYTES,
    )
    builder.start_packet(QuicPacketType.INITIAL, crypto)
    buffer = builder.start_frame(QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY)
    buffer.push_uint_var(code)
    buffer.push_uint_var(QuicFrameType.PADDING)
    buffer.push_uint_var(0)  # no words
    [datagram], _ = builder.flush()
    return bytes(datagram)
