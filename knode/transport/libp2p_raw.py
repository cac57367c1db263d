"""Bytes below Noise, as py-libp2p reads them: from a socket, or from a stream to a relay."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError

READ_BYTES = 256 * 1024


class RawBytes(ReadWriteCloser):
    """Gives each read in full: the library gives up a message that comes in more than 100 pieces.

    Args:
        receive: waits for up to so many bytes; empty at the end.
        send: sends all.
        close: closes at once.
    """

    def __init__(
        self,
        receive: Callable[[int], Awaitable[bytes]],
        send: Callable[[bytes], Awaitable[None]],
        close: Callable[[], None],
    ) -> None:
        self.close_now = close
        self.limit_bytes: int | None = None
        """How much more may be read; None without a limit."""
        self._receive = receive
        self._send = send
        self._incoming = bytearray()

    async def read(self, n: int | None = None) -> bytes:
        """Return exactly `n` bytes.

        Raises:
            ConnectionClosedError: fewer came, or more than `limit_bytes`.
        """
        assert n is not None, "Noise knows how much it waits for"
        if self.limit_bytes is not None:
            self.limit_bytes -= n
            if self.limit_bytes < 0:
                raise ConnectionClosedError("its opening is too long")
        while len(self._incoming) < n:
            try:
                data = await self._receive(READ_BYTES)
            except OSError as error:
                raise ConnectionClosedError(str(error)) from error
            if not data:
                raise ConnectionClosedError("the other end closed it")
            self._incoming += data
        result = bytes(memoryview(self._incoming)[:n])
        del self._incoming[:n]
        return result

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""
        await self._send(data)

    async def close(self) -> None:
        """Close at once."""
        self.close_now()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Nobody asks: whoever made these bytes knows where they go."""
        return None
