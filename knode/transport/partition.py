"""Cutting a node off from others where there is no firewall to do it: a testnet on loopback, without root.

The carriers of a node are wrapped; which nodes it must neither hear nor reach is one value, `Partition`.
While a link is cut it is a black hole: what is sent waits, what comes waits, the end of the other side is
not noticed, and neither is ours there. Healed, it goes on where it stood, as TCP would.

A production node has none of this. Nothing here knows what a node is but for its name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import trio

from knode.errors import Code, KnodeError
from knode.transport.link import Accept, Carrier, Link, LinkClosed, LinkStatistics, Listener

T = TypeVar("T")

OPENING_SECONDS = 10
CLOSE_SECONDS = 2
GIVEN_UP_SECONDS = 60
"""How long the accepting end of a closed link stays, when nothing passes: as long as TCP's keepalive."""


class Partition:
    """The nodes from which this one is cut off. Whose a link is, is known as soon as anybody knows it.

    A link that was dialled is the node's that `owner_of` names; one that was accepted is nobody's, and
    passes everything, until `claim` says whose it is.
    """

    def __init__(self, cut_off_from: Iterable[str] = ()) -> None:
        self.owner_of: Callable[[str], str | None] = lambda address: None
        """Tells which node has an address; None when that is not known."""
        self._cut_off_from = frozenset(cut_off_from)
        self._changed = trio.Event()
        self._left_open: dict[PartitionedLink, None] = {}

    @property
    def cut_off_from(self) -> frozenset[str]:
        """The nodes that are cut off now."""
        return self._cut_off_from

    def set(self, cut_off_from: Iterable[str]) -> None:
        """Cut these nodes off, and no others: what waited for those goes on."""
        self._cut_off_from = frozenset(cut_off_from)
        self.wake()

    def claim(self, link: Link, node: str) -> None:
        """Note whose a link is."""
        assert isinstance(link, PartitionedLink), "a node under faults has no other links"
        link.node = node

    async def run(self) -> None:
        """Close what was closed here during a cut, and what the other end learns of only now."""
        async with trio.open_nursery() as nursery:
            while True:
                for link in [link for link in self._left_open if not link.is_cut]:
                    del self._left_open[link]
                    nursery.start_soon(link.aclose)
                await self._changed.wait()

    # what carriers and links use

    def cuts(self, node: str | None) -> bool:
        """Tell whether nothing passes to and from a node."""
        return node in self._cut_off_from

    def leave_open(self, link: PartitionedLink) -> None:
        """Keep a link that was closed here until the other end may learn of it."""
        self._left_open[link] = None

    def forget(self, link: PartitionedLink) -> None:
        """Undo `leave_open`; twice is no error."""
        self._left_open.pop(link, None)

    def wake(self) -> None:
        """Let everyone who waits look again."""
        self._changed.set()
        self._changed = trio.Event()

    async def change(self) -> None:
        """Wait until something may be different."""
        await self._changed.wait()


