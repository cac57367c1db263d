"""Relaying, both sides of it: libp2p specification `circuit-v2`.

A node that nobody can dial keeps a place at a relay: a connection that it opened, and a reservation. Who
wants to reach it asks the relay to join a stream to it with one of theirs; inside, Noise runs end to end, so
the relay passes on what it cannot read. py-libp2p's relay is not used: it knows one circuit a peer, and
the end of one ends another (docs/adr/0013).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import base58
import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, PeerId, Reservation, Status, StopMessage
from multiaddr import Multiaddr

from knode.transport.libp2p_address import PeerAddress, circuit_address
from knode.transport.libp2p_carrier import RelayLimits
from knode.transport.libp2p_connection import Connection, MuxedStream, StreamEnded
from knode.transport.libp2p_host import Host, NotOpened
from knode.transport.libp2p_messages import read_message, write_message
from knode.transport.libp2p_raw import RawBytes
from knode.world import Log, World

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
MESSAGE_BYTES = 4096
"""Of one message between a relay and its peers, at most (the specification)."""
ASK_SECONDS = 10
PASSED_ON_BYTES = 64 * 1024
CIRCUIT_ADDRESSES = 4
"""How many of a relay's own addresses are told for one peer behind it."""
BACKOFF_FIRST_S = 2.0
BACKOFF_LONGEST_S = 120.0
RESERVATION_SHORTEST_S = 60
RESERVATION_LONGEST_S = 3600


