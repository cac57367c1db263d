"""The WebSocket link against clients and servers that are not knode: honest, broken and hostile."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol
from websockets.sync.client import connect
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from knode.errors import Code, KnodeError
from knode.transport import MAX_FRAME_BYTES, Link, LinkClosed, binding
from knode.transport.certificate import client_context, server_context
from knode.transport.openings import OPENINGS_AT_ONCE
from knode.transport.websocket import (
    OPENING_BYTES,
    OPENING_SECONDS,
    WebSocketCarrier,
    WebSocketListener,
)
from knode.world import SilentLog

UPGRADE = (
    "GET /klp HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
HELLO = f"{UPGRADE}Sec-WebSocket-Protocol: klp.1\r\n\r\n"

TlsStream = trio.SSLStream[trio.SocketStream]


class Echo:
    """A listening node that answers each frame with itself, and keeps why links ended."""

    def __init__(self, listener: WebSocketListener) -> None:
        self.listener = listener
        self.address = listener.addresses[0]
        self.port = int(self.address.rpartition(":")[2])
        self.received: list[bytes] = []
        self.ended: list[str] = []
        self._changed = trio.Event()

    async def accept(self, link: Link) -> None:
        try:
            while True:
                self.received.append(await link.receive_frame())
                await link.send_frame(self.received[-1])
        except LinkClosed as closed:
            self.ended.append(closed.reason)
            self._changed.set()

    async def why_ended(self) -> str:
        """Wait for the end of the first link."""
        with trio.fail_after(60):
            await self._changed.wait()
        return self.ended[0]

    async def dropped(self, count: int = 1) -> None:
        """Wait until that many openings were dropped; then a good one must still work."""
        with trio.fail_after(60):
            while self.listener.dropped < count:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert self.listener.dropped == count
        link = await WebSocketCarrier(Path("dials only"), SilentLog()).dial(self.address)
        await link.send_frame(b"still here")
        assert await link.receive_frame() == b"still here"
        await link.aclose()


@pytest.fixture
async def echo(certificate: Path) -> AsyncIterator[Echo]:
    listener = await WebSocketCarrier(certificate, SilentLog()).listen("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        echo = Echo(listener)
        nursery.start_soon(listener.serve, echo.accept)
        yield echo
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def tls_to(echo: Echo) -> AsyncIterator[TlsStream]:
    tcp = await trio.open_tcp_stream("127.0.0.1", echo.port)
    stream = trio.SSLStream(tcp, client_context(), https_compatible=True)
    try:
        yield stream
    finally:
        await trio.aclose_forcefully(stream)


async def read_all(stream: TlsStream) -> bytes:
    data = b""
    with trio.fail_after(60):
        while True:
            try:
                piece = await stream.receive_some()
            except trio.BrokenResourceError:
                return data
            if not piece:
                return data
            data += piece


async def upgraded(stream: TlsStream) -> None:
    await stream.send_all(HELLO.encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += await stream.receive_some()
    assert answer.startswith(b"HTTP/1.1 101 ")


def masked(opcode: Opcode, data: bytes, *, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin).serialize(mask=True)


async def test_another_implementation_can_open_ping_send_and_close(echo: Echo) -> None:
    def visit() -> None:
        with connect(
            f"wss://{echo.address}/klp",
            ssl=client_context(),
            subprotocols=[Subprotocol("klp.1")],
            compression=None,
        ) as other:
            assert other.subprotocol == "klp.1"
            other.send(b"hello")
            assert other.recv() == b"hello"
            assert other.ping(b"there?").wait(60), "no pong"

    await trio.to_thread.run_sync(visit)
    assert await echo.why_ended() == "it was closed by the other end"


async def test_fragments_are_put_together(echo: Echo) -> None:
    async with tls_to(echo) as stream:
        await upgraded(stream)
        for data, opcode, fin in [
            (b"a" * 70_000, Opcode.BINARY, False),
            (b"", Opcode.CONT, False),
            (b"b" * 10, Opcode.CONT, True),
        ]:
            await stream.send_all(masked(opcode, data, fin=fin))
        await stream.send_all(masked(Opcode.CLOSE, b""))
        answer = await read_all(stream)
    assert b"a" * 70_000 + b"b" * 10 in answer
    assert echo.ended == ["it was closed by the other end"]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (masked(Opcode.TEXT, b"text"), "text"),
        (masked(Opcode.BINARY, b""), "empty"),
        (masked(Opcode.BINARY, b"", fin=False) + masked(Opcode.CONT, b""), "empty"),
        (Frame(Opcode.BINARY, b"bare").serialize(mask=False), "incorrect masking"),
        (masked(Opcode.CONT, b"x"), "unexpected continuation frame"),
        (
            masked(Opcode.BINARY, b"x", fin=False) + masked(Opcode.BINARY, b"y"),
            "expected a continuation frame",
        ),
        (b"\xc2\x81" + bytes(5), "reserved bits"),
        (b"\x82\xff" + (MAX_FRAME_BYTES + 1).to_bytes(8), "over size limit|exceeds limit|too big"),
        (b"\x82\xff" + (2**63).to_bytes(8), "exceeds limit|too big"),
        (
            masked(Opcode.BINARY, bytes(MAX_FRAME_BYTES), fin=False) + masked(Opcode.CONT, b"x"),
            "exceeds limit|too big",
        ),
        (masked(Opcode.PONG, b"x" * 10)[:5], "without a good-bye"),
    ],
    ids=[
        "text",
        "empty",
        "empty in fragments",
        "unmasked",
        "continuation of nothing",
        "two at once",
        "reserved bit",
        "one byte too large",
        "2^63 bytes",
        "fragments too large",
        "half a frame",
    ],
)
async def test_what_is_no_frame_ends_the_link_behind_the_frames_before_it(
    echo: Echo, said: bytes, why: str
) -> None:
    async with tls_to(echo) as stream:
        await upgraded(stream)
        await stream.send_all(masked(Opcode.BINARY, b"good one") + said)
        await stream.transport_stream.send_eof()
        reason = await echo.why_ended()
    assert echo.received == [b"good one"]
    assert any(each in reason for each in why.split("|")), reason


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (HELLO.replace("/klp", "/"), 404),
        (HELLO.replace("klp.1", "klp.2"), 400),
        (f"{UPGRADE}\r\n", 400),
        (HELLO.replace("GET", "POST"), 405),
        ("GET /klp HTTP/1.1\r\nHost: x\r\n\r\n", 426),
        (HELLO.replace("Host: x", "Host: x\r\nOrigin: https://evil.example"), 403),
        ("GET /" + "x" * 9000 + HELLO, 414),
        (HELLO.replace("Host: x", "Host: " + "x" * 9000), 431),
        (HELLO.replace("Host: x", "\r\n".join(f"X-{number}: y" for number in range(200))), 431),
    ],
    ids=[
        "wrong path",
        "wrong subprotocol",
        "no subprotocol",
        "POST",
        "plain HTTP",
        "a browser's page",
        "long request line",
        "long header",
        "many headers",
    ],
)
async def test_an_opening_that_is_not_ours_gets_its_http_error(
    echo: Echo, request_text: str, status: int
) -> None:
    async with tls_to(echo) as stream:
        await stream.send_all(request_text.encode())
        assert (await read_all(stream)).startswith(f"HTTP/1.1 {status} ".encode())
    await echo.dropped()


@pytest.mark.parametrize(
    "said",
    [
        HELLO.replace("Host: x", "\r\n".join(f"X-{number}: {'y' * 1000}" for number in range(30))).encode(),
        HELLO.encode() + masked(Opcode.BINARY, b"too early"),
        b"\x00" * 1000 + b"\r\n\r\n",
        b"\xff" * (OPENING_BYTES + 1),
    ],
    ids=["30 KB of headers", "frame before the answer", "binary garbage", "endless line"],
)
async def test_a_hostile_opening_is_dropped(echo: Echo, said: bytes) -> None:
    async with tls_to(echo) as stream:
        await stream.send_all(said)
        assert b" 101 " not in await read_all(stream)
    await echo.dropped()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(100), b"x"])
async def test_what_is_not_tls_is_dropped(echo: Echo, said: bytes) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", echo.port)
    await stream.send_all(said)
    await stream.send_eof()
    await echo.dropped()
    await stream.aclose()


async def test_tls_below_1_3_is_refused(echo: Echo) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    stream = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", echo.port), context)
    with pytest.raises(trio.BrokenResourceError) as raised:
        await stream.do_handshake()
    assert "PROTOCOL_VERSION" in str(raised.value.__cause__)
    await trio.aclose_forcefully(stream)
    await echo.dropped()


async def test_no_session_can_be_resumed(echo: Echo) -> None:
    async with tls_to(echo) as stream:
        await upgraded(stream)
        assert stream.version() == "TLSv1.3"
        assert not stream.session.has_ticket


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "a byte at a time"])
async def test_a_slow_opening_is_dropped_after_ten_seconds(
    tenfold_clock: MockClock, echo: Echo, drip: bool
) -> None:
    async with tls_to(echo) as stream:
        await stream.do_handshake()
        started = trio.current_time()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def say_little() -> None:
                while drip:
                    await stream.send_all(b"G")
                    await trio.sleep(1)

            assert await read_all(stream) == b""
            nursery.cancel_scope.cancel()
        assert OPENING_SECONDS - 1 < trio.current_time() - started < 3 * OPENING_SECONDS
    await echo.dropped()


async def test_silent_connections_shut_nobody_out(echo: Echo) -> None:
    silent = [await trio.open_tcp_stream("127.0.0.1", echo.port) for _ in range(OPENINGS_AT_ONCE)]
    link = await WebSocketCarrier(Path("dials only"), SilentLog()).dial(echo.address)
    await link.send_frame(b"here I am")
    assert await link.receive_frame() == b"here I am"
    assert echo.listener.dropped == 1, "the oldest made room"
    with trio.fail_after(60):
        assert await silent[0].receive_some() == b""
    await link.aclose()
    for stream in silent:
        await trio.aclose_forcefully(stream)


async def test_pings_of_who_never_reads_the_answers_come_to_wait(echo: Echo) -> None:
    pings = masked(Opcode.PING, b"x" * 125) * 1000
    async with tls_to(echo) as stream:
        await upgraded(stream)
        sent = 0
        waiting = False
        while not waiting:
            with trio.move_on_after(1) as scope:
                await stream.transport_stream.wait_send_all_might_not_block()
                await stream.send_all(pings)
            waiting = scope.cancelled_caught
            sent += len(pings)
            assert sent < 64 * 1024 * 1024, "nobody reads the answers, and they pile up"


async def test_a_receive_that_is_cancelled_while_it_answers_pings_loses_nothing(
    nursery: trio.Nursery, certificate: Path
) -> None:
    batches = 40
    stuck = trio.Event()

    async def serve(stream: TlsStream) -> None:
        stream.transport_stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        protocol = await accepted(stream)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def ping() -> None:
                for number in range(batches):
                    for _ in range(1000):
                        protocol.send_ping(b"x" * 125)
                    protocol.send_binary(number.to_bytes(2))
                    await stream.send_all(b"".join(protocol.data_to_send()))

            await stuck.wait()
            while True:  # not one answer until the other end had to wait
                await stream.receive_some()

    link = await dial_to(nursery, certificate, serve)
    received: list[bytes] = []
    cancelled = 0
    with trio.fail_after(60):
        while len(received) < batches:
            with trio.move_on_after(0.05) as scope:
                received.append(await link.receive_frame())
            cancelled += scope.cancelled_caught
            if cancelled == 5:
                stuck.set()
    assert received == [number.to_bytes(2) for number in range(batches)]
    assert cancelled >= 5
    await hang_up(link)


async def say_nothing(_: TlsStream) -> None:
    await trio.sleep_forever()


# the other way round: the node dials what is no node


Serve = Callable[[TlsStream], Awaitable[None]]


async def accepted(stream: TlsStream) -> ServerProtocol:
    """Answer the opening as a server of KLP links does."""
    protocol = ServerProtocol(subprotocols=[Subprotocol("klp.1")])
    while not (events := protocol.events_received()):
        protocol.receive_data(await stream.receive_some())
    protocol.send_response(protocol.accept(events[0]))
    await stream.send_all(b"".join(protocol.data_to_send()))
    return protocol


async def dial_listener(certificate: Path, listener: trio.SocketListener) -> Link:
    port = listener.socket.getsockname()[1]
    return await WebSocketCarrier(certificate, SilentLog()).dial(f"127.0.0.1:{port}")


async def dial_to(nursery: trio.Nursery, certificate: Path, serve: Serve) -> Link:
    """Dial a TLS server that does `serve`."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    tls = trio.SSLListener(listener, server_context(certificate), https_compatible=True)
    nursery.start_soon(trio.serve_listeners, serve, [tls])
    return await dial_listener(certificate, listener)


