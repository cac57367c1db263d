"""TLS 1.3 over a trio socket, such that cancelling tears nothing.

`trio.SSLStream` breaks when a write is cancelled, also one that a read made (an answer to a ping, a key
update), and yields to the loop for each record of 16 KiB. Here what is to be sent waits in a queue until it
is, whoever sends it, and a read takes all the records that have come.
"""

from __future__ import annotations

import socket
import ssl
from collections import deque
from contextlib import suppress

import trio

from knode.world import Turns

READ_BYTES = 256 * 1024
"""How much ciphertext one read takes from the socket, at most."""

_RECORD_BYTES = 16 * 1024
# the other end decrypts one piece while this one encrypts the next
_PIECE_BYTES = 128 * 1024


class TlsStream:
    """One TLS connection over a connected socket, which it owns. One task receives; several may flush.

    The socket is the system's own, driven without a turn of the loop for a send that the kernel takes at
    once: a round trip has two of them.

    Everything raises OSError when the connection or its TLS fails (`ssl.SSLError` is an OSError), and
    `trio.ClosedResourceError` after `close`, also in tasks that wait.
    """

    def __init__(
        self, connected: trio.socket.SocketType, context: ssl.SSLContext, *, server_side: bool
    ) -> None:
        # detached: trio's own methods yield to the loop at each call
        self._socket = socket.socket(fileno=connected.detach())
        self._socket.setblocking(False)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._plain: deque[memoryview] = deque()
        self._unsent = memoryview(b"")
        self._sending = Turns()
        self._ended = False

    async def handshake(self) -> None:
        """Agree on keys. Cancelling leaves a connection that can only be closed."""
        done = False
        while not done:
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                await self.flush()  # the alert that tells the other end why
                raise
            await self.flush()
            if not done:
                data = await self._read()
                if not data:
                    raise ConnectionResetError("closed while TLS was being set up")
                self._incoming.write(data)

    def peer_certificate(self) -> bytes | None:
        """Return the certificate (DER) that the other end showed."""
        return self._tls.getpeercert(binary_form=True)

    def queue(self, data: bytes) -> None:
        """Put `data` behind what waits to be sent; call `flush` before the next, to keep that bounded."""
        self._plain.append(memoryview(data))

    async def flush(self) -> None:
        """Return once everything queued so far is with the kernel.

        Cancelling keeps what is unsent for the next flush, in order.
        """
        async with self._sending:
            while self._unsent or self._encrypt_next():
                try:
                    sent = self._open_socket().send(self._unsent)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)
                else:
                    self._unsent = self._unsent[sent:]

    def flush_at_once(self) -> None:
        """Hand to the kernel what it takes now of what was queued; the next flush sends the rest."""
        with suppress(BlockingIOError):
            while self._unsent or self._encrypt_next():
                sent = self._open_socket().send(self._unsent)
                self._unsent = self._unsent[sent:]

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be sent, and nobody sends."""
        return not (self._plain or self._unsent or self._outgoing.pending or self._sending.locked())

    def _encrypt_next(self) -> bool:
        """Make the next piece ready to be sent; tell whether there is one."""
        while self._plain and self._outgoing.pending < _PIECE_BYTES:
            waiting = self._plain.popleft()
            self._tls.write(waiting[:_PIECE_BYTES])
            if len(waiting) > _PIECE_BYTES:
                self._plain.appendleft(waiting[_PIECE_BYTES:])
        self._unsent = memoryview(self._outgoing.read())
        return bool(self._unsent)

    async def receive(self) -> list[bytes]:
        """Wait for data and return all that one read brought, in pieces; an empty list is the end.

        Cancelling loses nothing.
        """
        while True:
            if self._incoming.pending:
                pieces = self._decrypt()
                if pieces or self._ended:
                    return pieces
            data = await self._read()
            # no checkpoint from here to the return: what was read is handed over
            if not data:
                return []
            self._incoming.write(data)

    async def _read(self) -> bytes:
        """Return what the socket has, waiting for it; empty at the end."""
        while True:
            try:
                return self._open_socket().recv(READ_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)

    def _open_socket(self) -> socket.socket:
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError("the connection was closed here")
        return self._socket

    def _decrypt(self) -> list[bytes]:
        """Return the content of all whole records that have come."""
        pieces: list[bytes] = []
        try:
            while piece := self._tls.read(_RECORD_BYTES):
                pieces.append(piece)
            self._ended = True  # the other end's close_notify
        except ssl.SSLWantReadError:
            pass
        return pieces

    def close(self) -> None:
        """Close the socket at once; twice is no error."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
