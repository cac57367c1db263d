"""Links over WebSocket (RFC 6455) over TLS 1.3 over TCP.

The protocol is the sans-I/O core of `websockets`, driven here: subprotocol `klp.1`, path `/klp`, binary
messages alone, no extensions, no compression.
"""

from __future__ import annotations

import logging
import ssl
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import trio
from websockets.client import ClientProtocol
from websockets.exceptions import WebSocketException
from websockets.frames import Frame
from websockets.http11 import Request, Response
from websockets.protocol import Event, State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from knode.errors import Code, KnodeError
from knode.transport.address import is_host_and_port, join_address, split_address
from knode.transport.binding import dialable
from knode.transport.certificate import (
    binding_of,
    channel_binding,
    client_context,
    damaged,
    server_context,
)
from knode.transport.link import MAX_FRAME_BYTES, Accept, serve_link
from knode.transport.openings import Openings
from knode.transport.strangers import StrangerLines
from knode.transport.tcp import bind_tcp, prepare_tcp
from knode.transport.tls import TlsStream
from knode.transport.websocket_link import WebSocketLink, send_queued
from knode.world import Log

SUBPROTOCOL = Subprotocol("klp.1")
PATH = "/klp"
OPENING_SECONDS = 10
OPENING_BYTES = 16 * 1024
"""How large the HTTP request or answer that opens a link may be, but for its last TLS record."""

# the core describes each frame to a logger that listens at debug level
_core_log = logging.getLogger("knode.websockets")
_core_log.setLevel(logging.ERROR)


class _NotOpened(Exception):
    """The other end does not open a link as it should."""


async def _first_event(
    stream: TlsStream, protocol: ClientProtocol | ServerProtocol
) -> tuple[Request | Response, list[Event]]:
    """Return the HTTP request or answer, and what came behind it."""
    received_bytes = 0
    while True:
        pieces = await stream.receive()
        for piece in pieces:
            protocol.receive_data(piece)
            if not protocol.events:  # frames may follow the opening in the same read, and do not count
                received_bytes += len(piece)
        if not pieces:
            protocol.receive_eof()
        if protocol.handshake_exc is not None:
            await send_queued(stream, protocol)  # the HTTP error that tells the other end why
            raise _NotOpened(str(protocol.handshake_exc))
        if received_bytes >= OPENING_BYTES:
            raise _NotOpened(f"its opening has more than {OPENING_BYTES} bytes")
        events = protocol.events_received()
        if events and not isinstance(events[0], Frame):
            return events[0], events[1:]


async def _open_as_server(stream: TlsStream, binding: bytes, remote: str) -> WebSocketLink:
    await stream.handshake()
    protocol = ServerProtocol(
        # a browser names the page's origin; no page has business here
        origins=[None],
        subprotocols=[SUBPROTOCOL],
        max_size=MAX_FRAME_BYTES,
        logger=_core_log,
    )
    request, behind = await _first_event(stream, protocol)
    assert isinstance(request, Request)
    if behind:
        raise _NotOpened("it spoke before the answer")
    if request.path == PATH:
        answer = protocol.accept(request)
    else:
        answer = protocol.reject(HTTPStatus.NOT_FOUND, f"Links are at {PATH}.\n")
    protocol.send_response(answer)
    await send_queued(stream, protocol)
    if protocol.state is not State.OPEN:
        raise _NotOpened(f"it asked for what is not here: HTTP {answer.status_code}")
    return WebSocketLink(stream, protocol, remote, binding, ())


async def _open_as_client(stream: TlsStream, address: str) -> WebSocketLink:
    await stream.handshake()
    certificate = stream.peer_certificate()
    assert certificate is not None, "a TLS 1.3 server shows a certificate"
    protocol = ClientProtocol(
        parse_uri(f"wss://{address}{PATH}"),
        subprotocols=[SUBPROTOCOL],
        max_size=MAX_FRAME_BYTES,
        logger=_core_log,
    )
    protocol.send_request(protocol.connect())
    await send_queued(stream, protocol)
    _, behind = await _first_event(stream, protocol)
    if protocol.subprotocol != SUBPROTOCOL:
        raise _NotOpened(f"it does not speak {SUBPROTOCOL}")
    return WebSocketLink(stream, protocol, address, channel_binding(certificate), behind)


