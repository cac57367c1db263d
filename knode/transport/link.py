"""The one small interface that every link has, and the carriers that make links."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

MAX_FRAME_BYTES = 1024 * 1024
"""The largest frame that any link takes or gives, in bytes."""


class LinkClosed(Exception):
    """The link carries nothing more. `reason` says why, for the log; it is no protocol value."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LinkFault(LinkClosed):
    """The link is closed because the other end sent what is no frame of it."""


@dataclass(slots=True)
class LinkStatistics:
    """What a link has carried since it was opened."""

    frames_sent: int = 0
    frames_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_read: int = 0
    """All that came from the other end, with the carrier's framing and frames that are not whole yet:
    a sign of life while a large frame crawls over a slow link."""


class Link(Protocol):
    """A carrier of frames between two nodes.

    One task sends and one task receives at a time. Frames arrive in order, whole, once, or the link
    is closed.
    """

    @property
    def carrier(self) -> str:
        """The kind of link: `quic`, `websocket`, `libp2p`, `memory`."""
        ...

    @property
    def remote_address(self) -> str:
        """Where the other end is, for people: `192.168.1.7:4747`."""
        ...

    @property
    def relayed(self) -> bool:
        """Whether a third node passes everything on: slower, and there only as long as that one is."""
        ...

    @property
    def channel_binding(self) -> bytes:
        """32 bytes that only the two ends of this very channel share: SHA-256 of the server's certificate."""
        ...

    @property
    def statistics(self) -> LinkStatistics:
        """What it has carried."""
        ...

    async def send_frame(self, frame: bytes | bytearray | memoryview) -> None:
        """Send one frame of 1 to MAX_FRAME_BYTES bytes; returns when the link takes more (back-pressure).

        Raises:
            LinkClosed: the link is closed, by either end or by a fault.
            ValueError: the frame is empty or too large; nothing was sent.

        A cancelled send either has not begun, and the link stays usable, or the link is closed:
        the other end never sees half a frame.
        """
        ...

    def send_at_once(self, frame: bytes) -> bool:
        """Send one frame if that needs no wait; False: nothing of it was sent, and `send_frame` can.

        For small frames that many links are sent at one moment. Not while another task sends.
        """
        ...

    async def receive_frame(self) -> bytes:
        """Return the next frame.

        Raises:
            LinkClosed: closed in order by the other end, or broken; LinkFault when the other end sent what
                is no frame.

        Cancelling loses nothing: the next call returns the frame that this one would have.
        """
        ...

    async def aclose(self) -> None:
        """Close in order, waiting at most 2 seconds for the other end; twice is no error.

        When cancelled it closes at once, without a good-bye.
        """
        ...


Accept = Callable[[Link], Awaitable[None]]
"""What a listener calls with each new link, in a task of its own. The link is closed when it returns or
raises LinkClosed; any other error is the caller's and ends `serve`."""


async def serve_link(link: Link, accept: Accept) -> None:
    """Give a link to `accept` and close it afterwards, as `Accept` promises, whatever the end was."""
    try:
        with suppress(LinkClosed):  # how every link ends
            await accept(link)
    finally:
        await link.aclose()


class Listener(Protocol):
    """Where a carrier listens."""

    @property
    def addresses(self) -> list[str]:
        """The addresses that others can dial now: `host:port`, `[v6]:port`, or a libp2p multiaddr."""
        ...

    @property
    def dropped(self) -> int:
        """How many connections failed in their opening, since it was bound."""
        ...

    async def serve(self, accept: Accept) -> None:
        """Accept links until cancelled. A link that fails in its opening is dropped, logged and counted.

        At most a fixed number of links are in their opening at once, each for at most 10 seconds.
        """
        ...

    async def aclose(self) -> None:
        """Stop listening; twice is no error."""
        ...


class Carrier(Protocol):
    """A kind of link: how to listen for it and how to dial it."""

    async def listen(self, host: str, port: int) -> Listener:
        """Bind, so that dialling works from the return on (connections wait until `serve`).

        Raises:
            KnodeError: PORT_IN_USE, or INVALID_ARGUMENT for an address that is not this machine's.
        """
        ...

    def dials(self, address: str) -> bool:
        """Whether `address` has the form that this kind of link goes to."""
        ...

    async def dial(self, address: str) -> Link:
        """Open a link to an address, of a form that it `dials`, within 10 seconds.

        Raises:
            KnodeError: UNAVAILABLE, with why.
        """
        ...
