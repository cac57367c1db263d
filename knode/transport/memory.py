"""Links in memory, for the simulator: delay, loss, cuts and crashes, all drawn from one randomness.

A whole network is one value, `MemoryNetwork`; each host gets its carrier from it. There are no threads
or real seconds in here: one task of the network waits on trio's clock, so that a virtual clock works, and
wakes whoever receives when something has arrived.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, inf

import trio

from knode.errors import Code, KnodeError
from knode.transport.address import is_host_and_port, join_address, split_address
from knode.transport.link import MAX_FRAME_BYTES, Accept, LinkClosed, LinkStatistics, serve_link
from knode.world import Randomness

OPENING_SECONDS = 10
OPENINGS_AT_ONCE = 64
CLOSE_SECONDS = 2

_BINDING_BYTES = 32
_FIRST_FREE_PORT = 49152


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """How a network behaves.

    Args:
        delay_seconds: least and most that a frame takes to the other end.
        loss: probability, below 1, that a frame is lost on the way. It is sent again: a loss is a delay.
        retransmission_seconds: how much later a lost frame is sent again.
        grain_seconds: frames arrive only at multiples of this, those of a large network many at once, which
            costs far less; 0: each at its own moment.
        breaks: probability that a frame breaks its link for good.
        buffer_frames: how many frames wait in one direction before the sender does.
        buffer_bytes: likewise, in bytes; a single frame always fits.
    """

    delay_seconds: tuple[float, float] = (0.0002, 0.002)
    loss: float = 0.0
    retransmission_seconds: float = 0.2
    grain_seconds: float = 0.0
    breaks: float = 0.0
    buffer_frames: int = 64
    buffer_bytes: int = 2 * MAX_FRAME_BYTES

    def __post_init__(self) -> None:
        low, high = self.delay_seconds
        if not (0 <= low <= high and 0 <= self.loss < 1 and 0 <= self.breaks <= 1 and self.buffer_frames > 0):
            raise ValueError(f"no network behaves like this: {self}")


class MemoryLink:
    """One end of a link. See `Link` for the contract; a cancelled send has never begun.

    An end is open, then closed (`_closed_why` is set), then gone: the other end notices that one as soon
    as nothing cuts the two off from each other.
    """

    carrier = "memory"
    relayed = False
    peer: MemoryLink

    def __init__(
        self, network: MemoryNetwork, number: int, host: str, remote_address: str, channel_binding: bytes
    ) -> None:
        self.number = number
        self.host = host
        self.remote_address = remote_address
        self.channel_binding = channel_binding
        self.statistics = LinkStatistics()
        self._network = network
        # what is on its way to this end, with the time of its arrival; None is the good-bye
        self._on_its_way: deque[tuple[float, bytes | None]] = deque()
        self._arrived: deque[bytes | None] = deque()
        self._waiting_bytes = 0
        self._last_arrival = 0.0
        self._closed_why: str | None = None
        self._is_gone = False
        self._receiver: trio.lowlevel.Task | None = None
        self._senders = trio.lowlevel.ParkingLot()

    async def send_frame(self, frame: bytes | bytearray | memoryview) -> None:
        """Send one frame; see `Link.send_frame`."""
        size = len(frame)
        if not 0 < size <= MAX_FRAME_BYTES:
            raise ValueError(f"a frame has 1 to {MAX_FRAME_BYTES} bytes, not {size}")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_can_send()
        while not self.peer._has_room(size):
            await self._senders.park()
            self._check_can_send()
        if self._network.draw(self._network.settings.breaks):
            self.peer._lose()
            self.vanish("the connection broke")
            raise LinkClosed("the connection broke")
        self._send(bytes(frame))

    def send_at_once(self, frame: bytes) -> bool:
        """Send one frame if there is room and it cannot break the link; see `Link.send_at_once`."""
        if (
            self._closed_why is not None
            or self._is_peer_gone()
            or not self.peer._has_room(len(frame))
            or self._network.settings.breaks
        ):
            return False
        self._send(frame)
        return True

    def _send(self, frame: bytes) -> None:
        self.peer._put(frame)
        self.statistics.frames_sent += 1
        self.statistics.bytes_sent += len(frame)

    async def receive_frame(self) -> bytes:
        """Return the next frame; see `Link.receive_frame`."""
        if self._arrived:
            await trio.lowlevel.checkpoint()
        while not self._arrived:
            self._check_open()
            if not self._on_its_way and self._is_peer_gone():
                self.vanish("the connection ended without a good-bye")
            else:
                # less than a parking lot: it is what a keepalive costs a simulation most
                assert self._receiver is None, "one task receives at a time"
                self._receiver = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._stop_receiving)
        frame = self._arrived.popleft()
        if frame is None:
            self.vanish("it was closed by the other end")
            raise LinkClosed("it was closed by the other end")
        self._waiting_bytes -= len(frame)
        self.peer.wake_senders()
        self.statistics.frames_received += 1
        self.statistics.bytes_received += len(frame)
        self.statistics.bytes_read += len(frame)
        return frame

    async def aclose(self) -> None:
        """Close; see `Link.aclose`. What was sent stays for the other end to take."""
        try:
            await trio.lowlevel.checkpoint()
            if self._closed_why is None:
                self._close("it was closed here")
                self.peer._put(None)
                with trio.move_on_after(CLOSE_SECONDS):
                    while not self._is_peer_closed():
                        await self._senders.park()
        finally:
            self.vanish("it was closed here")

    def vanish(self, why: str) -> None:
        """End at once and without a good-bye; twice is no error. The first reason stays."""
        self._close(why)
        self._is_gone = True
        self._network.forget(self)
        self.peer.wake()

    def wake(self) -> None:
        """Let the tasks at this end look again."""
        self._wake_receiver()
        self.wake_senders()

    def arrive(self, now: float) -> None:
        """Give what has arrived by `now` to the task that receives, unless a cut keeps it."""
        if not self._is_cut:
            while self._on_its_way and self._on_its_way[0][0] <= now:
                self._arrived.append(self._on_its_way.popleft()[1])
            self._wake_receiver()

    def wake_senders(self) -> None:
        """Let the tasks that send or close here look again: there is room."""
        if self._senders:
            self._senders.unpark_all()

    def _stop_receiving(self, raise_cancel: object) -> trio.lowlevel.Abort:
        self._receiver = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_receiver(self) -> None:
        if self._receiver is not None:
            trio.lowlevel.reschedule(self._receiver)
            self._receiver = None

    @property
    def is_open(self) -> bool:
        """Whether it may carry more."""
        return self._closed_why is None

    @property
    def _is_cut(self) -> bool:
        return self._network.is_cut(self.peer.host, self.host)

    def _is_peer_closed(self) -> bool:
        return self.peer._closed_why is not None and not self._is_cut

    def _is_peer_gone(self) -> bool:
        return self.peer._is_gone and not self._is_cut

    def _check_open(self) -> None:
        if self._closed_why is not None:
            raise LinkClosed(self._closed_why)

    def _check_can_send(self) -> None:
        self._check_open()
        if self._is_peer_gone():
            raise LinkClosed("the other end is gone")

    def _close(self, why: str) -> None:
        if self._closed_why is None:
            self._closed_why = why
        self._lose()
        self.wake()

    def _lose(self) -> None:
        self._on_its_way.clear()
        self._arrived.clear()
        self._waiting_bytes = 0

    def _has_room(self, size: int) -> bool:
        settings = self._network.settings
        waiting = len(self._on_its_way) + len(self._arrived)
        fits = not waiting or self._waiting_bytes + size <= settings.buffer_bytes
        return fits and waiting < settings.buffer_frames

    def _put(self, frame: bytes | None) -> None:
        """Let a frame travel to this end. It does not overtake those before it."""
        if self._closed_why is not None:
            return  # nobody here wants it any more
        self._last_arrival = max(self._last_arrival, self._network.arrival())
        self._on_its_way.append((self._last_arrival, frame))
        self._waiting_bytes += len(frame or b"")
        self._network.expect(self._last_arrival, self)


class MemoryListener:
    """A bound port of a host. See `Listener` for the contract."""

    def __init__(self, network: MemoryNetwork, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._network = network
        self._offer, self._offered = trio.open_memory_channel[tuple[MemoryLink, trio.Event]](OPENINGS_AT_ONCE)
        self._accepting = trio.CancelScope()

    dropped = 0
    """Nobody says anything else than frames here."""

    @property
    def addresses(self) -> list[str]:
        """The one address."""
        return [join_address(self.host, self.port)]

    async def serve(self, accept: Accept) -> None:
        """Accept links; see `Listener.serve`. After `aclose`, returns when the last link is done."""

        async with trio.open_nursery() as links:
            with self._accepting:
                async for link, answered in self._offered:
                    links.start_soon(serve_link, link, accept)
                    answered.set()

    async def aclose(self) -> None:
        """Stop listening; see `Listener.aclose`. Open links stay open."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Free the port and refuse who waits; twice is no error."""
        self._network.unbind(self)
        self._accepting.cancel()
        with suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            while True:
                link, answered = self._offered.receive_nowait()
                link.vanish("refused")
                answered.set()
        self._offered.close()

    async def connect(self, link: MemoryLink) -> bool:
        """Offer the far end of a link; tell whether it was accepted."""
        answered = trio.Event()
        try:
            await self._offer.send((link, answered))
        except trio.BrokenResourceError:
            return False
        await answered.wait()
        return link.is_open


