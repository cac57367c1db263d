"""Two ends with fixed keys and nonces, and the little that the tests do with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from knode.identity import KeyPair
from knode.klp import Context, Established, Hello, Initiator, Introduction, Request, Responder, Session


def seed(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


ALICE = KeyPair(seed("alice"))
BOB = KeyPair(seed("bob"))
MALLORY = KeyPair(seed("mallory"))
CELL = seed("cell")
CHANNEL = seed("channel")
ALICE_BOOT = seed("alice boot")[:16]
BOB_BOOT = seed("bob boot")[:16]
ALICE_SAYS = Introduction(CELL, ALICE_BOOT, seed("roster"))
BOB_SAYS = Introduction(CELL, BOB_BOOT, seed("roster"))


def admit_all(hello: Hello) -> None:
    """A roster that everyone is in."""


def initiator(
    key: KeyPair = ALICE,
    says: Introduction = ALICE_SAYS,
    *,
    expected: KeyPair = BOB,
    channel: bytes = CHANNEL,
    ticket: KeyPair | None = None,
) -> Initiator:
    return Initiator(
        key,
        says,
        expected_peer=expected.public,
        channel_binding=channel,
        nonce=seed("nonce of the initiator"),
        ticket=ticket,
    )


def responder(
    key: KeyPair = BOB,
    says: Introduction = BOB_SAYS,
    *,
    admit: Callable[[Hello], None] = admit_all,
    channel: bytes = CHANNEL,
) -> Responder:
    return Responder(key, says, admit=admit, channel_binding=channel, nonce=seed("nonce of the responder"))


def shake(a: Initiator, b: Responder) -> tuple[Established, Established]:
    proof, of_a = a.receive(b.receive_hello(a.hello()))
    return of_a, b.receive_auth(proof)


def sessions() -> tuple[Session, Session]:
    of_a, of_b = shake(initiator(), responder())
    return Session(ALICE, of_a), Session(BOB, of_b)


def request(counter: int = 1, *, stream: int = 0, body: bytes = b"", ttl_ms: int = 1000) -> Request:
    return Request(counter, BOB_BOOT, "test", ttl_ms, stream, Context(), body)


def frames_of(session: Session) -> list[bytes]:
    frames = []
    while (frame := session.next_frame()) is not None:
        frames.append(frame)
    return frames


def deliver(source: Session, destination: Session) -> list[object]:
    return [item for frame in frames_of(source) for item in destination.receive(frame)]
