"""Multicast DNS between network namespaces: with itself, with libp2p's browser, and where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from local_network import LIBP2P_BROWSER, LocalNetwork, line, local_network
from real_processes import Process

from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.mesh.announcement import write_announcement
from knode.transport.mdns import MulticastDns

NODE = KeyPair(bytes(32)).public.node_id
TEXT = write_announcement(NODE, ("10.99.0.1:4747", f"/ip4/10.99.0.1/tcp/4748/p2p/{NODE}"))
OTHER = KeyPair(bytes([1]) * 32).public.node_id

SPEAKER = """
import sys, trio
from knode.errors import KnodeError
from knode.transport.mdns import MulticastDns

name, text, *hosts = sys.argv[1:]

async def main():
    try:
        await MulticastDns(name * 32).run(
            bytes.fromhex(text), hosts, 4747, lambda heard: print("heard", heard.hex(), flush=True)
        )
    except* KnodeError as group:
        print("failed", group.exceptions[0].code, flush=True)

trio.run(main)
"""

WITHOUT_DESCRIPTORS = """
import resource, trio
from knode.errors import KnodeError
from knode.transport.mdns import MulticastDns

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    try:
        await MulticastDns("a" * 32).run(b"", ["127.0.0.1"], 4747, print)
    except KnodeError as error:
        print("failed", error.code, flush=True)

trio.run(main)
"""

PORT_TAKER = """
import socket, time
taker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
taker.bind(("", 5353))
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture
def network() -> Iterator[LocalNetwork]:
    with local_network() as made:
        yield made


def hears(process: Process, *texts: bytes) -> bool:
    """Wait until a speaker has heard all these texts, and nothing else."""
    missing = set(texts)
    while missing:
        word, text = line(process)
        assert word == "heard"
        assert bytes.fromhex(text) in texts
        missing.discard(bytes.fromhex(text))
    return True


def test_two_machines_hear_each_other_and_themselves_over_both_kinds_of_ip(network: LocalNetwork) -> None:
    first = network.machine("10.99.0.1/24", "fd99::1/64", "fd99::11/64")
    second = network.machine("10.99.0.2/24", "fd99::2/64")
    other = write_announcement(OTHER, ("10.99.0.2:4747",))
    with (
        network.start(first, SPEAKER, "a", TEXT.hex(), "10.99.0.1", "fd99::1", "fd99::11") as a,
        network.start(second, SPEAKER, "b", other.hex(), "10.99.0.2", "fd99::2") as b,
    ):
        assert hears(a, TEXT, other)
        assert hears(b, TEXT, other)


def test_machines_with_ipv6_alone_hear_each_other(network: LocalNetwork) -> None:
    first, second = network.machine("fd99::1/64"), network.machine("fd99::2/64")
    other = write_announcement(OTHER, ("[fd99::2]:4747",))
    with (
        network.start(first, SPEAKER, "a", TEXT.hex(), "fd99::1") as a,
        network.start(second, SPEAKER, "b", other.hex(), "fd99::2") as b,
    ):
        assert hears(a, TEXT, other)
        assert hears(b, TEXT, other)


def test_the_libp2p_library_finds_the_node_at_its_libp2p_address_alone(network: LocalNetwork) -> None:
    first, second = network.machine("10.99.0.1/24"), network.machine("10.99.0.2/24")
    with (
        network.start(first, SPEAKER, "a", TEXT.hex(), "10.99.0.1"),
        network.start(second, LIBP2P_BROWSER) as browser,
    ):
        assert line(browser) == ["found", NODE, "/ip4/10.99.0.1/tcp/4748"]


FLOODER = """
import os, socket, struct, sys, time

def name(text):
    return b"".join(bytes([len(part)]) + part for part in text.encode().split(b".")) + bytes(1)

sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.bind((sys.argv[1], 5353))
sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))
service = name("_p2p._udp.local")
while True:
    instance = name(os.urandom(16).hex() + "._p2p._udp.local")
    text = b"".join(bytes([255]) + os.urandom(255) for _ in range(8))
    pointer = service + struct.pack(">HHIH", 12, 1, 4500, len(instance)) + instance
    record = instance + struct.pack(">HHIH", 16, 0x8001, 4500, len(text)) + text
    sender.sendto(struct.pack(">HHHHHH", 0, 0x8400, 0, 2, 0, 0) + pointer + record, ("224.0.0.251", 5353))
    time.sleep(0.0002)
"""

IMPATIENT_SPEAKER = """
import sys, trio
from knode.transport import mdns

mdns.ASK_AGAIN_S = 1.0
counted = [0]

async def main():
    def heard(text):
        counted[0] += 1

    await mdns.MulticastDns("a" * 32).run(bytes.fromhex(sys.argv[1]), ["10.99.0.1"], 4747, heard)
    print("ended", counted[0] > 256, flush=True)

trio.run(main)
"""


def test_a_flood_of_names_is_forgotten_by_beginning_anew(network: LocalNetwork) -> None:
    first, second = network.machine("10.99.0.1/24"), network.machine("10.99.0.2/24")
    with (
        network.start(first, IMPATIENT_SPEAKER, TEXT.hex()) as speaker,
        network.start(second, FLOODER, "10.99.0.2"),
    ):
        assert line(speaker) == ["ended", "True"]


def test_a_machine_that_cannot_multicast_says_so(network: LocalNetwork) -> None:
    machine = network.machine("10.99.0.1/24")
    with network.start(machine, PORT_TAKER) as taker:
        assert line(taker) == ["taken"]
        with network.start(machine, SPEAKER, "a", TEXT.hex(), "10.99.0.1") as speaker:
            assert line(speaker) == ["failed", "UNAVAILABLE"]
            assert speaker.wait(60) == 0
    with network.start(machine, SPEAKER, "a", TEXT.hex(), "10.99.0.77") as speaker:
        assert line(speaker) == ["failed", "UNAVAILABLE"]


def test_without_a_descriptor_it_cannot_be_done_now() -> None:
    asked = [sys.executable, "-c", WITHOUT_DESCRIPTORS]
    answer = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=60)
    assert answer.stdout.decode().split() == ["failed", Code.UNAVAILABLE]


async def test_what_zeroconf_refuses_is_an_error_of_ours() -> None:
    longer_than_a_label = "\u00e9" * 40
    with pytest.raises(KnodeError, match="Too long"):
        await MulticastDns(longer_than_a_label).run(TEXT, ["127.0.0.1"], 4747, lambda text: None)