async def hang_up(link: Link) -> None:
    with trio.CancelScope() as at_once:
        at_once.cancel()
        await link.aclose()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "HTTP 200"),
        (b"\x00\xff" * 100 + b"\r\n", "valid HTTP response"),
        (b"", "closed the connection|valid HTTP response"),
        (b"HTTP/1.1 101 " + b"x" * 20_000, "valid HTTP response|more than|bytes"),
        (b"HTTP/1.1 101 X\r\n" + b"X-Y: z\r\n" * 10_000, "more than|valid HTTP response|header"),
    ],
    ids=["a web server", "garbage", "silence and the end", "endless status", "endless headers"],
)
async def test_dialling_what_is_no_node_says_so(
    nursery: trio.Nursery, certificate: Path, answer: bytes, why: str
) -> None:
    async def serve(stream: TlsStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)

    with pytest.raises(KnodeError) as raised:
        await dial_to(nursery, certificate, serve)
    assert raised.value.code is Code.UNAVAILABLE
    assert any(each in raised.value.message for each in why.split("|")), raised.value.message


async def test_dialling_who_says_nothing_ends_after_ten_seconds(
    tenfold_clock: MockClock, nursery: trio.Nursery, certificate: Path
) -> None:
    started = trio.current_time()
    with pytest.raises(KnodeError, match="no answer within 10 seconds"):
        await dial_to(nursery, certificate, say_nothing)
    assert trio.current_time() - started < 3 * OPENING_SECONDS


