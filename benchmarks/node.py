"""Two real nodes in two processes: request, direct task, start, idle cost.

One is a daemon, started by the command line; the other runs in the measuring process, joined to it by a
ticket, so that the figures are those of the mesh and not of the daemon's socket.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import trio
import trio.testing

from benchmarks.links import _both_servers, _echo_over_tls, _on_stream
from benchmarks.report import ROUNDS, Row
from knode.control.client import Client
from knode.home.configuration import Settings
from knode.home.layout import Home
from knode.identity import KeyPair
from knode.klp.objects import Domain, open_signed, sign
from knode.mesh.ticket import parse_ticket
from knode.node import Machine, Node, initialise, prepare_home
from knode.tasks.direct import Submission
from knode.transport.websocket import WebSocketCarrier
from knode.world import SilentLog
from knode.world.real import real_world

PINGS = 300
TASKS = 200
SIGNATURES = 200
SIGNED_BYTES = 400
IDLE_S = 20.0
READY_WITHIN_S = 1.5
IDLE_PERCENT = 1.0
IDLE_MIB = 90.0
FLAGS = {
    "node.host": "127.0.0.1",
    "node.port": "0",
    "log.level": "warning",
    "discovery.mdns": "false",
    "discovery.libp2p": "false",  # what it takes is measured beside it
}


def run() -> list[Row]:
    """Measure in turn: bare TLS echo, signatures, requests, tasks; then start and idle cost."""
    with tempfile.TemporaryDirectory() as folder, _both_servers() as (tls_port, _):
        home = Home(Path(folder, "daemon"))
        initialise(home, name="daemon", flags=FLAGS)
        with _daemon(home) as (pid, _):
            with Client.connect(home) as client:
                ticket = client.call("invite")["ticket"]
            seconds, idle_percent, idle_mib = trio.run(_measure, Path(folder, "ours"), ticket, tls_port, pid)
        ready = [_ready_s(home) for _ in range(ROUNDS)]
    typical = {name: median(values) for name, values in seconds.items()}
    floor = 2 * typical["tls echo"] + typical["two signatures"]
    return [
        Row(
            "KLP request and answer over WebSocket",
            _microseconds(typical["ping"]),
            f"{_microseconds(floor)} 2 bare TLS echoes + 2 signatures",
            typical["ping"] / floor,
            "at most 1.00",
            typical["ping"] <= floor,
        ),
        Row(
            "direct no-op task, built-in agent",
            _microseconds(typical["task"]),
            f"{_microseconds(typical['ping'])} link round trip",
            typical["task"] / typical["ping"],
            "at most 3.00",
            typical["task"] <= 3 * typical["ping"],
        ),
        Row(
            "daemon answers after its start",
            f"{median(ready):.2f} s",
            "",
            median(ready) / READY_WITHIN_S,
            f"at most {READY_WITHIN_S} s",
            median(ready) <= READY_WITHIN_S,
        ),
        Row(
            "idle node, one peer, processor",
            f"{idle_percent:.2f} %",
            "",
            idle_percent / IDLE_PERCENT,
            f"below {IDLE_PERCENT:g} %",
            idle_percent < IDLE_PERCENT,
        ),
        Row(
            "idle node, one peer, memory",
            f"{idle_mib:.0f} MiB",
            "",
            idle_mib / IDLE_MIB,
            f"at most {IDLE_MIB:g} MiB",
            idle_mib <= IDLE_MIB,
        ),
    ]


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"


async def _measure(
    folder: Path, ticket: str, tls_port: int, daemon_pid: int
) -> tuple[dict[str, list[float]], float, float]:
    world, home = real_world(), Home(folder)
    prepare_home(home, name="ours", flags={})
    settings = Settings()
    carriers = {"websocket": WebSocketCarrier(home.certificate, SilentLog())}
    machine = Machine(os.cpu_count() or 1, lambda: 0, None)
    listening = Settings(node=type(settings.node)(host="127.0.0.1", port=0))
    node = await Node.open(world, home, listening, carriers, machine, SilentLog())
    seconds: dict[str, list[float]] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(node.run)
        await node.join(parse_ticket(ticket), None)
        [peer] = node.peers.members()
        while not node.offers.of(node.membership.roster.find("daemon").key):
            await trio.testing.wait_all_tasks_blocked(0.01)
        for _ in range(ROUNDS):
            seconds.setdefault("tls echo", []).append(await _on_stream(tls_port, _echo_over_tls))
            seconds.setdefault("two signatures", []).append(_two_signatures(node.key))
            times = [await node.pinging.ping(peer) for _ in range(PINGS)]
            seconds.setdefault("ping", []).append(median(t for t in times if t is not None))
            seconds.setdefault("task", []).append(median([await _task(node) for _ in range(TASKS)]))
        before = _processor_s(daemon_pid)
        await trio.sleep(IDLE_S)
        idle_percent = 100 * (_processor_s(daemon_pid) - before) / IDLE_S
        idle_mib = resident_mib(daemon_pid)
        nursery.cancel_scope.cancel()
    return seconds, idle_percent, idle_mib


async def _task(node: Node) -> float:
    started = time.perf_counter()
    task = await node.tasks.submit(Submission(agent="kExecutor:text", input=b"-", on="daemon"))
    await task.ended()
    assert task.output is not None, task.error
    return time.perf_counter() - started


def _two_signatures(key: KeyPair) -> float:
    """Return what signing and verifying a request and its answer cost."""
    body = bytes(SIGNED_BYTES)
    started = time.perf_counter()
    for _ in range(SIGNATURES):
        for _ in ("request", "answer"):
            open_signed(key.public, Domain.BUNDLE, sign(key, Domain.BUNDLE, body))
    return (time.perf_counter() - started) / SIGNATURES


@contextmanager
def _daemon(home: Home) -> Iterator[tuple[int, float]]:
    """Run the daemon of a home; give its process id and how long it took to answer."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "knode", "up", "--home", str(home.path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                with Client.connect(home) as client:
                    client.call("status")
                break
            except Exception:
                if process.poll() is not None or time.perf_counter() - started > 60:
                    raise
                time.sleep(0.01)
        yield process.pid, time.perf_counter() - started
    finally:
        process.terminate()
        process.wait()


def _ready_s(home: Home) -> float:
    with _daemon(home) as (_, seconds):
        return seconds


def resident_mib(pid: int) -> float:
    """Return how much memory a process has resident, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
