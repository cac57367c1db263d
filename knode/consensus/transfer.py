"""Whole states on their way from a leader to a follower that lacks what the leader's log has let go."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path

import trio

from knode.consensus.driver import Driver
from knode.consensus.envelope import Envelope, Offer
from knode.consensus.installation import Received
from knode.consensus.messages import InstallSnapshot, Message, ReplicaId
from knode.errors import Code, KnodeError
from knode.mesh.chunks import READ_BYTES, read_chunks, write_chunks
from knode.mesh.peer import Peer
from knode.world import Log, Monotonic, World

METHOD = "consensus.snapshot"
MAX_STATE_BYTES = 4 * 1024 * 1024 * 1024
SENT_AT_ONCE = 2
AGAIN_S = 1.0
"""How long it waits after a transfer, before the same follower may get another."""
TRANSFER_S = 300.0


class Transfers:
    """Sends states to followers, one at a time to each, and receives one at a time.

    Files lie in `folder` only as long as a transfer lasts; what a crash leaves is removed at the next start.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        driver: Driver,
        log: Log,
        *,
        peer_of: Callable[[ReplicaId], Peer | None],
        envelope: Callable[[Message], Envelope],
    ) -> None:
        self._world = world
        self._folder = folder
        self._driver = driver
        self._log = log
        self._peer_of = peer_of
        self._envelope = envelope
        self._turn = trio.Semaphore(SENT_AT_ONCE)
        self._sending: dict[ReplicaId, trio.CancelScope] = {}
        self._is_receiving = False
        self._names = count()
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Own the tasks that send, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def send(self, message: InstallSnapshot) -> None:
        """Send the state to a follower, unless that is being done."""
        if self._nursery is not None and message.target not in self._sending:
            self._sending[message.target] = trio.CancelScope()
            self._nursery.start_soon(self._send, message)

    def stop_sending(self) -> None:
        """Send no more: this replica does not lead now."""
        for scope in self._sending.values():
            scope.cancel()

    async def receive(self, offer: Offer, message: InstallSnapshot, chunks: AsyncIterator[bytes]) -> None:
        """Take a state; return when it is in use here, or the core does not want it.

        Raises:
            KnodeError: TOO_LARGE, RATE_LIMITED while another arrives, INVALID_ARGUMENT when it is not what
                was announced, DISK_FULL, DISK_READ_ONLY.
        """
        if offer.size > MAX_STATE_BYTES:
            raise KnodeError(Code.TOO_LARGE, f"a ledger has at most {MAX_STATE_BYTES // 2**30} GiB")
        if self._is_receiving:
            raise KnodeError(Code.RATE_LIMITED, "another state is arriving here", "try again later")
        self._is_receiving = True
        received = Received(message, self._new_path("in"))
        try:
            await self._write(received.path, offer, chunks)
            await self._driver.install(received)
        finally:
            self._is_receiving = False
            if not received.is_accepted:
                await self._remove(received.path)

    async def _send(self, message: InstallSnapshot) -> None:
        target = message.target
        try:
            with self._sending[target]:
                async with self._turn:
                    await self._transfer(message)
                # Its acknowledgement is on its way; when that gets lost, the core tries again.
                await trio.sleep(AGAIN_S)
        finally:
            del self._sending[target]
        self._driver.snapshot_failed(target)

    async def _transfer(self, message: InstallSnapshot) -> None:
        peer, path = self._peer_of(message.target), self._new_path("out")
        if peer is None:
            return
        try:
            snapshot = await self._driver.dump(path)
            size, digest = await self._world.blocking.run(partial(self._measure, path))
            whole = InstallSnapshot(message.term, message.source, message.target, snapshot)
            offer = Offer(self._envelope(whole), size, digest)
            self._log.info("sending the ledger", to=peer.node_id, index=snapshot.index, size_bytes=size)
            deadline = Monotonic(self._world.clock.monotonic() + TRANSFER_S)
            async with aclosing(read_chunks(self._world, path, size)) as chunks:
                await peer.request(METHOD, offer, deadline=deadline, chunks=chunks)
        except KnodeError as error:
            self._log.warning("the ledger did not arrive", to=peer.node_id, why=str(error))
        finally:
            await self._remove(path)

    def _new_path(self, way: str) -> Path:
        return self._folder / f"{way}-{next(self._names)}"

    def _measure(self, path: Path) -> tuple[int, bytes]:
        size, digest = 0, sha256()
        while chunk := self._world.disk.read_at(path, size, READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
        return size, digest.digest()

    async def _write(self, path: Path, offer: Offer, chunks: AsyncIterator[bytes]) -> None:
        """Write what comes to a file, durably."""
        run = self._world.blocking.run
        with await run(partial(self._world.disk.create, path)) as file:
            digest = sha256()
            await write_chunks(
                self._world, file, chunks, name="the ledger", size=offer.size, update=digest.update
            )
            if digest.digest() != offer.hash:
                raise KnodeError(Code.INVALID_ARGUMENT, "the ledger is not the one that was announced")
            await run(file.sync)

    async def _remove(self, path: Path) -> None:
        with trio.CancelScope(shield=True):
            try:
                await self._world.blocking.run(partial(self._world.disk.remove, path))
            except KnodeError as error:
                self._log.warning("a file of a transfer cannot be removed", why=str(error))