class RelayServer:
    """The relay that this node is for others.

    Args:
        world: its clock says when a reservation ends.
        host: whose peers it joins.
        addresses: the multiaddrs at which others can dial this node now.
        may_reserve: whether a place may be given to a PeerId.
        limits: what it gives.
    """

    def __init__(
        self,
        world: World,
        host: Host,
        addresses: Callable[[], Sequence[str]],
        may_reserve: Callable[[str], bool],
        limits: RelayLimits,
    ) -> None:
        self.counters: Counter[str] = Counter()
        """What was refused, by the status that said so, and `circuits` that were made."""
        self._world = world
        self._host = host
        self._addresses = addresses
        self._may_reserve = may_reserve
        self._limits = limits
        self._places: dict[str, _Place] = {}
        self._circuits: Counter[str] = Counter()
        """How many lead to each peer now."""
        host.handlers[HOP] = self._hop

    def addresses_of(self, peer_id: str) -> list[str]:
        """Return the multiaddrs at which others reach a peer through this relay; none without a place."""
        place = self._places.get(peer_id)
        if place is None or place.is_over:
            return []
        return [circuit_address(relay, peer_id) for relay in self._own_addresses()][:CIRCUIT_ADDRESSES]

    def _own_addresses(self) -> list[str]:
        return [each for each in self._addresses() if "/p2p-circuit" not in each]

    async def _hop(self, stream: MuxedStream) -> None:
        try:
            with trio.fail_after(ASK_SECONDS):
                message = await read_message(stream, HopMessage, MESSAGE_BYTES)
            if stream.connection.relayed:
                raise _Refused(Status.PERMISSION_DENIED)
            match message.type:
                case HopMessage.RESERVE:
                    await self._reserve(stream)
                case HopMessage.CONNECT:
                    await self._connect(stream, base58.b58encode(message.peer.id).decode())
                case _:
                    raise _Refused(Status.UNEXPECTED_MESSAGE)
        except _Refused as refused:
            self.counters[Status.Name(refused.status)] += 1
            with trio.fail_after(ASK_SECONDS):
                await write_message(stream, HopMessage(type=HopMessage.STATUS, status=refused.status))
            stream.finish()

    async def _reserve(self, stream: MuxedStream) -> None:
        connection = stream.connection
        if not self._may_reserve(connection.peer_id):
            raise _Refused(Status.PERMISSION_DENIED)
        for peer_id in [peer_id for peer_id, place in self._places.items() if place.is_over]:
            self._give_up(peer_id)
        if connection.peer_id not in self._places and len(self._places) >= self._limits.reservations:
            raise _Refused(Status.RESERVATION_REFUSED)
        self._give_up(connection.peer_id)
        self._host.use(connection)
        lasts_s = self._limits.reservation_seconds
        self._places[connection.peer_id] = _Place(connection, trio.current_time() + lasts_s)
        reservation = Reservation(
            expire=self._world.clock.wall() // 1000 + lasts_s,
            addrs=[Multiaddr(each).to_bytes() for each in self._own_addresses()],
        )
        with trio.fail_after(ASK_SECONDS):
            await write_message(
                stream,
                HopMessage(
                    type=HopMessage.STATUS, status=Status.OK, reservation=reservation, limit=self._limit()
                ),
            )
        stream.finish()

    async def _connect(self, stream: MuxedStream, peer_id: str) -> None:
        place = self._places.get(peer_id)
        if place is None or place.is_over:
            self._give_up(peer_id)
            raise _Refused(Status.NO_RESERVATION)
        # Strangers, who may be joining, leave half of them to the others.
        share = 1 if self._may_reserve(stream.connection.peer_id) else 2
        if (
            self._circuits[peer_id] >= self._limits.circuits_a_place // share
            or self._circuits.total() >= self._limits.circuits // share
        ):
            raise _Refused(Status.RESOURCE_LIMIT_EXCEEDED)
        self._circuits[peer_id] += 1
        self._host.use(stream.connection)
        try:
            try:
                with trio.fail_after(ASK_SECONDS):
                    far = await self._stop(place.connection, stream.connection.peer_id)
            except (NotOpened, StreamEnded, trio.TooSlowError, ValueError) as error:
                raise _Refused(Status.CONNECTION_FAILED) from error
            try:
                with trio.fail_after(ASK_SECONDS):
                    made = HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=self._limit())
                    await write_message(stream, made)
                self.counters["circuits"] += 1
                await self._pass_on(stream, far)
            finally:
                far.abort()
                stream.abort()
        finally:
            self._host.release(stream.connection)
            self._circuits[peer_id] -= 1
            if not self._circuits[peer_id]:
                del self._circuits[peer_id]

    async def _stop(self, connection: Connection, source: str) -> MuxedStream:
        """Ask the peer with a place to take a circuit from `source`."""
        far = await self._host.open_stream(connection, STOP)
        try:
            peer = PeerId(id=base58.b58decode(source))
            await write_message(far, StopMessage(type=StopMessage.CONNECT, peer=peer, limit=self._limit()))
            answer = await read_message(far, StopMessage, MESSAGE_BYTES)
            if answer.type != StopMessage.STATUS or answer.status != Status.OK:
                raise NotOpened(f"status {answer.status}")
        except BaseException:
            far.abort()
            raise
        return far

    async def _pass_on(self, near: MuxedStream, far: MuxedStream) -> None:
        """Pass bytes both ways until both ends have finished, one breaks off, or a limit is reached."""
        left_bytes = self._limits.data_bytes

        async def one_way(source: MuxedStream, sink: MuxedStream) -> None:
            nonlocal left_bytes
            try:
                while left_bytes > 0:
                    data = await source.read(PASSED_ON_BYTES)
                    left_bytes -= len(data)
                    if left_bytes >= 0:
                        await sink.write(data)
                self.counters["data limit"] += 1
            except StreamEnded as ended:
                if ended.in_order:
                    sink.finish()
                    return
            nursery.cancel_scope.cancel()

        with trio.move_on_after(self._limits.seconds) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one_way, near, far)
                nursery.start_soon(one_way, far, near)
        if scope.cancelled_caught:
            self.counters["time limit"] += 1

    def _limit(self) -> Limit:
        return Limit(duration=self._limits.seconds, data=self._limits.data_bytes)

    def _give_up(self, peer_id: str) -> None:
        place = self._places.pop(peer_id, None)
        if place is not None:
            self._host.release(place.connection)


class _Refused(Exception):
    def __init__(self, status: Status.ValueType) -> None:
        super().__init__(Status.Name(status))
        self.status = status


@dataclass(frozen=True, slots=True)
class _Place:
    connection: Connection
    ends_at: float

    @property
    def is_over(self) -> bool:
        return self.connection.ended_why is not None or trio.current_time() > self.ends_at