class PartitionedLink:
    """A link that may be cut. See `Link` for the contract."""

    def __init__(self, link: Link, partition: Partition, node: str | None) -> None:
        self.node = node
        """Whose the other end is; None as long as nobody knows."""
        self._link = link
        self._partition = partition
        self._seen = replace(link.statistics)
        self._held: bytes | None = None
        self._ended: LinkClosed | None = None
        self._is_closed = False
        self._under_way: set[trio.CancelScope] = set()

    @property
    def carrier(self) -> str:
        """See `Link.carrier`."""
        return self._link.carrier

    @property
    def remote_address(self) -> str:
        """See `Link.remote_address`."""
        return self._link.remote_address

    @property
    def relayed(self) -> bool:
        """See `Link.relayed`."""
        return self._link.relayed

    @property
    def channel_binding(self) -> bytes:
        """See `Link.channel_binding`."""
        return self._link.channel_binding

    @property
    def statistics(self) -> LinkStatistics:
        """See `Link.statistics`; while it is cut they are as they were last seen."""
        if not self.is_cut:
            self._seen = replace(self._link.statistics)
        return self._seen

    @property
    def is_cut(self) -> bool:
        """Whether nothing passes now."""
        return self._partition.cuts(self.node)

    async def send_frame(self, frame: bytes | bytearray | memoryview) -> None:
        """Send one frame; see `Link.send_frame`. While it is cut this waits, and has not begun."""
        await self._until_passable()
        await self._below(self._link.send_frame(frame))

    def send_at_once(self, frame: bytes) -> bool:
        """Send one frame if that needs no wait; see `Link.send_at_once`."""
        return not (self.is_cut or self._is_closed) and self._link.send_at_once(frame)

    async def receive_frame(self) -> bytes:
        """Return the next frame; see `Link.receive_frame`. What comes while it is cut is kept for later."""
        while True:
            await self._until_passable()
            if self._held is not None:
                frame, self._held = self._held, None
                return frame
            if self._ended is not None:
                raise self._ended
            try:
                self._held = await self._below(self._link.receive_frame())
            except LinkClosed as closed:
                self._ended = closed

    async def aclose(self) -> None:
        """Close; see `Link.aclose`. While it is cut the other end does not learn of it."""
        self._is_closed = True
        self._partition.wake()
        try:
            with trio.move_on_after(CLOSE_SECONDS):
                while self.is_cut:
                    await self._partition.change()
        finally:
            if self.is_cut:
                self._partition.leave_open(self)
                for scope in self._under_way:
                    scope.cancel()
            else:
                await self._link.aclose()

    async def _below(self, work: Awaitable[T]) -> T:
        """Let the link below do something, until it is given up because this one was closed while cut."""
        with trio.CancelScope() as scope:
            self._under_way.add(scope)
            try:
                return await work
            finally:
                self._under_way.discard(scope)
        raise LinkClosed("it was closed here")

    async def _until_passable(self) -> None:
        """Wait while it is cut. Raises LinkClosed when it is closed here."""
        while self.is_cut and not self._is_closed:
            await self._partition.change()
        if self._is_closed:
            raise LinkClosed("it was closed here")


class PartitionedListener:
    """A listener whose links may be cut. See `Listener` for the contract."""

    def __init__(self, listener: Listener, partition: Partition) -> None:
        self._listener = listener
        self._partition = partition

    @property
    def addresses(self) -> list[str]:
        """See `Listener.addresses`."""
        return self._listener.addresses

    @property
    def dropped(self) -> int:
        """See `Listener.dropped`."""
        return self._listener.dropped

    async def serve(self, accept: Accept) -> None:
        """Accept links; see `Listener.serve`."""

        async def accept_partitioned(accepted: Link) -> None:
            link = PartitionedLink(accepted, self._partition, None)
            try:
                await accept(link)
            finally:
                await link.aclose()
            # the listener closes what it accepted as soon as this returns
            with trio.move_on_after(GIVEN_UP_SECONDS):
                while link.is_cut:
                    await self._partition.change()
            self._partition.forget(link)

        await self._listener.serve(accept_partitioned)

    async def aclose(self) -> None:
        """See `Listener.aclose`."""
        await self._listener.aclose()


class PartitionedCarrier:
    """A carrier whose links may be cut. See `Carrier` for the contract."""

    def __init__(self, carrier: Carrier, partition: Partition) -> None:
        self._carrier = carrier
        self._partition = partition

    async def listen(self, host: str, port: int) -> PartitionedListener:
        """See `Carrier.listen`."""
        return PartitionedListener(await self._carrier.listen(host, port), self._partition)

    def dials(self, address: str) -> bool:
        """See `Carrier.dials`."""
        return self._carrier.dials(address)

    async def dial(self, address: str) -> PartitionedLink:
        """Open a link; see `Carrier.dial`. A node that is cut off does not answer."""
        node = self._partition.owner_of(address)
        with trio.move_on_after(OPENING_SECONDS):
            while self._partition.cuts(node):
                await self._partition.change()
            return PartitionedLink(await self._carrier.dial(address), self._partition, node)
        raise KnodeError(
            Code.UNAVAILABLE, f"no link to {address}: no answer within {OPENING_SECONDS} seconds"
        )
