"""One daemon as a real process, and what strangers and a rogue member do to it over real sockets.

Whatever they do: the daemon answers, its memory, descriptors and tasks stay bounded and come back, what is
turned away is counted.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from real_processes import PATIENCE_S, Process, kill_daemons, until
from rogue import Rogue, body, daemon_of
from stranger import Stranger

from knode.cli.daemon import answering
from knode.control.client import Client
from knode.errors import Code, KnodeError
from knode.home.layout import Home
from knode.identity import KeyPair
from knode.klp.limits import MAX_STREAMS
from knode.klp.messages import Cancel, Context, Event, Failure, Response
from knode.mesh.peers import CONVERSATIONS_A_PEER, JOINING_AT_ONCE
from knode.mesh.serving import PROGRESS_TOPIC, SERVED_A_PEER
from knode.mesh.ticket import parse_ticket
from knode.node import initialise
from knode.transport import Carrier, LinkClosed
from knode.transport.openings import OPENINGS_AT_ONCE
from knode.transport.quic import QuicCarrier
from knode.transport.websocket import WebSocketCarrier
from knode.world import SilentLog

FLAGS = {
    "node.host": "127.0.0.1",
    "node.port": "0",
    "discovery.mdns": "false",
    "discovery.libp2p": "false",
    "sandbox.prefer": "none",
}
MIB = 2**20
_numbers = itertools.count(1)
SLACK = 12
"""Descriptors and tasks that come and go on their own."""


@dataclass
class Daemon:
    """A daemon, alone in its cell but for those who joined by hand."""

    home: Home
    client: Client

    def call(self, method: str, **params: Any) -> Any:
        return self.client.call(method, params, silence_s=PATIENCE_S)

    @property
    def status(self) -> Any:
        return self.call("status")

    @property
    def process(self) -> dict[str, int]:
        taken: dict[str, int] = self.status["process"]
        return taken

    @property
    def ticket(self) -> str:
        return str(self.call("invite")["ticket"])

    def works(self) -> None:
        """See that it still does what it is for."""
        task = self.call("task.submit", agent="kExecutor:text", input="a b", direct=True, wait=True)
        assert task["result"]["total"]["words"] == 2

    def counted(self, code: Code, *, where: str = "refusals") -> int:
        return int(self.status[where].get(code, 0))

    def settles(self, before: dict[str, int]) -> None:
        """Wait until it takes about what it took before."""
        now = self.process
        names = ("descriptors", "tasks")
        until(lambda: now.update(self.process) or all(now[name] <= before[name] + SLACK for name in names))
        assert now["resident_bytes"] - before["resident_bytes"] < 64 * MIB


def start(home: Home, descriptors: int = 1024) -> Process:
    environment = {key: text for key, text in os.environ.items() if not key.startswith(("KNODE_", "XDG_"))}
    return Process(
        [sys.executable, "-m", "knode", "up", "--home", str(home.path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors)),
    )


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    home = Home(tmp_path_factory.mktemp("hostile") / "home", None)
    initialise(home, name="desk", flags=FLAGS)
    try:
        with start(home), until(lambda: answering(home)) as client:
            yield Daemon(home, client)
    finally:
        kill_daemons(home.path)


@pytest.fixture(params=[WebSocketCarrier, QuicCarrier], ids=["websocket", "quic"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return request.param(Path("dials only"), SilentLog())


async def blocking(work: Callable[[], Any]) -> Any:
    """Ask the daemon without holding up the tasks of the test."""
    return await trio.to_thread.run_sync(work)


async def ended(stranger: Stranger) -> KnodeError | LinkClosed:
    """Read until the daemon ends the session, and say how."""
    with trio.fail_after(PATIENCE_S):
        try:
            while True:
                await stranger.hear()
        except (KnodeError, LinkClosed) as end:
            return end


async def test_a_flood_of_silent_connections_holds_few_of_them(daemon: Daemon) -> None:
    before, dropped = daemon.process, daemon.status["dropped"]
    port = int(parse_ticket(daemon.ticket).addresses[0].rpartition(":")[2])
    flood = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(400)]
    await blocking(lambda: until(lambda: daemon.status["dropped"] - dropped >= 400 - OPENINGS_AT_ONCE))
    assert daemon.process["descriptors"] <= before["descriptors"] + OPENINGS_AT_ONCE + SLACK
    daemon.works()
    for stream in flood:
        await trio.aclose_forcefully(stream)
    await blocking(partial(daemon.settles, before))
    assert daemon.status["dropped"] - dropped == 400


async def test_a_flood_of_datagrams_of_noise_changes_nothing(daemon: Daemon) -> None:
    before, noise = daemon.process, random.Random(7)
    port = int(parse_ticket(daemon.ticket).addresses[0].rpartition(":")[2])
    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as udp:
        for number in range(10_000):
            first = bytes([noise.choice((0x00, 0x40, 0xC0, 0xFF))])  # short, long, or none of QUIC's headers
            await udp.sendto(first + noise.randbytes(noise.choice((0, 20, 1200))), ("127.0.0.1", port))
            if number % 1000 == 0:
                await blocking(daemon.works)
    await blocking(partial(daemon.settles, before))


@pytest.mark.parametrize("shows", ["no ticket", "a forged ticket"])
async def test_a_flood_of_handshakes_is_refused_one_by_one_and_counted(
    daemon: Daemon, carrier: Carrier, shows: str
) -> None:
    code = Code.UNKNOWN_PEER if shows == "no ticket" else Code.TICKET_INVALID
    ticket = None if shows == "no ticket" else KeyPair(bytes(32))
    target = daemon_of(parse_ticket(daemon.ticket))
    before, count = daemon.process, daemon.counted(code)
    refused: list[Code] = []

    async def knock(number: int) -> None:
        for _ in range(10):
            stranger = Stranger(carrier, KeyPair(number.to_bytes(32)))
            try:
                await stranger.shake_hands(target, ticket=ticket)
            except KnodeError as error:
                refused.append(error.code)
            await stranger.link.aclose()

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(knock, number)
        await blocking(daemon.works)
    assert refused == [code] * 100
    assert daemon.counted(code) - count == 100
    await blocking(partial(daemon.settles, before))
    lines = daemon.home.log_file.read_text().splitlines()
    assert sum("handshake refused" in line for line in lines) < 10


async def test_a_ticket_that_many_show_takes_a_few_places_and_is_still_good(
    daemon: Daemon, carrier: Carrier
) -> None:
    text = daemon.ticket
    ticket, before, count = parse_ticket(text), daemon.process, daemon.counted(Code.RATE_LIMITED)
    crowd = [Stranger(carrier, KeyPair(number.to_bytes(32))) for number in range(1, JOINING_AT_ONCE + 11)]
    for stranger in crowd:
        await stranger.shake_hands(daemon_of(ticket), ticket=ticket.key)
    await blocking(lambda: until(lambda: daemon.counted(Code.RATE_LIMITED) - count == 10))
    for stranger in crowd:
        await stranger.link.aclose()
    await blocking(partial(daemon.settles, before))
    await Rogue.join(carrier, "honest", text)


@pytest.fixture
async def rogue(daemon: Daemon, carrier: Carrier) -> Rogue:
    return await Rogue.join(carrier, f"rogue-{next(_numbers)}", daemon.ticket)


async def test_a_member_that_opens_links_and_closes_none_holds_few_of_them(
    daemon: Daemon, rogue: Rogue
) -> None:
    before, count = daemon.process, sum(daemon.status["refusals"].values())
    opened = [await rogue.dial() for _ in range(100)]
    most = daemon.process
    assert most["descriptors"] <= before["descriptors"] + 2 * CONVERSATIONS_A_PEER + SLACK
    await blocking(lambda: until(lambda: sum(daemon.status["refusals"].values()) - count >= 90))
    for stranger in opened:
        await stranger.link.aclose()
    await blocking(partial(daemon.settles, before))
    daemon.works()


async def test_a_member_that_floods_with_small_messages_costs_no_memory(daemon: Daemon, rogue: Rogue) -> None:
    stranger = await rogue.open()
    before = daemon.process
    number = 0

    async def drain() -> None:
        with suppress(LinkClosed):
            while True:
                await stranger.hear()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        for round_ in range(150):
            for _ in range(64):
                number += 1
                match round_ % 4:
                    case 0:
                        await stranger.keep_alive(number)
                    case 1:
                        stranger.say_later(Cancel(number))
                    case 2:
                        no_report = Event(PROGRESS_TOPIC, Context(number.to_bytes(16)), b"\xc1 no report")
                        stranger.say_later(no_report)
                    case _:
                        stranger.say_later(Event("no.such.topic", Context(), bytes(64)))
            await stranger.say()
        await blocking(daemon.works)
        nursery.cancel_scope.cancel()
    answer = await stranger.ask(1, "peer.ping", body())
    assert isinstance(answer, Response)
    await stranger.link.aclose()
    await blocking(partial(daemon.settles, before))
    assert daemon.process["resident_bytes"] - before["resident_bytes"] < 16 * MIB


async def test_requests_with_a_millisecond_to_live_end_and_are_counted(daemon: Daemon, rogue: Rogue) -> None:
    stranger = await rogue.open()
    before, counted = daemon.process, sum(daemon.status["failures"].values())
    number, answers = 0, 0
    for _ in range(30):
        for _ in range(SERVED_A_PEER):
            number += 1
            run = body(os.urandom(16), "kExecutor:text", b"a b", (), 300_000)
            stranger.say_later(stranger.request(number, "task.run", run, ttl_ms=1))
        await stranger.say()
        asked = number
        with trio.fail_after(PATIENCE_S):
            while answers < asked:
                answers += sum(isinstance(m, Response | Failure) for m in await stranger.hear())
    await stranger.link.aclose()
    await blocking(partial(daemon.settles, before))
    assert sum(daemon.status["failures"].values()) > counted
    daemon.works()


async def test_streams_that_a_member_opens_and_never_feeds_hold_a_share_and_no_more(
    daemon: Daemon, rogue: Rogue, carrier: Carrier
) -> None:
    before, count = daemon.process, daemon.counted(Code.RATE_LIMITED, where="failures")
    greedy = await rogue.open()
    for number in range(1, MAX_STREAMS + 1):
        stage = body(os.urandom(16), "file", 1000)
        greedy.say_later(
            greedy.request(number, "task.stage", stage, stream=greedy.session.open_stream(), ttl_ms=20_000)
        )
    await greedy.say()
    other = await (await Rogue.join(carrier, f"modest-{next(_numbers)}", daemon.ticket)).open()
    stream = other.session.open_stream()
    await other.say(other.request(1, "task.stage", body(os.urandom(16), "file", 3), stream=stream))
    other.session.write(stream, b"abc")
    other.session.end(stream)
    await other.say()
    answer = await other.answer(1)
    assert isinstance(answer, Response), answer
    refusals = partial(daemon.counted, Code.RATE_LIMITED, where="failures")
    await blocking(lambda: until(lambda: refusals() - count >= MAX_STREAMS // 2))
    for stranger in (greedy, other):
        await stranger.link.aclose()
    await blocking(partial(daemon.settles, before))


async def test_data_that_nobody_reads_is_bounded_by_its_credit(daemon: Daemon, rogue: Rogue) -> None:
    before = daemon.process
    stranger = await rogue.dial()  # its roster is not told, so its requests wait with all that they bring
    for number in range(1, 17):
        stream = stranger.session.open_stream()
        await stranger.say(
            stranger.request(number, "task.stage", body(os.urandom(16), "f", 10), stream=stream)
        )
        while (room := stranger.session.writable(stream)) > 0:
            stranger.session.write(stream, bytes(min(room, 65536)))
            await stranger.say()
    assert daemon.process["resident_bytes"] - before["resident_bytes"] < (16 + 16) * MIB
    await stranger.link.aclose()
    await blocking(partial(daemon.settles, before))


async def test_a_daemon_that_has_no_descriptor_left_lives_and_works_again(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", None)
    await blocking(partial(initialise, home, name="poor", flags=FLAGS))
    try:
        with start(home, descriptors=48) as process, until(lambda: answering(home)) as client:
            poor = Daemon(home, client)
            port = int(parse_ticket(poor.ticket).addresses[0].rpartition(":")[2])
            flood = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(100)]
            await blocking(lambda: until(lambda: poor.process["descriptors"] is None))
            assert poor.status["name"] == "poor"
            for stream in flood:
                await trio.aclose_forcefully(stream)
            await blocking(lambda: until(lambda: (poor.process["descriptors"] or 48) < 40))
            poor.works()
            assert (
                await Rogue.join(WebSocketCarrier(home.certificate, SilentLog()), "late", poor.ticket)
            ).key
            assert process.poll() is None
    finally:
        kill_daemons(home.path)