class RelayClient:
    """This node's places at relays, and its ways through them.

    Args:
        world: its clock and randomness.
        host: this node among libp2p's peers.
        relays: where it keeps places.
        log: told when a place is got and lost.
    """

    def __init__(self, world: World, host: Host, relays: Sequence[PeerAddress], log: Log) -> None:
        self._world = world
        self._host = host
        self._relays = relays
        self._log = log
        self._reserved: dict[Connection, str] = {}
        """The connections to relays where it has a place now, with its address there."""
        if relays:
            host.handlers[STOP] = self._stopped

    @property
    def addresses(self) -> list[str]:
        """The multiaddrs at which others reach this node through its relays."""
        return list(self._reserved.values())

    async def run(self) -> None:
        """Keep the places until cancelled."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(self._keep_place, relay)

    async def dial(self, address: PeerAddress) -> Connection:
        """Open a connection to a peer behind a relay.

        Raises:
            NotOpened: with why. The caller sets the deadline.
        """
        assert address.behind is not None
        relay = await self._host.reach(address)
        self._host.use(relay)
        try:
            stream = await self._host.open_stream(relay, HOP)
            try:
                peer = PeerId(id=base58.b58decode(address.behind))
                await self._ask(stream, HopMessage(type=HopMessage.CONNECT, peer=peer))
            except BaseException:
                stream.abort()
                raise
            return await self._host.dial_over(_raw_of(stream), address.behind, str(address), relayed=True)
        finally:
            self._host.release(relay)

    async def _keep_place(self, relay: PeerAddress) -> None:
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                with trio.fail_after(ASK_SECONDS):
                    connection = await self._host.reach(relay)
                    lasts_s = await self._reserve(connection)
            except (NotOpened, trio.TooSlowError) as error:
                why = str(error) or f"no answer within {ASK_SECONDS} seconds"
                self._log.warning("no place at the relay", relay=str(relay), why=why)
                await trio.sleep(backoff_s * self._world.randomness.uniform(0.5, 1.5))
                backoff_s = min(BACKOFF_LONGEST_S, 2 * backoff_s)
                continue
            backoff_s = BACKOFF_FIRST_S
            address = circuit_address(str(relay), self._host.node_id)
            self._log.info("a place at the relay", address=address)
            self._reserved[connection] = address
            self._host.use(connection)
            try:
                await self._renew(connection, lasts_s)
            finally:
                self._host.release(connection)
                del self._reserved[connection]

    async def _renew(self, connection: Connection, lasts_s: float) -> None:
        """Ask for the place again, well before it ends, until that fails or the connection ends."""
        while True:
            with trio.move_on_after(lasts_s / 2):
                while connection.ended_why is None:
                    await connection.changed.wait()
                return
            try:
                with trio.fail_after(ASK_SECONDS):
                    lasts_s = await self._reserve(connection)
            except (NotOpened, trio.TooSlowError):
                connection.abort()
                return

    async def _reserve(self, connection: Connection) -> float:
        """Ask for a place; return for how many seconds it was given."""
        stream = await self._host.open_stream(connection, HOP)
        try:
            answer = await self._ask(stream, HopMessage(type=HopMessage.RESERVE))
        finally:
            stream.abort()
        lasts_s = answer.reservation.expire - self._world.clock.wall() // 1000
        return min(max(lasts_s, RESERVATION_SHORTEST_S), RESERVATION_LONGEST_S)  # the clocks may differ

    async def _ask(self, stream: MuxedStream, question: HopMessage) -> HopMessage:
        try:
            await write_message(stream, question)
            answer = await read_message(stream, HopMessage, MESSAGE_BYTES)
        except (StreamEnded, ValueError) as error:
            raise NotOpened(f"the relay does not answer ({error})") from error
        if answer.type != HopMessage.STATUS or answer.status != Status.OK:
            name = Status.Name(answer.status) if answer.status in Status.values() else str(answer.status)
            raise NotOpened(f"the relay refuses: {name}")
        return answer

    async def _stopped(self, stream: MuxedStream) -> None:
        """Take a circuit from the relay: the peer at its other end dialled this node."""
        if stream.connection not in self._reserved:
            raise NotOpened("no place was asked for there")
        with trio.fail_after(ASK_SECONDS):
            message = await read_message(stream, StopMessage, MESSAGE_BYTES)
            if message.type != StopMessage.CONNECT:
                raise NotOpened("no circuit")
            await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Status.OK))
        await self._host.accept_circuit(_raw_of(stream), stream.connection.remote_address)


def _raw_of(stream: MuxedStream) -> RawBytes:
    async def receive(most_bytes: int) -> bytes:
        try:
            return await stream.read(most_bytes)
        except StreamEnded as ended:
            if ended.in_order:
                return b""
            raise

    return RawBytes(receive, stream.write, stream.abort)