class WebSocketListener:
    """A bound TCP port. See `Listener` for the contract."""

    def __init__(
        self, listening: trio.SocketListener, context: ssl.SSLContext, binding: bytes, log: Log
    ) -> None:
        self.dropped = 0
        """How many connections failed in their opening."""
        self._listening = listening
        self._context = context
        self._binding = binding
        self._log = log
        self._lines = StrangerLines()
        self._accepting = trio.CancelScope()
        self._openings = Openings()
        self._addresses = self._dialable()

    @property
    def addresses(self) -> list[str]:
        """The addresses that others can dial now: a machine may move to another network."""
        with suppress(OSError):  # closed, or no descriptor left to ask the system with: as they were
            self._addresses = self._dialable()
        return self._addresses

    def _dialable(self) -> list[str]:
        return [join_address(host, port) for host, port in dialable(self._listening.socket.getsockname())]

    async def serve(self, accept: Accept) -> None:
        """Accept links; see `Listener.serve`. After `aclose`, returns when the last link is done."""

        async def handle(stream: trio.SocketStream) -> None:
            link = await self._open(stream.socket)
            if link is not None:
                await serve_link(link, accept)

        async with trio.open_nursery() as links:
            with self._accepting:
                await trio.serve_listeners(handle, [self._listening], handler_nursery=links)

    async def aclose(self) -> None:
        """Stop listening; see `Listener.aclose`. Open links stay open."""
        self._accepting.cancel()
        await self._listening.aclose()

    async def _open(self, raw: trio.socket.SocketType) -> WebSocketLink | None:
        """Return the link that a connection becomes, or None when it is dropped."""
        why = f"not open after {OPENING_SECONDS} seconds, or the oldest when others came"
        link = None
        try:
            prepare_tcp(raw)
            remote = join_address(*raw.getpeername()[:2])
        except OSError:  # it came and went
            raw.close()
            self.dropped += 1
            return None
        stream = TlsStream(raw, self._context, server_side=True)
        try:
            with self._openings.take(OPENING_SECONDS):
                link = await _open_as_server(stream, self._binding, remote)
        except (OSError, _NotOpened) as error:
            why = str(error)
        finally:
            if link is None:
                stream.close()
        if link is None:
            self.dropped += 1
            left_out = self._lines.admit(remote, trio.current_time())
            if left_out is not None:
                self._log.info("link opening dropped", remote=remote, reason=why, left_out=left_out)
        return link


class WebSocketCarrier:
    """Listens for WebSocket links and dials them.

    Args:
        certificate_path: the PEM file with the node's TLS key and certificate. Only `listen` reads it.
        log: told of connections that become no link.
    """

    def __init__(self, certificate_path: Path, log: Log) -> None:
        self._certificate_path = certificate_path
        self._log = log
        self._client_context = client_context()

    async def listen(self, host: str, port: int) -> WebSocketListener:
        """Bind; see `Carrier.listen`, and `bind_tcp`."""
        try:
            context = server_context(self._certificate_path)
            binding = binding_of(self._certificate_path)
        except (OSError, ValueError) as error:
            raise damaged(self._certificate_path, error) from error
        listening = await bind_tcp(host, port, setting="node.port")
        return WebSocketListener(listening, context, binding, self._log)

    def dials(self, address: str) -> bool:
        """Whether it dials such addresses; see `Carrier.dials`."""
        return is_host_and_port(address)

    async def dial(self, address: str) -> WebSocketLink:
        """Open a link; see `Carrier.dial`."""
        try:
            host, port = split_address(address)
            with trio.fail_after(OPENING_SECONDS):
                connected = (await trio.open_tcp_stream(host, port)).socket
                prepare_tcp(connected)
                stream = TlsStream(connected, self._client_context, server_side=False)
                try:
                    return await _open_as_client(stream, join_address(host, port))
                except BaseException:
                    stream.close()
                    raise
        except (OSError, ValueError, trio.TooSlowError, WebSocketException, _NotOpened) as error:
            raise KnodeError(Code.UNAVAILABLE, f"no link to {address}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return what went wrong, without the layers around it."""
    if isinstance(error, trio.TooSlowError):
        return f"no answer within {OPENING_SECONDS} seconds"
    if isinstance(error.__cause__, BaseExceptionGroup):  # one error for each address that was tried
        return "; ".join(dict.fromkeys(str(tried) for tried in error.__cause__.exceptions))
    return str(error)