async def test_dialling_who_speaks_no_tls_says_so(certificate: Path) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 mail.example ESMTP\r\n")

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        with pytest.raises(KnodeError, match="no link to") as raised:
            await dial_listener(certificate, listener)
        assert raised.value.code is Code.UNAVAILABLE
        nursery.cancel_scope.cancel()


async def test_frames_right_behind_the_answer_are_not_lost(nursery: trio.Nursery, certificate: Path) -> None:
    async def serve(stream: TlsStream) -> None:
        protocol = ServerProtocol(subprotocols=[Subprotocol("klp.1")])
        while not (events := protocol.events_received()):
            protocol.receive_data(await stream.receive_some())
        protocol.send_response(protocol.accept(events[0]))
        protocol.send_binary(b"first")
        protocol.send_binary(b"second")
        await stream.send_all(b"".join(protocol.data_to_send()))
        await trio.sleep_forever()

    link = await dial_to(nursery, certificate, serve)
    assert [await link.receive_frame(), await link.receive_frame()] == [b"first", b"second"]
    await hang_up(link)


def test_a_node_asks_for_its_path_and_subprotocol() -> None:
    protocol = ClientProtocol(parse_uri("wss://[::1]:4747/klp"), subprotocols=[Subprotocol("klp.1")])
    assert b"GET /klp HTTP/1.1\r\nHost: [::1]:4747\r\n" in protocol.connect().serialize()


