"""What KLP costs: bundles beside single signatures, and a request with its answer beside bare signatures."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial
from statistics import median

from benchmarks.report import ROUNDS, Row
from knode.identity import KeyPair
from knode.klp import Context, Initiator, Introduction, Request, Responder, Response, Session
from knode.klp.limits import MAX_BUNDLE_MESSAGES

MESSAGES = 16 * MAX_BUNDLE_MESSAGES
EXCHANGES = 500
BODY = bytes(200)
_BOOT = bytes(16)
_HASH = bytes(32)


def run() -> list[Row]:
    """Measure each figure and its floor in turn."""
    initiator, responder = KeyPair(_seed("initiator")), KeyPair(_seed("responder"))
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        a, b = _sessions(initiator, responder)
        one_by_one = [_bundle_of(a, 1) for _ in range(MESSAGES)]
        seconds.setdefault("one by one", []).append(_seconds(partial(_receive, b, one_by_one)))
        a, b = _sessions(initiator, responder)
        bundled = [_bundle_of(a, MAX_BUNDLE_MESSAGES) for _ in range(MESSAGES // MAX_BUNDLE_MESSAGES)]
        seconds.setdefault("bundled", []).append(_seconds(partial(_receive, b, bundled)))
        seconds.setdefault("signatures", []).append(_seconds(partial(_bare_signatures, initiator)))
        a, b = _sessions(initiator, responder)
        seconds.setdefault("exchange", []).append(_seconds(partial(_exchange, a, b)))
    single, bundle = (median(seconds[name]) / MESSAGES for name in ("one by one", "bundled"))
    floor, exchange = (median(seconds[name]) / EXCHANGES for name in ("signatures", "exchange"))
    return [
        Row(
            name=f"KLP: receive a message, {MAX_BUNDLE_MESSAGES} under one signature",
            figure=f"{bundle * 1e6:.2f} us",
            floor=f"{single * 1e6:.1f} us, each signed",
            ratio=single / bundle,
            target="at least 20",
            met=single / bundle >= 20,
        ),
        Row(
            name="KLP: request and answer over two sessions, without a link",
            figure=f"{exchange * 1e6:.0f} us",
            floor=f"{floor * 1e6:.0f} us, 2 signatures and 2 verifications",
            ratio=exchange / floor,
            target="at most 1.25",
            met=exchange / floor <= 1.25,
        ),
    ]


def _seed(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _sessions(initiator: KeyPair, responder: KeyPair) -> tuple[Session, Session]:
    says = Introduction(cell_id=_HASH, boot=_BOOT, roster_digest=_HASH)
    a = Initiator(initiator, says, expected_peer=responder.public, channel_binding=_HASH, nonce=_seed("a"))
    b = Responder(responder, says, admit=lambda hello: None, channel_binding=_HASH, nonce=_seed("b"))
    proof, of_a = a.receive(b.receive_hello(a.hello()))
    return Session(initiator, of_a), Session(responder, b.receive_auth(proof))


def _request(counter: int) -> Request:
    return Request(counter, _BOOT, "benchmark", 1000, 0, Context(), BODY)


def _bundle_of(session: Session, count: int) -> bytes:
    for counter in range(1, count + 1):
        session.send(_request(counter))
    return _frame(session)


def _frame(session: Session) -> bytes:
    frame = session.next_frame()
    assert frame is not None, "something was sent"
    return frame


def _receive(session: Session, frames: list[bytes]) -> None:
    for frame in frames:
        session.receive(frame)


def _exchange(a: Session, b: Session) -> None:
    for counter in range(1, EXCHANGES + 1):
        a.send(_request(counter))
        b.receive(_frame(a))
        b.send(Response(counter, BODY))
        a.receive(_frame(b))
        a.acknowledge(counter)


def _bare_signatures(key: KeyPair) -> None:
    # as many bytes as the bundles of an exchange have
    for _ in range(EXCHANGES):
        for data in (bytes(360), bytes(320)):
            key.public.verifies(key.sign(data), data)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
