"""A libp2p connection at work: Noise below, Yamux above, and two tasks that move its bytes.

Cancelling a task inside a read or a write of libp2p tears the connection. So nobody but `Connection.run`
reads or writes there: streams take from and put into the buffers of the Yamux core, which are bounded, and
can be cancelled anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from libp2p.abc import ISecureConn
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import IOException

from knode.transport.libp2p_yamux import Stream, Yamux, YamuxError

CLOSE_SECONDS = 1
OUTGOING_BYTES = 256 * 1024
"""How much may wait to be written before those who send wait, too."""


class StreamEnded(IOException):
    """The stream gives or takes nothing more.

    Args:
        in_order: the other side finished it; otherwise it was reset, or the connection is gone.
    """

    def __init__(self, reason: str, *, in_order: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.in_order = in_order


class Connection:
    """One connection to a peer whose key Noise has proven.

    Args:
        secured: owned by `run` from now on.
        peer_id: the PeerId at the other end.
        initiator: whether this end dialled.
        remote_address: where the other end is, for people.
        relayed: whether it runs through a third node.
    """

    def __init__(
        self, secured: ISecureConn, peer_id: str, *, initiator: bool, remote_address: str, relayed: bool
    ) -> None:
        self.peer_id = peer_id
        self.initiator = initiator
        self.remote_address = remote_address
        self.relayed = relayed
        self.core = Yamux(initiator=initiator)
        self.changed = trio.Event()
        """Set, and replaced, whenever anything here may have changed."""
        self.ended_why: str | None = None
        """Why it carries nothing more; None as long as it does."""
        self._secured = secured
        self._scope = trio.CancelScope()
        self._closing = False

    @property
    def is_open(self) -> bool:
        """Whether streams can be opened."""
        return self.ended_why is None and not self._closing

    async def run(self, serve: Callable[[MuxedStream], None]) -> None:
        """Move bytes until the connection ends, of which `ended_why` says why.

        Args:
            serve: told each stream that the other side opens; must not wait.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read(serve)
        finally:
            if self.ended_why is None:
                self.ended_why = "it was closed here"
            self.core.end()
            self.wake()
            with trio.CancelScope(shield=True):
                await self._secured.close()

    def open_stream(self) -> MuxedStream:
        """Open a stream; raises StreamEnded when the connection is gone."""
        if not self.is_open:
            raise StreamEnded(self.ended_why or "it is being closed", in_order=False)
        stream = MuxedStream(self, self.core.open())
        self.wake()
        return stream

    async def aclose(self) -> None:
        """Send what waits and a good-bye, then close, within a second; twice is no error.

        When cancelled it closes at once.
        """
        if not self._closing:
            self._closing = True
            self.core.go_away()
            self.wake()
        try:
            with trio.move_on_after(CLOSE_SECONDS):
                while self.ended_why is None:
                    await self.changed.wait()
        finally:
            self.abort()

    def abort(self) -> None:
        """Close without a word; what has arrived stays readable."""
        self._closing = True
        self._scope.cancel()

    def wake(self) -> None:
        """Let everyone who waits here look again."""
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    async def _read(self, serve: Callable[[MuxedStream], None]) -> None:
        while True:
            try:
                self.core.receive(await self._secured.read())
            except YamuxError as error:
                self.ended_why = f"the other end broke Yamux: {error}"
                self._closing = True
                self.wake()
                await trio.sleep(CLOSE_SECONDS)  # for the writer to tell the other end
                return self._scope.cancel()
            except Exception as error:  # whatever Noise finds wrong with a stranger's bytes
                return self._end(str(error) or type(error).__name__)
            while self.core.accepted:
                serve(MuxedStream(self, self.core.accepted.popleft()))
            self.wake()
            while self.core.outgoing_bytes > 2 * OUTGOING_BYTES:
                await self.changed.wait()  # it asks, and does not read the answers

    async def _write(self) -> None:
        while True:
            data = self.core.take_outgoing()
            if data:
                self.wake()  # there is room again
                try:
                    await self._secured.write(data)
                except Exception as error:  # as above
                    return self._end(str(error) or type(error).__name__)
            elif self._closing:
                return self._end("it was closed here")
            else:
                await self.changed.wait()

    def _end(self, why: str) -> None:
        if self.ended_why is None:
            self.ended_why = why
        self._scope.cancel()


class MuxedStream(ReadWriteCloser):
    """One stream of a connection. One task reads and one writes at a time.

    `read`, `write`, `close` and `get_remote_address` are what the library's functions expect of a stream.
    """

    def __init__(self, connection: Connection, stream: Stream) -> None:
        self.connection = connection
        self.sent_bytes = 0
        """All that is on its way, or was."""
        self._stream = stream
        self._is_discarding = False

    @property
    def is_over(self) -> bool:
        """Whether nothing can be sent or arrive any more."""
        return self._stream.is_over

    @property
    def received_bytes(self) -> int:
        """All that ever arrived."""
        return self._stream.received_bytes

    async def read(self, n: int | None = None) -> bytes:
        """Return what has arrived, at least one byte and at most `n`.

        Raises:
            StreamEnded: and everything that came before was returned.

        Cancelling loses nothing.
        """
        connection, stream = self.connection, self._stream
        if stream.arrived:
            await trio.lowlevel.checkpoint()
        while self._is_discarding or not stream.arrived:
            if self._is_discarding:
                raise StreamEnded("it was closed here", in_order=False)
            if stream.finished_there:
                raise StreamEnded("the other end finished it", in_order=True)
            if stream.reset:
                raise StreamEnded(connection.ended_why or "it was reset", in_order=False)
            await connection.changed.wait()
        waiting = connection.core.outgoing_bytes
        data = connection.core.take(stream, n or 2**31)
        if connection.core.outgoing_bytes > waiting:
            connection.wake()  # the other end may send more
        return data

    async def write(self, data: bytes | memoryview) -> None:
        """Return once all of `data` is on its way: the other end has room, and the connection takes it.

        Raises:
            StreamEnded: part of it may have been sent.

        Cancelling leaves part of it sent, or none; nothing else can follow it then but a reset.
        """
        connection, rest = self.connection, memoryview(data)
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._stream.reset or connection.ended_why is not None:
                raise StreamEnded(connection.ended_why or "it was reset", in_order=False)
            if self._stream.finished_here:
                raise StreamEnded("it was finished here", in_order=True)
            while rest and connection.core.outgoing_bytes < OUTGOING_BYTES:
                sent = connection.core.send(self._stream, rest)
                if not sent:
                    break
                rest = rest[sent:]
                self.sent_bytes += sent
            connection.wake()
            if not rest:
                return await trio.lowlevel.cancel_shielded_checkpoint()
            await connection.changed.wait()

    async def discard(self) -> None:
        """Throw away what comes until the other end finishes; from now on `read` raises."""
        self._is_discarding = True
        self.connection.wake()
        core, stream = self.connection.core, self._stream
        while stream.arrived or not (stream.finished_there or stream.reset):
            if not core.take(stream, 2**31):
                await self.connection.changed.wait()
            elif core.outgoing_bytes:
                self.connection.wake()

    def finish(self) -> None:
        """Say that no more comes from here; twice is no error."""
        self.connection.core.finish(self._stream)
        self.connection.wake()

    def abort(self) -> None:
        """End both directions at once; twice is no error."""
        self.connection.core.abort(self._stream)
        self.connection.wake()

    async def close(self) -> None:
        """`finish`, as the library calls it."""
        self.finish()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Nobody asks: see `Connection.remote_address`."""
        return None