# listening


async def test_a_port_that_another_program_holds_is_named(certificate: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(KnodeError, match=f"listens on port {port}") as raised:
            await WebSocketCarrier(certificate, SilentLog()).listen("127.0.0.1", port)
    assert raised.value.code is Code.PORT_IN_USE
    assert raised.value.next_step


@pytest.mark.parametrize(
    "content", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
async def test_a_damaged_certificate_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tls.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KnodeError, match="holds no TLS key and certificate") as raised:
        await WebSocketCarrier(path, SilentLog()).listen("127.0.0.1", 0)
    assert raised.value.code is Code.HOME_DAMAGED


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7", "no.such.host.invalid", "not a host"])
async def test_an_address_that_is_not_ours_is_refused(certificate: Path, host: str) -> None:
    with pytest.raises(KnodeError, match="cannot listen on") as raised:
        await WebSocketCarrier(certificate, SilentLog()).listen(host, 0)
    assert raised.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("host", ["", "::", "0.0.0.0", "localhost", "127.0.0.1"])
async def test_every_address_that_a_listener_names_can_be_dialled(certificate: Path, host: str) -> None:
    carrier = WebSocketCarrier(certificate, SilentLog())
    listener = await carrier.listen(host, 0)
    assert listener.addresses
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, Echo(listener).accept)
        for address in listener.addresses:
            assert not address.startswith(("0.0.0.0", "[::]"))
            link = await carrier.dial(address)
            await link.send_frame(b"hello")
            assert await link.receive_frame() == b"hello"
            assert link.remote_address == address
            await link.aclose()
        nursery.cancel_scope.cancel()


async def test_the_addresses_to_dial_are_those_that_the_machine_has_now(
    monkeypatch: pytest.MonkeyPatch, certificate: Path
) -> None:
    carrier = WebSocketCarrier(certificate, SilentLog())
    listener = await carrier.listen("0.0.0.0", 0)
    port = listener.addresses[0].rpartition(":")[2]

    def moved(*, versions: frozenset[int]) -> list[str]:
        return ["198.51.100.7"]

    def out_of_descriptors(*, versions: frozenset[int]) -> list[str]:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(binding, "interface_addresses", moved)
    assert listener.addresses == [f"198.51.100.7:{port}"]
    monkeypatch.setattr(binding, "interface_addresses", out_of_descriptors)
    assert listener.addresses == [f"198.51.100.7:{port}"]
    await listener.aclose()
    assert listener.addresses == [f"198.51.100.7:{port}"]