class MemoryCarrier:
    """What one host listens and dials with. Made by `MemoryNetwork.carrier`."""

    def __init__(self, network: MemoryNetwork, host: str) -> None:
        self._network = network
        self._host = host
        self._is_over = False

    def end(self) -> None:
        """Open nothing from now on: the process that has this carrier is gone, though its tasks still end."""
        self._is_over = True

    async def listen(self, host: str, port: int) -> MemoryListener:
        """Bind; see `Carrier.listen`.

        Args:
            host: the host of this carrier; "", "::" and "0.0.0.0" mean the same.
            port: 0 takes a free one.
        """
        await trio.lowlevel.checkpoint()
        if host not in (self._host, "", "::", "0.0.0.0"):
            raise KnodeError(
                Code.INVALID_ARGUMENT,
                f"cannot listen on {host!r}: this host is {self._host!r}",
                "choose that",
            )
        return self._network.bind(self._host, port)

    def dials(self, address: str) -> bool:
        """Whether it dials such addresses; see `Carrier.dials`."""
        return is_host_and_port(address)

    async def dial(self, address: str) -> MemoryLink:
        """Open a link; see `Carrier.dial`. Takes a round trip, and cut off, all of the 10 seconds."""
        try:
            host, port = split_address(address)
            with trio.fail_after(OPENING_SECONDS):
                self._check_alive()
                link = await self._network.connect(self._host, host, port)
                try:
                    self._check_alive()
                except LinkClosed as error:
                    link.vanish(str(error))
                    raise
                return link
        except (ValueError, LinkClosed) as error:
            raise KnodeError(Code.UNAVAILABLE, f"no link to {address}: {error}") from error
        except trio.TooSlowError as error:
            raise KnodeError(
                Code.UNAVAILABLE, f"no link to {address}: no answer within {OPENING_SECONDS} seconds"
            ) from error

    def _check_alive(self) -> None:
        if self._is_over:
            raise LinkClosed("the process that dialled is gone")


class MemoryNetwork:
    """Hosts, and what lies between them.

    The same randomness, settings and calls give the same network: every frame the same delay.
    """

    def __init__(self, randomness: Randomness, settings: MemorySettings | None = None) -> None:
        self.settings = settings or MemorySettings()
        self._randomness = randomness
        self._listeners: dict[tuple[str, int], MemoryListener] = {}
        self._next_free_port = _FIRST_FREE_PORT
        # ends by the order of their making: whoever is iterated must not be ordered by id
        self._links: dict[int, MemoryLink] = {}
        self._links_made = 0
        self._cuts: set[tuple[str, str]] = set()  # source, destination
        self._healed = trio.Event()
        # who receives something when; the times are also a heap
        self._arrivals: dict[float, list[MemoryLink]] = {}
        self._times: list[float] = []
        self._alarm: trio.CancelScope | None = None

    def carrier(self, host: str) -> MemoryCarrier:
        """Return what `host` listens and dials with."""
        return MemoryCarrier(self, host)

    def cut(self, a: str, b: str) -> None:
        """Let nothing pass between two hosts: frames stall, and dials time out."""
        self.cut_way(a, b)
        self.cut_way(b, a)

    def heal(self, a: str, b: str) -> None:
        """Undo a cut. What stalled arrives now."""
        self.heal_way(a, b)
        self.heal_way(b, a)

    def cut_way(self, source: str, destination: str) -> None:
        """Let nothing pass from one host to the other, and all that goes back."""
        self._cuts.add((source, destination))

    def heal_way(self, source: str, destination: str) -> None:
        """Undo a cut of one way. What stalled arrives now."""
        self._cuts.discard((source, destination))
        self._healed.set()
        self._healed = trio.Event()
        for link in list(self._links.values()):
            link.arrive(trio.current_time())
            link.wake()

    def is_cut(self, source: str, destination: str) -> bool:
        """Tell whether nothing passes from one host to the other."""
        return bool(self._cuts) and (source, destination) in self._cuts

    def break_links(self, host: str) -> None:
        """Do what a crash of `host` does: its links end without a good-bye, and its ports are free.

        Who is cut off from it learns of that after the cut.
        """
        for listener in [each for each in self._listeners.values() if each.host == host]:
            listener.close()
        for link in [each for each in self._links.values() if each.host == host]:
            link.vanish("its host crashed")

    # what links and carriers of this network use

    def bind(self, host: str, port: int) -> MemoryListener:
        """Give a host a listener. Raises KnodeError: PORT_IN_USE."""
        if (host, port) in self._listeners:
            raise KnodeError(
                Code.PORT_IN_USE, f"another program listens on port {port} of {host}", "choose another port"
            )
        listener = MemoryListener(self, host, port or self._free_port())
        self._listeners[host, listener.port] = listener
        return listener

    def unbind(self, listener: MemoryListener) -> None:
        """Free the port of a listener; twice is no error."""
        if self._listeners.get((listener.host, listener.port)) is listener:
            del self._listeners[listener.host, listener.port]

    async def connect(self, dialler: str, host: str, port: int) -> MemoryLink:
        """Return the near end of a new link. Raises LinkClosed when nobody takes the far one."""
        for way in ((dialler, host), (host, dialler)):  # there and back
            await trio.sleep(self._delay())
            while self.is_cut(*way):
                await self._healed.wait()
        listener = self._listeners.get((host, port))
        if listener is None:
            raise LinkClosed("nobody listens there")
        binding = self._randomness.token(_BINDING_BYTES)
        near = self._end(dialler, join_address(host, port), binding)
        far = self._end(host, join_address(dialler, self._free_port()), binding)
        near.peer, far.peer = far, near
        try:
            if not await listener.connect(far):
                raise LinkClosed("refused")
        except BaseException:
            near.vanish("it was never opened")
            raise
        return near

    def forget(self, link: MemoryLink) -> None:
        """Drop an end that is gone; twice is no error."""
        self._links.pop(link.number, None)

    def draw(self, probability: float) -> bool:
        """Tell whether something of that probability happens."""
        return probability > 0 and self._randomness.uniform(0, 1) < probability

    def arrival(self) -> float:
        """Return when a frame that is sent now arrives, on trio's clock."""
        time = trio.current_time() + self._delay()
        while self.draw(self.settings.loss):
            time += self.settings.retransmission_seconds
        grain = self.settings.grain_seconds
        return ceil(time / grain) * grain if grain else time

    def expect(self, time: float, link: MemoryLink) -> None:
        """Let what is on its way to `link` arrive at `time`, on trio's clock."""
        receivers = self._arrivals.get(time)
        if receivers is not None:
            receivers.append(link)
            return
        self._arrivals[time] = [link]
        heappush(self._times, time)
        if self._alarm is None:
            self._alarm = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._deliver)
        self._alarm.deadline = self._times[0]

    async def _deliver(self) -> None:
        """Let everything arrive in time, for as long as trio runs."""
        while True:
            with trio.CancelScope(deadline=self._times[0] if self._times else inf) as self._alarm:
                await trio.sleep_forever()
            now = trio.current_time()
            while self._times and self._times[0] <= now:
                for link in self._arrivals.pop(heappop(self._times)):
                    link.arrive(now)

    def _delay(self) -> float:
        return self._randomness.uniform(*self.settings.delay_seconds)

    def _end(self, host: str, remote_address: str, binding: bytes) -> MemoryLink:
        self._links_made += 1
        link = MemoryLink(self, self._links_made, host, remote_address, binding)
        self._links[link.number] = link
        return link

    def _free_port(self) -> int:
        port = self._next_free_port
        self._next_free_port = port + 1 if port < 65535 else _FIRST_FREE_PORT
        return port
